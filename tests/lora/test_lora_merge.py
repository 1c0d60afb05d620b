"""Merging: the right sums, encoded by the released rule, what has no adapter byte for byte, and an honest report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_tools import random_adapters, spec_of
from safetensors import safe_open
from typer.testing import CliRunner

from conftest import same_files
from dsv4_bridge import make_toy
from dsv4_bridge.cli.app import app
from dsv4_bridge.codec import reference
from dsv4_bridge.convert.merge import merge
from dsv4_bridge.convert.run import Options
from dsv4_bridge.errors import BridgeError
from dsv4_bridge.lora.adapters import Adapters
from dsv4_bridge.lora.peft import export_peft
from dsv4_bridge.spec.lora import CARRIERS, Lora, targets
from dsv4_bridge.spec.spec import ModelSpec, replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.store.hf import open_hf


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return spec_of()


@pytest.fixture(scope="module")
def toy(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("merge") / "toy", "Flash", 3, spec=spec)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that a folder stores, as it is stored."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def decoded(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A weight as float64, by the readable definition of the codecs."""
    weight, scale = state[name], state.get(name.removesuffix(".weight") + ".scale")
    if scale is None:
        return weight.double()
    decode = reference.decode_mxfp4 if weight.dtype is torch.int8 else reference.decode_fp8
    return decode(weight.view(torch.uint8), scale.view(torch.uint8)).double()


