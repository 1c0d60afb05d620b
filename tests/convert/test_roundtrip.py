"""toy -> import -> export --like -> the very same files."""

from pathlib import Path

import pytest

from conftest import dsv4, fresh_dsv4, same_files
from dsv4_bridge import BridgeError, Options, export_hf, import_hf, inspect, make_toy, repack, verify
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny


# Every variant of both shapes and with both payloads; that each shape meets each payload is left to `make test-all`.
@pytest.mark.parametrize(
    ("payload", "ragged"),
    [
        pytest.param("natural", False, id="natural-aligned"),
        pytest.param("extreme", True, id="extreme-ragged"),
        pytest.param("natural", True, id="natural-ragged", marks=pytest.mark.slow),
        pytest.param("extreme", False, id="extreme-aligned", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_identical(variant: str, ragged: bool, payload: str, tmp_path: Path) -> None:
    spec = replace_spec(tiny(VARIANTS[variant], ragged), n_routed_experts=4)
    source = make_toy(tmp_path / "hf", variant, 3, spec=spec, payload=payload)
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back", source)
    assert same_files(source, tmp_path / "back") == []
    report = verify(source, tmp_path / "back", "bytes")
    assert report.same and report.total().identical_bytes == report.total().bytes
    assert verify(source, tmp_path / "megatron", "values").same
    assert verify(tmp_path / "megatron", source, "bytes").same
    again = tmp_path / "again"
    assert inspect(source).variant == inspect(tmp_path / "megatron").variant
    import_hf(tmp_path / "back", again, Options(workers=3))
    assert same_files(tmp_path / "megatron", again) == []


def test_export_to_bf16_needs_no_like(tmp_path: Path, toy_flash: Path, toy_megatron: Path) -> None:
    export_hf(toy_megatron, tmp_path / "bf16", None, "bf16")
    assert inspect(tmp_path / "bf16").encodings == VARIANTS["Flash-BF16"].encodings
    assert verify(tmp_path / "bf16", toy_flash, "values").same
    repack(toy_flash, tmp_path / "repacked", "bf16")
    assert not [f for f in same_files(tmp_path / "bf16", tmp_path / "repacked") if f.endswith("safetensors")]


def test_source_encoding_needs_like(tmp_path: Path, toy_megatron: Path) -> None:
    with pytest.raises(BridgeError, match="--like"):
        export_hf(toy_megatron, tmp_path / "out")


def test_fp8_repack_of_natural_weights_is_lossless_and_certified(tmp_path: Path, toy_flash: Path) -> None:
    report = repack(toy_flash, tmp_path / "fp8", "fp8")
    assert set(report.recoded) == {"ffn.experts.w1", "ffn.experts.w2", "ffn.experts.w3"}
    assert all(c.lossless and c.blocks == c.exact for c in report.recoded.values())
    assert verify(toy_flash, tmp_path / "fp8", "values").same
    assert inspect(tmp_path / "fp8").encodings == {**VARIANTS["Flash-FP8"].encodings, "expert": "fp8_f32"}
    import_hf(tmp_path / "fp8", tmp_path / "m")
    export_hf(tmp_path / "m", tmp_path / "back", tmp_path / "fp8")
    assert same_files(tmp_path / "fp8", tmp_path / "back") == []


def test_trap40_lossy_repack_is_refused_by_name_unless_asked(tmp_path: Path) -> None:
    source = make_toy(tmp_path / "hf", "Flash", 1, payload="extreme")
    with pytest.raises(BridgeError, match=r"layers\.0\.ffn\.experts\.0\.w1\.weight.*allow-lossy"):
        repack(source, tmp_path / "fp8", "fp8")
    assert not (tmp_path / "fp8").exists()
    report = repack(source, tmp_path / "fp8", "fp8", allow_lossy=True)
    lossy = report.recoded["ffn.experts.w1"]
    assert not lossy.lossless and lossy.rounded_values > 0 and lossy.max_abs_error > 0


def test_passengers_travel_and_can_be_dropped(tmp_path: Path) -> None:
    source = make_toy(tmp_path / "hf", "Flash-0731", 5)
    assert len(inspect(source).passengers) == len([n for n in inspect(source).passengers if n.startswith("mtp.")]) > 0
    import_hf(source, tmp_path / "m")
    # without --like the passengers come from what travelled along
    export_hf(tmp_path / "m", tmp_path / "bf16", None, "bf16")
    assert verify(source, tmp_path / "bf16", "values").same
    export_hf(tmp_path / "m", tmp_path / "dropped", source, drop_passengers=True)
    assert inspect(tmp_path / "dropped").draft == "none" and inspect(tmp_path / "dropped").sound
    import_hf(source, tmp_path / "m2", drop_passengers=True)
    assert inspect(tmp_path / "m2").draft == "none"


def test_the_command_end_to_end(tmp_path: Path) -> None:
    hf, megatron, back = tmp_path / "hf", tmp_path / "m", tmp_path / "back"
    assert fresh_dsv4("toy", hf, "--variant", "pro", "--seed", "4").returncode == 0
    assert fresh_dsv4("import", hf, megatron, "--workers", "2").returncode == 0
    assert fresh_dsv4("export", megatron, back, "--like", hf).returncode == 0
    done = fresh_dsv4("verify", hf, back, "--level", "bytes")
    assert done.returncode == 0 and "100 % of bytes" in done.stdout
    assert fresh_dsv4("inspect", megatron).returncode == 0


def test_a_dry_run_converts_everything_and_writes_nothing(tmp_path: Path, toy_flash: Path, toy_megatron: Path) -> None:
    dry = Options(dry_run=True)
    whole = import_hf(toy_flash, tmp_path / "whole")
    assert import_hf(toy_flash, tmp_path / "none", dry).to_json() == whole.to_json()
    assert export_hf(toy_megatron, tmp_path / "none", toy_flash, "source", dry).encoded["attn.wq_a"].kept
    assert repack(toy_flash, tmp_path / "none", "fp8", dry).recoded["ffn.experts.w1"].lossless
    done = dsv4("import", toy_flash, tmp_path / "none", "--dry-run")
    assert done.returncode == 0 and "nothing written" in done.stdout
    lossy = make_toy(tmp_path / "lossy", "Flash", 1, payload="extreme")
    with pytest.raises(BridgeError, match="allow-lossy"):
        repack(lossy, tmp_path / "none", "fp8", dry)
    assert not (tmp_path / "none").exists()
