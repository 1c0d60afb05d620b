"""Whole items of a model that is cut over ranks, put together one at a time."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...parallel.pieces import Piece, pieces
from ...parallel.topology import Coordinate, chunk_of
from ...spec.dtypes import DTYPES
from ...spec.encodings import ENCODINGS
from ...spec.plan import Item
from ...store.values import Scratch, check_ids, cuts, stripe_rows
from ..model import DeepSeekV4Model
from .places import Place, places, to_numpy

_RAW = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}


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
