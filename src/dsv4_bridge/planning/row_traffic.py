"""Bytes that layers send between the ranks that rows are cut over: the table of `mcore.layers.context` in numbers.

Counted as real ranks send them by tests/mcore/test_row_traffic.py.
"""

from dataclasses import dataclass, replace

from ..spec.spec import ModelSpec
from .activations import Shape
from .index_queries import query_costs, spread_rows

_BLOCK = {4: 7, 128: 127}  # tokens in front of a rank's first one that a block and, at ratio 4, the one before it have


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends of a micro-batch.

    Attributes:
        window: keys in front of the next rank's first token, to that rank.
        tails: projections of the compressors in front of it, to that rank.
        entries: compressed entries, to all others: each sends its own once to each.
        keys: the indexer's, likewise.
        queries: the indexer's that others score, and what was chosen for others' queries, to those that
            `index_queries` says; of the rank that sends most.
    """

    window: int = 0
    tails: int = 0
    entries: int = 0
    keys: int = 0
    queries: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.window + self.tails + self.entries + self.keys + self.queries

    @property
    def least(self) -> int:
        """What another way of cutting rows in runs would send too: window keys, entries and the indexer's keys."""
        return self.window + self.entries + self.keys


def sent_forward(spec: ModelSpec, ratio: int, shape: Shape, queries: str = "auto") -> Sent:
    """Of one layer's forward, by a rank that has a next one.

    Args:
        spec: the model.
        ratio: the layer's.
        shape: the micro-batch; its length is a rank's.
        queries: where the indexer's are scored, see `index_queries.spread`.
    """
    if shape.cp == 1:
        return Sent()
    value, d = shape.batch * shape.e, spec.head_dim
    window = value * (spec.sliding_window - 1) * d
    if not ratio:
        return Sent(window)
    # An indexer that learns makes its keys a second time, with gradients.
    widths = (d, *((1 + shape.indexer) * [spec.index_head_dim])) if ratio == 4 else (d,)
    # Keys and gates; at ratio 4 each token has two of each, for its block and the next.
    tails = value * _BLOCK[ratio] * sum(widths) * (4 if ratio == 4 else 2)
    rows = (shape.cp - 1) * -(-shape.length // ratio)
    moved = max(queries_sent(spec, shape, queries)) if ratio == 4 else 0
    return Sent(window, tails, value * rows * d, value * rows * sum(widths[1:]), moved)


def queries_sent(spec: ModelSpec, shape: Shape, queries: str = "auto") -> tuple[int, ...]:
    """Bytes of every rank in a forward of a CSA layer: queries that it gives away, and what it chose for others'."""
    costs = query_costs(spec, shape.e)
    sent = spread_rows(spec, shape.length * shape.cp, shape.cp, shape.e, queries, shape.batch).sent
    return tuple(
        shape.batch * sum(run.size * (costs.there * (run.home == rank) + costs.back * (run.at == rank)) for run in sent)
        for rank in range(shape.cp)
    )


def sent_backward(spec: ModelSpec, ratio: int, shape: Shape) -> Sent:
    """Of its backward: gradients go the same ways back; the indexer's if it learns."""
    forth = sent_forward(spec, ratio, replace(shape, indexer=False), "home")
    if ratio != 4 or shape.indexer:
        return forth
    part = spec.head_dim / (spec.head_dim + spec.index_head_dim)
    return Sent(forth.window, round(forth.tails * part), forth.entries)
