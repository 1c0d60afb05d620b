"""The bytes of a Megatron ``torch_dist`` folder that are not tensor data, composed without torch.

An item of a ``.distcp`` file is what ``torch.save(tensor)`` writes: an uncompressed zip of a small pickle
(dtype, shape, strides) and the raw data. Everything before and after the data depends on dtype and shape
only, so it is made once a shape (:func:`tensor_frame`) and a tensor is written as head + data + tail, in
one pass. The zips and the pickles are composed here rather than by torch.save: no import of torch, no
temporary file, no global CRC switch, no storage of the tensor's size, the same bytes whatever the release
of torch.

What differs from a torch.save with default options: the checksum of a tensor's data record is 0, since
the data is not known beforehand (torch.save without CRC32 does the same; torch reads such items, ``unzip``
complains), and the three small records that only name versions of the container are left out.

Sources: torch/serialization.py (``_save``), caffe2/serialize/inline_container.cc (names, 64-byte
alignment, "FB" padding), PKWARE APPNOTE 6.3 sections 4.3-4.5 (zip, zip64),
torch/distributed/checkpoint/metadata.py, megatron-core 0.19.2 dist_checkpointing (core.py, strategies/).
"""

import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any, Final

from ...errors import BridgeError
from ...spec.dtypes import DTYPES
from . import pickle_writer as code
from .pickle_reader import show

# What megatron-core 0.19.2 writes; its presence marks a distributed checkpoint.
METADATA_JSON: Final = b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
COMMON_STATE_KEY: Final = "common_state/shard_0_1"

# Typed storages of torch.save; the other dtypes are views of untyped bytes.
STORAGE_NAMES: Final = {
    "F32": "FloatStorage", "BF16": "BFloat16Storage", "F16": "HalfStorage", "F64": "DoubleStorage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage",
    "U8": "ByteStorage", "BOOL": "BoolStorage",
}  # fmt: skip

_DCP: Final = "torch.distributed.checkpoint"
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
    head.add("data.pkl", code.dumps(_tensor(dtype, shape)))
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


def item_of(records: Mapping[str, bytes]) -> bytes:
    """An item whose records are all known, by their names in the archive."""
    directory = bytearray()
    whole = _Records(0, directory)
    for name, content in records.items():
        whole.add(name, content)
    return bytes(whole.data + directory + _end(len(records), len(directory), len(whole.data)))


def _tensor(dtype: str, shape: tuple[int, ...]) -> bytes:
    """A contiguous tensor on record ``data/0``, as torch.save pickles it less its unused memo entries.

    FP8 and E8M0 have no typed storage: they are views of untyped bytes with the dtype as an argument.
    """
    numel, strides, step = math.prod(shape), [], 1
    for n in reversed(shape):
        strides.insert(0, step)
        step *= max(n, 1)
    typed = dtype in STORAGE_NAMES
    count = numel if typed else numel * DTYPES[dtype].itemsize
    kind = code.name("torch", STORAGE_NAMES[dtype]) if typed else code.name("torch.storage", "UntypedStorage")
    where = (code.text("storage"), kind, code.text("0"), code.text("cpu"), code.integer(count))
    hooks = code.call(code.name("collections", "OrderedDict"))
    args = [code.persistent(code.tuple_of(where)), code.integer(0), code.integers(shape)]
    args += [code.integers(tuple(strides)), code.FALSE, hooks]
    if not typed:
        args.append(code.name("torch", DTYPES[dtype].torch))
    return code.call(code.name("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"), *args)


def object_item(payload: Any) -> bytes:
    """The item of an object, what ``torch.save([payload])`` writes; equal bytes for equal payloads.

    Args:
        payload: None, numbers, strings, and lists, tuples and dicts of them. No bytes and no tensors.

    Raises:
        BridgeError: anything else, which a reader that runs no code could not load.
    """
    return _object_zip(code.plain(payload))


def _object_zip(value: bytes, data: Mapping[str, bytes] | None = None) -> bytes:
    """A list of one value, and the storages that its pickle refers to."""
    records = {"data.pkl": code.dumps(code.list_of([value])), "byteorder": b"little"}
    return item_of(records | dict(data or {}) | {"version": b"3\n"})


@cache
def extra_state_item() -> bytes:
    """The item of a module's ``_extra_state`` where there is no FP8 state: an empty uint8 tensor."""
    return _object_zip(_tensor("U8", (0,)), {"data/0": b""})


