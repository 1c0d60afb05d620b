"""Megatron-Core itself loads what is written here, and what it saves is read here: 1 and 2 ranks, gloo."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_dist_tools import bits, same, write
from warm import Warm

from dsv4_bridge.errors import BridgeError
from dsv4_bridge.spec.dtypes import DTYPES
from dsv4_bridge.store.torch_dist import pickle_reader as pickles
from dsv4_bridge.store.torch_dist.frames import COMMON_STATE_KEY, METADATA_JSON
from dsv4_bridge.store.torch_dist.index import METADATA_GLOBALS
from dsv4_bridge.store.torch_dist.reader import open_torch_dist

# One worker of pytest-xdist runs the whole module, so that the fixture is set up once.
pytestmark = pytest.mark.megatron

EXPERTS = 4
MLP = "decoder.layers.0.mlp.experts.experts.linear_fc"

# key -> dtype, global shape, how chunks are cut here (otherwise than any rank asks for them).
TENSORS = {
    "embedding.word_embeddings.weight": ("BF16", (12, 5), [[5], []]),
    "decoder.layers.0.self_attention.linear_proj.weight": ("BF16", (5, 8), [[2], [3]]),
    "decoder.final_layernorm.weight": ("BF16", (5,), [[]]),
    "decoder.hc_head_fn": ("F32", (4, 20), [[], []]),
    "decoder.layers.0.mlp.router.tid2eid": ("I32", (12, 2), [[], []]),
    MLP + "1.weight": ("BF16", (EXPERTS, 8, 5), [[1, 2, 3], [], []]),
    MLP + "2.weight": ("BF16", (EXPERTS, 5, 4), [[1, 2, 3], [], []]),
    "optimizer.state.exp_avg.decoder.final_layernorm.weight": ("F32", (5,), [[]]),
    "optimizer.state.exp_avg." + MLP + "1.weight": ("F32", (EXPERTS, 8, 5), [[2], [4], []]),
}
OBJECTS = (
    "decoder.final_layernorm._extra_state/shard_0_1",
    *(f"{MLP}1._extra_state/shard_{e}_{EXPERTS}" for e in range(EXPERTS)),
)

# A rank of Megatron: cuts as TP (rows, columns), EP with expert-TP, gate and up as two chunks.
WORKER = '''
import sys
import numpy as np
import torch
import torch.distributed as dist

BITS = {"uint16": torch.bfloat16}


def without_strides():
    """megatron-core 0.19.2 passes every attribute of TensorProperties to torch.empty, and torch 2.15 added
    one that it does not take: all strict modes but the default fail, on any checkpoint."""
    from torch.distributed.checkpoint.metadata import TensorProperties

    original = TensorProperties.__setstate__

    def setstate(self, state):
        original(self, state)
        self.__dict__.pop("strides", None)

    TensorProperties.__setstate__ = setstate


def main(rank, world, root, ours):
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *a: None
        torch.cuda.current_device = lambda: "cpu"
    from megatron.core import dist_checkpointing as dc
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    get_write_results_queue("fork")  # by default another process is spawned, which imports Megatron once more
    dist.init_process_group("gloo", init_method=f"file://{root}/meet{world}", rank=rank, world_size=world)

    arrays = dict(np.load(f"{root}/arrays.npz"))
    parts = [rank] if world == 2 else [0, 1]
    experts = [e for p in parts for e in (2 * p, 2 * p + 1)]

    def tensor(a):
        t = torch.from_numpy(np.ascontiguousarray(a))
        return t.view(BITS.get(str(a.dtype), t.dtype))

    def state(fill):
        """name -> (sharded, the part of the global array it stands for)"""
        out = {}

        def add(key, part, *cuts, prepend=0, replica=0):
            data = tensor(part) if fill else torch.empty_like(tensor(part))
            if fill and part.ndim == 2 and "hc_head" in key:
                data = data.t().contiguous().t()  # a transposed parameter keeps its strides on disk
            name = f"{key}{cuts}"
            out[name] = ShardedTensor.from_rank_offsets(
                key, data, *cuts, prepend_axis_num=prepend, replica_id=replica), part

        for key, a in arrays.items():
            if "experts" in key:
                for e in experts:
                    if "fc2" in key:
                        for t in (0, 1):
                            add(key, a[e][:, 2 * t : 2 * t + 2], (0, e, 4), (2, t, 2), prepend=1)
                    else:
                        for row in range(4):  # gate and up, each in two
                            add(key, a[e][2 * row : 2 * row + 2], (0, e, 4), (1, row, 4), prepend=1)
            elif "embedding" in key:
                for p in parts:
                    add(key, a[6 * p : 6 * p + 6], (0, p, 2))
            elif "linear_proj" in key:
                for p in parts:
                    add(key, a[:, 4 * p : 4 * p + 4], (1, p, 2))
            else:
                add(key, a, replica=rank)
        empty = torch.empty(0, dtype=torch.uint8)
        key = "decoder.final_layernorm._extra_state"
        out["n"] = ShardedObject(key, empty, (1,), (0,), replica_id=rank), None
        for e in experts:
            key = "decoder.layers.0.mlp.experts.experts.linear_fc1._extra_state"
            out[f"x{e}"] = ShardedObject(key, empty, (4,), (e,)), None
        return out

    for strict in ("assume_ok_unexpected", "raise_all", "return_all"):
        if strict == "raise_all":
            without_strides()
        wanted = state(False)
        result = dc.load({k: v for k, (v, _) in wanted.items()}, ours, strict=strict)
        if strict == "return_all":
            result, missing, unexpected = result
            assert not missing and not unexpected, (missing, unexpected)
        for name, (_, part) in wanted.items():
            if part is not None:
                got, expected = result[name], tensor(part)
                assert got.dtype == expected.dtype
                assert got.contiguous().view(torch.uint8).equal(expected.view(torch.uint8)), (strict, name)
        assert result["iteration"] == 7 and result["deep"] == {"a": None, "b": True}, result.keys()

    saved = {k: v for k, (v, _) in state(True).items()}
    dc.save(saved | {"iteration": 3, "checkpoint_version": 3.0}, f"{root}/saved{world}/iter_0000003")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
'''


@pytest.fixture(scope="module")
def arrays():
    return {k: bits(d, shape, i) for i, (k, (d, shape, _)) in enumerate(TENSORS.items())}


@pytest.fixture(scope="module")
def root(tmp_path_factory, arrays):
    """Checkpoints saved by Megatron on 1 and 2 ranks, after each loaded ours under three strict modes."""
    root = tmp_path_factory.mktemp("megatron")
    ours = write(root / "ours", {k: (d, arrays[k], cuts) for k, (d, _, cuts) in TENSORS.items()}, OBJECTS)
    np.savez(root / "arrays.npz", **arrays)
    (root / "worker.py").write_text(WORKER)
    running: list[tuple[Warm, Path]] = []
    for world in (1, 2):
        (root / f"saved{world}" / "iter_0000003").mkdir(parents=True)
        (root / f"saved{world}" / "latest_checkpointed_iteration.txt").write_text("3")
        for rank in range(world):
            said = root / f"rank{rank} of {world}.log"
            running.append((Warm(root / "worker.py", rank, world, root, ours, out=said), said))
    try:
        failed = [said.read_text()[-3000:] for process, said in running if process.wait(timeout=600)]
    finally:
        for process, _ in running:
            process.kill()
    if failed:
        pytest.fail("\n\n".join(failed))
    return root


def test_megatron_loads_ours_strictly(root):
    """The assertions are in WORKER, which the fixture has run: values, dtypes, no key missing."""
    assert (root / "saved2" / "iter_0000003" / ".metadata").is_file()
    assert (root / "saved2" / "iter_0000003" / "metadata.json").read_bytes() == METADATA_JSON


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("legacy", [False, True])
def test_what_megatron_saved_is_read(root, arrays, world, legacy):
    folder = root / f"saved{world}"
    if legacy:  # releases before common_state; a class in it would run code if it were unpickled
        torch.save({"iteration": 3, "args": Path("x")}, folder / "iter_0000003" / "common.pt")
    with open_torch_dist(folder) as reader:
        assert reader.iteration == 3
        assert set(reader.tensors) == set(TENSORS)
        assert set(reader.objects) == {*OBJECTS, COMMON_STATE_KEY}
        assert reader.read_object(COMMON_STATE_KEY) == {"iteration": 3, "checkpoint_version": 3.0}
        assert reader.read_object(OBJECTS[0]).shape == (0,)
        assert len({c.file for t in reader.tensors.values() for c in t.chunks}) >= world
        assert len(reader.tensors[MLP + "1.weight"].chunks) == 4 * EXPERTS
        for key, (dtype, shape, _) in TENSORS.items():
            assert (reader.tensors[key].dtype, reader.tensors[key].shape) == (dtype, shape)
            assert same(reader.read(key), arrays[key]), key
            low, high = [n // 3 for n in shape], [n - n // 4 for n in shape]
            box = reader.read(key, tuple(low), tuple(b - a for a, b in zip(low, high)))
            assert same(box, arrays[key][tuple(map(slice, low, high))]), key


def test_real_metadata_names_only_known_globals(root):
    """The globals of a real file are all in the table, none of them is of Megatron."""
    named = set()

    class Watch(dict):
        def __getitem__(self, name):
            named.add(name)
            return super().__getitem__(name)

    pickles.decode((root / "saved2/iter_0000003/.metadata").read_bytes(), Watch(METADATA_GLOBALS), "x")
    # all_local_plans is there, but for torch 2.11, with which Megatron plans on one rank
    planned = ("torch.distributed.checkpoint.planner", "SavePlan") in named
    assert planned or torch.__version__.startswith("2.11")
    assert len(named) >= (17 if planned else 14)
    assert not [module for module, _ in named if module.startswith("megatron")]


def test_a_missing_rank_file_is_said(root, tmp_path):
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    for file in (root / "saved2" / "iter_0000003").iterdir():
        if not file.name.startswith("__1_"):
            (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BridgeError, match=r"__1_\d\.distcp: not there"):
        open_torch_dist(folder)


def test_dtypes_of_the_table_exist_in_torch():
    assert all(hasattr(torch, d.torch) for d in DTYPES.values())
