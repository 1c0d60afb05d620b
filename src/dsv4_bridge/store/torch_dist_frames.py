"""The bytes of a Megatron ``torch_dist`` folder that are not tensor data.

An item of a ``.distcp`` file is what ``torch.save(tensor)`` writes: an uncompressed zip of a small pickle
(dtype, shape, strides) and the raw data. Everything before and after the data depends on dtype and shape
only, so it is made once a shape (:func:`tensor_frame`) and a tensor is written as head + data + tail, in
one pass and without torch. The zip is composed here rather than by torch.save: no temporary file, no
global CRC switch, no storage of the tensor's size, the same bytes from every torch release.

One thing differs from a torch.save with default options: the checksum of the data record is 0, since the
data is not known beforehand (torch.save without CRC32 does the same). torch reads such items; ``unzip``
complains.

Sources: torch/serialization.py (``_save``), caffe2/serialize/inline_container.cc (names, 64-byte
alignment, "FB" padding), PKWARE APPNOTE 6.3 sections 4.3-4.5 (zip, zip64),
torch/distributed/checkpoint/metadata.py, megatron-core 0.19.2 dist_checkpointing (core.py, strategies/).
"""

import copyreg
import io
import math
import pickle
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final

from dsv4_bridge.dtypes import DTYPES
from dsv4_bridge.errors import BridgeError
from dsv4_bridge.store.pickles import show

# What megatron-core 0.19.2 writes; its presence marks a distributed checkpoint.
METADATA_JSON: Final = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
COMMON_STATE_KEY: Final = "common_state/shard_0_1"

# Typed storages of torch.save; the other dtypes are views of untyped bytes.
STORAGE_NAMES: Final = {
    "F32": "FloatStorage", "BF16": "BFloat16Storage", "F16": "HalfStorage", "F64": "DoubleStorage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage",
    "U8": "ByteStorage", "BOOL": "BoolStorage",
}  # fmt: skip

_ALIGNMENT: Final = 64  # of the data record in its item, as torch.save has it
_MAX32: Final = 0xFFFFFFFF
_DATE: Final = 0x21  # 1980-01-01, the first day a zip can name


@dataclass(frozen=True, slots=True)
class Frame:
    """The bytes of an item before and after its raw little-endian data."""

    head: bytes
    tail: bytes


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """One stored piece of a tensor: where it lies in the tensor, and where its item lies on disk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor of the checkpoint: key, safetensors dtype name, global shape, the chunks that cover it."""

    key: str
    dtype: str
    global_shape: tuple[int, ...]
    chunks: tuple[ChunkRecord, ...]


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """An object of the checkpoint. Several keys may name the same item."""

    key: str
    file: str
    offset: int
    length: int


