"""Whole items of a model that is cut over ranks, put together one at a time."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...codec.tensors import encode
from ...parallel.pieces import Piece, pieces
from ...parallel.topology import Coordinate, chunk_of
from ...spec.dtypes import DTYPES
from ...spec.encodings import ENCODINGS
from ...spec.plan import Item
from ...store.values import EncodedRows, EncodingValues, Scratch, check_ids, cuts, stripe_rows
from ..model import DeepSeekV4Model
from .on_device import computes
from .places import Place, places, to_numpy

_RAW = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}
# A GPU takes more at a time than what fits a core's cache.
_TIMES = 16


class ModelValues:
    """The items of a live model as a source of values (see `values.Values`).

    On one rank a stripe is read where it lies. On several, an item is put together on every rank from
    the first of those that hold each piece of it; all ranks must ask for the same items in the same order.

    Args:
        chunks: this rank's chunks of the model.
    """

    def __init__(self, chunks: Sequence[DeepSeekV4Model]):
        first = chunks[0]
        self.spec, self.topology = first.spec, first.topology
        self.plan, self._places = places(first)
        for chunk in chunks[1:]:
            for name, here in places(chunk)[1].items():
                self._places.setdefault(name, here)
        self._dtype = first.config.params_dtype
        self._device = next(first.parameters()).device
        self._ranks = _owners(first.coordinate) if dist.get_world_size() > 1 else {}

    def encoding(self, item: Item) -> str:
        dtype = _RAW[self._torch_dtype(item)]
        return next(e.name for e in ENCODINGS.values() if e.dtype == dtype and e.scale_dtype is None)

    def stripes(self, item: Item, start: int, stop: int, scratch: Scratch) -> Iterator[np.ndarray]:
        dtype = DTYPES[_RAW[self._torch_dtype(item)]]
        whole = self._whole(item) if self._ranks else None
        for first, last in cuts(start, stop, stripe_rows(item.shape, dtype.itemsize)):
            out = scratch.take("decoded", dtype.numpy, (last - first, *item.shape[1:]))
            if whole is not None:
                out[...] = to_numpy(whole[first:last])
            else:
                _copy_rows(self._places[item.name], first, last, out)
            if item.row.encoding == "int":
                check_ids(out, self.spec, item.name)
            yield out

    def extents(self, item: Item, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
        return ()

    def _torch_dtype(self, item: Item) -> torch.dtype:
        return {"f32": torch.float32, "int": torch.int32}.get(item.row.encoding, self._dtype)

    def _whole(self, item: Item) -> Tensor:
        """Collective: the item, on every rank."""
        whole = torch.empty(item.shape, dtype=self._torch_dtype(item), device=self._device)
        chunk = chunk_of(item, self.spec, self.topology.layout)[0]
        seen: set[tuple[tuple[int, int], tuple[int, int]]] = set()
        for at, rank in self._ranks.items():
            if at.pp != chunk % self.topology.pp:
                continue
            for piece in pieces(item, self.spec, self.topology, at, chunk):
                if (piece.rows, piece.columns) in seen:
                    continue
                seen.add((piece.rows, piece.columns))
                self._broadcast(item, piece, rank, whole)
        return whole

    def _broadcast(self, item: Item, piece: Piece, rank: int, whole: Tensor) -> None:
        box = (slice(*piece.rows),) if whole.ndim == 1 else (slice(*piece.rows), slice(*piece.columns))
        if dist.get_rank() == rank:
            place = next(p for p in self._places[item.name] if (p.start, p.columns) == (piece.rows[0], piece.columns))
            part = place.rows(*piece.rows).contiguous()
        else:
            part = torch.empty_like(whole[box], memory_format=torch.contiguous_format)
        dist.broadcast(part, rank)
        whole[box] = part


class DeviceModelValues(ModelValues, EncodingValues):
    """The same, which encodes on the model's device: what crosses the bus is codes (see `EncodingValues`)."""

    def encoded(
        self,
        item: Item,
        encoding: str,
        old_scale: Callable[[int, int], np.ndarray | None],
        on_host: Callable[[int, np.ndarray], EncodedRows],
    ) -> Iterator[EncodedRows]:
        whole = self._whole(item) if self._ranks else None
        for first, last in cuts(0, item.shape[0], _TIMES * stripe_rows(item.shape)):
            values = self._rows(item, first, last) if whole is None else whole[first:last]
            plain = values.to(torch.bfloat16)
            old = old_scale(first, last)
            like = None if old is None else torch.from_numpy(old).to(self._device)
            found = encode(encoding, plain, like)
            if found is None:
                on_host(first, to_numpy(values))
                raise AssertionError(f"{item.name}: only the device finds fault with it")
            codes, scale, stats = found
            rounded = int((plain.float() != values).sum()) if values.dtype == torch.float32 else 0
            yield EncodedRows(to_numpy(codes), to_numpy(scale), stats, rounded)

    def _rows(self, item: Item, first: int, last: int) -> Tensor:
        """Rows of an item that this rank has, one behind another."""
        found = sorted(self._places[item.name], key=lambda place: place.start)
        parts = [p.rows(max(first, p.start), min(last, p.stop)) for p in found if p.start < last and first < p.stop]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()


def model_values(chunks: Sequence[DeepSeekV4Model]) -> ModelValues:
    """The items of this rank's chunks as a source, which encodes by itself on a GPU."""
    return (DeviceModelValues if computes(next(chunks[0].parameters()).device) else ModelValues)(chunks)


def _copy_rows(found: Iterable[Place], first: int, last: int, out: np.ndarray) -> None:
    for place in found:
        low, high = max(first, place.start), min(last, place.stop)
        if low < high:
            out[low - first : high - first] = to_numpy(place.rows(low, high))


def _owners(mine: Coordinate) -> dict[Coordinate, int]:
    """Collective: coordinate -> the first rank that has it."""
    gathered: list[Coordinate | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    found: dict[Coordinate, int] = {}
    for rank, at in enumerate(gathered):
        assert at is not None
        found.setdefault(at, rank)
    return found
