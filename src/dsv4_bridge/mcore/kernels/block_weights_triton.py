"""The attention's weights on compressed blocks, summed over heads, by Triton: one program a query.

Its heads are the rows of a tile, keys its columns. The weights need the softmax's denominators first, so a block's
dots are computed twice: its channels come from the second-level cache again, and no dot or weight of a head ever
leaves the chip.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import Reach
from .tiles import dot, shared_memory

# Bytes that sums over rows and columns need besides the operands.
_SPARE = 2 << 10


@dataclass(frozen=True)
class QueryTiles:
    """How a query's work is cut.

    Attributes:
        heads: of a tile, a power of two of at least 16.
        blocks: of a tile.
        depth: channels multiplied at a time; all of them: what a program reads again and again stays on the chip.
        warps: of a program.
        stages: of the pipeline of loads.
    """

    heads: int
    blocks: int
    depth: int
    warps: int
    stages: int

    def launch(self, **more: Any) -> dict[str, Any]:
        """What a kernel is launched with."""
        sizes = {"HEADS": self.heads, "BLOCKS": self.blocks, "DEPTH": self.depth}
        return sizes | more | {"num_warps": self.warps, "num_stages": self.stages}


def target_tiles(heads: int, width: int, dtype: torch.dtype, shared: int) -> QueryTiles:
    """Tiles of the attention's weights: as many heads as possible share a block that was read."""
    rows = max(16, triton.next_power_of_2(heads))
    if dtype == torch.float32:
        return QueryTiles(min(rows, 32), 32, min(width, 32), 4, 2)
    for most, blocks, stages in ((128, 64, 2), (128, 32, 2), (64, 64, 2), (64, 32, 2), (32, 32, 2), (16, 32, 1)):
        tile = min(rows, most)
        if 2 * width * (tile + stages * blocks) + _SPARE <= shared:
            return QueryTiles(tile, blocks, width, 8, stages)
    return QueryTiles(16, 32, min(width, 64), 4, 2)


def slots_of(picked: Tensor | None) -> int:
    """A power of two of at least as many as a query chooses."""
    return 1 if picked is None else triton.next_power_of_2(picked.shape[-1])


def fill_block_weights(
    target: Tensor, attention: tuple[Tensor, ...], picked: Tensor | None, start: int, reach: Reach, scale: float
) -> None:
    """Fill in the weights of a chunk of queries.

    Args:
        target: [b, c, m] float32 zeros; stays 0 where a query does not look.
        attention: q [b, s, h, d], kv [b, l + s, d], blocks [b, n, d], d a power of two of at least 16, and the sink [h]
            float32, all contiguous.
        picked: [b, c, m] indices of the blocks, contiguous, -1 for none; None: the first m.
        start: the chunk's first query.
        reach: what queries may see.
        scale: of the scores.
    """
    q, kv, blocks, sink = attention
    batch, rows, columns = target.shape
    tiles = target_tiles(q.shape[2], q.shape[3], q.dtype, shared_memory(q.device))
    _target[(rows, batch)](
        q,
        kv,
        blocks,
        sink,
        target if picked is None else picked,
        target,
        start,
        kv.shape[1] - q.shape[1],
        reach.start,
        q.shape[1],
        blocks.shape[1],
        rows,
        columns,
        q.shape[2],
        reach.window,
        scale,
        **tiles.launch(RATIO=reach.ratio, CHOSEN=picked is not None, SLOTS=slots_of(picked), WIDTH=q.shape[3]),
    )


@triton.jit
def last_chosen(picked, columns, SLOTS: tl.constexpr):
    """How many slots of a query there are up to the last that holds a block: early queries choose few."""
    slot = tl.arange(0, SLOTS)
    place = tl.load(picked + slot, mask=slot < columns, other=-1)
    return tl.max(tl.where(place >= 0, slot + 1, 0), 0)