@lru_cache(maxsize=4096)
def tensor_frame(dtype: str, shape: tuple[int, ...]) -> Frame:
    """The item of a contiguous tensor without its data: ``head + data + tail`` is a torch.save(tensor).

    Args:
        dtype: safetensors name, such as ``"BF16"``.
        shape: of the chunk; the data is ``prod(shape) * itemsize`` bytes.

    Raises:
        BridgeError: a dtype that is not in the table.
    """
    if dtype not in DTYPES:
        raise BridgeError(f"writing a torch_dist item: dtype {show(dtype)} is not one of {', '.join(DTYPES)}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    directory = bytearray()
    head, tail = _Records(0, directory), _Records(0, directory)
    head.add("data.pkl", _tensor_pickle(dtype, shape))
    head.add("byteorder", b"little")
    head.header("data/0", nbytes, 0)
    tail.base = start = len(head.data) + nbytes
    tail.add("version", b"3\n")
    end = _end(4, len(directory), start + len(tail.data))
    return Frame(bytes(head.data), bytes(tail.data + directory + end))


class _Records:
    """Consecutive zip records from byte ``base`` of an item; each is also entered in ``directory``."""

    def __init__(self, base: int, directory: bytearray) -> None:
        self.base = base
        self.data = bytearray()
        self._directory = directory

    def add(self, name: str, content: bytes) -> None:
        self.header(name, len(content), zlib.crc32(content))
        self.data += content

    def header(self, name: str, size: int, crc: int) -> None:
        """The local header of a record, padded so that its content is aligned, and its directory entry."""
        path, at = f"archive/{name}".encode(), self.base + len(self.data)
        wide = size >= _MAX32
        extra = struct.pack("<HHQQ", 1, 16, size, size) if wide else b""
        pad = -(at + 30 + len(path) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", pad) + b"Z" * pad
        need = 45 if wide or at >= _MAX32 else 20
        common = struct.pack("<HHHHHIII", need, 0, 0, 0, _DATE, crc, min(size, _MAX32), min(size, _MAX32))
        self.data += b"PK\3\4" + common + struct.pack("<HH", len(path), len(extra)) + path + extra
        values = [size, size] * wide + [at] * (at >= _MAX32)
        extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        place = struct.pack("<HHHHHII", len(path), len(extra), 0, 0, 0, 0, min(at, _MAX32))
        self._directory += b"PK\1\2" + struct.pack("<H", need) + common + place + path + extra


def _end(count: int, size: int, start: int) -> bytes:
    """The end of the central directory, preceded by its zip64 form where ``start`` needs it."""
    wide = b""
    if start >= _MAX32:
        wide = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, start)
        wide += b"PK\6\7" + struct.pack("<IQI", 0, start + size, 1)
    return wide + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, size, min(start, _MAX32), 0)


