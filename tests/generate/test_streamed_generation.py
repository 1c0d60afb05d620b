"""Text from a model that stays in its checkpoint: the same as from the whole one, in any memory."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import small_spec

from conftest import dsv4
from dsv4_bridge import BridgeError, ModelSpec, import_hf, make_toy
from dsv4_bridge.generate.generate import Ask, generate
from dsv4_bridge.mcore.generate import complete
from dsv4_bridge.mcore.weights.encoded import EncodedModel
from dsv4_bridge.store.checkpoint import open_checkpoint
from dsv4_bridge.store.direct import DirectReader, aligned_memory
from dsv4_bridge.store.hf import open_hf

pytestmark = pytest.mark.megatron

# One is longer than what is multiplied without a decoded copy; both end within a block.
PROMPTS = [[5, 3, 100, 7], [9, 11, 250] * 35]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("streamed") / "toy", "Flash", 31, spec=small_spec())


@pytest.mark.parametrize("kind", ["mxfp4", "fp8-f32-ragged", "megatron"])
def test_greedy_text_is_that_of_the_whole_model(kind: str, toy: Path, tmp_path: Path) -> None:
    folder = toy
    if kind == "megatron":
        import_hf(toy, folder := tmp_path / "megatron")
    if kind == "fp8-f32-ragged":
        folder = make_toy(tmp_path / "toy", "Flash-Base", 32, ragged=True)
    ask = Ask(ids=PROMPTS, max_new_tokens=12)
    whole, streamed = (generate(folder, ask, stream=stream) for stream in (False, True))
    assert [c.ids for c in streamed.continuations] == [c.ids for c in whole.continuations]
    assert whole.streamed is None and streamed.streamed is not None
    told = streamed.streamed
    assert told.kept == told.every_token > 0 and told.hits and told.misses > 0
    assert told.room == ModelSpec.from_pretrained(folder).n_routed_experts  # and no more, where all have room


def test_logits_are_those_of_the_whole_model_to_rounding(toy: Path) -> None:
    from dsv4_bridge.mcore import build_model, load_weights

    ids = torch.tensor([PROMPTS[1]])
    with open_checkpoint(toy) as opened, torch.no_grad():
        spec = opened.spec.without_draft()
        model = build_model(spec, initialize_weights=False).eval()
        load_weights(model, toy)
        with EncodedModel(opened.source, spec, torch.float32, 1 << 30) as encoded:
            ours, exact = encoded.model(ids), model(ids)
            few, exactly = encoded.model(ids[:, :9]), model(ids[:, :9])
    assert 0 < (ours - exact).abs().max() <= 2e-6 * exact.abs().max()
    assert 0 < (few - exactly).abs().max() <= 2e-6 * exactly.abs().max()


def test_activations_in_bf16(toy: Path) -> None:
    from dsv4_bridge.mcore import build_model, load_weights

    ids = torch.tensor([PROMPTS[0]])
    with open_checkpoint(toy) as opened, torch.no_grad():
        spec = opened.spec.without_draft()
        model = build_model(spec, dtype=torch.bfloat16, initialize_weights=False).eval()
        load_weights(model, toy, allow_lossy=True)
        with EncodedModel(opened.source, spec, torch.bfloat16, 1 << 30) as encoded:
            ours, theirs = encoded.model(ids), model(ids)
    assert ours.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=-1).min() > 0.995


def test_any_memory_gives_the_same_text(toy: Path) -> None:
    found, kept, read = [], [], []
    with open_checkpoint(toy) as opened:
        spec = opened.spec.without_draft()
        with EncodedModel(opened.source, spec, torch.float32, 1 << 30) as encoded:
            every = encoded.shelf.whole
        with pytest.raises(BridgeError, match=r"bytes are the least .* more --memory"):
            EncodedModel(opened.source, spec, torch.float32, 4096)
        with pytest.raises(BridgeError) as refused:
            EncodedModel(opened.source, spec, torch.float32, 0)
        least = int(re.findall(r"([0-9,]+) bytes", str(refused.value))[1].replace(",", ""))
        for memory in (least, least + every // 2, 1 << 30):
            with EncodedModel(opened.source, spec, torch.float32, memory) as encoded:
                found.append(complete(encoded.model, PROMPTS, 10))
                reads = encoded.shelf.reads
                kept.append(encoded.shelf.kept)
                read.append(reads.nbytes)
                assert reads.hits + reads.misses > 10 * spec.num_hidden_layers
    assert found[0] == found[1] == found[2]
    assert kept[0] < kept[1] < kept[2] == every and read[2] < read[0]


def test_the_experts_used_last_are_kept(toy: Path) -> None:
    with open_checkpoint(toy) as opened:
        spec = opened.spec.without_draft()
        with EncodedModel(opened.source, spec, torch.float32, 1 << 30) as encoded:
            shelf, layer = encoded.shelf, "layers.3"
            shelf.room = 2
            items = {n: encoded.experts[f"{layer}.", n] for n in range(5)}

            def use(*numbers: int) -> list[int]:
                return [n for n, _ in shelf.experts(layer, [(n, items[n]) for n in numbers])]

            assert use(0, 1) == [0, 1] and (shelf.reads.hits, shelf.reads.misses) == (0, 2)
            assert use(2, 1) == [1, 2]  # what is there first; 0 goes
            assert use(1, 0) == [1, 0] and (shelf.reads.hits, shelf.reads.misses) == (2, 4)
            assert sorted(use(0, 1, 2, 3, 4)) == [0, 1, 2, 3, 4]
            for number, matrices in shelf.experts(layer, list(items.items())):
                for matrix, item in zip(matrices, items[number], strict=True):
                    assert (matrix.decode() == opened.values(item.name)).all()


def test_a_damaged_weight_is_named(toy: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(toy, tmp_path / "bad")
    checkpoint = open_hf(tmp_path / "bad")
    info = checkpoint.folder.tensors["layers.2.attn.wq_b.weight"]
    checkpoint.close()
    with (tmp_path / "bad" / info.file).open("r+b") as file:
        file.seek(info.start + 777)
        file.write(b"\x7f")  # NaN
    done = dsv4("generate", tmp_path / "bad", "--prompt-ids", "5,6,7", "--max-new-tokens", "3", "--stream")
    assert done.returncode == 2 and "layers.2.attn.wq_b.weight" in done.stderr and "Traceback" not in done.stderr


def test_the_command_tells_what_was_read(toy: Path) -> None:
    done = dsv4("generate", toy, "--prompt-ids", "5,6,7", "--max-new-tokens", "3", "--stream")
    assert done.returncode == 0 and "of what every token needs" in done.stderr, done.stderr
    wrong = dsv4("generate", toy, "--prompt-ids", "5", "--memory", "0.1")
    assert wrong.returncode == 2 and "are the least" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("direct", [True, False])
def test_direct_reads_are_the_bytes(direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_toy(tmp_path / "toy", "Flash", 33)
    if not direct:
        real = os.open

        def refuses(path: str, flags: int, *more: int) -> int:
            if flags & os.O_DIRECT:
                raise OSError(22, "Invalid argument")
            return real(path, flags, *more)

        monkeypatch.setattr(os, "open", refuses)
    checkpoint = open_hf(folder)
    reader, rng = DirectReader(folder), np.random.default_rng(1)
    names = list(checkpoint.folder.tensors)
    try:
        for count in (1, 2, 7, 40):
            chosen = [str(n) for n in rng.choice(names, min(count, len(names)), replace=False)]
            infos = [checkpoint.folder.tensors[name] for name in chosen]
            memory = aligned_memory(reader.size(infos))
            memory[...] = 0xA5
            for name, raw in zip(chosen, reader.read(infos, memory), strict=True):
                assert raw.tobytes() == checkpoint.folder.read(name).tobytes()
        last = max(checkpoint.folder.tensors.values(), key=lambda info: (info.file, info.start))
        with (folder / last.file).open("r+b") as file:
            file.truncate(last.start + last.nbytes // 2)
        with pytest.raises(BridgeError, match="ends at byte"):
            reader.read([last], aligned_memory(reader.size([last])))
    finally:
        reader.close()
        checkpoint.close()


def test_readers_that_take_memory_at_once_each_get_their_own(toy: Path) -> None:
    """Sizes of experts are alike, so that threads take what others gave back; what is read is checked whole."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with open_checkpoint(toy) as opened:
            spec = opened.spec.without_draft()
            with EncodedModel(opened.source, spec, torch.float32, 1 << 30) as encoded:
                encoded.shelf.room = 0
                wanted = [(n, encoded.experts["layers.3.", n]) for n in range(spec.n_routed_experts)]
                exact = {n: [opened.values(item.name) for item in items] for n, items in wanted}
                for _ in range(30):
                    for number, matrices in encoded.shelf.experts("layers.3", wanted):
                        for matrix, values in zip(matrices, exact[number], strict=True):
                            assert (matrix.decode() == values).all()
                assert encoded.shelf.reads.misses == 30 * len(wanted)
    finally:
        sys.setswitchinterval(interval)
