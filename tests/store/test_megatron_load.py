"""Megatron-Core's own loader takes what `import` writes, cut as TP, EP, expert-TP and PP ranks cut it."""

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from warm import run_world

from conftest import same_files
from dsv4_bridge import BridgeError, export_hf, import_hf, inspect, make_toy
from dsv4_bridge.spec.megatron import Naming, extra_state_keys, megatron_dtype, regions
from dsv4_bridge.spec.plan import Item, expand, scale_name
from dsv4_bridge.store.hf import open_hf

pytestmark = pytest.mark.megatron

WORKER = '''
import os
import sys
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import TensorProperties

original = TensorProperties.__setstate__


def setstate(self, state):
    """megatron-core 0.19.2 hands every attribute to torch.empty; torch 2.15 added one it does not take."""
    original(self, state)
    self.__dict__.pop("strides", None)


def main(rank, world, root, checkpoint):
    TensorProperties.__setstate__ = setstate
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *a: None
        torch.cuda.current_device = lambda: "cpu"
    dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=world)
    from megatron.core import dist_checkpointing as dc
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    get_write_results_queue("fork")  # by default another process is spawned, which imports Megatron once more
    for mode in ("tp", "ep", "pp"):
        os.makedirs(f"{root}/saved-{mode}/iter_0000003", exist_ok=True)
    arrays = dict(np.load(f"{root}/arrays.npz"))
    cuts = dict(line.split() for line in open(f"{root}/cuts.txt"))
    half = max(int(k.split(".")[2]) for k in arrays if k.startswith("decoder.layers.")) // 2

    def mine(key):  # pipeline: rank 0 the first layers, rank 1 the others and everything behind them
        parts = key.split(".")
        if parts[:2] == ["decoder", "layers"]:
            return (int(parts[2]) > half) == bool(rank)
        return key.startswith("embedding") == (rank == 0)

    def tensor(a):
        t = torch.from_numpy(np.ascontiguousarray(a))
        return t.view(torch.bfloat16) if a.dtype == np.uint16 else t

    def pieces(mode):
        for key, a in arrays.items():
            cut = cuts[key]
            if mode == "pp":
                if mine(key):
                    yield key, a, (), 0, 0
            elif cut.startswith("expert"):
                axis = 0 if cut.endswith("columns") else 1
                n = len(a)
                for e in range(rank * n // 2, (rank + 1) * n // 2) if mode == "ep" else range(n):
                    if mode == "ep":
                        yield key, a[e], ((0, e, n),), 1, 0
                    else:  # expert-tensor parallel; fc1 as gate and up, each cut
                        count = 4 if "fc1" in key else 2
                        size = a.shape[1 + axis] // count
                        for i in (rank, rank + 2) if count == 4 else (rank,):
                            part = a[e].take(range(i * size, (i + 1) * size), axis)
                            yield key, part, ((0, e, n), (1 + axis, i, count)), 1, 0
            elif cut in ("columns", "vocabulary", "heads", "rows") and mode == "tp":
                axis = 1 if cut == "rows" else 0
                count = 4 if "fc1" in key else 2
                size = a.shape[axis] // count
                for i in (rank, rank + 2) if count == 4 else (rank,):
                    yield key, a.take(range(i * size, (i + 1) * size), axis), ((axis, i, count),), 0, 0
            else:
                yield key, a, (), 0, rank

    for mode in ("tp", "ep", "pp"):
        wanted, expected = {}, {}
        for n, (key, part, cut, prepend, replica) in enumerate(pieces(mode)):
            wanted[n] = ShardedTensor.from_rank_offsets(
                key, torch.empty_like(tensor(part)), *cut, prepend_axis_num=prepend, replica_id=replica)
            expected[n] = tensor(part)
        for line in open(f"{root}/objects.txt"):
            key, index, count = line.split()
            wanted[line] = ShardedObject(key, None, (int(count),), (int(index),), replica_id=rank)
        found, missing, unexpected = dc.load(dict(wanted), checkpoint, strict="return_all")
        assert not missing and not unexpected, (mode, missing, unexpected)
        for n, part in expected.items():
            got = found[n]
            assert got.dtype == part.dtype, (mode, wanted[n].key)
            assert got.contiguous().view(torch.uint8).equal(part.contiguous().view(torch.uint8)), (mode, wanted[n].key)
        assert found["iteration"] == 0
        print(f"{mode}: {len(expected)} tensors on rank {rank}", flush=True)

        # As a training run saves it: the same cuts, other ranks, optimizer entries beside.
        saved = {}
        for n, (key, part, cut, prepend, replica) in enumerate(pieces(mode)):
            for name in (key, f"optimizer.state.exp_avg.{key}"):
                saved[name, n] = ShardedTensor.from_rank_offsets(
                    name, tensor(part), *cut, prepend_axis_num=prepend, replica_id=replica)
        dc.save(saved | {"iteration": 3, "args": {"lr": 0.1}}, f"{root}/saved-{mode}/iter_0000003")
        dist.barrier()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), *sys.argv[1:])
'''