def _tensor_pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    """data.pkl of a contiguous tensor, protocol 2, as torch.save writes it less its unused memo entries.

    FP8 and E8M0 have no typed storage: they are views of untyped bytes with the dtype as an argument.
    """
    numel, strides, step = math.prod(shape), [], 1
    for n in reversed(shape):
        strides.insert(0, step)
        step *= max(n, 1)
    typed = dtype in STORAGE_NAMES
    count = numel if typed else numel * DTYPES[dtype].itemsize
    kind = _global("torch", STORAGE_NAMES[dtype]) if typed else _global("torch.storage", "UntypedStorage")
    storage = b"(" + _text("storage") + kind + _text("0") + _text("cpu") + _int(count) + b"tQ"
    view = _int(0) + _ints(shape) + _ints(tuple(strides)) + b"\x89" + _global("collections", "OrderedDict")
    last = b"" if typed else _global("torch", DTYPES[dtype].torch)
    rebuild = _global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
    return b"\x80\x02" + rebuild + b"(" + storage + view + b")R" + last + b"tR."


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _int(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def _ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def object_item(payload: Any) -> bytes:
    """The item of an object: ``torch.save([payload])``, equal bytes for equal payloads.

    Args:
        payload: None, numbers, strings, bytes-free lists, tuples and dicts of them, tensors.

    Raises:
        BridgeError: anything else, which a reader that runs no code could not load.
    """
    import torch

    buffer = io.BytesIO()
    torch.save([_canonical(payload, {}, "object")], buffer)
    return buffer.getvalue()


def _canonical(value: Any, seen: dict[str, str], where: str) -> Any:
    """``value`` rebuilt with one object a distinct string: pickle writes shared and equal strings apart."""
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str:
        return seen.setdefault(value, value)
    if type(value) is list:
        return [_canonical(v, seen, f"{where}[{i}]") for i, v in enumerate(value)]
    if type(value) is tuple:
        return tuple(_canonical(v, seen, f"{where}[{i}]") for i, v in enumerate(value))
    if type(value) is dict and all(type(k) in (str, int) for k in value):
        return {_canonical(k, seen, where): _canonical(v, seen, f"{where}[{k!r}]") for k, v in value.items()}
    if hasattr(value, "untyped_storage"):
        return value
    raise BridgeError(
        f"writing an object of a torch_dist checkpoint: {where} is a {type(value).__name__}; "
        "expected numbers, strings, lists, tuples, dicts with string or integer keys, or tensors"
    )


@cache
def extra_state_item() -> bytes:
    """The item of a module's ``_extra_state`` where there is no FP8 state: an empty uint8 tensor."""
    import torch

    return object_item(torch.empty(0, dtype=torch.uint8))


def common_state_item(state: dict[str, Any]) -> bytes:
    """The item of :data:`COMMON_STATE_KEY`: plain numbers, strings, lists and dicts.

    Megatron saves at least ``{"iteration": 0, "checkpoint_version": 3.0}``.
    """
    return object_item(state)


class _Interned:
    """One torch.Size a distinct value, one str a distinct text: the pickle depends on values alone."""

    def __init__(self, size: type) -> None:
        self._size = size
        self._sizes: dict[tuple[int, ...], Any] = {}
        self._texts: dict[str, str] = {}

    def dims(self, value: tuple[int, ...]) -> Any:
        if value not in self._sizes:
            self._sizes[value] = self._size(value)
        return self._sizes[value]

    def text(self, value: str) -> str:
        return self._texts.setdefault(value, value)


def metadata_bytes(tensors: Iterable[TensorRecord], objects: Iterable[ObjectRecord]) -> bytes:
    """The content of ``.metadata``: the same bytes whatever the order of the records.

    Write it last: a folder without it is no checkpoint.

    Raises:
        BridgeError: a key or a chunk given twice, or an unknown dtype.
    """
    import torch
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint import metadata as dcp

    intern = _Interned(torch.Size)
    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}

    def add(key: str, record: ChunkRecord | ObjectRecord, offsets: Any) -> None:
        index = dcp.MetadataIndex(key, offsets)
        if index in storage:
            raise BridgeError(f"writing .metadata: {show(key)} has two chunks at {show(offsets)}")
        if offsets is not None:
            object.__setattr__(index, "offset", offsets)  # its constructor makes a copy
        storage[index] = filesystem._StorageInfo(intern.text(record.file), record.offset, record.length)

    for t in sorted(tensors, key=lambda t: t.key):
        if t.dtype not in DTYPES or t.key in entries:
            what = f"dtype {show(t.dtype)} is unknown" if t.key not in entries else "the key is given twice"
            raise BridgeError(f"writing .metadata: tensor {show(t.key)}: {what}")
        key = intern.text(t.key)
        properties = dcp.TensorProperties(dtype=getattr(torch, DTYPES[t.dtype].torch))
        chunks = []
        for c in sorted(t.chunks, key=lambda c: c.offsets):
            chunks.append(dcp.ChunkStorageMetadata(intern.dims(c.offsets), intern.dims(c.sizes)))
            add(key, c, intern.dims(c.offsets))
        entries[key] = dcp.TensorStorageMetadata(properties, intern.dims(t.global_shape), chunks)
    for o in sorted(objects, key=lambda o: o.key):
        if o.key in entries:
            raise BridgeError(f"writing .metadata: the key {show(o.key)} is given twice; expected once")
        entries[intern.text(o.key)] = dcp.BytesStorageMetadata()
        add(intern.text(o.key), o, None)
    whole = dcp.Metadata(entries, storage_data=storage, storage_meta=dcp.StorageMeta(), version="1.0.0")
    return _dump(whole, dcp.TensorProperties)


def _dump(value: Any, properties: type) -> bytes:
    """Pickle as torch does, with TensorProperties in the form of five fields.

    torch 2.15 appends the strides, and older releases refuse a state of six; all read five.
    """

    def reduce(obj: Any) -> tuple:
        return copyreg.__newobj__, (properties,), obj.__getstate__()[:5]  # type: ignore[attr-defined]

    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=4)
    pickler.dispatch_table = copyreg.dispatch_table | {properties: reduce}
    pickler.dump(value)
    return buffer.getvalue()
