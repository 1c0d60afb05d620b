"""The indexer's choice by Triton: scores of a chunk of queries into a bounded scratch, then an exact radix choice.

Choosing needs every score of a query at least twice: to find the threshold and to collect what lies above it.
Computed anew, a score costs 2 x 64 heads x 128 channels = 16 thousand operations, 17 ps of an H100's tensor cores;
written and read, it costs 8 bytes, 2.4 ps of its memory. So scores are written once, for as many queries as fit
`_SCRATCH` bytes, and memory never grows with S x S. A row is read once: it stays in registers while its threshold is
found bit by bit, in at most 32 passes of a comparison and a count; at 64 K tokens that is a sixth of what the products
of the scores cost. Merging sorted buffers would compare each score some hundred times.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from .tiles import dot, shared_memory

if TYPE_CHECKING:
    from .index import IndexTerms

# Bytes of scores at a time: some 2,000 queries of 64 K tokens, eight waves of tiles, so that the last one, which leaves
# processors idle, weighs little.
_SCRATCH = 128 << 20
# Scores of a row that one program holds in registers; a longer row is a tournament of such pieces.
_PIECE = 1 << 14
_ALIGN = 64


@dataclass(frozen=True)
class ScoreTiles:
    """How scores are cut into tiles.

    Attributes:
        queries: of a tile.
        blocks: of a tile.
        depth: channels multiplied at a time; all of them: the keys of a tile stay in shared memory.
        warps: of a program.
        stages: of the pipeline of loads.
    """

    queries: int
    blocks: int
    depth: int
    warps: int
    stages: int

    def launch(self, **more: Any) -> dict[str, Any]:
        """What a kernel is launched with."""
        sizes = {"QUERIES": self.queries, "BLOCKS": self.blocks, "DEPTH": self.depth}
        return sizes | more | {"num_warps": self.warps, "num_stages": self.stages}


def score_tiles(width: int, dtype: torch.dtype, shared: int) -> ScoreTiles:
    """Tiles for so many channels (a power of two) and so many bytes of shared memory."""
    if dtype == torch.float32:  # no tensor cores: operands pass through registers, so few channels at a time
        return ScoreTiles(64, 64, min(width, 32), 4, 2)
    for tiles in (ScoreTiles(64, 256, width, 8, 3), ScoreTiles(64, 128, width, 4, 2), ScoreTiles(32, 64, width, 4, 2)):
        if 2 * width * (tiles.blocks + tiles.stages * tiles.queries) <= shared:
            return tiles
    return ScoreTiles(64, 64, 64, 4, 2)


def widened(x: Tensor) -> Tensor:
    """The last axis filled up with zeros to a power of two of at least 16, and lying densely."""
    want = max(16, triton.next_power_of_2(x.shape[-1]))
    if x.shape[-1] != want:
        return functional.pad(x, (0, want - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def block_scores(terms: "IndexTerms") -> Tensor:
    """Scores of all blocks, [b, s, n] float32, -inf where a query does not see a block: what `choose` goes by."""
    batch, length = terms.queries.shape[:2]
    scores = terms.weights.new_full((batch, length, terms.keys.shape[1]), -torch.inf)
    if scores.numel():
        _fill(scores, _laid(terms), 0, terms.queries.shape[-1])
    return scores


def choose(terms: "IndexTerms", topk: int, first: int = 0) -> Tensor:
    """As `choose_blocks`, where there are more blocks than `topk`; a query's blocks are in ascending order."""
    batch, length, _, width = terms.queries.shape
    count, device = terms.keys.shape[1], terms.keys.device
    visible = (torch.arange(length, device=device, dtype=torch.int32) + first + 1) // 4
    chosen = torch.empty((batch, length, topk), dtype=torch.int64, device=device)
    # Queries that see no more than `topk` blocks need no scores.
    start = min(length, max(0, 4 * topk + 3 - first) // _ALIGN * _ALIGN)
    block = torch.arange(topk, device=device)
    chosen[:, :start] = torch.where(block < visible[:start, None], block, -1)
    terms = _laid(terms)
    while start < length:
        stop, most = chunk(start, length, count, batch, first)
        scores = terms.weights.new_empty((batch, stop - start, most))
        _fill(scores, terms, start, width, first)
        select(scores, visible[start:stop], topk, chosen[:, start:stop])
        start = stop
    return chosen


def chunk(start: int, length: int, count: int, batch: int, first: int = 0) -> tuple[int, int]:
    """Where a chunk of queries from `start` ends, and how many blocks its last query sees."""
    rows = _SCRATCH // (4 * batch * count)
    stop = min(length, start + max(_ALIGN, rows // _ALIGN * _ALIGN))
    return stop, min(count, (first + stop) // 4)


def select(scores: Tensor, visible: Tensor, topk: int, out: Tensor, piece: int = _PIECE) -> None:
    """The `topk` best of each row's first `visible` scores, in ascending order of place, -1 behind them.

    A row longer than `piece` is cut: the best of all are among the best of the pieces.

    Args:
        scores: [b, s, n] float32.
        visible: [s] int32.
        topk: at most 32 Ki.
        out: [b, s, topk] int64, filled here.
        piece: scores that a program holds, a power of two; more are held where `topk` asks for it.
    """
    batch, rows, count = scores.shape
    if rows == 0:
        return
    places: Tensor | None = None
    while True:
        size = min(max(piece, triton.next_power_of_2(2 * topk)), max(16, triton.next_power_of_2(count)))
        pieces = triton.cdiv(count, size)
        found = out if pieces == 1 else out.new_empty((batch, rows, pieces * topk))
        together = max(1, 1024 // size)  # rows of a program
        _select[(triton.cdiv(rows, together), pieces, batch)](
            scores,
            visible,
            scores if places is None else places,
            found,
            rows,
            count,
            scores.stride(0),
            scores.stride(1),
            0 if places is None else places.stride(0),
            0 if places is None else places.stride(1),
            found.stride(0),
            found.stride(1),
            **{
                "TOPK": topk,
                "FILL": triton.next_power_of_2(topk),
                "ROWS": together,
                "SIZE": size,
                "AGAIN": places is not None,
                "num_warps": min(16, max(2, size // 512)),
            },
        )
        if pieces == 1:
            return
        places, count = found, pieces * topk


def _laid(terms: "IndexTerms") -> "IndexTerms":
    """As the kernel takes them: of one type, channels densely and a power of two, a row's heads behind another."""
    kind = torch.promote_types(terms.queries.dtype, terms.keys.dtype)
    queries, weights = widened(terms.queries.to(kind)), terms.weights
    queries = queries if queries.stride(2) == queries.shape[3] else queries.contiguous()
    return type(terms)(
        queries, widened(terms.keys.to(kind)), weights if weights.stride(2) == 1 else weights.contiguous()
    )


def _fill(scores: Tensor, terms: "IndexTerms", start: int, width: int, first: int = 0) -> None:
    """Scores of the queries from `start` on, as many as `scores` has rows; those not visible are left.

    `first` is the place of query 0 in its document.
    """
    queries, keys, weights = terms
    batch, rows, most = scores.shape
    tiles = score_tiles(queries.shape[3], queries.dtype, shared_memory(queries.device))
    _score[(triton.cdiv(most, tiles.blocks), triton.cdiv(rows, tiles.queries), batch)](
        queries,
        keys,
        weights,
        scores,
        start,
        start + rows,
        first,
        most,
        queries.shape[2],
        width**-0.5,
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        weights.stride(0),
        weights.stride(1),
        scores.stride(0),
        scores.stride(1),
        **tiles.launch(WIDTH=queries.shape[3]),
    )


@triton.jit(do_not_specialize=["start", "stop", "past", "most"])
def _score(
    queries,
    keys,
    weights,
    out,
    start,
    stop,
    past,  # tokens of the document in front of query 0
    most,
    heads,
    scale,
    q_batch,
    q_row,
    k_batch,
    k_row,
    w_batch,
    w_row,
    out_batch,
    out_row,
    WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of scores: heads one after another, the keys of the tile held in shared memory."""
    batch = tl.program_id(2).to(tl.int64)
    first = start + tl.program_id(1) * QUERIES
    least = tl.program_id(0) * BLOCKS
    if least < (past + tl.minimum(first + QUERIES, stop)) // 4:
        row = first + tl.arange(0, QUERIES)
        block = least + tl.arange(0, BLOCKS)
        channel = tl.arange(0, DEPTH)
        here, there = row < stop, block < most
        at = queries + batch * q_batch + row.to(tl.int64)[:, None] * q_row + channel[None, :]
        key = keys + batch * k_batch + block.to(tl.int64)[None, :] * k_row + channel[:, None]
        weight = weights + batch * w_batch + row.to(tl.int64) * w_row
        total = tl.full((QUERIES, BLOCKS), 0.0, tl.float32)
        if DEPTH == WIDTH:
            held = tl.load(key, mask=there[None, :], other=0.0)
            for head in range(heads):
                dots = dot(tl.load(at + head * WIDTH, mask=here[:, None], other=0.0), held)
                scale_of = tl.load(weight + head, mask=here, other=0.0)
                total += tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * scale_of[:, None]
        else:
            for head in range(heads):
                dots = tl.full((QUERIES, BLOCKS), 0.0, tl.float32)
                for part in range(0, WIDTH, DEPTH):
                    some = tl.load(at + head * WIDTH + part, mask=here[:, None], other=0.0)
                    dots += dot(some, tl.load(key + part, mask=there[None, :], other=0.0))
                scale_of = tl.load(weight + head, mask=here, other=0.0)
                total += tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * scale_of[:, None]
        seen = here[:, None] & (block[None, :] < (past + row[:, None] + 1) // 4)
        place = out + batch * out_batch + (row - start).to(tl.int64)[:, None] * out_row + block[None, :]
        tl.store(place, total * scale, mask=seen & there[None, :])


@triton.jit(do_not_specialize=["rows", "count"])
def _select(
    scores,
    visible,
    places,
    out,
    rows,
    count,
    s_batch,
    s_row,
    p_batch,
    p_row,
    out_batch,
    out_row,
    TOPK: tl.constexpr,
    FILL: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """The best of a piece of some rows; `AGAIN`: of those that earlier rounds found."""
    piece, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    at = piece * SIZE + tl.arange(0, SIZE)[None, :]
    if AGAIN:
        found = places + batch * p_batch + row[:, None] * p_row + at
        place = tl.load(found, mask=here[:, None] & (at < count), other=-1).to(tl.int32)
        seen = place >= 0
    else:
        place = at + tl.full((ROWS, 1), 0, tl.int32)
        seen = at < tl.minimum(tl.load(visible + row, mask=here, other=0), count)[:, None]
    score = tl.load(scores + batch * s_batch + row[:, None] * s_row + place, mask=seen, other=0.0)
    least = -2147483648  # below every score
    # Integers in the order of the floats: -0 equals 0, NaN counts as +inf.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7F800000, bits)
    key = tl.where(seen, bits ^ ((bits >> 31) & 0x7FFFFFFF), least)
    # The largest threshold that at least TOPK keys reach, from the highest bit down; done once exactly TOPK do.
    threshold = tl.full((ROWS,), least, tl.int32)
    above = tl.full((ROWS,), SIZE, tl.int32)
    bit = 31
    while bit >= 0:
        trial = threshold ^ (tl.full((ROWS,), 1, tl.int32) << bit)
        reached = tl.sum((key >= trial[:, None]).to(tl.int32), 1)
        threshold = tl.where(reached >= TOPK, trial, threshold)
        above = tl.where(reached >= TOPK, reached, above)
        going = tl.max((above != TOPK).to(tl.int32), 0)
        bit = tl.where(going != 0, bit - 1, -1)
    better = (seen & (key > threshold[:, None])).to(tl.int32)
    equal = (seen & (key == threshold[:, None])).to(tl.int32)
    # Both counts of those in front in one scan: each is below 2^16.
    flags = better | (equal << 16)
    before = tl.cumsum(flags, 1) - flags
    equals = (before >> 16) & 0xFFFF
    wanted = TOPK - tl.sum(better, 1, keep_dims=True)
    kept = (better > 0) | ((equal > 0) & (equals < wanted))
    slot = (before & 0xFFFF) + tl.minimum(equals, wanted)
    into = out + batch * out_batch + row[:, None] * out_row + piece * TOPK
    tl.store(into + slot, place.to(tl.int64), mask=kept)
    rest = tl.arange(0, FILL)[None, :]
    none = (rest >= tl.sum(kept.to(tl.int32), 1, keep_dims=True)) & (rest < TOPK)
    tl.store(into + rest, tl.full((ROWS, FILL), -1, tl.int64), mask=none & here[:, None])
