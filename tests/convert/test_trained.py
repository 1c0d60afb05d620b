"""Weights that changed are re-encoded by the rule; all others return byte for byte."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv4_bridge import BridgeError, export_hf, import_hf, make_toy, verify
from dsv4_bridge.codec import reference


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def train(source: Path, folder: Path, changes: dict[str, float]) -> dict[str, torch.Tensor]:
    """A Megatron checkpoint of `source` in which some weights were scaled and disturbed; the new values."""
    rng = torch.Generator().manual_seed(5)
    import_hf(source, folder / "before")
    export_hf(folder / "before", folder / "bf16", None, "bf16")
    changed = {}
    for file in sorted((folder / "bf16").glob("*.safetensors")):
        tensors = load_file(file)
        for name in changes.keys() & tensors.keys():
            old = tensors[name].float()
            step = torch.randn(old.shape, generator=rng) * old.std() * changes[name]
            step[old.shape[0] // 2 :] = 0  # some blocks change, some do not
            tensors[name] = changed[name] = (old + step).to(tensors[name].dtype)
        save_file(tensors, file)
    import_hf(folder / "bf16", folder / "after")
    return changed


def split_shards(source: Path, out: Path) -> Path:
    """The same checkpoint with every scale in another shard than its weight."""
    out.mkdir()
    tensors = load(source)
    parts = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    one, other = parts
    for name, tensor in tensors.items():
        parts[one if name.endswith(".scale") else other][name] = tensor
    for file, content in parts.items():
        save_file(content, out / file)
    weight_map = {n: f for f, content in parts.items() for n in content}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


@pytest.mark.parametrize("split", [False, True], ids=["scale-beside-weight", "scale-in-another-shard"])
@pytest.mark.parametrize("variant", ["Flash", "Flash-Base"])
def test_changed_blocks_get_fresh_scales_and_the_rest_stays(variant: str, split: bool, tmp_path: Path) -> None:
    source = make_toy(tmp_path / "hf", variant, 31)
    if split:
        source = split_shards(source, tmp_path / "split")
    changes = {
        "layers.1.ffn.experts.3.w1.weight": 0.3,
        "layers.2.attn.wq_b.weight": 0.2,
        "layers.4.attn.indexer.wq_b.weight": 0.5,
        "mtp.0.e_proj.weight": 0.1,
        "layers.3.ffn.gate.bias": 0.1,
        "norm.weight": 0.2,
    }
    changed = train(source, tmp_path, changes)
    assert changed.keys() == changes.keys()
    report = export_hf(tmp_path / "after", tmp_path / "out", source)
    before, after = load(source), load(tmp_path / "out")
    assert before.keys() == after.keys()
    expected, other_scales = dict(before), []
    for name, values in changed.items():
        scale = name.removesuffix(".weight") + ".scale"
        if scale not in before:
            expected[name] = values.to(before[name].dtype)
            continue
        old = before[scale] if variant == "Flash-Base" else before[scale].view(torch.uint8)
        if before[name].dtype == torch.int8:
            codes, fresh = reference.encode_mxfp4(values, old)
        else:
            codes, fresh = reference.encode_fp8(values, old, "F32" if variant == "Flash-Base" else "F8_E8M0")
        expected[name], expected[scale] = codes.view(before[name].dtype), fresh.view(before[scale].dtype)
        other_scales.append(not torch.equal(expected[scale].view(torch.uint8), before[scale].view(torch.uint8)))
    assert any(other_scales)
    for name, tensor in expected.items():
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    rounded = {k for k, s in report.encoded.items() if s.fresh}
    assert rounded == {"ffn.experts.w1", "attn.wq_b", "attn.indexer.wq_b", "mtp.e_proj"}
    assert all(s.kept and s.rounded_values and s.max_abs_error > 0 for k, s in report.encoded.items() if k in rounded)
    differing = {d.name for d in verify(source, tmp_path / "out", "bytes").differences}
    assert differing == set(changes)


def test_trap66_verify_sees_a_change_of_one_unit_in_the_last_place(tmp_path: Path) -> None:
    source = make_toy(tmp_path / "hf", "Flash", 8)
    import_hf(source, tmp_path / "m")
    export_hf(tmp_path / "m", tmp_path / "other", source)
    file = next(f for f in sorted((tmp_path / "other").glob("*.safetensors")) if "00004" in f.name)
    with safe_open(file, "np") as opened:
        name = next(n for n in opened.keys() if n.endswith("attn.attn_sink"))  # noqa: SIM118
    header = int.from_bytes(file.read_bytes()[:8], "little")
    place = json.loads(file.read_bytes()[8 : 8 + header])[name]["data_offsets"][0]
    data = bytearray(file.read_bytes())
    data[8 + header + place] ^= 1
    file.write_bytes(data)
    for level in ("values", "bytes"):
        report = verify(source, tmp_path / "other", level)
        assert [d.name for d in report.differences] == [name], level
    assert verify(source, tmp_path / "other", "names").same
    assert not verify(tmp_path / "m", tmp_path / "other", "values").same


def test_minus_zero_is_a_difference(tmp_path: Path) -> None:
    source = make_toy(tmp_path / "hf", "Flash-BF16", 8)
    changed = make_toy(tmp_path / "other", "Flash-BF16", 8)
    file = changed / "model-00001-of-00009.safetensors"
    tensors = load_file(file)
    tensors["embed.weight"][3, 5] = 0.0
    save_file(tensors, file)
    twin = load_file(source / file.name)
    twin["embed.weight"][3, 5] = -0.0
    save_file(twin, source / file.name)
    assert np.signbit(twin["embed.weight"][3, 5].float().item())
    assert [d.name for d in verify(source, changed, "values").differences] == ["embed.weight"]


def test_float32_training_is_refused_or_rounded_on_request(tmp_path: Path) -> None:
    source = make_toy(tmp_path / "hf", "Flash-BF16", 8)
    file = source / "model-00002-of-00009.safetensors"
    tensors = load_file(file)
    name = "layers.0.attn.wq_a.weight"
    tensors[name] = tensors[name].float() + 1e-6
    save_file(tensors, file)
    with pytest.raises(BridgeError, match=r"layers\.0\.attn\.wq_a\.weight.*round.*--allow-lossy"):
        import_hf(source, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    report = import_hf(source, tmp_path / "m", allow_lossy=True)
    assert report.rounded["attn.wq_a"] > 0
