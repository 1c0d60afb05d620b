"""Bad values and bad Megatron folders: one clear message by name, nothing written, nothing run."""

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import Shards, drop, edit, holder, linked, listing, one_message, poke, put, refuses, spoiled

from conftest import dsv4
from dsv4_bridge import Options, export_hf, import_hf, inspect, make_toy, repack

# ---------------------------------------------------------------- values that cannot be


WEIGHT, SCALE = "layers.2.attn.wq_a.weight", "layers.2.attn.wq_a.scale"
EXPERT = "layers.2.ffn.experts.3.w2.scale"
TABLE = "layers.0.ffn.gate.tid2eid"
VALUES: dict[str, tuple[str, Callable[[Shards], None], str]] = {
    "NaN code": ("Flash", poke(WEIGHT, b"\x7f", 700), WEIGHT),
    "negative NaN code": ("Flash", poke(WEIGHT, b"\xff", 0), WEIGHT),
    "NaN scale": ("Flash", poke(SCALE, b"\xff", 1), WEIGHT),
    "scale beyond bf16": ("Flash", poke(SCALE, b"\xfe", 0), WEIGHT),
    "scale too small for bf16": ("Flash", poke(SCALE, b"\x00", 0), WEIGHT),
    "NaN scale of an expert": ("Flash", poke(EXPERT, b"\xff", 5), EXPERT.replace("scale", "weight")),
    "expert scale beyond bf16": ("Flash", poke(EXPERT, b"\xfe", 5), EXPERT.replace("scale", "weight")),
    "float32 scale NaN": ("Flash-Base", poke(SCALE, struct.pack("<f", float("nan"))), WEIGHT),
    "float32 scale infinite": ("Flash-Base", poke(SCALE, struct.pack("<f", float("inf"))), WEIGHT),
    "float32 scale negative": ("Flash-Base", poke(SCALE, struct.pack("<f", -1.0)), WEIGHT),
    "float32 scale subnormal": ("Flash-Base", poke(SCALE, struct.pack("<f", 1e-40)), WEIGHT),
    "expert id negative": ("Flash", poke(TABLE, struct.pack("<q", -1), 8), f"{TABLE}: expert ids from -1 to 7"),
    "expert id one too large": ("Flash", poke(TABLE, struct.pack("<q", 8), 8), f"{TABLE}: expert ids from 0 to 8"),
    "expert id beyond int32": ("Flash", poke(TABLE, struct.pack("<q", 1 << 31)), f"{TABLE}: .* to 2147483648"),
    "expert id beyond int32, low half sound": ("Flash", poke(TABLE, struct.pack("<q", 1 << 32)), f"{TABLE}: .*"),
}