@triton.jit(do_not_specialize=["start", "lead", "past", "length", "count", "rows", "columns"])
def _target(
    q,
    kv,
    blocks,
    sink,
    picked,
    out,
    start,
    lead,  # keys in front of query 0's
    past,  # tokens of the document in front of it
    length,
    count,
    rows,
    columns,
    heads,
    window,
    scale,
    RATIO: tl.constexpr,
    CHOSEN: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Weights on blocks, summed over heads, of one query: a pass for the denominators, another for the weights."""
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = start + row
    line = batch * rows + row  # of the chunk
    channel, each = tl.arange(0, DEPTH), tl.arange(0, BLOCKS)
    if CHOSEN:
        end = last_chosen(picked + line * columns, columns, SLOTS)
    else:
        end = tl.minimum(columns, (past + token + 1) // RATIO)
    kv += batch * (lead + length) * WIDTH
    blocks += batch * count * WIDTH
    for group in range(0, heads, HEADS):
        head = group + tl.arange(0, HEADS)
        real = head < heads
        at = q + ((batch * length + token) * heads + head[:, None]) * WIDTH + channel[None, :]
        held = tl.load(at, mask=real[:, None], other=0.0)
        top = tl.load(sink + head, mask=real, other=0.0)
        total = tl.full((HEADS,), 1.0, tl.float32)
        for back in range(0, tl.minimum(window, lead + token + 1), BLOCKS):
            place = lead + token - back - each
            seen = (place >= 0) & (back + each < window)
            key = kv + place.to(tl.int64)[None, :] * WIDTH + channel[:, None]
            if DEPTH == WIDTH:
                score = dot(held, tl.load(key, mask=seen[None, :], other=0.0))
            else:
                score = tl.full((HEADS, BLOCKS), 0.0, tl.float32)
                for part in range(0, WIDTH, DEPTH):
                    some = tl.load(at + part, mask=real[:, None], other=0.0)
                    score += dot(some, tl.load(key + part, mask=seen[None, :], other=0.0))
            score = tl.where(seen[None, :], score * scale, float("-inf"))
            new = tl.maximum(top, tl.max(score, 1))
            total = total * tl.exp(top - new) + tl.sum(tl.exp(score - new[:, None]), 1)
            top = new
        for begin in range(0, end, BLOCKS):
            place = begin + each
            seen = place < end
            if CHOSEN:
                place = tl.load(picked + line * columns + place, mask=seen, other=-1)
                seen = place >= 0
            key = blocks + place.to(tl.int64)[None, :] * WIDTH + channel[:, None]
            if DEPTH == WIDTH:
                score = dot(held, tl.load(key, mask=seen[None, :], other=0.0))
            else:
                score = tl.full((HEADS, BLOCKS), 0.0, tl.float32)
                for part in range(0, WIDTH, DEPTH):
                    some = tl.load(at + part, mask=real[:, None], other=0.0)
                    score += dot(some, tl.load(key + part, mask=seen[None, :], other=0.0))
            score = tl.where(seen[None, :], score * scale, float("-inf"))
            new = tl.maximum(top, tl.max(score, 1))
            total = total * tl.exp(top - new) + tl.sum(tl.exp(score - new[:, None]), 1)
            top = new
        whole = top + tl.log(total)
        for begin in range(0, end, BLOCKS):
            slot = begin + each
            place, seen = slot, slot < end
            if CHOSEN:
                place = tl.load(picked + line * columns + slot, mask=seen, other=-1)
                seen = place >= 0
            key = blocks + place.to(tl.int64)[None, :] * WIDTH + channel[:, None]
            if DEPTH == WIDTH:
                score = dot(held, tl.load(key, mask=seen[None, :], other=0.0))
            else:
                score = tl.full((HEADS, BLOCKS), 0.0, tl.float32)
                for part in range(0, WIDTH, DEPTH):
                    some = tl.load(at + part, mask=real[:, None], other=0.0)
                    score += dot(some, tl.load(key + part, mask=seen[None, :], other=0.0))
            weight = tl.where(real[:, None] & seen[None, :], tl.exp(score * scale - whole[:, None]), 0.0)
            into = out + line * columns + slot
            earlier = tl.load(into, mask=seen & (group > 0), other=0.0)  # of the heads in front
            tl.store(into, earlier + tl.sum(weight, 0), mask=seen)
