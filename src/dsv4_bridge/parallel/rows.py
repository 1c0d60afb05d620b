"""Rows cut over context-parallel ranks: which tokens of which documents each of them has. Pure numbers."""

from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """A document's tokens on one rank.

    Attributes:
        document: its number in the row.
        size: tokens.
        start: tokens of the document on the ranks before.
    """

    document: int
    size: int
    start: int


def segments_of(documents: Sequence[slice], ranks: int, size: int) -> tuple[tuple[Segment, ...], ...]:
    """Every rank's parts of the documents.

    Args:
        documents: the row's, in order, from token 0 to ranks * size.
        ranks: that the row is cut over.
        size: tokens of a rank.
    """
    found: list[list[Segment]] = [[] for _ in range(ranks)]
    for number, part in enumerate(documents):
        for rank in range(part.start // size, -(-part.stop // size)):
            low = max(part.start, rank * size)
            found[rank].append(Segment(number, min(part.stop, (rank + 1) * size) - low, low - part.start))
    return tuple(map(tuple, found))
