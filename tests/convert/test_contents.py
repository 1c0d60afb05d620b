"""`dsv4 inspect --deep`: what other tools leave in a checkpoint's values is found, and sound ones are clean."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import damage
import numpy as np
import pytest
from typer.testing import CliRunner

from dsv4_bridge import examine, import_hf, make_toy
from dsv4_bridge.cli.app import app
from dsv4_bridge.convert.contents import ContentsReport
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny

Spoil = Callable[[np.ndarray], np.ndarray]
EXPERT, HASH = "layers.2.ffn.experts.5.w1", "layers.0.ffn.gate.tid2eid"
KINDS = {
    "I8": np.uint8,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "BF16": "<u2",
    "F32": "<f4",
    "I64": "<i8",
    "I32": "<i4",
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("contents")
    many = replace_spec(
        tiny(VARIANTS["Pro"]), n_routed_experts=384, num_hidden_layers=1, compress_ratios=(0, 0), num_hash_layers=1
    )
    return {
        "Flash": make_toy(folder / "flash", "Flash", 31),
        "Base": make_toy(folder / "base", "Flash-Base", 32),
        "many": make_toy(folder / "many", "Pro", 33, spec=many),
    }


def spoilt(source: Path, out: Path, changes: dict[str, Spoil]) -> Path:
    """A copy in which these tensors are changed."""
    folder, left = damage.linked(source, out), dict(changes)
    for path in sorted(folder.glob("*.safetensors")):
        header, data = damage.header_of(path)
        changed = bytearray(data)
        for name in [n for n in header if n in left]:
            dtype, shape = KINDS[header[name]["dtype"]], header[name]["shape"]
            begin, end = header[name]["data_offsets"]
            values = left.pop(name)(np.frombuffer(data[begin:end], dtype).reshape(shape).copy())
            changed[begin:end] = values.reshape(shape).astype(dtype).tobytes()
        damage.put(path, damage.with_header(header, bytes(changed)))
    assert not left
    return folder


def found(report: ContentsReport) -> dict[str, set[str]]:
    kinds: dict[str, set[str]] = {}
    for finding in report.findings:
        kinds.setdefault(finding.kind, set()).update(finding.names)
    return kinds


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (damage.replace("norm.weight", "F16"), "norm.weight"),
        (damage.replace("norm.weight", shape=[3]), "norm.weight"),
        (damage.replace(HASH, "U8"), HASH),
        (damage.replace(f"{EXPERT}.scale", "U8"), f"{EXPERT}.weight"),
        (damage.drop(f"{EXPERT}.scale"), f"{EXPERT}.weight"),
        (damage.drop(f"{EXPERT}.scale", f"{EXPERT}.weight"), f"{EXPERT}.weight"),
        (damage.add("norm.other"), None),
    ],
)
def test_what_is_there_is_read_where_the_headers_have_findings(
    change: Callable[[damage.Shards], None], lost: str | None, toys: dict[str, Path], tmp_path: Path
) -> None:
    folder = damage.linked(toys["Flash"], tmp_path / "toy")
    damage.edit(change)(folder)
    assert examine(folder).tensors == examine(toys["Flash"]).tensors - (lost is not None)
    done = CliRunner().invoke(app, ["inspect", str(folder), "--deep"])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.output
    assert (lost or "norm.other").removesuffix(".weight").rpartition(".")[2] in done.output


def test_what_is_there_is_read_where_a_key_of_megatron_is_gone(toys: dict[str, Path], tmp_path: Path) -> None:
    import_hf(toys["Flash"], tmp_path / "megatron")
    path = tmp_path / "megatron/iter_0000000/.metadata"
    whole = examine(tmp_path / "megatron").tensors
    table = pickle.loads(path.read_bytes())
    gone = "decoder.final_layernorm.weight"
    del table.state_dict_metadata[gone]
    table.storage_data = {i: where for i, where in table.storage_data.items() if i.fqn != gone}
    path.write_bytes(pickle.dumps(table, 2))
    assert examine(tmp_path / "megatron").tensors == whole - 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_toys_are_clean(variant: str, tmp_path: Path) -> None:
    report = examine(make_toy(tmp_path / "toy", variant, 7))
    assert report.sound and report.tensors > 300, report.findings
    assert (report.blocks > 0) == (not variant.endswith("BF16"))


def test_a_megatron_checkpoint_is_read_too(toys: dict[str, Path], tmp_path: Path) -> None:
    import_hf(toys["Flash"], tmp_path / "sound")
    assert examine(tmp_path / "sound").sound
    same = spoilt(toys["Flash"], tmp_path / "spoilt", {"layers.2.attn.compressor.wkv.weight": np.zeros_like})
    import_hf(same, tmp_path / "megatron")
    assert found(examine(tmp_path / "megatron")) == {"zeros": {"layers.2.attn.compressor.wkv.weight"}}


def through_bf16(ids: np.ndarray) -> np.ndarray:
    bits = ids.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.view(np.float32).astype(ids.dtype)


def first_twice(ids: np.ndarray) -> np.ndarray:
    ids[3, 1] = ids[3, 0]
    return ids


def set_at(value: float, *at: int) -> Spoil:
    def change(values: np.ndarray) -> np.ndarray:
        values[at] = value
        return values

    return change


PLANTED: dict[str, tuple[str, str, Spoil, str]] = {
    # what: toy, tensor, how, kind of finding
    "an id beyond the experts": ("Flash", HASH, set_at(8, 4, 1), "ids"),
    "a negative id": ("Flash", HASH, set_at(-1, 4, 1), "ids"),
    "an expert twice in a row": ("Flash", HASH, first_twice, "ids"),
    "a table of zeros": ("Flash", HASH, np.zeros_like, "ids"),
    "a table through bf16": ("many", HASH, through_bf16, "ids"),
    "a table through bf16 without its last expert": (
        "many",
        HASH,
        lambda ids: through_bf16(np.where(ids >= 383, 1, ids)),
        "ids",
    ),
    "a scale of NaN": ("Flash", f"{EXPERT}.scale", set_at(255, 1, 0), "NaN"),
    "a scale out of range": ("Flash", "layers.1.attn.wq_a.scale", set_at(1, 0, 0), "scale"),
    "scales copied as numbers": (
        "Base",
        f"{EXPERT}.scale",
        lambda scales: (np.log2(scales).round() + 127).astype(np.float32),
        "scale",
    ),
    "a NaN code": ("Flash", "layers.1.attn.wq_a.weight", set_at(0x7F, 2, 3), "NaN"),
    "an infinite float32": ("Flash", "layers.1.attn.attn_sink", set_at(np.inf, 2), "NaN"),
    "a matrix of zeros": ("Flash", "layers.3.ffn.gate.weight", np.zeros_like, "zeros"),
    "a norm of ones": ("Flash", "mtp.0.enorm.weight", lambda x: np.full_like(x, 0x3F80), "initial"),
    "values 64 times as large": ("Flash", f"{EXPERT}.scale", lambda scales: scales + 6, "apart"),
    "scales twice too large": (
        "Flash",
        f"{EXPERT}.weight",
        # codes of 3, 4 and 6 become 1.5, 2 and 3: the group's largest is below 3 where it was
        lambda x: (x & 0x88) | np.minimum(x & 7, 4) | np.minimum(x >> 4 & 7, 4) << 4,
        "coarse",
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_is_found_and_named(what: str, toys: dict[str, Path], tmp_path: Path) -> None:
    toy, name, spoil, kind = PLANTED[what]
    there = spoilt(toys[toy], tmp_path / "toy", {name: spoil})
    item = name.replace(".scale", ".weight")
    kinds = found(examine(there))
    assert kinds.pop(kind) == {item}
    assert not kinds.keys() - {"apart", "scale"}, kinds


def test_a_tensor_that_is_there_twice(toys: dict[str, Path], tmp_path: Path) -> None:
    held = {n: v for tensors in damage.load(toys["Flash"]).values() for n, v in tensors.items()}
    changes: dict[str, Spoil] = {}
    for end in ("weight", "scale"):
        dtype, shape, data = held[f"{EXPERT}.{end}"]
        other = np.frombuffer(data, KINDS[dtype]).reshape(shape)
        changes[f"layers.3.ffn.experts.1.w1.{end}"] = lambda _, other=other: other
    report = examine(spoilt(toys["Flash"], tmp_path / "toy", changes))
    (finding,) = report.findings
    assert finding.kind == "repeated" and finding.names == ("layers.3.ffn.experts.1.w1.weight",)
    assert f"the same bytes as {EXPERT}.weight" in finding.what


def test_scales_of_zeros_are_one_and_no_codes(toys: dict[str, Path], tmp_path: Path) -> None:
    changes: dict[str, Spoil] = {f"{EXPERT}.weight": np.zeros_like, f"{EXPERT}.scale": np.ones_like}
    assert found(examine(spoilt(toys["Base"], tmp_path / "toy", changes))) == {"zeros": {f"{EXPERT}.weight"}}


def test_dropped_signs_of_zeros(toys: dict[str, Path], tmp_path: Path) -> None:
    def positive(codes: np.ndarray) -> np.ndarray:
        codes = np.where(codes & 0x0F == 0x08, codes & 0xF0, codes)
        return np.where(codes & 0xF0 == 0x80, codes & 0x0F, codes).astype(np.uint8)

    packed = [n for tensors in damage.load(toys["Flash"]).values() for n, (d, *_) in tensors.items() if d == "I8"]
    report = examine(spoilt(toys["Flash"], tmp_path / "toy", dict.fromkeys(packed, positive)))
    assert found(report) == {"signs": set(packed)}


def test_float32_that_went_through_bf16(toys: dict[str, Path], tmp_path: Path) -> None:
    wide = [n for tensors in damage.load(toys["Flash"]).values() for n in tensors if n.endswith("hc_attn_fn")]
    assert len(wide) > 1

    def cut(values: np.ndarray) -> np.ndarray:
        return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)

    report = examine(spoilt(toys["Flash"], tmp_path / "toy", dict.fromkeys(wide, cut)))
    assert found(report) == {"rounded": set(wide)}


def test_the_command(toys: dict[str, Path], tmp_path: Path) -> None:
    runner = CliRunner()
    sound = runner.invoke(app, ["inspect", str(toys["Flash"]), "--deep"])
    assert sound.exit_code == 0 and "nothing in them is amiss" in sound.stdout
    there = spoilt(toys["Flash"], tmp_path / "toy", {HASH: np.zeros_like})
    told = runner.invoke(app, ["inspect", str(there), "--deep"])
    assert told.exit_code == 1 and f"{HASH}: every id is 0: the table was never loaded" in told.stdout
    facts = json.loads(runner.invoke(app, ["inspect", str(there), "--deep", "--json"]).stdout)
    assert not facts["sound"] and facts["contents"]["findings"][0]["names"] == [HASH]
    assert facts["contents"]["bytes"] == facts["bytes"]
