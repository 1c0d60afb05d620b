"""Scales on their way into a file: bytes, or, where they are too many to hold, those of a checkpoint and what differs.

The scale of an Engram table has 3 GB. It comes behind its weight, of which it is a by-product: what is kept meanwhile
are the rows in which it is not the scale that the checkpoint at hand has.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..store.hf import Bound
from ..store.stream import Stream
from ..store.values import HFValues, Scratch

LARGE = 64 << 20  # bytes that are not held at once
_PIECE = 4 << 20


@dataclass
class StoredScale:
    """The scale of a tensor of a checkpoint, read when it is written.

    Attributes:
        source: the checkpoint.
        bound: the tensor.
        changes: first row of the scale -> rows that are others.
    """

    source: HFValues
    bound: Bound
    changes: dict[int, np.ndarray] = field(default_factory=dict)
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def row_bytes(self) -> int:
        """Of one row of the scale."""
        assert self.bound.scale
        return self.bound.scale.nbytes // self.bound.scale.shape[0]

    def note(self, first: int, rows: np.ndarray) -> None:
        """What was made for rows from `first` on; it is kept where the checkpoint has another."""
        own = self.source.scale_rows(self.bound, first, first + len(rows), self.scratch, "own_scale")
        if not np.array_equal(rows, own):
            self.changes[first] = rows.copy()

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, front to back."""
        assert self.bound.scale
        count, at = self.bound.scale.shape[0], 0
        for first, rows in sorted(self.changes.items()):
            yield from self._stored(at, first)
            yield rows.tobytes()
            at = first + len(rows)
        yield from self._stored(at, count)

    def patches(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Byte, what the checkpoint has there, and what belongs there instead."""
        for first, rows in sorted(self.changes.items()):
            yield first * self.row_bytes, b"".join(self._stored(first, first + len(rows))), rows.tobytes()

    def _stored(self, first: int, last: int) -> Iterator[bytes]:
        step = max(1, _PIECE // self.row_bytes)
        for at in range(first, last, step):
            yield self.source.scale_rows(self.bound, at, min(at + step, last), self.scratch, "stored_scale").tobytes()


Made = bytes | StoredScale


def whole(scale: Made) -> bytes:
    """All of it at once."""
    return scale if isinstance(scale, bytes) else b"".join(scale.pieces())


def put(scale: Made, stream: Stream) -> None:
    """Write it."""
    for piece in (scale,) if isinstance(scale, bytes) else scale.pieces():
        stream.write(piece)


def mend(stream: Stream, at: int, written: Made, scale: Made) -> None:
    """Put right what was written at byte `at` before its weight was."""
    if isinstance(scale, StoredScale) and isinstance(written, StoredScale):
        for offset, old, new in scale.patches():
            stream.patch(at + offset, old, new)
    elif (old := whole(written)) != (new := whole(scale)):
        stream.patch(at, old, new)
