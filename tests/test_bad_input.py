"""Bad input: one clear message, exit code 2, nothing written or changed."""

import contextlib
import errno
import json
import os
import pickle
import re
import resource
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import DATA, dsv4, same_files
from dsv4_bridge import BridgeError, Options, export_hf, import_hf, inspect, make_toy, repack, verify

INDEX = "model.safetensors.index.json"
Tensors = dict[str, tuple[str, list[int], bytes]]  # name -> dtype, shape, data
Shards = dict[str, Tensors]


# ---------------------------------------------------------------- making it bad


def linked(source: Path, target: Path) -> Path:
    """A copy by hard links; replace files in it, never write into them."""
    return shutil.copytree(source, target, copy_function=os.link)


def put(path: Path, data: bytes | str) -> None:
    """Replace a file of a linked copy."""
    path.unlink(missing_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def load(folder: Path) -> Shards:
    shards: Shards = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, data = header_of(path)
        header.pop("__metadata__", None)
        tensors = shards.setdefault(path.name, {})
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = (entry["dtype"], entry["shape"], data[begin:end])
    return shards


def save(folder: Path, shards: Shards) -> None:
    weight_map = {}
    for file, tensors in shards.items():
        header, data = {}, b""
        for name, (dtype, shape, raw) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
            weight_map[name] = file
        put(folder / file, with_header(header, data))
    put(folder / INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))


def holder(shards: Shards, name: str) -> Tensors:
    return next(t for t in shards.values() if name in t)