@pytest.fixture(scope="session")
def toys(toy_flash: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = make_toy(tmp_path_factory.mktemp("bad") / "base", "Flash-Base", 7)
    return {"Flash": toy_flash, "Flash-Base": base}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("case", VALUES)
def test_trap33_39_values_that_cannot_be_are_refused_by_name(
    case: str, workers: int, tmp_path: Path, toys: dict[str, Path]
) -> None:
    variant, change, message = VALUES[case]
    folder = linked(toys[variant], tmp_path / "hf")
    edit(change)(folder)
    before = listing(tmp_path)
    refuses(lambda: import_hf(folder, tmp_path / "a" / "out", Options(workers=workers)), message)
    assert listing(tmp_path) == before
    (tmp_path / "empty").mkdir()
    refuses(lambda: import_hf(folder, tmp_path / "empty", Options(workers=workers)), message)
    assert (tmp_path / "empty").is_dir() and not list((tmp_path / "empty").iterdir())


def test_trap25_an_expert_id_out_of_range_is_refused_by_the_command(tmp_path: Path, toy_flash: Path) -> None:
    folder = linked(toy_flash, tmp_path / "hf")
    edit(poke(TABLE, struct.pack("<q", 8)))(folder)
    text = one_message(dsv4("import", folder, tmp_path / "out"))
    assert TABLE in text and "expected 0 to 7" in text and not (tmp_path / "out").exists()


def test_trap34_int8_without_its_scale_is_refused(tmp_path: Path, toy_flash: Path) -> None:
    folder = linked(toy_flash, tmp_path / "hf")
    scales = [f"layers.{n}.ffn.experts.{e}.w1.scale" for n in range(6) for e in range(8)]
    edit(drop(*scales))(folder)
    before = listing(tmp_path)
    for call in (lambda: import_hf(folder, tmp_path / "out"), lambda: repack(folder, tmp_path / "out", "bf16")):
        refuses(call, r"scale +ffn\.experts\.w1: 48 \(.*\) is I8 and has no scale beside it")
    assert listing(tmp_path) == before


def test_trap33_an_e8m0_scale_stored_as_another_type_is_refused(tmp_path: Path, toy_flash: Path) -> None:
    folder = linked(toy_flash, tmp_path / "hf")

    def as_numbers(shards: Shards) -> None:
        tensors = holder(shards, SCALE)
        _, shape, raw = tensors[SCALE]
        tensors[SCALE] = ("BF16", shape, b"\0\0" * len(raw))

    edit(as_numbers)(folder)
    refuses(lambda: import_hf(folder, tmp_path / "out"), r"is F8_E4M3 with a BF16 scale, known are")


# ---------------------------------------------------------------- Megatron folders

ITERATION = "iter_0000000"


class Malice:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_metadata_file_that_runs_code_is_refused_and_not_run(tmp_path: Path, toy_megatron: Path) -> None:
    mark = tmp_path / "executed"
    for protocol in (2, 4, 5):
        folder = linked(toy_megatron, tmp_path / f"m{protocol}")
        put(folder / ITERATION / ".metadata", pickle.dumps(Malice(mark), protocol))
        before = listing(tmp_path)
        refuses(lambda path=folder: inspect(path), r"names '(posix|nt)\.mkdir'.*refusing to run code")
        refuses(lambda path=folder: export_hf(path, tmp_path / "out", None, "bf16"), "refusing to run code")
        assert listing(tmp_path) == before and not mark.exists()
    text = one_message(dsv4("export", tmp_path / "m4", tmp_path / "out", "--encoding", "bf16"))
    assert "refusing to run code" in text and not mark.exists() and not (tmp_path / "out").exists()
    pickle.loads((tmp_path / "m4" / ITERATION / ".metadata").read_bytes())
    assert mark.exists()  # it would have


def test_an_item_that_runs_code_is_refused_and_not_run(tmp_path: Path, toy_megatron: Path) -> None:
    mark, folder = tmp_path / "executed", linked(toy_megatron, tmp_path / "m")
    for path in (folder / ITERATION).glob("*.distcp"):
        raw = path.read_bytes()
        hostile = pickle.dumps(Malice(mark), 2)
        at = raw.find(b"\x80\x02c")
        while at >= 0:
            raw = raw[:at] + hostile + raw[at + len(hostile) :]
            at = raw.find(b"\x80\x02ctorch", at + len(hostile))
        put(path, raw)
    before = listing(tmp_path)
    refuses(lambda: export_hf(folder, tmp_path / "out", None, "bf16"), "refusing to run code")
    assert listing(tmp_path) == before and not mark.exists()


def test_a_run_config_that_runs_code_is_refused_and_not_run(tmp_path: Path, toy_megatron: Path) -> None:
    mark, folder = tmp_path / "executed", linked(toy_megatron, tmp_path / "m")
    path = folder / ITERATION / "run_config.yaml"
    put(path, path.read_bytes() + f"x: !!python/object/apply:os.mkdir ['{mark}']\n".encode())
    refuses(lambda: inspect(folder), r"run_config\.yaml: not plain YAML")
    assert not mark.exists()


def fewer_keys(folder: Path) -> None:
    """The same checkpoint without its final norm, as a training run that lost it would save it."""
    path = folder / ITERATION / ".metadata"
    put(path, path.read_bytes().replace(b"decoder.final_layernorm.weight", b"decoder.final_layernorm.other_"))


MEGATRON: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor under another name": (
        fewer_keys,
        r"missing +norm: 1 \(decoder\.final_layernorm\.weight\).*unknown +no tensor of this model: 1",
    ),
    "no .metadata": (
        lambda f: (f / ITERATION / ".metadata").unlink(), r"says 0, but iter_0000000/\.metadata is not there",
    ),
    "empty .metadata": (lambda f: put(f / ITERATION / ".metadata", b""), r"damaged pickle"),
    "truncated .metadata": (
        lambda f: put(f / ITERATION / ".metadata", (f / ITERATION / ".metadata").read_bytes()[:-9]), r"damaged pickle",
    ),
    "missing data file": (lambda f: (f / ITERATION / "__0_3.distcp").unlink(), r"__0_3\.distcp: not there, but"),
    "truncated data file": (
        lambda f: put(f / ITERATION / "__0_3.distcp", (f / ITERATION / "__0_3.distcp").read_bytes()[:-1]),
        r"__0_3\.distcp: \d+ bytes, but .* ends at byte \d+; the file is truncated",
    ),
    "no run_config.yaml": (
        lambda f: (f / ITERATION / "run_config.yaml").unlink(), r"no run_config\.yaml of this tool.*--like",
    ),
    "run_config.yaml of another format": (
        lambda f: put(f / ITERATION / "run_config.yaml", "dsv4_bridge: {format: 99}\n"), r"is not format 1",
    ),
    "run_config.yaml that is no YAML": (
        lambda f: put(f / ITERATION / "run_config.yaml", "a: [\n"), r"run_config\.yaml: not plain YAML",
    ),
    "tracker that is no number": (
        lambda f: put(f / "latest_checkpointed_iteration.txt", "../../etc"), r"it says '\.\./\.\./etc'; expected",
    ),
    "tracker of an iteration that is not there": (
        lambda f: put(f / "latest_checkpointed_iteration.txt", "100"), r"says 100, but iter_0000100/\.metadata is not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MEGATRON)
def test_a_bad_megatron_folder_is_refused_and_nothing_is_written(case: str, tmp_path: Path, toy_megatron: Path) -> None:
    folder, message = spoiled(toy_megatron, tmp_path / "m", MEGATRON[case])
    before = listing(tmp_path)
    refuses(lambda: export_hf(folder, tmp_path / "new" / "out", None, "bf16"), message)
    assert listing(tmp_path) == before


def test_damaged_data_is_refused_by_name(tmp_path: Path, toy_megatron: Path) -> None:
    folder = linked(toy_megatron, tmp_path / "m")
    path = folder / ITERATION / "__0_3.distcp"
    put(path, bytes(path.stat().st_size))
    before = listing(tmp_path)
    refuses(lambda: export_hf(folder, tmp_path / "out", None, "bf16"), r"reading '.*' of .*__0_3\.distcp at byte")
    assert listing(tmp_path) == before


def test_a_like_of_another_model_is_refused(tmp_path: Path, toy_megatron: Path) -> None:
    other = make_toy(tmp_path / "pro", "Pro", 1)
    before = listing(tmp_path)
    refuses(lambda: export_hf(toy_megatron, tmp_path / "out", other), "describe two models")
    assert listing(tmp_path) == before


def test_trap25_a_trained_table_with_ids_out_of_range_is_refused(tmp_path: Path, toy_flash: Path) -> None:
    folder = linked(toy_flash, tmp_path / "hf")
    marked = struct.pack("<6q", 7, 1, 7, 2, 7, 3)  # findable once it is int32
    edit(poke(TABLE, marked))(folder)
    import_hf(folder, tmp_path / "m")
    small = struct.pack("<6i", 7, 1, 7, 2, 7, 3)
    hits = [p for p in (tmp_path / "m" / ITERATION).glob("*.distcp") if small in p.read_bytes()]
    assert len(hits) == 1
    put(hits[0], hits[0].read_bytes().replace(small, struct.pack("<6i", 7, 1, 7, 2, 7, 8), 1))
    refuses(lambda: export_hf(tmp_path / "m", tmp_path / "out", folder), f"{TABLE}: expert ids from 0 to 8")
    assert not (tmp_path / "out").exists()
