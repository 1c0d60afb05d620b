"""Documents of many lengths -> sequences of one length, the boundaries kept."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...codec._kernels import kernel
from ...errors import BridgeError
from .samples import Sample


@dataclass(frozen=True)
class Pack:
    """Documents one behind the other.

    Attributes:
        tokens: int32 [n], n <= seq_length; padding is the reader's.
        loss_mask: bool [n], as in `samples.Sample`; never set at the first token of a document, so that
            nothing is learned across a boundary.
        cu_seqlens: int32 [documents + 1], where each document begins, and n.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    cu_seqlens: np.ndarray


@dataclass(frozen=True)
class Packing:
    """Which documents stand together.

    Attributes:
        packs: document numbers of each pack, rising; packs in the order of their first documents.
        seq_length: most tokens of a pack.
        tokens: of all documents.
    """

    packs: tuple[tuple[int, ...], ...]
    seq_length: int
    tokens: int

    @property
    def fill_rate(self) -> float:
        """Tokens over places, 1.0 where nothing needs padding."""
        return self.tokens / (len(self.packs) * self.seq_length) if self.packs else 1.0


def plan_packs(lengths: Sequence[int], seq_length: int) -> Packing:
    """First-fit decreasing: the longest document first, each into the first pack that has room.

    The same lengths give the same packs. Takes time n log n: a tree over the packs' free places finds the
    first that is large enough.

    Raises:
        BridgeError: a document longer than a pack, or empty.
    """
    sizes = np.asarray(lengths, np.int64).reshape(-1)  # [documents]
    for i in np.flatnonzero((sizes < 1) | (sizes > seq_length))[:1]:
        raise BridgeError(f"packing: document {i} has {sizes[i]} tokens, a pack holds {seq_length}; cut it first")
    order = np.argsort(-sizes, kind="stable")
    number = _first_fit(order, sizes, seq_length)  # pack of each document
    members = np.argsort(number, kind="stable")  # documents by pack, rising within it
    edges = np.flatnonzero(np.diff(number[members])) + 1
    packs = [tuple(group.tolist()) for group in np.split(members, edges) if len(group)]
    return Packing(tuple(sorted(packs)), seq_length, int(sizes.sum()))


@kernel()
def _first_fit(order: np.ndarray, sizes: np.ndarray, room: int) -> np.ndarray:
    """The pack of each document, int64 [documents], where each in turn goes to the first with room for it."""
    leaves = 1  # as many packs as documents, at most
    while leaves < len(order):
        leaves *= 2
    free = np.full(2 * leaves, room, np.int64)  # a tree: free[1] is the most that any pack has
    number = np.empty(len(order), np.int64)
    for i in order:
        node = 1
        while node < leaves:
            node = 2 * node + (1 if free[2 * node] < sizes[i] else 0)
        number[i] = node - leaves
        free[node] -= sizes[i]
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return number


def pack(samples: Sequence[Sample], seq_length: int) -> Iterator[Pack]:
    """Samples in packs, each sample whole and once, see `plan_packs`.

    Raises:
        BridgeError: a sample that is too long.
    """
    for documents in plan_packs([len(sample.tokens) for sample in samples], seq_length).packs:
        members = [samples[i] for i in documents]
        ends = np.cumsum([0, *(len(sample.tokens) for sample in members)])
        yield Pack(
            np.concatenate([sample.tokens for sample in members]),
            np.concatenate([sample.loss_mask for sample in members]),
            ends.astype(np.int32),
        )
