"""Where values come from: items of an opened checkpoint, decoded, a stripe of rows at a time.

A stripe is `[rows, columns]` (`[rows]` for vectors) in the raw numpy type of its plain dtype: bf16
as uint16 bit patterns, float32, int32 or int64. Stripes start at multiples of 128 rows and live in
reused buffers: use one before asking for the next.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from ..codec import CodecError, EncodeStats
from ..errors import BridgeError
from ..spec.dtypes import DTYPES
from ..spec.encodings import ENCODINGS, TILE, of_dtype
from ..spec.megatron import Naming, Region, regions
from ..spec.plan import Item
from ..spec.spec import ModelSpec
from .hf import Bound, HFCheckpoint
from .torch_dist.reader import TorchDistReader

# A stripe of values fits the second-level caches together with its codes.
_STRIPE_BYTES = 2 << 20


class Scratch:
    """Reused buffers of one worker, by name; grown to the largest request."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def take(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """A contiguous array of raw type `dtype` over the buffer called `name`."""
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[name] = self.new(-(-size // 4096) * 4096)
        return buffer[:size].view(kind).reshape(shape)

    def new(self, size: int) -> np.ndarray:
        """A buffer of so many bytes."""
        return np.empty(size, np.uint8)


class Values(Protocol):
    """A source of decoded items."""

    def encoding(self, item: Item) -> str:
        """How the source stores the item."""
        ...

    def stripes(self, item: Item, start: int, stop: int, scratch: Scratch) -> Iterator[np.ndarray]:
        """Decoded rows `start` to `stop` of an item, stripe by stripe."""
        ...

    def extents(self, item: Item, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
        """Descriptor, first byte and size of what reading those rows will touch."""
        ...


class EncodedRows(NamedTuple):
    """Rows of an item, encoded.

    Attributes:
        codes: uint8, of the encoding's shape.
        scale: uint8 or float32, the rows of the scale.
        stats: what encoding did to the values.
        rounded: float32 values that became bf16 on the way and changed.
    """

    codes: np.ndarray
    scale: np.ndarray
    stats: EncodeStats
    rounded: int = 0


class EncodingValues:
    """A source that encodes by itself, where its values lie; a class, for protocols are slow to ask."""

    def encoded(
        self,
        item: Item,
        encoding: str,
        old_scale: Callable[[int, int], np.ndarray | None],
        on_host: Callable[[int, np.ndarray], EncodedRows],
    ) -> Iterator[EncodedRows]:
        """All rows of an item, encoded, stripe by stripe.

        Args:
            item: what.
            encoding: a quantised one.
            old_scale: rows of the source's scale that cover rows from … to.
            on_host: encodes a stripe that begins at a row; called for one that cannot be encoded, to say why.
        """
        raise NotImplementedError


def stripe_rows(shape: tuple[int, ...], itemsize: int = 2) -> int:
    """Rows a stripe of a tensor of `shape`; a multiple of 128."""
    width = shape[1] if len(shape) > 1 else 1
    return max(TILE, _STRIPE_BYTES // (max(1, width) * itemsize) // TILE * TILE)


def cuts(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    """`(from, to)` pairs covering rows `start` to `stop`."""
    for at in range(start, stop, step):
        yield at, min(at + step, stop)


class HFValues:
    """Items of a Hugging Face folder."""

    def __init__(self, checkpoint: HFCheckpoint):
        self.checkpoint = checkpoint

    def encoding(self, item: Item) -> str:
        return self.checkpoint.bound[item.name].encoding

    def stripes(self, item: Item, start: int, stop: int, scratch: Scratch) -> Iterator[np.ndarray]:
        bound = self.checkpoint.bound[item.name]
        for first, raw, scale in self.stored(item, start, stop, scratch):
            yield raw if scale is None else self.decoded(bound, first, raw, scale, scratch)

    def stored(
        self, item: Item, start: int, stop: int, scratch: Scratch
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """Rows as they are stored, stripe by stripe: first row, codes, and their scale where they have one."""
        bound = self.checkpoint.bound[item.name]
        rows = stripe_rows(item.shape, DTYPES[bound.weight.dtype].itemsize)
        if start % TILE and bound.scale is not None:
            raise AssertionError("a quantised tensor is cut at multiples of 128 rows")
        for first, last in cuts(start, stop, rows):
            raw = self.raw(bound, first, last, scratch)
            if bound.scale is None:
                if item.row.encoding == "int":
                    check_ids(raw, self.checkpoint.spec, bound.weight_name)
                yield first, raw, None
            else:
                yield first, raw, self.scale(bound, first, last, scratch)

    def decoded(self, bound: Bound, first: int, raw: np.ndarray, scale: np.ndarray, scratch: Scratch) -> np.ndarray:
        """What a stripe of codes from row `first` on stands for, as bf16 bit patterns."""
        from ..codec import CODECS  # compiled code, which headers do without

        columns = raw.shape[1] * ENCODINGS[bound.encoding].packed
        out = scratch.take("decoded", "<u2", (len(raw), columns))
        try:
            CODECS[bound.encoding].decode(raw, scale, out)
        except CodecError as error:
            where = f"decoding {bound.weight_name} ({bound.encoding})"
            raise BridgeError(f"{where}: {error.problem.shifted(first)}") from None
        return out

    def extents(self, item: Item, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
        fd, first, nbytes = self.checkpoint.folder.extent(self.checkpoint.bound[item.name].weight)
        row = nbytes // item.shape[0]
        yield fd, first + start * row, (stop - start) * row

    def raw(self, bound: Bound, first: int, last: int, scratch: Scratch) -> np.ndarray:
        """Stored bytes of rows `first` to `last` of a weight, in the scratch buffer `raw`."""
        shape = (last - first, *bound.weight.shape[1:])
        out = scratch.take("raw", DTYPES[bound.weight.dtype].numpy, shape)
        row = bound.weight.nbytes // bound.weight.shape[0]
        self.checkpoint.folder.read_into(bound.weight, first * row, out)
        return out

    def scale(self, bound: Bound, first: int, last: int, scratch: Scratch, name: str = "scale") -> np.ndarray:
        """The rows of a scale that belong to rows `first` to `last` of its weight."""
        return self.scale_rows(bound, *ENCODINGS[bound.encoding].scale_rows(first, last), scratch, name)

    def scale_rows(self, bound: Bound, low: int, high: int, scratch: Scratch, name: str = "scale") -> np.ndarray:
        """Rows `low` to `high` of the scale itself."""
        assert bound.scale is not None
        shape = (high - low, bound.scale.shape[1])
        out = scratch.take(name, DTYPES[bound.scale.dtype].numpy, shape)
        row = bound.scale.nbytes // bound.scale.shape[0]
        self.checkpoint.folder.read_into(bound.scale, low * row, out)
        return out


def check_ids(ids: np.ndarray, spec: ModelSpec, name: str) -> None:
    """The ids of a hash layer's table name experts; BridgeError otherwise."""
    if ids.size and (ids.min() < 0 or ids.max() >= spec.n_routed_experts):
        raise BridgeError(
            f"reading {name}: expert ids from {ids.min()} to {ids.max()}, expected 0 to {spec.n_routed_experts - 1} "
            "(n_routed_experts of config.json)"
        )