def deltas(adapters: Adapters, spec: ModelSpec, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each weight should change by, in float64, written another way than the package does."""
    found = {}
    for target in targets(spec, adapters.lora.keys):
        a, b, magnitude = adapters.values[target.name]
        change = np.einsum("or,ri->oi", b.double().numpy(), a.double().numpy())
        change = torch.from_numpy(change * adapters.lora.alpha / adapters.lora.rank)
        old = torch.cat([decoded(state, item.name) for item in target.items])
        if magnitude is not None:
            new = old + change
            change = new / new.square().sum(1, keepdim=True).sqrt() * magnitude.double()[:, None] - old
        for item, part in zip(target.items, change.split([i.shape[0] for i in target.items]), strict=True):
            found[item.name] = part
    return found


KINDS = {
    "everything": Lora(2, 3, targets=CARRIERS),
    "dora": Lora(2, 3, targets=("attn.wq_b", "attn.wo_b", "ffn.shared_experts"), dora=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["source", "bf16"])
def test_report_agrees_with_an_independent_computation(
    toy: Path, spec: ModelSpec, kind: str, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4_bridge.store.values._STRIPE_BYTES", 1 << 15)  # several stripes a tensor
    adapters = random_adapters(spec, KINDS[kind], 0.03)
    export_peft(adapters, spec, tmp_path / "adapter")
    report = merge(toy, tmp_path / "adapter", tmp_path / "out", encoding)
    before, after = tensors(toy), tensors(tmp_path / "out")
    expected = deltas(adapters, spec, before)
    assert [t.name for t in report.tensors] == [i.name for i in open_hf(toy).plan.items if i.name in expected]
    for found in report.tensors:
        old, new, delta = decoded(before, found.name), decoded(after, found.name), expected[found.name]
        survived = new - old
        assert found.delta == pytest.approx(float(delta.norm()), rel=1e-5)
        assert found.survived == pytest.approx(float(survived.norm()), rel=1e-6)
        kept = float((survived * delta).sum() / delta.square().sum())
        assert found.lost == pytest.approx(1 - kept, abs=1e-5)
        assert found.error == pytest.approx(float((survived - delta).norm() / delta.norm()), rel=1e-3, abs=1e-6)
        assert (found.unchanged, found.values) == (int((new == old).sum()), old.numel())
        # As near to the float32 sum as the encoding allows: half a step of what it stores.
        relative, least = {"mxfp4": (1 / 4, 1 / 11), "fp8": (1 / 15, 2**-14), "bf16": (1 / 256, 2**-20)}[found.encoding]
        bound = relative * (old + delta).abs() + least * new.abs().amax()
        assert ((survived - delta).abs() <= bound).all(), found.name
    assert report.total.delta == pytest.approx(float(torch.cat([d.flatten() for d in expected.values()]).norm()))


def test_source_encoding_is_that_of_an_export(spec: ModelSpec, tmp_path: Path) -> None:
    """The bytes are those of the codec's definition for the bf16 sum: scales are kept where they fit."""
    toy = make_toy(tmp_path / "toy", "Flash", 3, spec=spec, payload="random")
    adapters = random_adapters(spec, Lora(2, 3, targets=("attn.wo_a", "attn.wo_b", "ffn.experts")), 0.3)
    for adapter in adapters.values.values():
        adapter.a[:, 64:] = 0  # what stands behind is not changed, and does not have the scale of a fresh encoding
    export_peft(adapters, spec, tmp_path / "adapter")
    merge(toy, tmp_path / "adapter", tmp_path / "out")
    before, after = tensors(toy), tensors(tmp_path / "out")
    fresh = 0
    for name, delta in deltas(adapters, spec, before).items():
        total = (decoded(before, name).float() + delta.float()).bfloat16()
        scale = name.removesuffix(".weight") + ".scale"
        old, new = before[scale].view(torch.uint8), after[scale].view(torch.uint8)
        encode = reference.encode_mxfp4 if "experts" in name else reference.encode_fp8
        codes, scales = encode(total, old)
        differing = (codes.view(torch.uint8) != after[name].view(torch.uint8)).sum()
        assert differing <= 2, name  # a sum between two bf16 values, one way here and the other there
        assert torch.equal(scales.view(torch.uint8), new), name
        fresh += int((encode(total)[1].view(torch.uint8) != new).sum())
    assert fresh > 0


def test_what_has_no_adapter_keeps_its_bytes(toy: Path, spec: ModelSpec, tmp_path: Path) -> None:
    adapters = random_adapters(spec, Lora(2, 3, targets=("attn.wq_b",)))
    export_peft(adapters, spec, tmp_path / "adapter")
    report = merge(toy, tmp_path / "adapter", tmp_path / "out", options=Options(workers=3))
    before, after = tensors(toy), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    touched = {f"layers.{i}.attn.wq_b.{x}" for i in (0, 1) for x in ("weight", "scale")}
    for name, tensor in before.items():
        same = torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))
        assert same or name in touched, name
        assert tensor.dtype == after[name].dtype and not (same and name.endswith("wq_b.weight") and name in touched)
    # The files, their order and their headers too.
    first = sorted(p.name for p in toy.glob("model-*"))
    assert same_files(toy, tmp_path / "out") == [first[1], first[2]]
    assert report.copied + len(report.tensors) == len(open_hf(toy).plan.items)
    merge(toy, tmp_path / "adapter", tmp_path / "again")
    assert same_files(tmp_path / "out", tmp_path / "again") == []


def test_a_tiny_delta_is_reported_as_lost(toy: Path, spec: ModelSpec, tmp_path: Path) -> None:
    export_peft(random_adapters(spec, Lora(2, 3, targets=("ffn.experts",)), 1e-5), spec, tmp_path / "adapter")
    report = merge(toy, tmp_path / "adapter", tmp_path / "out")
    assert report.total.lost > 0.99 and report.total.unchanged > 0.999 * report.total.values
    assert len(report.warnings) == 1 and "100% of the adapters is lost to rounding" in report.warnings[0]
    whole = merge(toy, tmp_path / "adapter", tmp_path / "bf16", "bf16")
    assert whole.total.lost < report.total.lost and "merge with --encoding bf16" not in "".join(whole.warnings)


@pytest.mark.parametrize("variant", ["Flash-Base", "Flash-0731"])
def test_passengers_and_other_encodings_go_along(variant: str, tmp_path: Path) -> None:
    """Float32 scales; a drafter and an MTP block's own head, which no adapter is of."""
    spec = tiny(VARIANTS[variant])
    toy = make_toy(tmp_path / "toy", variant, 3, spec=spec)
    export_peft(random_adapters(spec, Lora(2, 3)), spec, tmp_path / "adapter")
    report = merge(toy, tmp_path / "adapter", tmp_path / "out")
    assert report.total.lost < 0.1 and {t.encoding for t in report.tensors} <= {"fp8", "fp8_f32"}
    before, after = tensors(toy), tensors(tmp_path / "out")
    for name in before:
        if not name.startswith("layers.") or ".attn.w" not in name:
            assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


