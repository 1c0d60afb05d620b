"""Weights as they are stored, kept in a given memory or read when they are needed.

Everything of a token's way is read once a token, but of the experts a few: so what all tokens need is kept first, layer
by layer, and what memory is left holds experts, of every layer those that were used last. What has no place is read,
past the page cache, while the layer before computes.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from ...codec.multiply import EncodedMatrix
from ...spec.encodings import TILE
from ...spec.plan import Item
from ...store.direct import DirectReader, aligned_memory
from ...store.encoded import Rows, infos_of, matrix_of, plain_matrix, whole
from ...store.safetensors import TensorInfo
from ...store.values import HFValues, Values, cuts

_READERS = 4  # that wait for the disk at a time
_AHEAD = 3  # units in memory while one is computed with: it, and those that come
_UNIT = 64 << 20  # bytes of a unit, about; larger weights are several


class Loaded(NamedTuple):
    """Weights of a unit, and the memory that they lie in."""

    matrices: tuple[EncodedMatrix, ...]
    memory: np.ndarray


@dataclass
class Reads:
    """What was read, and how often experts were there already.

    Attributes:
        nbytes: read from the checkpoint while tokens were made.
        hits: experts that were in memory.
        misses: experts that were read.
    """

    nbytes: int = 0
    hits: int = 0
    misses: int = 0


class Shelf:
    """The weights of one checkpoint.

    Args:
        values: of the checkpoint.

    Attributes:
        reads: since the shelf was filled.
        kept: bytes of what is always there.
        room: experts of a layer that are kept.
    """

    def __init__(self, values: Values):
        self.values, self.reads, self.kept, self.room = values, Reads(), 0, 0
        self._reader = DirectReader(values.checkpoint.folder.path) if isinstance(values, HFValues) else None
        self._units: dict[str, tuple[Rows, ...]] = {}
        self._always: dict[str, Loaded] = {}
        self._experts: dict[str, OrderedDict[int, Loaded]] = {}
        self._coming: dict[str, Future[Loaded]] = {}
        self._next: dict[str, str] = {}
        self._last: str | None = None
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()  # the readers take memory and count at the same time
        self._pool = ThreadPoolExecutor(_READERS, "reading weights")

    def add(self, unit: str, items: Sequence[Item], together: bool = False) -> tuple[str, ...]:
        """Name weights that every token needs one above another, in parts that are not too large.

        Args:
            unit: their name.
            items: the weights.
            together: leave them in one part.

        Returns:
            Names of the parts.
        """
        parts = [whole(item) for item in items]
        names = (unit,)
        if not together and len(items) == 1 and (count := self.size(parts) // _UNIT) > 1:
            step = -(-items[0].shape[0] // (count * TILE)) * TILE
            parts = [Rows(items[0], *cut) for cut in cuts(0, items[0].shape[0], step)]
            names = tuple(f"{unit} {n}" for n in range(len(parts)))
            self._units |= {name: (part,) for name, part in zip(names, parts, strict=True)}
        else:
            self._units[unit] = tuple(parts)
        return names

    def size(self, rows: Sequence[Rows]) -> int:
        """Bytes of memory that they take."""
        return sum(r.numel * 4 for r in rows) if self._reader is None else self._reader.size(self._infos(rows))

    def fill(self, memory: int, expert: Sequence[Item], layers: int) -> None:
        """Read and keep what fits.

        Args:
            memory: bytes.
            expert: the weights of one of the experts, which are all alike.
            layers: with experts.
        """
        one, left = self.size([whole(item) for item in expert]), memory - self.least(expert)
        for unit, rows in self._units.items():
            size = self.size(rows)
            if size <= left:
                self._always[unit] = self._read(rows)
                self.kept, left = self.kept + size, left - size
        self.room = max(0, left) // (one * layers)
        self.reads = Reads()

    def least(self, expert: Sequence[Item]) -> int:
        """Bytes without which nothing runs."""
        one = self.size([whole(item) for item in expert])
        return (_READERS + 1) * one + _AHEAD * max(self.size(rows) for rows in self._units.values())

    @property
    def whole(self) -> int:
        """Bytes of what every token needs."""
        return sum(self.size(rows) for rows in self._units.values())

    @contextmanager
    def lent(self, unit: str) -> Iterator[tuple[EncodedMatrix, ...]]:
        """The weights of a unit; in the body they stay as they are."""
        if (always := self._always.get(unit)) is not None:
            yield always.matrices
            return
        coming = self._coming.pop(unit, None)
        loaded = coming.result() if coming else self._read(self._units[unit])
        if self._last is not None:
            self._next[self._last] = unit  # every token goes the same way
        self._last, ahead = unit, unit
        for _ in range(_AHEAD - 1):
            ahead = self._next.get(ahead)
            if ahead is None or ahead == unit:
                break
            if ahead not in self._coming:
                self._coming[ahead] = self._pool.submit(self._read, self._units[ahead])
        try:
            yield loaded.matrices
        finally:
            self._give_back(loaded)

    def experts(
        self, layer: str, wanted: Sequence[tuple[int, Sequence[Item]]]
    ) -> Iterator[tuple[int, tuple[EncodedMatrix, ...]]]:
        """Numbers and weights of experts, each once, those that are in memory first; use one before the next.

        Args:
            layer: name of it.
            wanted: number and weights of each.
        """
        held = self._experts.setdefault(layer, OrderedDict())
        there = [number for number, _ in wanted if number in held]
        missing = [(number, items) for number, items in wanted if number not in held]
        self.reads.hits += len(there)
        self.reads.misses += len(missing)
        coming: list[tuple[int, Future[Loaded]]] = []
        queue = iter(missing)

        def ask(count: int) -> None:
            for number, items in islice(queue, count):
                coming.append((number, self._pool.submit(self._read, [whole(item) for item in items])))

        ask(_READERS)
        for number in there:
            held.move_to_end(number)
            yield number, held[number].matrices
        while coming:
            number, future = coming.pop(0)
            loaded = future.result()
            yield number, loaded.matrices
            if self.room:
                held[number] = loaded
                if len(held) > self.room:
                    self._give_back(held.popitem(last=False)[1])
            else:
                self._give_back(loaded)
            ask(1)

    def close(self) -> None:
        """End the threads and close the files."""
        self._pool.shutdown(cancel_futures=True)
        if self._reader:
            self._reader.close()

    def _read(self, rows: Sequence[Rows]) -> Loaded:
        if self._reader is None or not isinstance(self.values, HFValues):
            found = tuple(plain_matrix(self.values, part) for part in rows)
            with self._lock:
                self.reads.nbytes += sum(m.nbytes for m in found)
            return Loaded(found, np.empty(0, np.uint8))
        infos, bound = self._infos(rows), self.values.checkpoint.bound
        memory = self._take(self._reader.size(infos))
        parts = iter(self._reader.read(infos, memory))
        with self._lock:
            self.reads.nbytes += sum(info.nbytes for info in infos)
        return Loaded(tuple(matrix_of(bound[part.item.name], part, parts) for part in rows), memory)

    def _infos(self, rows: Sequence[Rows]) -> list[TensorInfo]:
        assert isinstance(self.values, HFValues)
        bound = self.values.checkpoint.bound
        return [info for part in rows for info in infos_of(bound[part.item.name], part)]

    def _take(self, size: int) -> np.ndarray:
        """Memory that was given back, whose pages are there already, or new."""
        with self._lock:
            if spare := self._free.get(size):
                return spare.pop()
        return aligned_memory(size)

    def _give_back(self, loaded: Loaded) -> None:
        if len(loaded.memory):
            with self._lock:
                self._free.setdefault(len(loaded.memory), []).append(loaded.memory)


def threads() -> int:
    """That share a multiplication: the cores of this process."""
    return len(os.sched_getaffinity(0))
