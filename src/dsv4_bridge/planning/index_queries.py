"""Which context-parallel rank scores the blocks of which queries of an indexer. Pure numbers.

A query scores every block of 4 tokens in front of it: at a million tokens over 8 ranks the last rank's do 1.9 times
the mean. What a score is made of is small, and every rank has the keys of all blocks: so ranks with more work than
the mean give their costliest queries to those with less, and get the chosen blocks back.

The unit of work is a block scored for one query; making a query of its low-rank form counts as so many of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from ..parallel.rows import Segment, segments_of
from ..spec.flops import block_pairs, share_flops
from ..spec.spec import ModelSpec
from .rates import BETWEEN, LATENCY, RATE

MODES = ("auto", "home", "spread")


class Run(NamedTuple):
    """Queries of one document, one behind another, that one rank scores.

    Attributes:
        home: rank that has their tokens, and attends with them.
        first: the first of them among the home's tokens.
        size: how many.
        segment: number of theirs among the home's.
        place: of the first in its document.
        at: rank that scores them.
    """

    home: int
    first: int
    size: int
    segment: int
    place: int
    at: int

    @property
    def blocks(self) -> int:
        """Those that its last query sees."""
        return (self.place + self.size) // 4


@dataclass(frozen=True)
class Costs:
    """Of one query, of one row.

    Attributes:
        topk: blocks that are chosen; with no more in sight nothing is scored.
        making: blocks' worth of work that its heads are made with.
        block: FLOPs of one block's score.
        there: bytes that it is sent as.
        back: bytes of its choice.
    """

    topk: int
    making: int
    block: int
    there: int
    back: int


@dataclass(frozen=True)
class Spread:
    """Who scores what.

    Attributes:
        runs: every query of a segment that sees more than `topk` blocks, once; in the order of the row.
        home: work of every rank, were nothing sent.
        work: work of every rank.
        reason: why queries are sent, or stay, for people.
    """

    runs: tuple[Run, ...]
    home: tuple[int, ...]
    work: tuple[int, ...]
    reason: str

    @property
    def sent(self) -> tuple[Run, ...]:
        """Runs that are scored away from home."""
        return tuple(run for run in self.runs if run.at != run.home)


def query_costs(spec: ModelSpec, value_bytes: int) -> Costs:
    """What a query costs in a model whose values have `value_bytes` bytes."""
    heads, width, low = spec.index_n_heads, spec.index_head_dim, spec.q_lora_rank
    # The low-rank query and the weights of the heads go there, int32 places come back.
    there, back = (low + heads) * value_bytes, 4 * spec.index_topk
    return Costs(spec.index_topk, round(low * width / (width + 1)), 2 * heads * (width + 1), there, back)


def work_of(place: int, size: int, costs: Costs) -> int:
    """Of queries from a place in their document on."""
    return block_pairs(place + size, 4) - block_pairs(place, 4) + costs.making * size


def spread(every: Sequence[Sequence[Segment]], costs: Costs, mode: str = "auto", rows: int = 1) -> Spread:
    """Level the ranks' work; at home stays what need not be sent, and everything where sending does not pay.

    Args:
        every: the segments of every rank.
        costs: of a query.
        mode: `auto`: sent where by estimate it saves more time than it takes; `spread`: in any case; `home`: never.
        rows: that are cut alike.

    Returns:
        Who scores what. Spread, no rank has more than the mean work and the costliest query's, once a rank.
    """
    stay = [_at_home(rank, segments, costs) for rank, segments in enumerate(every)]
    runs = tuple(run for own in stay for run in own)
    home = tuple(sum(work_of(run.place, run.size, costs) for run in own) for own in stay)
    if mode == "home" or len(every) == 1:
        return Spread(runs, home, home, "the settings keep every query at home")
    level, work = _leveled(stay, home, costs)
    found = Spread(tuple(sorted(level)), home, tuple(work), "the settings send them in any case")
    if mode == "spread":
        return found
    busiest = max(sum(run.size for run in found.sent if rank in (run.home, run.at)) for rank in range(len(every)))
    saved = rows * (max(home) - max(work)) * costs.block / RATE
    takes = rows * busiest * (costs.there + costs.back) / BETWEEN + LATENCY
    why = f"sending up to {busiest:,} queries of a rank saves {saved * 1e3:.3g} ms a layer and takes {takes * 1e3:.3g}"
    return Spread(found.runs, home, found.work, why) if saved > takes else Spread(runs, home, home, why)


@cache
def spread_rows(
    spec: ModelSpec, length: int, ranks: int, value_bytes: int, mode: str = "auto", rows: int = 1
) -> Spread:
    """`spread` of rows of `length` tokens that are a document each."""
    every = segments_of([slice(0, length)], ranks, length // ranks)
    return spread(every, query_costs(spec, value_bytes), mode, rows)


def rank_flops(
    spec: ModelSpec, length: int, ranks: int, value_bytes: int, mode: str = "auto", rows: int = 1
) -> tuple[float, ...]:
    """Training FLOPs of every context-parallel rank on one sequence, with the indexers' queries where they are scored.

    What an indexer's objective adds is as much for every query, and left out.

    Args:
        spec: the model.
        length: tokens of the sequence, which the ranks divide.
        ranks: that it is cut over.
        value_bytes: of the model's type.
        mode: see `spread`.
        rows: see `spread`.
    """
    found = spread_rows(spec, length, ranks, value_bytes, mode, rows)
    layers = spec.compress_ratios[: spec.num_hidden_layers + spec.mtp_layers].count(4)
    each = layers * query_costs(spec, value_bytes).block
    shares = zip(share_flops(spec, length, ranks), found.work, found.home, strict=True)
    return tuple(share + (work - home) * each for share, work, home in shares)


def _at_home(rank: int, segments: Sequence[Segment], costs: Costs) -> list[Run]:
    first, found = 0, []
    for number, segment in enumerate(segments):
        if (segment.start + segment.size) // 4 > costs.topk:
            found.append(Run(rank, first, segment.size, number, segment.start, rank))
        first += segment.size
    return found


def _leveled(stay: Sequence[Sequence[Run]], home: Sequence[int], costs: Costs) -> tuple[list[Run], list[int]]:
    """Runs and work of every rank, when the last ranks with too much have given to the first with too little."""
    mean, work = sum(home) // len(home), list(home)
    takers = [rank for rank, own in enumerate(home) if own < mean]
    found: list[Run] = []
    for donor in reversed(range(len(home))):
        left = sorted(stay[donor], key=lambda run: run.place + run.size)  # the costliest queries behind
        while left and takers and work[donor] > mean:
            run, taker = left[-1], takers[0]
            room = min(work[donor] - mean, mean - work[taker])
            count = _from_the_end(run, room, costs)
            if not count:
                if room == work[donor] - mean:
                    break
                takers.pop(0)
                continue
            kept = run.size - count
            given = run._replace(at=taker, first=run.first + kept, size=count, place=run.place + kept)
            found.append(given)
            moved = work_of(given.place, count, costs)
            work[donor], work[taker] = work[donor] - moved, work[taker] + moved
            left[-1:] = [run._replace(size=kept)] if kept else []
        found += left
    return found, work


def _from_the_end(run: Run, room: int, costs: Costs) -> int:
    """How many of the last queries make no more work than `room`."""
    low, high = 0, run.size
    while low < high:
        count = (low + high + 1) // 2
        if work_of(run.place + run.size - count, count, costs) <= room:
            low = count
        else:
            high = count - 1
    return low
