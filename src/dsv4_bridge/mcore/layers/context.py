"""Context parallelism: each rank has a run of every row's tokens, [rank * s, (rank + 1) * s) of ranks * s.

Most of the model looks at one token at a time. What looks back needs of other ranks:

| what | from whom | tokens |
|---|---|---|
| keys of the window | the rank before | window - 1 |
| projections of a block of 128 that the cut goes through | the rank before | 127 |
| the same of a block of 4 and of the one before it | the rank before | 7 |
| compressed entries, keys of the indexer | all ranks | one in 128 or 4 |
| the indexer's queries, where that levels its work, and back what they chose | any rank | those that are moved |
| the token behind the last, for multi-token prediction | the rank behind | 1 a depth |

A block is completed by the rank that has its last token. Documents of a packed row lie across cuts as they come.
Gradients go the same ways back. Every rank makes the same calls in the same order, whatever documents it has: a
backward runs in the reverse order of the forward, so no rank waits for a call that another does not make.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ...parallel.rows import Segment, segments_of
from ...planning.index_queries import Costs, Run, spread
from .documents import documents_of

RATIOS = (4, 128)
Every = Sequence[Sequence[Segment]]


@dataclass(frozen=True)
class Blocks:
    """The compressed blocks of one ratio.

    Attributes:
        ratio: tokens a block.
        leads: of every segment, tokens in front of it that its first block and, at ratio 4, the block before it have.
        skipped: of every segment, entries to leave out: 1 for that block before, which the ranks before have made.
        positions: [n] int64, of the first tokens of this rank's entries, in their documents.
        most: entries of any rank at most; shorter ones are filled up.
        rows: [m] int64, entries that this rank's queries see, of all ranks' entries one behind another: segment by
            segment, from the beginning of its document.
        counts: how many of them each segment has.
    """

    ratio: int
    leads: tuple[int, ...]
    skipped: tuple[int, ...]
    positions: Tensor
    most: int
    rows: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """Queries of the indexer, and which rank scores them.

    Attributes:
        runs: of all ranks.
        rows: [m] int64, keys that this rank's runs need, of all ranks' entries one behind another: document by
            document, from its beginning.
        begins: of each of these documents, where its keys begin in `rows`.
        documents: of every rank's segments.
    """

    runs: tuple[Run, ...]
    rows: Tensor
    begins: Mapping[int, int]
    documents: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Share:
    """What a rank has of a row.

    Attributes:
        group: the ranks.
        size: tokens of a rank.
        segments: of this rank.
        ends: [ranks * s] bool, whether a document ends with the token; the same on all ranks.
        blocks: by ratio.
        scored: by the indexers that are not trained.
    """

    group: ProcessGroup
    size: int
    segments: tuple[Segment, ...]
    ends: Tensor
    blocks: Mapping[int, Blocks]
    scored: Scored

    def positions(self) -> Tensor:
        """Of this rank's tokens in their documents: [s] int64."""
        found = [torch.arange(s.start, s.start + s.size, device=self.ends.device) for s in self.segments]
        return torch.cat(found)

    def sizes(self) -> list[int]:
        """Tokens of every segment."""
        return [s.size for s in self.segments]

    def with_window(self, kv: Tensor, window: int) -> tuple[Tensor, ...]:
        """Keys of every segment, those of the tokens in front of it first: [b, s, d] -> [b, l + size, d] each."""
        lead = min(window - 1, self.segments[0].start)
        whole = with_tail(kv, window - 1, self.group)
        first, *others = self.sizes()
        return whole.split([whole.shape[1] - kv.shape[1] - lead, lead + first, *others], 1)[1:]


def share_of(
    group: ProcessGroup,
    batch: int,
    size: int,
    cu_seqlens: Tensor | None,
    device: torch.device,
    costs: Costs,
    queries: str = "auto",
) -> Share:
    """What this rank has of rows of `size` tokens a rank.

    Args:
        group: the ranks.
        batch: rows.
        size: tokens of a rank.
        cu_seqlens: boundaries of the documents of the whole row; None: every row is one document.
        device: where indices are wanted.
        costs: of a query of the model's indexers.
        queries: where they are scored, see `spread`.

    Raises:
        BridgeError: boundaries that do not cover the row, see `documents_of`.
    """
    ranks, whole = group.size(), group.size() * size
    documents = (slice(0, whole),) if cu_seqlens is None else documents_of(cu_seqlens, batch, whole)
    every = segments_of(documents, ranks, size)
    ends = ends_of(torch.tensor([0, *(part.stop for part in documents)]), whole, device)
    blocks = {ratio: _blocks(every, group.rank(), ratio, size, device) for ratio in RATIOS}
    scored = _scored(every, group.rank(), spread(every, costs, queries, batch).runs, size, device)
    return Share(group, size, every[group.rank()], ends, blocks, scored)


def ends_of(cu_seqlens: Tensor, length: int, device: torch.device) -> Tensor:
    """Whether a document ends with the token: [length] bool, for boundaries from 0 to `length`."""
    ends = torch.zeros(length, dtype=torch.bool, device=device)
    ends[cu_seqlens[1:].to(device, torch.int64, non_blocking=True) - 1] = True
    return ends