def common_state_item(state: dict[str, Any]) -> bytes:
    """The item of :data:`COMMON_STATE_KEY`: plain numbers, strings, lists and dicts.

    Megatron saves at least ``{"iteration": 0, "checkpoint_version": 3.0}``.
    """
    return object_item(state)


class _Vocabulary:
    """What a ``.metadata`` repeats: classes, attribute names, keys, files, sizes; each is written once."""

    def __init__(self) -> None:
        self._memo = memo = code.Memo()
        size = memo.share(code.name("torch", "Size"))
        self.text = cache(lambda value: memo.share(code.text(value)))
        self.dims = cache(lambda value: memo.share(code.call(size, code.integers(value))))
        self.properties = cache(self._properties)

    def dumps(self, value: bytes) -> bytes:
        return code.dumps(value, bytes(self._memo.definitions))

    def cls(self, name: str, module: str = "metadata") -> bytes:
        return self._memo.share(code.name(f"{_DCP}.{module}", name))

    def instances(self, cls: bytes, attributes: str) -> Callable[..., bytes]:
        return code.instances(cls, *map(self.text, attributes.split()))

    def _properties(self, dtype: str) -> bytes:
        """The state of TensorProperties: dense, no gradient, contiguous, not pinned; in the form of five.

        torch 2.15 appends the strides, and older releases refuse a state of six; all read five.
        """
        layout = code.call(code.name("torch.serialization", "_get_layout"), code.text("torch.strided"))
        contiguous = code.call(code.name(f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"), code.integer(0))
        five = (code.name("torch", DTYPES[dtype].torch), layout, code.FALSE, contiguous, code.FALSE)
        return self._memo.share(code.tuple_of(five))


def metadata_bytes(tensors: Iterable[TensorRecord], objects: Iterable[ObjectRecord]) -> bytes:
    """The content of ``.metadata``: the same bytes whatever the order of the records.

    It is the pickle of a torch.distributed.checkpoint ``Metadata``. Write it last: a folder without it is
    no checkpoint.

    Raises:
        BridgeError: a key or a chunk given twice, or an unknown dtype.
    """
    words = _Vocabulary()
    properties, blob = words.cls("TensorProperties"), code.instance(words.cls("BytesStorageMetadata"))
    tensor = words.instances(words.cls("TensorStorageMetadata"), "properties size chunks")
    chunk = words.instances(words.cls("ChunkStorageMetadata"), "offsets sizes")
    index = words.cls("MetadataIndex")
    of_chunk, of_blob = words.instances(index, "fqn index offset"), words.instances(index, "fqn index")
    info = words.instances(words.cls("_StorageInfo", "filesystem"), "relative_path offset length")
    entries, storage = bytearray(), bytearray()  # keys and values in turn
    seen: set[str] = set()

    def place(r: ChunkRecord | ObjectRecord) -> bytes:
        return info(words.text(r.file), code.integer(r.offset), code.integer(r.length))

    for t in sorted(tensors, key=attrgetter("key")):
        if t.dtype not in DTYPES or t.key in seen:
            what = f"dtype {show(t.dtype)} is unknown" if t.key not in seen else "the key is given twice"
            raise BridgeError(f"writing .metadata: tensor {show(t.key)}: {what}")
        seen.add(t.key)
        key, chunks, last = words.text(t.key), bytearray(), None
        for c in sorted(t.chunks, key=attrgetter("offsets")):
            if c.offsets == last:
                raise BridgeError(f"writing .metadata: {show(t.key)} has two chunks at {show(last)}")
            last, offsets = c.offsets, words.dims(c.offsets)
            chunks += chunk(offsets, words.dims(c.sizes))
            storage += of_chunk(key, code.NONE, offsets) + place(c)
        state = code.instance(properties, words.properties(t.dtype))
        entries += key + tensor(state, words.dims(t.global_shape), code.list_of([chunks]))
    for o in sorted(objects, key=attrgetter("key")):
        if o.key in seen:
            raise BridgeError(f"writing .metadata: the key {show(o.key)} is given twice; expected once")
        seen.add(o.key)
        key = words.text(o.key)
        entries += key + blob
        storage += of_blob(key, code.NONE) + place(o)
    meta = words.instances(words.cls("StorageMeta"), "checkpoint_id save_id load_id modules")
    whole = words.instances(words.cls("Metadata"), "state_dict_metadata planner_data storage_data storage_meta version")
    described = meta(code.NONE, code.NONE, code.NONE, code.EMPTY_LIST)
    found = code.dict_of([entries]), code.NONE, code.dict_of([storage])
    return words.dumps(whole(*found, described, code.text("1.0.0")))
