"""A folder of safetensors shards: read by header and by byte range, never mapped, never unpickled.

Only headers are held in memory; data is read into buffers that the caller owns, so that resident
memory does not follow the size of the checkpoint.
"""

import json
import math
import os
import stat
import struct
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import BridgeError, short, some
from ..spec.dtypes import DTYPES
from ..strict_json import LFS_POINTER, parse_json
from .reading import drop_behind, open_to_read

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000  # the safetensors library's own limit
_MAX_INDEX = 256_000_000
# Dtypes that the format knows and no DeepSeek-V4 tensor has: one of these is a finding, not a broken file.
_OTHERS = {"U16": 16, "U32": 32, "U64": 64, "C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_OTHERS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS: Mapping[str, int] = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | _OTHERS


class TensorInfo(NamedTuple):
    """Where a tensor lies: safetensors dtype, shape, file name, first byte in that file, size."""

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int


class Shard(NamedTuple):
    """One shard's header: tensors in the order of their data, `__metadata__`, raw header bytes.

    `stamp` is the file's identity and time when the header was read.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    header: bytes
    size: int
    stamp: tuple[int, ...]


def read_header(path: Path) -> Shard:
    """Read and check one shard's header.

    Raises:
        BridgeError: not a safetensors file, truncated, or a header that contradicts itself.
    """
    try:
        with path.open("rb") as file:
            facts = os.fstat(file.fileno())
            size = facts.st_size
            start = file.read(8)
            raw = start + file.read(header_end(path, start, size) - 8)
    except OSError as error:
        raise BridgeError(f"reading {path}: {error.strerror or error}") from None
    return parse_header(path, raw, size, _stamp(facts))


def header_end(path: Path, start: bytes, size: int) -> int:
    """Where the header ends in a shard of `size` bytes that begins with the 8 bytes `start`.

    Raises:
        BridgeError: that cannot be a safetensors file.
    """
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise BridgeError(f"reading {path}: {_not_safetensors(start, size, length)}")
    return 8 + length


def parse_header(path: Path, raw: bytes, size: int, stamp: tuple[int, ...] = ()) -> Shard:
    """Check a shard's header.

    Args:
        path: the shard, for its name and messages; it need not exist.
        raw: its first bytes, up to where the header ends.
        size: of the whole file.
        stamp: see `Shard`.

    Raises:
        BridgeError: a header that contradicts itself or the size.
    """
    entries = parse_json(raw[8:], str(path))
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BridgeError(f"reading {path}: __metadata__ is not an object of strings")
    first = len(raw)
    found = [(name, *_entry(path, name, entry)) for name, entry in entries.items()]
    found.sort(key=lambda e: (e[3], e[4]))
    tensors: dict[str, TensorInfo] = {}
    at = 0
    for name, dtype, shape, begin, end in found:
        if begin != at:
            raise BridgeError(f"reading {path}: tensor {short(name)} begins at byte {begin} of the data, expected {at}")
        tensors[name] = TensorInfo(dtype, shape, path.name, first + begin, end - begin)
        at = end
    if first + at != size:
        kind = "is truncated" if size < first + at else "has trailing bytes"
        raise BridgeError(f"reading {path}: the shard {kind}: its header describes {first + at} bytes, it has {size}")
    return Shard(tensors, metadata, raw, size, stamp)


def _stamp(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _not_safetensors(start: bytes, size: int, length: int) -> str:
    if start == b"version ":
        return LFS_POINTER
    if start[:4] == b"GGUF":
        return "a GGUF file; take the released safetensors"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "this is a pickle (a PyTorch .bin or .pt file), not safetensors; refusing to load code"
    if size < 10:
        return f"the file has {size} bytes, too few for a safetensors shard"
    return f"its header claims {length} bytes (the file has {size}); corrupt, or no safetensors file"


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise BridgeError(f"reading {path}: tensor {short(name)} has no usable dtype, shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise BridgeError(
            f"reading {path}: tensor {short(name)} has dtype {short(dtype)}; known are {', '.join(_BITS)}"
        )
    size = math.prod(shape) * _BITS[dtype]
    if size != 8 * (offsets[1] - offsets[0]):
        raise BridgeError(
            f"reading {path}: tensor {short(name)}, {dtype} {short(list(shape))}, spans "
            f"{offsets[1] - offsets[0]} bytes of data, expected {short(-(-size // 8))}"
        )
    return dtype, shape, offsets[0], offsets[1]


def _sizes(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or len(value) > 16:
        return None
    for n in value:  # a loop: this runs twice for each of 150,000 tensors
        if type(n) is not int or not 0 <= n < 1 << 62:
            return None
    return tuple(value)


class SafetensorsFolder:
    """The shards of one folder.

    Attributes:
        path: the folder.
        shards: file name -> header.
        tensors: tensor name -> where it lies.
        index: raw bytes of the index file, None for a single-file checkpoint.
    """

    def __init__(self, path: Path, headers: Mapping[str, Shard] | None = None):
        """Open a folder.

        Args:
            path: the folder.
            headers: file name -> header of shards that lie elsewhere; what they hold cannot be read.
        """
        self.path = path
        self.index, weight_map = read_index(path)
        files = sorted(set(weight_map.values()) or headers or [_only_file(path)])
        missing = [f for f in files if (f not in headers if headers is not None else not (path / f).is_file())]
        if missing:
            raise BridgeError(
                f"opening {path}: {len(missing)} of {len(files)} shards that the index names are missing: "
                f"{some(missing)}; finish the download"
            )
        self.shards = {file: headers[file] if headers else read_header(path / file) for file in files}
        self.tensors: dict[str, TensorInfo] = {}
        for file, shard in self.shards.items():
            for name, info in shard.tensors.items():
                if name in self.tensors:
                    first = self.tensors[name].file
                    raise BridgeError(f"opening {path}: tensor {short(name)} is in {first} and in {file}")
                self.tensors[name] = info
        if weight_map:
            _check_index(path, weight_map, self.tensors)
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def read_into(self, info: TensorInfo, offset: int, out: np.ndarray) -> None:
        """Fill `out` (contiguous, any dtype) with the tensor's bytes from byte `offset` on."""
        view = memoryview(out).cast("B") if out.nbytes else memoryview(b"")
        at, done = info.start + offset, 0
        while done < len(view):
            try:
                fd = self._fd(info.file)
                count = os.preadv(fd, [view[done:]], at + done)
                changed = _stamp(os.fstat(fd)) != self.shards[info.file].stamp
            except OSError as error:
                raise BridgeError(f"reading {self.path / info.file}: {error.strerror or error}") from None
            if count == 0 or changed:
                raise BridgeError(
                    f"reading {self.path / info.file}: the file changed while being read; wait until whatever "
                    "writes it is done, and start again"
                )
            done += count
        drop_behind(self._fd(info.file), info.start + offset, done)

    def extent(self, info: TensorInfo) -> tuple[int, int, int]:
        """Descriptor, first byte and size of a tensor, for reading ahead."""
        return self._fd(info.file), info.start, info.nbytes

    def read(self, name: str) -> np.ndarray:
        """A whole (small) tensor, raw numpy dtype."""
        info = self.tensors[name]
        out = np.empty(info.shape, DTYPES[info.dtype].numpy)
        self.read_into(info, 0, out)
        return out

    def _fd(self, file: str) -> int:
        fd = self._files.get(file)
        if fd is None:
            with self._lock:
                fd = self._files.get(file)
                if fd is None:
                    fd = self._files[file] = open_to_read(self.path / file)
        return fd

    def close(self) -> None:
        """Close every shard."""
        with self._lock:
            for fd in self._files.values():
                os.close(fd)
            self._files.clear()


def read_index(path: Path) -> tuple[bytes | None, dict[str, str]]:
    """Raw bytes and weight map of a folder's index; `(None, {})` if there is none.

    Raises:
        BridgeError: unreadable, or it points outside the folder.
    """
    file = path / INDEX
    try:
        if not file.exists():
            return None, {}
        facts = file.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise BridgeError(f"reading {file}: not a regular file")
        if facts.st_size > _MAX_INDEX:
            raise BridgeError(f"reading {file}: {facts.st_size} bytes are too many for an index")
        raw = file.read_bytes()
    except OSError as error:
        raise BridgeError(f"reading {file}: {error.strerror or error}") from None
    weight_map = parse_json(raw, str(file)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BridgeError(f"reading {file}: it has no 'weight_map' object")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and len(shard) <= 200 and shard.isprintable() and not set(shard) & set("/\\")
        if not plain or not shard.endswith(".safetensors") or len(os.fsencode(shard)) > 255:
            raise BridgeError(
                f"reading {file}: tensor {short(name)} is said to be in {short(shard)}; "
                "a shard is a .safetensors file of the same folder"
            )
    return raw, weight_map


def _only_file(path: Path) -> str:
    try:
        files = sorted(p.name for p in path.iterdir())
    except OSError as error:
        raise BridgeError(f"opening {path}: {error.strerror or error}") from None
    shards = [f for f in files if f.endswith(".safetensors")]
    if SINGLE in shards or len(shards) == 1:
        return SINGLE if SINGLE in shards else shards[0]
    if shards:
        raise BridgeError(f"opening {path}: {len(shards)} shards but no {INDEX}; the folder is incomplete")
    pickles = [f for f in files if f.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise BridgeError(f"opening {path}: {pickles[0]} is a pickle and may run code; only safetensors are read")
    raise BridgeError(f"opening {path}: no {INDEX} and no .safetensors file; this is not a Hugging Face checkpoint")


def _check_index(path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    lost = [n for n, file in weight_map.items() if n not in tensors or tensors[n].file != file]
    extra = [n for n in tensors if n not in weight_map]
    if lost or extra:
        said = [f"{len(lost)} not where the index says ({some(lost)})"] if lost else []
        said += [f"{len(extra)} in a shard but not in the index ({some(extra)})"] if extra else []
        raise BridgeError(f"opening {path}: index and shard headers disagree: {'; '.join(said)}")


# ---------------------------------------------------------------- writing


def make_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and header for tensors `(name, dtype, shape)` laid out in the order given.

    Padded with spaces to a multiple of 8, as the safetensors library does.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def make_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """Bytes of an index file."""
    body = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(body, indent=2) + "\n").encode()
