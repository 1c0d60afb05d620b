"""Ways to spoil a checkpoint, and what a refusal must be: one clear message, nothing written or changed."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_bridge import BridgeError

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


def spoiled(source: Path, target: Path, case: tuple[Callable[[Path], Any], str]) -> tuple[Path, str]:
    """A copy of `source` that a case has spoiled, and the message it must be refused with."""
    spoil, message = case
    spoil(linked(source, target))
    return target, message


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def refuses(call: Callable[[], Any], message: str) -> str:
    with pytest.raises(BridgeError) as caught:
        call()
    text = str(caught.value)
    assert re.search(message, text, re.DOTALL), f"expected {message!r} in:\n{text}"
    assert "Traceback" not in text and len(text) < 20_000
    return text


def one_message(done: Any) -> str:
    """Exit code 2 and exactly one message."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("dsv4: ") and len(re.findall("^dsv4: ", done.stderr, re.MULTILINE)) == 1
    assert "Traceback" not in done.stderr + done.stdout and done.stdout == ""
    return done.stderr
