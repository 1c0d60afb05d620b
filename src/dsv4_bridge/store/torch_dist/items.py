"""Where the raw data lies in an item of a ``.distcp`` file, read from the item itself.

An item is a torch.save zip of one tensor or one object, by torch, Megatron or :mod:`.torch_dist_frames`.
Its directory and its small pickle say dtype, shape, strides and position. Both may be damaged or hostile:
the pickle is decoded by :mod:`.pickles`, which runs no code, and no size is believed before it is checked
against the item.

Sources: torch/serialization.py, torch/_utils.py; PKWARE APPNOTE 6.3 sections 4.3-4.5.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...errors import BridgeError
from ...spec.dtypes import DTYPES
from .boxes import Extent
from .frames import STORAGE_NAMES
from .pickle_reader import Global, decode, empty_dict, exact, int_tuple, show, size, torch_dtypes

_MAX_PICKLE: Final = 64 << 20
_MAX_DIRECTORY: Final = 1 << 20
_TAIL: Final = 1536  # holds the directory of every item torch writes
_HEAD: Final = 1024  # holds its pickle and the header of its data


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A torch storage of the item: element type (None: untyped bytes), record name, elements."""

    dtype: str | None
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of the item: a strided view of a storage. Offset and strides count elements."""

    dtype: str
    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorItem:
    """Where the elements of a stored tensor are: byte offset of the first, strides in elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int


def tensor_item(extent: Extent, length: int) -> TensorItem:
    """The layout of an item that holds one tensor.

    Args:
        extent: where the item begins.
        length: of the item in bytes.

    Raises:
        BridgeError: no such item, compressed, big-endian, or a tensor that leaves its storage.
    """
    with _damage(extent, length):
        item, tensor = _open(extent, length)
        if type(tensor) is not TensorRef:
            raise ValueError(f"it holds {show(tensor)}; expected one tensor")
        start, _ = _storage(item, tensor)
        return TensorItem(tensor.dtype, tensor.shape, tensor.strides, start)


@contextmanager
def _damage(extent: Extent, length: int) -> Iterator[None]:
    """Say of what is found wrong within where it is."""
    try:
        yield
    except (struct.error, ValueError) as error:
        raise BridgeError(
            f"{extent.where}: no usable torch.save item of {length} bytes: {error}. The file is damaged "
            "or of another kind; copy or save the checkpoint again"
        ) from None


def _storage(item: "_Item", tensor: TensorRef) -> tuple[int, int]:
    """(byte offset of the first element, bytes that the tensor spans) in the item."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"dtype {show(tensor.dtype)}; expected one of {', '.join(DTYPES)}")
    itemsize, storage = DTYPES[tensor.dtype].itemsize, tensor.storage
    stored = storage.numel * (DTYPES[storage.dtype].itemsize if storage.dtype else 1)
    begin = tensor.offset * itemsize
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides))
    span = 0 if 0 in tensor.shape else (steps + 1) * itemsize
    name = f"data/{storage.key}"
    have = item.records[name][1] if name in item.records else 0
    if name not in item.records or stored != have or (span and begin + span > have):
        raise ValueError(
            f"{tensor.dtype} {show(tensor.shape)} with strides {show(tensor.strides)} from element "
            f"{tensor.offset} of {stored} bytes; it stores {have} bytes"
        )
    return item.start(name) + begin, span


def object_payload(extent: Extent, length: int) -> Any:
    """The object of an item, plain types only; a tensor becomes a numpy array of its bit patterns."""
    with _damage(extent, length):
        item, value = _open(extent, length)
        if type(value) is not list or len(value) != 1:
            raise ValueError(f"it holds {show(value)}; expected a list of one object")
        return _Plain(item).copy(value[0], 0)


def _array(item: "_Item", tensor: TensorRef) -> np.ndarray:
    start, span = _storage(item, tensor)
    dtype = np.dtype(DTYPES[tensor.dtype].numpy)
    if math.prod(tensor.shape) * dtype.itemsize > span:
        raise ValueError("a tensor that repeats its storage; expected a plain one")
    flat = np.frombuffer(item.read(start, span), dtype)
    strides = [s * dtype.itemsize for s in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides).copy()


class _Plain:
    """Copies plain data, within a budget: a small file can nest shared lists into an endless walk."""

    def __init__(self, item: "_Item") -> None:
        self._item = item
        self._budget = 1 << 20

    def copy(self, value: Any, depth: int) -> Any:
        self._spend(1)
        if depth > 64:
            raise ValueError("it is nested too deep for plain data")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) is list:
            return [self.copy(v, depth + 1) for v in value]
        if isinstance(value, tuple):
            return tuple(self.copy(v, depth + 1) for v in value)
        if type(value) is dict:
            return {k: self.copy(v, depth + 1) for k, v in value.items()}
        if type(value) is TensorRef:
            self._spend(math.prod(value.shape) >> 6)
            return _array(self._item, value)
        raise ValueError(f"it contains {show(value)}; expected numbers, strings, lists, dicts and tensors")

    def _spend(self, amount: int) -> None:
        self._budget -= amount
        if self._budget < 0:
            raise ValueError("it is too large for plain data")


class _Item:
    """An item being looked at: its first and last bytes, which describe it, and its zip directory."""

    def __init__(self, extent: Extent, length: int) -> None:
        self._extent = extent
        self._length = length
        self._at = max(0, length - _TAIL)
        self._tail = extent.bytes(self._at, length - self._at)
        self._head = extent.bytes(0, min(_HEAD, length)) if self._at else self._tail
        self.records = _directory(self.read, length)

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the item; ValueError where they leave it."""
        if offset + size > self._length:
            raise ValueError("a record leaves the item")
        if offset + size <= len(self._head):
            return self._head[offset : offset + size]
        if offset >= self._at:
            return self._tail[offset - self._at : offset - self._at + size]
        return self._extent.bytes(offset, size)

    def start(self, name: str) -> int:
        """Offset of a record's content; its own header may be padded otherwise than the directory says."""
        at, size = self.records[name]
        header = self.read(at, 30)
        if header[:4] != b"PK\3\4":
            raise ValueError(f"no zip record at byte {at}")
        n, m = struct.unpack("<26xHH", header)
        if at + 30 + n + m + size > self._length:
            raise ValueError("a record leaves the item")
        return at + 30 + n + m

    def content(self, name: str) -> bytes:
        return self.read(self.start(name), self.records[name][1])


