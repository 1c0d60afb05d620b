"""Parity by layers: the numbers of whole models, in the memory of one layer; in parts; gone on with."""

import gc
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import small_spec

from conftest import dsv4
from dsv4_bridge import BridgeError, make_toy, repack
from dsv4_bridge.mcore.layers.observe import watching
from dsv4_bridge.parity import Inputs, ParityReport, parity
from dsv4_bridge.parity.report import write_report

pytestmark = [pytest.mark.megatron, pytest.mark.hf]

SHORT = Inputs(seq_length=142, batch=2, seed=3)
FEW = Inputs(seq_length=19, batch=2, seed=4)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("streamed") / "toy", "Flash", 21, spec=small_spec())


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("streamed") / "base", "Flash-Base", 22)


def plain(report: ParityReport) -> dict[str, Any]:
    """All that was found, without what may differ from run to run."""
    return {k: v for k, v in report.to_json().items() if k not in ("bytes", "seconds", "steps")}


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("kind", ["toy", "with_mtp"])
@pytest.mark.parametrize("how", [{}, {"inputs": SHORT, "replay": True}, {"inputs": SHORT, "dtype": "bf16"}])
def test_streamed_is_whole_bit_for_bit(kind: str, how: dict[str, Any], request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    streamed, whole = parity(folder, **how), parity(folder, stream=False, **how)
    assert plain(streamed) == plain(whole)
    assert streamed.free.logits is not None and whole.free.logits is not None
    assert (streamed.free.logits.kl == whole.free.logits.kl).all()
    assert len(streamed.steps) == len(streamed.layers) and not whole.steps
    assert streamed.bytes < whole.bytes


def test_two_checkpoints_streamed_are_two_whole(toy: Path, tmp_path: Path) -> None:
    """Choices differ from a layer on: there the replayed way parts from the free one."""
    other = make_toy(tmp_path / "other", "Flash", 23, spec=small_spec())
    both = [parity(toy, reference_checkpoint=other, inputs=SHORT, stream=s) for s in (True, False)]
    assert plain(both[0]) == plain(both[1])
    assert not both[0].passed and both[0].replayed is not None
    assert any(s.flips for s in both[0].free.sites)


# ---------------------------------------------------------------- in the memory of a layer


class Peak:
    """The most bytes of weights, and of what else tensors hold, at any site of our model."""

    def __init__(self) -> None:
        self.most = 0

    def __call__(self, site: str, block: str, value: torch.Tensor) -> None:
        held = [x.untyped_storage() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        found = {s.data_ptr(): s.nbytes() for s in held if s.device.type == "cpu"}
        self.most = max(self.most, sum(found.values()))


def test_memory_does_not_grow_with_layers(tmp_path: Path) -> None:
    found = {}
    for layers in (3, 6):
        ratios = (0, 4, 128) * (layers // 3)
        spec = small_spec(num_hidden_layers=layers, compress_ratios=ratios, n_routed_experts=16, num_hash_layers=1)
        folder = make_toy(tmp_path / str(layers), "Flash", 24, spec=spec)
        gc.collect()
        before, streamed, whole = Peak(), Peak(), Peak()
        before("", "", torch.empty(0))
        with watching(streamed):
            assert parity(folder, inputs=FEW).passed
        gc.collect()
        with watching(whole):
            parity(folder, inputs=FEW, stream=False)
        gc.collect()
        found[layers] = streamed.most - before.most, whole.most - before.most
    # What stays of every layer are vectors of up to 1,024 values.
    assert found[6][0] < 1.3 * found[3][0] and found[6][1] > 1.6 * found[3][1]
    assert found[6][0] < found[6][1] / 8


def test_only_experts_that_tokens_go_to_are_read(toy: Path) -> None:
    spec = small_spec()
    one = parity(toy, inputs=Inputs(prompt_ids=(7,)))
    assert [s.experts for s in one.steps] == [spec.num_experts_per_tok] * spec.num_hidden_layers
    many = parity(toy, inputs=SHORT)
    assert all(a.experts < b.experts and a.nbytes < b.nbytes for a, b in zip(one.steps, many.steps, strict=True))
    # Both sides read a layer once, and nobody more than all of it.
    folder = sum(f.stat().st_size for f in toy.glob("*.safetensors"))
    assert 0 < sum(s.nbytes for s in many.steps) <= 2 * folder


# ---------------------------------------------------------------- a part


def broken(toy: Path, out: Path, name: str) -> Path:
    """A plain copy with another tensor of one layer."""
    from safetensors.torch import load_file, save_file

    repack(toy, out, "bf16")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    file = out / index["weight_map"][name]
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(5)
    tensors[name] = torch.randn(tensors[name].shape, generator=generator).to(tensors[name].dtype)
    save_file(tensors, file)
    return out


def test_a_part_of_the_layers(toy: Path, tmp_path: Path) -> None:
    other = broken(toy, tmp_path / "other", "layers.2.attn.wo_a.weight")
    report = parity(toy, reference_checkpoint=other, inputs=SHORT, layers=(1, 2))
    assert {s.layer for s in report.free.sites} == {1, 2} and report.free.logits is None
    assert not report.passed and (report.verdict.layer, report.verdict.site) == (2, "attn")
    assert report.to_json()["free"]["logits"] is None and [s.layer for s in report.steps] == [1, 2]
    sound = parity(toy, reference_checkpoint=other, inputs=SHORT, layers=(0, 1))
    assert sound.passed and "layers compared" in sound.verdict.text
    assert max(s.error for s in (sound.replayed or sound.free).sites) < 1e-5
    page = write_report(report, tmp_path / "page").read_text()
    assert "layer 2" in page and "layer 3" not in page and "KL divergence of" not in page


def test_a_part_leaves_the_mtp_block_out_unless_it_ends_with_the_last_layer(with_mtp: Path) -> None:
    report = parity(with_mtp, inputs=FEW, layers=(0, 1))
    assert report.left_out and "part" in report.left_out and not report.drafts
    count = len(report.layers)
    rest = parity(with_mtp, inputs=FEW, layers=(2, count - 1))
    assert rest.drafts and rest.free.logits is not None and rest.passed


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"layers": (3, 9)}, "expected some of 0 to 3"),
        ({"layers": (2, 1)}, "the first first"),
        ({"layers": (0, 1), "stream": False}, "streamed"),
        ({"work": "x", "stream": False}, "streamed"),
    ],
)
def test_parts_that_are_none(how: dict[str, Any], match: str, toy: Path) -> None:
    with pytest.raises(BridgeError, match=match):
        parity(toy, inputs=FEW, **how)