def source_values(folder: Path, item: Item, shards: dict[str, Path]) -> np.ndarray:
    """An item's values by the readable definition, read with the safetensors library."""
    import torch

    from dsv4_bridge.codec import reference

    def load(name: str) -> torch.Tensor:
        with safe_open(shards[name], "pt") as opened:
            return opened.get_tensor(name)

    weight, scale = load(item.name), scale_name(item.name)
    if weight.dtype == torch.int8:
        weight = reference.decode_mxfp4(weight.view(torch.uint8), load(scale).view(torch.uint8))
    elif weight.dtype == torch.float8_e4m3fn:
        weight = reference.decode_fp8(weight.view(torch.uint8), load(scale).view(torch.uint8))
    if weight.dtype == torch.bfloat16:
        return weight.contiguous().view(torch.uint16).numpy()
    return weight.to(torch.int32).numpy() if weight.dtype == torch.int64 else weight.numpy()


@pytest.mark.parametrize(
    ("variant", "naming"),
    [
        ("Flash", "gpt"),
        ("Flash", "hybrid"),
        pytest.param("Flash-0731", "gpt", marks=pytest.mark.slow),
        pytest.param("Flash-0731", "hybrid", marks=pytest.mark.slow),
    ],
)
def test_megatron_loads_an_import_at_every_kind_of_cut(variant: str, naming: Naming, tmp_path: Path) -> None:
    source = make_toy(tmp_path / "hf", variant, 21, payload="extreme", ragged=True)
    import_hf(source, tmp_path / "m", naming=naming)
    checkpoint = open_hf(source)
    shards = {n: source / i.file for n, i in checkpoint.folder.tensors.items()}
    plan = expand(checkpoint.spec)
    arrays: dict[str, np.ndarray] = {}
    cuts: dict[str, str] = {}
    for item in plan.items:
        if item.passenger:
            continue
        values, at = source_values(source, item, shards), 0
        for region in regions(item, plan.spec, naming):
            kind = {"BF16": np.uint16, "F32": np.float32, "I32": np.int32}[megatron_dtype(item)]
            target = arrays.setdefault(region.key, np.empty(region.global_shape, kind))
            rows = region.sizes[-values.ndim]
            box = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
            target[box] = values[at : at + rows].reshape(region.sizes)
            at += rows
            cuts[region.key] = ("expert-" if item.expert is not None else "") + item.row.cut
    checkpoint.close()
    np.savez(tmp_path / "arrays.npz", **arrays)
    (tmp_path / "cuts.txt").write_text("".join(f"{k} {c}\n" for k, c in cuts.items()))
    shards_of = (k.rpartition("/shard_") for k in extra_state_keys(plan, naming))
    lines = (f"{key} {place.replace('_', ' ')}\n" for key, _, place in shards_of)
    (tmp_path / "objects.txt").write_text("".join(lines))
    (tmp_path / "worker.py").write_text(WORKER)
    iteration = tmp_path / "m" / "iter_0000000"
    assert inspect(tmp_path / "m").tensors == len(arrays)
    run_world(2, tmp_path / "worker.py", tmp_path, iteration, said=tmp_path / "worker", timeout=240)
    outputs = [(tmp_path / f"worker.rank{rank}.log").read_text() for rank in range(2)]
    assert all(mode in out for out in outputs for mode in ("tp:", "ep:", "pp:"))

    # And back: what Megatron saved, sharded over two ranks along other axes, exports to the very same files.
    for mode in ("tp", "ep", "pp"):
        saved = tmp_path / f"saved-{mode}"
        (saved / "latest_checkpointed_iteration.txt").write_text("3")
        if mode == "ep":
            (saved / "iter_0000003" / "common.pt").write_bytes(b"a legacy file that is never unpickled")
        assert len(list((saved / "iter_0000003").glob("*.distcp"))) > 1
        with pytest.raises(BridgeError, match="--like"):
            export_hf(saved, tmp_path / "none", None, "bf16")
        export_hf(saved, tmp_path / f"back-{mode}", source)
        assert same_files(source, tmp_path / f"back-{mode}") == []