def _open(extent: Extent, length: int) -> tuple[_Item, Any]:
    """The item at an extent, and the value of its pickle."""
    item = _Item(extent, length)
    if "data.pkl" not in item.records or item.records["data.pkl"][1] > _MAX_PICKLE:
        raise ValueError("no usable data.pkl")
    if "byteorder" in item.records and item.content("byteorder") != b"little":
        raise ValueError("big-endian data; expected little-endian")
    return item, decode(item.content("data.pkl"), ITEM_GLOBALS, extent.where, _persistent_storage)


def _directory(read: Callable[[int, int], bytes], length: int) -> dict[str, tuple[int, int]]:
    """Record name (less the archive's) -> (local header, size). ValueError on anything unexpected."""
    if length < 22:
        raise ValueError("too short")
    end = read(length - 22, 22)
    signature, _, _, _, count, size, start, comment = struct.unpack("<4sHHHHIIH", end)
    limit = length - 22
    if signature != b"PK\5\6" or comment:
        raise ValueError("no zip directory at its end")
    if limit >= 20 and (locator := read(limit - 20, 20))[:4] == b"PK\6\7":
        (limit,) = struct.unpack("<Q", locator[8:16])
        if limit > length - 98:
            raise ValueError("zip64 directory outside the item")
        signature, count, size, start = struct.unpack("<4s28xQQQ", read(limit, 56))
        if signature != b"PK\6\6":
            raise ValueError("no zip64 directory")
    if start + size > limit or size > _MAX_DIRECTORY:
        raise ValueError("zip directory outside the item")
    entries, at, records = read(start, size), 0, {}
    for _ in range(min(count, size)):
        fields = struct.unpack_from("<4s6xH8xIIHHH8xI", entries, at)
        signature, method, packed, plain, n, m, k, header = fields
        name = entries[at + 46 : at + 46 + n].decode("utf-8")
        extra = entries[at + 46 + n : at + 46 + n + m]
        packed, plain, header = _wide(extra, [packed, plain, header])
        at += 46 + n + m + k
        name = name.partition("/")[2]
        if signature != b"PK\1\2" or method or packed != plain or name in records:
            raise ValueError(f"record {show(name)} is compressed, doubled or damaged")
        if header + 30 + n + plain > start:
            raise ValueError(f"record {show(name)} outside the item")
        records[name] = (header, plain)
    return records


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """(packed, plain, header) with what the zip64 field of a directory entry says instead of 2^32-1."""
    at = 0
    while at + 4 <= len(extra) and 0xFFFFFFFF in values:
        tag, size = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            # APPNOTE 4.5.3: only the overflowing values, in the order plain, packed, header.
            fields = iter(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            order = [i for i in (1, 0, 2) if values[i] == 0xFFFFFFFF]
            for i in order:
                values[i] = next(fields, 0xFFFFFFFF)
            break
        at += 4 + size
    return values


def _rebuilt(args: tuple, dtype: str | None) -> TensorRef:
    storage, offset, shape, strides = args[:4]
    name = dtype or exact(storage, StorageRef).dtype
    (first,) = int_tuple((offset,))
    shape, strides = int_tuple(shape), int_tuple(strides)
    if type(name) is not str or len(shape) != len(strides):
        raise ValueError("a tensor with these arguments")
    return TensorRef(name, exact(storage, StorageRef), first, shape, strides)


def _parameter(args: tuple) -> TensorRef:
    return exact(args[0], TensorRef)


def _persistent_storage(pid: Any) -> StorageRef:
    """('storage', type, record name, device, elements) -> :class:`StorageRef`; ValueError otherwise."""
    tag, kind, key, _, numel = exact(pid, tuple)
    if tag != "storage" or type(kind) is not StorageRef or type(key) is not str:
        raise ValueError(f"{show(tag)} as a persistent id")
    return StorageRef(kind.dtype, key, int_tuple((numel,))[0])


# What the pickle inside one item (a tensor, or an object of plain data) names.
ITEM_GLOBALS: Final[Mapping[tuple[str, str], Any]] = {
    **torch_dtypes(),
    **{("torch", name): StorageRef(dtype, "", 0) for dtype, name in STORAGE_NAMES.items()},
    ("torch.storage", "UntypedStorage"): StorageRef(None, "", 0),
    ("torch._utils", "_rebuild_tensor_v2"): Global("_rebuild_tensor_v2", call=lambda a: _rebuilt(a, None)),
    ("torch._utils", "_rebuild_tensor_v3"): Global("_rebuild_tensor_v3", call=lambda a: _rebuilt(a, a[6])),
    ("torch._utils", "_rebuild_parameter"): Global("_rebuild_parameter", call=_parameter),
    ("torch", "Size"): Global("torch.Size", call=size),
    ("collections", "OrderedDict"): Global("OrderedDict", call=empty_dict),
}