class MegatronValues:
    """Items of a torch_dist checkpoint."""

    def __init__(self, reader: TorchDistReader, spec: ModelSpec, naming: Naming = "gpt"):
        self.reader, self.spec = reader, spec
        self.naming: Naming = naming

    def encoding(self, item: Item) -> str:
        dtype = self.reader.tensors[regions(item, self.spec, self.naming)[0].key].dtype
        encoding = of_dtype(dtype, None)
        assert encoding is not None, f"{dtype} was refused when the checkpoint was opened"
        return encoding

    def stripes(self, item: Item, start: int, stop: int, scratch: Scratch) -> Iterator[np.ndarray]:
        found = regions(item, self.spec, self.naming)
        dtype = DTYPES[self.reader.tensors[found[0].key].dtype]
        rows = stripe_rows(item.shape, dtype.itemsize)
        for first, last in cuts(start, stop, rows):
            out = scratch.take("decoded", dtype.numpy, (last - first, *item.shape[1:]))
            for part, low, high in _overlaps(found, item, first, last):
                region = _rows(part, low, high, len(item.shape))
                self.reader.read(part.key, region.offsets, region.sizes, _boxed(out, part, low, high, first, found))
            if item.row.encoding == "int":
                check_ids(out, self.spec, item.name)
            yield out

    def extents(self, item: Item, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
        for part, low, high in _overlaps(regions(item, self.spec, self.naming), item, start, stop):
            region = _rows(part, low, high, len(item.shape))
            yield from self.reader.extents(region.key, region.offsets, region.sizes)


def _overlaps(found: tuple[Region, ...], item: Item, first: int, last: int) -> Iterator[tuple[Region, int, int]]:
    at = 0
    for part in found:
        rows = part.sizes[-len(item.shape)]
        low, high = max(first, at), min(last, at + rows)
        if low < high:
            yield part, low - at, high - at
        at += rows


def _rows(part: Region, low: int, high: int, ndim: int) -> Region:
    axis = len(part.sizes) - ndim
    offsets, sizes = list(part.offsets), list(part.sizes)
    offsets[axis] += low
    sizes[axis] = high - low
    return Region(part.key, part.global_shape, tuple(offsets), tuple(sizes))


def _boxed(out: np.ndarray, part: Region, low: int, high: int, first: int, found: tuple[Region, ...]) -> np.ndarray:
    before = sum(p.sizes[-out.ndim] for p in found[: found.index(part)])
    view = out[before + low - first : before + high - first]
    return view.reshape((1,) * (len(part.sizes) - out.ndim) + view.shape)


def to_plain(item: Item, values: np.ndarray, encoding: str, scratch: Scratch) -> tuple[np.ndarray, int]:
    """Values in the raw type of a plain encoding, and how many float32 values were rounded.

    Raises:
        BridgeError: a float that bf16 cannot hold.
    """
    kind = "bf16" if values.dtype == np.uint16 else "f32"
    if kind == encoding:
        return values, 0
    out = scratch.take("plain", "<u2" if encoding == "bf16" else "<f4", values.shape)
    if encoding == "f32":
        np.left_shift(values.astype(np.uint32), 16, out=out.view("<u4"))
        return out, 0
    bits = values.view("<u4")
    rounded = int(np.count_nonzero(bits & 0xFFFF))
    nearest = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if np.any((nearest & 0x7F80) == 0x7F80):
        raise BridgeError(f"writing {item.name} as bf16: it holds NaN, infinite or too large float32 values")
    out[...] = nearest
    return out, rounded