# ---------------------------------------------------------------- stopped and gone on with


class Stopped(Exception):
    pass


def test_stopped_at_a_layer_and_gone_on_with(toy: Path, tmp_path: Path) -> None:
    other = make_toy(tmp_path / "other", "Flash", 23, spec=small_spec())
    how: dict[str, Any] = {"reference_checkpoint": other, "inputs": Inputs(seq_length=60, batch=2), "replay": True}
    whole, work, said = parity(toy, **how), tmp_path / "work", list[str]()

    def stop(line: str) -> None:
        if line.startswith("layer 2"):
            raise Stopped

    with pytest.raises(Stopped):
        parity(toy, work=work, say=stop, **how)
    report = parity(toy, work=work, say=said.append, **how)
    assert plain(report) == plain(whole) and len(report.steps) == 4
    assert any("going on behind layer 1" in line for line in said)
    assert sum(line.startswith("layer ") for line in said) == 2
    again = parity(toy, work=work, say=said.append, **how)  # nothing is left to do but the head
    assert plain(again) == plain(whole)


def test_a_state_of_another_comparison_is_refused(toy: Path, tmp_path: Path) -> None:
    parity(toy, work=tmp_path / "work", inputs=FEW)
    with pytest.raises(BridgeError, match="other files, tokens or settings"):
        parity(toy, work=tmp_path / "work", inputs=SHORT)
    kept = next((tmp_path / "work").iterdir())
    kept.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2])
    with pytest.raises(BridgeError, match="cannot be read"):
        parity(toy, work=tmp_path / "work", inputs=FEW)


# ---------------------------------------------------------------- the command


def test_the_command(toy: Path, tmp_path: Path) -> None:
    told = ["--seq-length", "19", "--batch", "1"]
    done = dsv4("parity", toy, "--stream", "--layers", "0-1", "--work", tmp_path / "work", *told)
    assert done.returncode == 0, done.stderr
    assert "layer 1 (CSA) of 4" in done.stderr and "layers compared" in done.stdout
    wrong = dsv4("parity", toy, "--layers", "one")
    assert wrong.returncode == 2 and "as 5 or 0-7" in wrong.stderr and "Traceback" not in wrong.stderr


def test_peak_memory_is_planned(toy: Path) -> None:
    """A longer vocabulary is no more than rows while layers run; the output layer is what it adds."""
    report = parity(toy, inputs=FEW)
    assert 0 < report.bytes < sum(f.stat().st_size for f in toy.glob("*.safetensors")) * 4
    assert math.isfinite(report.seconds)