def test_refused_and_nothing_left(toy: Path, spec: ModelSpec, tmp_path: Path) -> None:
    export_peft(random_adapters(spec, Lora(2, 3)), spec, tmp_path / "adapter")
    other = replace_spec(spec, hidden_size=512)
    export_peft(random_adapters(other, Lora(2, 3)), other, tmp_path / "other")
    export_peft(random_adapters(spec, Lora(2, 3, targets=("ffn.experts",))), spec, tmp_path / "experts")
    merge(toy, tmp_path / "experts", tmp_path / "plain", "bf16")
    for source, adapter, encoding, words in (
        (toy, tmp_path / "adapter", "fp4", "encoding 'fp4' is not one of source, fp8, bf16"),
        (toy, tmp_path / "other", "source", r"lora_A.weight is \[2, 512\], expected \[2, 256\]"),
        (toy, tmp_path / "nowhere", "source", "No such file"),
        (tmp_path / "plain", tmp_path / "adapter", "fp8", r"encoding layers\.\d\.ffn.experts.* as fp8 would change"),
    ):
        with pytest.raises(BridgeError, match=words):
            merge(source, adapter, tmp_path / "out", encoding)
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    with pytest.raises(BridgeError, match="overlaps the input"):
        merge(toy, tmp_path / "adapter", toy / "out")
    with pytest.raises(BridgeError, match="not resumed"):
        merge(toy, tmp_path / "adapter", tmp_path / "out", options=Options(resume=True))


def _run(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_command(toy: Path, spec: ModelSpec, tmp_path: Path) -> None:
    export_peft(random_adapters(spec, Lora(2, 3, targets=("attn",)), 1e-5), spec, tmp_path / "adapter")
    done = _run("merge", toy, tmp_path / "adapter", tmp_path / "out")
    assert done.exit_code == 0
    assert "attn.wo_a" in done.stdout and "10 tensors merged" in done.stdout
    assert "dsv4: warning: 9" in done.stderr or "dsv4: warning: 100%" in done.stderr
    done = _run("merge", toy, tmp_path / "adapter", tmp_path / "out", "--encoding", "bf16", "--overwrite", "--json")
    facts = json.loads(done.stdout)
    assert facts["encoding"] == "bf16" and len(facts["tensors"]) == 10
    assert facts["total"]["lost"] == pytest.approx(1 - facts["total"]["kept"])
    assert facts["tensors"][0]["name"] == "layers.0.attn.wq_a.weight"
    again = _run("merge", toy, tmp_path / "adapter", tmp_path / "out")
    assert isinstance(again.exception, BridgeError) and "the folder is not empty" in str(again.exception)
    lost = _run("lora", toy, tmp_path / "x")
    assert isinstance(lost.exception, BridgeError) and "a Megatron checkpoint is wanted" in str(lost.exception)


def test_a_merge_that_was_stopped_half_way_is_begun_anew(toy: Path, spec: ModelSpec, tmp_path: Path) -> None:
    export_peft(random_adapters(spec, Lora(2, 3)), spec, tmp_path / "adapter")
    merge(toy, tmp_path / "adapter", tmp_path / "whole")
    out = tmp_path / "out"
    (out / ".dsv4-partial").mkdir(parents=True)
    (out / ".dsv4-partial" / "model-00001-of-00005.safetensors").write_bytes(b"half")
    with pytest.raises(BridgeError, match=r"stopped half way here; --overwrite starts over$"):
        merge(toy, tmp_path / "adapter", out)
    merge(toy, tmp_path / "adapter", out, options=Options(overwrite=True))
    assert same_files(tmp_path / "whole", out) == []