def edit(change: Callable[[Shards], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shards = load(folder)
        change(shards)
        save(folder, shards)

    return apply


def drop(*names: str) -> Callable[[Shards], None]:
    def change(shards: Shards) -> None:
        for name in names:
            del holder(shards, name)[name]

    return change


def add(name: str, dtype: str = "BF16", shape: tuple[int, ...] = (4,), size: int = 8) -> Callable[[Shards], None]:
    def change(shards: Shards) -> None:
        next(iter(shards.values()))[name] = (dtype, list(shape), bytes(size))

    return change


def replace(name: str, dtype: str | None = None, shape: list[int] | None = None) -> Callable[[Shards], None]:
    """Another dtype or shape; the data is cut or padded to it."""

    def change(shards: Shards) -> None:
        tensors = holder(shards, name)
        old_dtype, old_shape, raw = tensors[name]
        kind, dims = dtype or old_dtype, shape or old_shape
        size = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "I32": 4}.get(kind, 1) * int(np.prod(dims))
        tensors[name] = (kind, dims, raw[:size].ljust(size, b"\0"))

    return change


def poke(name: str, value: bytes, at: int = 0) -> Callable[[Shards], None]:
    """Other bytes inside a tensor."""

    def change(shards: Shards) -> None:
        tensors = holder(shards, name)
        dtype, shape, raw = tensors[name]
        tensors[name] = (dtype, shape, raw[:at] + value + raw[at + len(value) :])

    return change


def several(*changes: Callable[[Shards], None]) -> Callable[[Shards], None]:
    return lambda shards: [c(shards) for c in changes] and None


def reconfig(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_bytes()) | changes
        put(folder / "config.json", json.dumps({k: v for k, v in config.items() if v is not Ellipsis}))

    return apply


def reindex(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_bytes())
        change(index["weight_map"])
        put(folder / INDEX, json.dumps(index))

    return apply


def first_shard(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        put(path, change(path.read_bytes()))

    return apply


def a_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[2]
        header, data = header_of(path)
        put(path, with_header(change(header) or header, data))

    return apply


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def refuses(call: Callable[[], Any], message: str) -> str:
    with pytest.raises(BridgeError) as caught:
        call()
    text = str(caught.value)
    assert re.search(message, text, re.DOTALL), f"expected {message!r} in:\n{text}"
    assert "Traceback" not in text and len(text) < 20_000
    return text


# ---------------------------------------------------------------- Hugging Face folders

E0 = "layers.0.ffn.experts"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensors, all of them by row": (
        edit(drop("norm.weight", *(f"{E0}.{e}.w1.weight" for e in range(5)), f"{E0}.7.w2.weight", f"{E0}.7.w2.scale")),
        r"missing +ffn\.experts\.w1: 5 \(layers\.0\.ffn\.experts\.0\.w1\.weight, .* …\).*"
        r"missing +ffn\.experts\.w2: 1 \(layers\.0\.ffn\.experts\.7\.w2\.weight\).*missing +norm: 1 \(norm\.weight\)"
        r"|missing +norm: 1.*missing +ffn\.experts\.w1: 5.*missing +ffn\.experts\.w2: 1",
    ),
    "extra tensors, all of them by name": (
        edit(several(add("layers.0.attn.extra"), add("layers.3.attn.extra"), add("bias"))),
        r"unknown +layers\.N\.attn\.extra: 2 \(layers\.0\.attn\.extra, layers\.3\.attn\.extra\)"
        r".*unknown +bias: 1 \(bias\)",
    ),
    "missing MTP block": (
        edit(lambda s: [t.pop(n) for t in s.values() for n in list(t) if n.startswith("mtp.")] and None),
        r"missing +mtp\..*num_nextn_predict_layers 0 in config\.json",
    ),
    "wrong shape": (
        edit(replace("layers.1.attn_norm.weight", shape=[255])),
        r"shape +attn_norm: 1 \(layers\.1\.attn_norm\.weight\) is \[255\], expected \[256\]",
    ),
    "wrong shape of a quantised weight": (
        edit(replace("layers.0.attn.wq_a.weight", shape=[127, 256])),
        r"shape +attn\.wq_a: 1 .* is \[127, 256\], expected \[128, 256\] = \[.*\] as fp8",
    ),
    "wrong shape of a scale": (
        edit(replace("layers.0.attn.wq_a.scale", shape=[1, 1])),
        r"attn\.wq_a: 1 .* scale is \[1, 1\], expected \[1, 2\]",
    ),
    "wrong dtype": (
        edit(replace("layers.1.attn_norm.weight", dtype="F16")),
        r"dtype +attn_norm: 1 \(layers\.1\.attn_norm\.weight\) is F16, expected BF16 or F32",
    ),
    "wrong dtype of a table": (
        edit(replace("layers.0.ffn.gate.tid2eid", dtype="F32")),
        r"dtype .*tid2eid.* is F32, expected I32 or I64",
    ),
    "weight without its scale": (
        edit(drop("layers.0.attn.wq_a.scale", "layers.1.attn.wq_a.scale")),
        r"scale +attn\.wq_a: 2 .* is F8_E4M3 and has no scale beside it",
    ),
    "scale without its weight": (
        edit(drop("layers.0.attn.wq_a.weight")),
        r"missing +attn\.wq_a: 1 .*a scale without its weight: 1 \(layers\.0\.attn\.wq_a\.scale\)",
    ),
    "scale on a tensor that has none": (
        edit(add("layers.0.attn_norm.scale", "F8_E8M0", (1,), 1)),
        r"attn_norm\.scale",
    ),
    "scale of another type": (
        edit(replace("layers.0.attn.wq_a.scale", dtype="I8")),
        r"attn\.wq_a: 1 .* is F8_E4M3 with a I8 scale, known are",
    ),
    "no tensor of this model": (
        edit(lambda s: [t.clear() for t in s.values()] and add("model.layers.0.self_attn.q_proj.weight")(s)),
        r"no tensor has a DeepSeek-V4 name \(found model\.layers\.0\.self_attn\.q_proj\.weight\)",
    ),
    "index names a tensor that no shard has": (
        reindex(lambda m: m.update({"layers.0.more": m["norm.weight"]})),
        r"index and shard headers disagree: 1 not where the index says \(layers\.0\.more\)",
    ),
    "shard holds a tensor that the index lacks": (
        reindex(lambda m: m.pop("norm.weight") and None),
        r"index and shard headers disagree: 1 in a shard but not in the index \(norm\.weight\)",
    ),
    "index names the wrong shard": (
        reindex(lambda m: m.update({"norm.weight": m["embed.weight"], "embed.weight": m["norm.weight"]})),
        r"index and shard headers disagree: 2 not where the index says",
    ),
    "the same tensor in two shards": (
        edit(lambda s: [t.update({"twice": ("U8", [1], b"x")}) for t in list(s.values())[:2]] and None),
        r"tensor 'twice' is in model-00001-.* and in model-00002-",
    ),
    "the same name twice in one header": (
        first_shard(lambda raw: with_header(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"xy")),
        r"the name 'a' is given twice",
    ),
    "missing shard": (
        lambda f: sorted(f.glob("*.safetensors"))[2].unlink(),
        r"1 of \d+ shards that the index names are missing: model-00003-.*finish the download",
    ),
    "no index beside several shards": (
        lambda f: (f / INDEX).unlink(),
        r"shards but no model\.safetensors\.index\.json; the folder is incomplete",
    ),
    "truncated shard": (
        first_shard(lambda raw: raw[:-1]),
        r"model-00001-.*the shard is truncated: its header describes \d+ bytes, it has \d+",
    ),
    "shard cut inside its header": (first_shard(lambda raw: raw[:60]), r"header claims \d+ bytes \(the file has 60\)"),
    "empty shard": (first_shard(lambda raw: b""), r"the file has 0 bytes, too few"),
    "trailing bytes": (first_shard(lambda raw: raw + b"x"), r"the shard has trailing bytes"),
    "absurdly large header": (
        first_shard(lambda raw: struct.pack("<Q", 1 << 62) + raw[8:]),
        r"its header claims 4611686018427387904 bytes .*corrupt, or no safetensors file",
    ),
    "header that is no JSON": (first_shard(lambda raw: raw[:8] + b"\0" + raw[9:]), r"not valid JSON"),
    "header that is a list": (first_shard(lambda raw: with_header([1, 2, 3, 4], b"")), r"expected a JSON object"),
    "header nested without end": (
        first_shard(lambda raw: with_header(b'{"a":' * 200_000, b"")), r"not (usable|valid) JSON",
    ),
    "header entry without a shape": (
        a_header(lambda h: h[max(h)].pop("shape") and None), r"has no usable dtype, shape and data_offsets",
    ),
    "header with a negative size": (
        a_header(lambda h: h[max(h)].update(shape=[-1, 4])), r"has no usable dtype, shape and data_offsets",
    ),
    "header with a shape beyond memory": (
        a_header(lambda h: h[max(h)].update(shape=[1 << 61] * 16)), r"spans \d+ bytes .* expected a huge integer",
    ),
    "header with an unknown dtype": (
        a_header(lambda h: h[max(h)].update(dtype="F4_E2M1FN_X2")), r"has dtype 'F4_E2M1FN_X2'; known are",
    ),
    "header with overlapping tensors": (
        a_header(lambda h: [e.update(data_offsets=[0, e["data_offsets"][1] - e["data_offsets"][0]])
                                for e in h.values()] and None),
        r"begins at byte 0 of the data, expected",
    ),
    "metadata that is no text": (a_header(lambda h: h | {"__metadata__": {"a": 1}}), r"__metadata__ is not"),
    "name with control characters": (
        edit(add("layers.0.\x1b[31m\n.x")), r"unknown +'layers\.N\.\\x1b\[31m\\n\.x': 1",
    ),
    "name with half a character": (
        first_shard(lambda raw: with_header(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"")),
        r"half of a surrogate pair",
    ),
    "index that points above its folder": (
        reindex(lambda m: m.update({"norm.weight": "../norm.safetensors"})),
        r"'norm\.weight' is said to be in '\.\./norm\.safetensors'; a shard is a \.safetensors file of the same folder",
    ),
    "index that points anywhere": (
        reindex(lambda m: m.update({"norm.weight": "/tmp/norm.safetensors"})), r"file of the same folder",
    ),
    "index that points below its folder": (
        reindex(lambda m: m.update({"norm.weight": "sub/norm.safetensors"})), r"file of the same folder",
    ),
    "index with a file name beyond the system's": (
        reindex(lambda m: m.update({"norm.weight": "x" * 5000 + ".safetensors"})), r"file of the same folder",
    ),
    "index that names a pickle": (
        reindex(lambda m: m.update({"norm.weight": "pytorch_model.bin"})), r"file of the same folder",
    ),
    "index without a weight map": (lambda f: put(f / INDEX, "{}"), r"it has no 'weight_map' object"),
    "index that is no JSON": (lambda f: put(f / INDEX, "weights"), r"not valid JSON"),
    "index that is a pipe": (lambda f: pipe(f / INDEX), r"not a regular file"),
    "zip pickle where safetensors belongs": (first_shard(lambda raw: b"PK\3\4" + raw[4:]), r"this is a pickle"),
    "pickle where safetensors belongs": (
        first_shard(lambda raw: pickle.dumps({"a": 1}) + raw), r"this is a pickle .*refusing to load code",
    ),
    "only a pickle in the folder": (
        lambda f: [p.unlink() for p in [*f.glob("*.safetensors"), f / INDEX]]
        and put(f / "pytorch_model.bin", pickle.dumps({})),
        r"pytorch_model\.bin is a pickle and may run code; only safetensors are read",
    ),
    "no weights in the folder": (
        lambda f: [p.unlink() for p in [*f.glob("*.safetensors"), f / INDEX]] and None,
        r"this is not a Hugging Face checkpoint",
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file; a checkpoint"),
    "config.json that is a folder": (
        lambda f: (f / "config.json").rename(f / "moved") and (f / "config.json").mkdir(), r"not a regular file",
    ),
    "config.json that is a pipe": (lambda f: pipe(f / "config.json"), r"not a regular file"),
    "config with a missing field": (reconfig(q_lora_rank=...), r"the field 'q_lora_rank' is missing"),
    "config of another size": (reconfig(hidden_size=512), r"not those that its config\.json implies.*expected \[.*512"),
    "config with more experts": (reconfig(n_routed_experts=9), r"missing +ffn\.experts\.w1: .*experts\.8\.w1"),
    "config that says the experts are FP8": (
        reconfig(expert_dtype="fp8"), r"contradicts the tensors: expert_dtype is 'fp8', .* stored as mxfp4",
    ),
    "config with other tiles": (
        reconfig(quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]}),
        r"contradicts the tensors: weight_block_size is \[32, 32\], expected \[128, 128\]",
    ),
    "config of a DSpark release": (
        reconfig(dspark_block_size=5, dspark_noise_token_id=1, dspark_target_layer_ids=[1], dspark_markov_rank=4,
                 compress_ratios=[0, 0, 4, 128, 4, 128, 0]),
        r"are an MTP block .* config\.json describes a DSpark drafter",
    ),
    "DeepSeek-V4.1": (
        lambda f: put(f / "config.json", (DATA / "DeepSeek-V4.1-Flash.config.transcribed.json").read_bytes()),
        r"this is DeepSeek-V4\.1 \(.*Engram",
    ),
    "Vision-Exp by its config": (reconfig(vision_config={}), r"this is DeepSeek-V4-Flash-Vision-Exp .*vision tower"),
    "Vision-Exp by its tensors": (
        edit(add("layers.3.ffn.gate.bias_vl", "F32", (8,), 32)), r"'layers\.3\.ffn\.gate\.bias_vl' belongs to .*Vision",
    ),
    "another model": (reconfig(model_type="deepseek_v3"), r"model_type is 'deepseek_v3', expected 'deepseek_v4'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_and_nothing_is_written(case: str, tmp_path: Path, toy_flash: Path) -> None:
    spoil, message = BAD[case]
    folder = linked(toy_flash, tmp_path / "hf")
    spoil(folder)
    before = listing(tmp_path)
    refuses(lambda: import_hf(folder, tmp_path / "new" / "out"), message)
    refuses(lambda: repack(folder, tmp_path / "new" / "out", "bf16"), message)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("case", ["missing tensors, all of them by row", "truncated shard", "another model"])
def test_a_bad_folder_is_refused_as_like(case: str, tmp_path: Path, toy_flash: Path, toy_megatron: Path) -> None:
    spoil, message = BAD[case]
    folder = linked(toy_flash, tmp_path / "hf")
    spoil(folder)
    before = listing(tmp_path)
    refuses(lambda: export_hf(toy_megatron, tmp_path / "out", folder), message)
    refuses(lambda: verify(toy_flash, folder), message)
    assert listing(tmp_path) == before


def test_inspect_lists_every_finding_instead(tmp_path: Path, toy_flash: Path) -> None:
    folder = linked(toy_flash, tmp_path / "hf")
    names = [f"{E0}.{e}.w1.weight" for e in range(5)]
    edit(several(drop(*names), add("bias"), replace("norm.weight", dtype="F16")))(folder)
    report = inspect(folder)
    found = {(f.kind, f.row): f.names for f in report.findings}
    assert not report.sound
    assert found["missing", "ffn.experts.w1"] == tuple(names)
    assert found["unknown", "bias"] == ("bias",)
    assert found["dtype", "norm"] == ("norm.weight",)
    assert len(found["scale", "a scale without its weight"]) == 5


BY_COMMAND = (
    "missing tensors, all of them by row",
    "index that points above its folder",
    "pickle where safetensors belongs",
    "truncated shard",
    "DeepSeek-V4.1",
    "config with a missing field",
)


def one_message(done: Any) -> str:
    """Exit code 2 and exactly one message."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("dsv4: ") and len(re.findall("^dsv4: ", done.stderr, re.MULTILINE)) == 1
    assert "Traceback" not in done.stderr + done.stdout and done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("case", BY_COMMAND)
def test_the_command_says_so_once_and_exits_with_2(case: str, tmp_path: Path, toy_flash: Path) -> None:
    spoil, message = BAD[case]
    folder = linked(toy_flash, tmp_path / "hf")
    spoil(folder)
    before = listing(tmp_path)
    assert re.search(message, one_message(dsv4("import", folder, tmp_path / "out", "--json")), re.DOTALL)
    assert listing(tmp_path) == before


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
        lambda f: (f / ITERATION / "run_config.yaml").unlink(), r"no run_config\.yaml of this tool; .*--like",
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
    spoil, message = MEGATRON[case]
    folder = linked(toy_megatron, tmp_path / "m")
    spoil(folder)
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


# ---------------------------------------------------------------- where it is to be written


def test_a_folder_that_is_not_empty_needs_overwrite(tmp_path: Path, toy_flash: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    before = listing(tmp_path)
    refuses(lambda: import_hf(toy_flash, out), "not empty; choose another, or --overwrite replaces a checkpoint")
    # Not even then: this is no checkpoint.
    refuses(lambda: import_hf(toy_flash, out, Options(overwrite=True)), r"this folder is none \(notes\.txt")
    refuses(lambda: import_hf(toy_flash, out, Options(resume=True)), "not empty")
    assert "not empty" in one_message(dsv4("import", toy_flash, out))
    assert "give one of them" in one_message(dsv4("import", toy_flash, out, "--resume", "--overwrite"))
    assert listing(tmp_path) == before


def test_a_failed_overwrite_keeps_what_was_there(tmp_path: Path, toy_flash: Path) -> None:
    folder, out = linked(toy_flash, tmp_path / "hf"), tmp_path / "out"
    import_hf(toy_flash, out)
    edit(poke(WEIGHT, b"\x7f"))(folder)
    before = {n: s for n, s in listing(out).items() if (out / n).is_file()}
    refuses(lambda: import_hf(folder, out, Options(overwrite=True)), WEIGHT)
    assert {n: s for n, s in listing(out).items() if (out / n).is_file()} == before
    import_hf(toy_flash, out, Options(overwrite=True))


def test_an_output_inside_or_around_the_input_is_refused(tmp_path: Path, toy_flash: Path) -> None:
    folder = linked(toy_flash, tmp_path / "around" / "hf")
    before = listing(tmp_path)
    for out in (folder, folder / "out", folder.parent):
        refuses(lambda out=out: import_hf(folder, out, Options(overwrite=True)), "it overlaps the input")
    assert listing(tmp_path) == before


def test_an_output_under_or_instead_of_a_file_is_refused(tmp_path: Path, toy_flash: Path) -> None:
    (tmp_path / "file").write_text("mine")
    before = listing(tmp_path)
    refuses(lambda: import_hf(toy_flash, tmp_path / "file"), "exists and is not a folder")
    refuses(lambda: import_hf(toy_flash, tmp_path / "file", Options(overwrite=True)), "exists and is not a folder")
    refuses(lambda: import_hf(toy_flash, tmp_path / "file" / "a" / "out"), "Not a directory")
    refuses(lambda: make_toy(tmp_path / "file" / "toy"), "Not a directory")
    assert "Not a directory" in one_message(dsv4("import", toy_flash, tmp_path / "file" / "out"))
    refuses(lambda: import_hf(toy_flash, tmp_path / ("x" * 300)), "name too long")
    assert listing(tmp_path) == before


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Even if it is root's, this process is nobody in particular."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_no_permission_to_write_is_said(toy_flash: Path, toy_megatron: Path) -> None:
    # toy_megatron: everything is imported and compiled before the privileges are gone.
    source = Path(tempfile.mkdtemp(prefix="dsv4-"))
    try:
        folder = shutil.copytree(toy_flash, source / "hf")
        source.chmod(0o555)
        with without_privileges():
            refuses(lambda: import_hf(folder, source / "a" / "out"), "Permission denied")
        assert [p.name for p in source.iterdir()] == ["hf"]
    finally:
        source.chmod(0o755)
        shutil.rmtree(source)


@pytest.mark.parametrize("file", ["config.json", INDEX, "model-00002-of-00009.safetensors", "generation_config.json"])
def test_no_permission_to_read_is_said(file: str, toy_flash: Path) -> None:
    source = Path(tempfile.mkdtemp(prefix="dsv4-"))
    try:
        folder = shutil.copytree(toy_flash, source / "hf")
        (folder / file).chmod(0)
        source.chmod(0o777)
        with without_privileges():
            refuses(lambda: import_hf(folder, source / "a" / "out"), f"{re.escape(file)}.*Permission denied")
        assert [p.name for p in source.iterdir()] == ["hf"]
    finally:
        shutil.rmtree(source)


def test_no_space_is_found_before_anything_is_written(
    tmp_path: Path, toy_flash: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil._ntuple_diskusage(10**12, 10**12 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    before = listing(tmp_path)
    refuses(
        lambda: import_hf(toy_flash, tmp_path / "a" / "out"),
        r"needs \d+\.\d MB more and 67\.1 MB to spare, [\d.]+ .B are free on that disk",
    )
    assert listing(tmp_path) == before


def test_a_disk_that_fills_up_is_said_and_resume_continues(
    tmp_path: Path, toy_flash: Path, toy_megatron: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = os.pwrite, 0

    def pwrite(*args: Any) -> int:
        nonlocal count
        count += 1
        if count > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        refuses(lambda: import_hf(toy_flash, out), r"the disk is full; .* repeat the command with --resume")
    assert [p.name for p in out.iterdir()] == [".dsv4-partial"]
    refuses(lambda: import_hf(toy_flash, out), "an earlier run stopped half way here; --resume continues it")
    refuses(lambda: inspect(out), "no such file|not a Hugging Face")
    import_hf(toy_flash, out, Options(resume=True))
    assert same_files(out, toy_megatron) == []


def test_a_limit_on_file_sizes_is_said(tmp_path: Path, toy_flash: Path, toy_megatron: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        refuses(lambda: import_hf(toy_flash, tmp_path / "out"), "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    import_hf(toy_flash, tmp_path / "out", Options(resume=True))
    assert same_files(tmp_path / "out", toy_megatron) == []


def test_resuming_with_another_input_is_refused(tmp_path: Path, toy_flash: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        refuses(lambda: import_hf(toy_flash, out), "the disk is full")
    before = listing(out)
    other = make_toy(tmp_path / "other", "Flash", 8)
    refuses(lambda: import_hf(other, out, Options(resume=True)), "had another input or other options")
    assert listing(out) == before


# ---------------------------------------------------------------- while it is read


class Meddler:
    """Progress that does something once the first bytes are written."""

    def __init__(self, act: Callable[[], Any]):
        self._act: Callable[[], Any] | None = act
        self._lock = threading.Lock()

    def start(self, label: str, total: int, done: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        with self._lock:
            act, self._act = self._act, None
        if act:
            act()

    def stop(self) -> None:
        pass


def overwrite_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "overwritten in place": overwrite_in_place,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 4096),
    "appended to": lambda path: path.open("ab").write(b"x"),
    "replaced": lambda path: put(path, path.read_bytes()),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_tensor_that_changes_while_it_is_read_is_refused(how: str, tmp_path: Path, toy_flash: Path) -> None:
    folder = shutil.copytree(toy_flash, tmp_path / "hf")
    last = sorted(folder.glob("*.safetensors"))[-1]
    meddler = Meddler(lambda: CHANGES[how](last))
    refuses(
        lambda: import_hf(folder, tmp_path / "a" / "out", Options(progress=meddler)),
        f"{last.name}.*(changed while being read|No such file)",
    )
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------- arguments


def test_paths_that_are_no_checkpoint_are_refused(tmp_path: Path, toy_flash: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    before = listing(tmp_path)
    for name, message in (("empty", "config.json"), ("file", "not a folder"), ("none", "no such|not a folder")):
        refuses(lambda name=name: import_hf(tmp_path / name, tmp_path / "out"), message)
        refuses(lambda name=name: inspect(tmp_path / name), f"{message}|no such file")
        refuses(
            lambda name=name: export_hf(tmp_path / name, tmp_path / "out", None, "bf16"), "expected a Megatron|neither"
        )
        refuses(lambda name=name: verify(toy_flash, tmp_path / name), f"{message}|no such file")
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    "args",
    [
        ("import", "/nowhere/at/all", "out"),
        ("import", "no-such-folder", "out"),
        ("import", "../x/y/z", "out"),
        ("export", "nowhere", "out"),
        ("export", "nowhere", "out", "--encoding", "int4"),
        ("repack", "nowhere", "out", "--encoding", "bf16"),
        ("import", "nowhere"),
        ("import", "nowhere", "out", "--workers", "0"),
        ("inspect", "nowhere"),
        ("verify", "nowhere", "nowhere"),
        ("plan", "Flash-9"),
        ("toy", "out", "--variant", "Flash-9"),
        ("unknown-verb",),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_one_message_and_exit_code_2(
    args: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one_message(dsv4(*args, HF_HUB_OFFLINE="1"))
    assert not list(tmp_path.iterdir())