def _blocks(every: Every, rank: int, ratio: int, size: int, device: torch.device) -> Blocks:
    most = -(-size // ratio)
    mine, seen = every[rank], [_ended(segment, ratio) for segment in every[rank]]
    overlaps = ratio == 4
    firsts = [max(0, s.start // ratio - overlaps) for s in mine]
    positions = [torch.arange(blocks.start, blocks.stop) * ratio for blocks in seen]
    begins = _begins(every, ratio)
    rows = [_rows(every, begins, most, rank, segment) for segment in mine]
    return Blocks(
        ratio,
        tuple(s.start - first * ratio for s, first in zip(mine, firsts, strict=True)),
        tuple(s.start // ratio - first for s, first in zip(mine, firsts, strict=True)),
        torch.cat(positions).to(device, non_blocking=True),
        most,
        torch.cat(rows).to(device, non_blocking=True),
        tuple(map(len, rows)),
    )


def _scored(every: Every, rank: int, runs: tuple[Run, ...], size: int, device: torch.device) -> Scored:
    last: dict[int, tuple[int, Segment]] = {}  # of every document that is needed, the segment that sees most
    for run in runs:
        segment = every[run.home][run.segment]
        if run.at == rank and segment.start >= last.get(segment.document, (0, segment))[1].start:
            last[segment.document] = run.home, segment
    begins, rows, count = _begins(every, 4), [torch.empty(0, dtype=torch.int64)], 0
    first: dict[int, int] = {}
    for document, (home, segment) in last.items():
        rows.append(_rows(every, begins, -(-size // 4), home, segment))
        first[document], count = count, count + len(rows[-1])
    documents = tuple(tuple(segment.document for segment in segments) for segments in every)
    return Scored(runs, torch.cat(rows).to(device, non_blocking=True), first, documents)


def _begins(every: Every, ratio: int) -> list[list[int]]:
    """Of every rank, where the entries of each segment begin among its own, and where the last ones end."""
    return [list(accumulate((len(_ended(s, ratio)) for s in segments), initial=0)) for segments in every]


def _rows(every: Every, begins: Sequence[Sequence[int]], most: int, rank: int, segment: Segment) -> Tensor:
    """Entries that a segment of `rank` sees, of all ranks' with `most` each: from the beginning of its document."""
    found = [torch.empty(0, dtype=torch.int64)]
    for other in range(rank + 1) if segment.start else (rank,):
        number = segment.document - every[other][0].document  # documents follow one another
        if 0 <= number < len(every[other]):
            first, stop = begins[other][number : number + 2]
            found.append(torch.arange(first, stop) + other * most)
    return torch.cat(found)


def _ended(segment: Segment, ratio: int) -> range:
    """Numbers of the blocks whose last tokens the segment has."""
    return range(segment.start // ratio, (segment.start + segment.size) // ratio)


def with_tail(x: Tensor, count: int, group: ProcessGroup) -> Tensor:
    """The last `count` tokens of the rank before, and this rank's: [b, s, w] -> [b, count + s, w]; zeros on rank 0."""
    return _WithTail.apply(x, count, group)  # type: ignore[return-value]


class _WithTail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count, group):  # type: ignore[override]
        ctx.count, ctx.group = count, group
        tail = _passed(x[:, x.shape[1] - count :], 1, group)
        return torch.cat([tail, x], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        own = grad[:, ctx.count :].clone()
        own[:, own.shape[1] - ctx.count :] += _passed(grad[:, : ctx.count], -1, ctx.group)
        return own, None, None


def _passed(x: Tensor, step: int, group: ProcessGroup) -> Tensor:
    """Give `x` to the rank `step` further, and return that of the rank `step` before; zeros where there is none."""
    got, calls = torch.zeros_like(x, memory_format=torch.contiguous_format), []
    to, source = group.rank() + step, group.rank() - step
    if 0 <= to < group.size():
        calls.append(dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=to))
    if 0 <= source < group.size():
        calls.append(dist.P2POp(dist.irecv, got, group=group, group_peer=source))
    for work in dist.batch_isend_irecv(calls) if calls else ():
        work.wait()
    return got


def of_all_ranks(entries: Tensor, most: int, rows: Tensor, group: ProcessGroup) -> Tensor:
    """The `rows` of what all ranks have made, one behind another with `most` each: [b, n, w] -> [b, m, w]."""
    filled = torch.nn.functional.pad(entries, (0, 0, 0, most - entries.shape[1])).transpose(0, 1)
    every = gather_from_sequence_parallel_region(filled.contiguous(), group=group)  # [ranks * most, b, w]
    return every.index_select(0, rows).transpose(0, 1)


def exchanged(sent: Mapping[int, Tensor], got: Mapping[int, Tensor], group: ProcessGroup) -> list[dist.Work]:
    """Messages to and from ranks, under way: leave the tensors alone until all have been waited for."""
    calls = [dist.P2POp(dist.isend, x, group=group, group_peer=to) for to, x in sorted(sent.items())]
    calls += [dist.P2POp(dist.irecv, x, group=group, group_peer=source) for source, x in sorted(got.items())]
    return dist.batch_isend_irecv(calls) if calls else []


def ahead(x: Tensor, ends: Tensor | None = None, group: Any = None) -> Tensor:
    """[b, s] of tokens one place ahead, 0 behind the row's last one.

    Args:
        x: [b, s].
        ends: of the whole row, as `Share` has them: 0 is behind every document's last token too.
        group: the ranks that the row is cut over; None: one.
    """
    behind = torch.zeros_like(x[:, :1]) if group is None else _passed(x[:, :1], -1, group)
    moved = torch.cat([x[:, 1:], behind], 1)
    if ends is None:
        return moved
    first = 0 if group is None else group.rank() * x.shape[1]
    return moved.masked_fill(ends[first : first + x.shape[1]], 0)


def over_ranks(x: Tensor, group: Any) -> Tensor:
    """The sum over the ranks, without a gradient; `x` is left as it is."""
    total = x.detach().clone()
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total
