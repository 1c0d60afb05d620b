"""Attention over a window and compressed blocks in Triton, forward; beside it lies the backward.

The rows of a tile are (query, head) pairs, all of which share the one key head, so scores and sums are products of
tensor cores, [rows, d] by [d, keys] and [rows, keys] by [keys, d]. A tile of keys is loaded once for both, keys
being values. Where keys are shared (the window, all visible blocks) rows of several queries follow each other in
one tile; where each query has chosen its own, a tile is one query's heads.

Why 64 rows: their sums, 64 x 512 in float32, take half of the registers of a multiprocessor, so a tile is one
query with its 64 heads, and a key of 1 KiB that comes out of the L2 cache serves 4 x 64 x 512 operations: 128 a
byte. An H100's tensor cores want some 180 of L2's some 5.5 TB/s. Keys of a window that several queries shared
would be loaded less often, but their rows would not fit. See docs/concepts/kernels.md for the count.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import Reach
from .attention_backward_triton import Saved, gradients
from .attention_tiles import (
    ALL,
    CHOSEN,
    LOG2E,
    constants,
    in_window,
    kind_of,
    last_choice,
    load_rows,
    most_rows,
    padded,
    row_programs,
    rows_of,
    tiles,
)
from .direct import applied
from .tiles import dot

_KEYS = 64


def attend_fused(
    q: Tensor,
    kv: Tensor,
    blocks: Tensor | None,
    chosen: Tensor | None,
    sink: Tensor,
    reach: Reach,
    deterministic: bool,
) -> Tensor:
    """`attend` by Triton; arguments as there."""
    return applied(_Attend, q, kv, blocks, chosen, sink, reach, deterministic)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, blocks, chosen, sink, reach, deterministic):  # type: ignore[override]
        q, kv, sink = q.contiguous(), kv.contiguous(), sink.contiguous()
        used, chosen = _used(blocks, chosen)
        out, lse = forward(q, kv, used, chosen, sink, reach)
        ctx.save_for_backward(q, kv, blocks, used, chosen, sink, out, lse)
        ctx.reach, ctx.deterministic = reach, deterministic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        q, kv, blocks, used, chosen, sink, out, lse = ctx.saved_tensors
        saved = Saved(q, kv, used, chosen, sink, out, lse)
        found = gradients(saved, grad.contiguous(), ctx.reach, ctx.deterministic)
        on_blocks = found.blocks
        if blocks is not None and on_blocks is None:
            on_blocks = torch.zeros_like(blocks)
        return found.q, found.kv, on_blocks, None, found.sink, None, None


def _used(blocks: Tensor | None, chosen: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Blocks and choices, or none if there is nothing in one of them."""
    if blocks is None or not blocks.shape[1] or (chosen is not None and not chosen.shape[2]):
        return None, None
    return blocks.contiguous(), None if chosen is None else chosen.contiguous()


def forward(
    q: Tensor, kv: Tensor, blocks: Tensor | None, chosen: Tensor | None, sink: Tensor, reach: Reach
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, of base 2: [b, s, h, d] in q's type, [b, s, h] float32. All tensors contiguous."""
    batch, length, heads, width = q.shape
    out = torch.empty_like(q)
    lse = q.new_empty((batch, length, heads), dtype=torch.float32)
    kind, columns = kind_of(blocks, chosen), padded(width)
    cut = tiles(most_rows(kind, heads), _KEYS, (1, 0), (0, 1), columns, q)
    programs = row_programs(kind, length, heads, cut.rows)
    if programs and batch:
        _forward[programs, batch](
            q,
            kv,
            kv if blocks is None else blocks,
            q if chosen is None else chosen,
            sink,
            out,
            lse,
            length,
            kv.shape[1] - length,
            reach.start,
            0 if blocks is None else blocks.shape[1],
            0 if chosen is None else chosen.shape[2],
            **constants(WINDOW=reach.window, RATIO=max(1, reach.ratio), KIND=kind),
            **constants(HEADS=heads, WIDTH=width, PADDED=columns, SCALE=width**-0.5),
            **cut.constants,
        )
    return out, lse


@triton.jit(do_not_specialize=["lead", "past"])
def _forward(
    q,  # [b, s * h, d]
    kv,  # [b, lead + s, d]
    blocks,  # [b, n, d]
    chosen,  # [b, s, k]
    sink,  # [h]
    out,  # as q
    lse,  # [b, s * h]
    length,
    lead,  # keys in front of the first query's
    past,  # tokens of the document in front of it
    blocks_count,
    chosen_count,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A tile of rows over all keys it may see, with the maximum and the sum so far (online softmax)."""
    batch = tl.program_id(1).to(tl.int64)
    first, stop = rows_of(tl.program_id(0), length, KIND, HEADS, ROWS)
    row = first + tl.arange(0, ROWS)
    there = row < stop
    query = row // HEADS
    at = batch * length * HEADS + row
    x = load_rows(q, at, there, WIDTH, PADDED)
    # The sink is a key without a value: the softmax starts with it.
    on_sink = tl.load(sink + row % HEADS).to(tl.float32) * LOG2E
    top = tl.maximum(on_sink, -1e30)
    total = tl.exp2(on_sink - top)
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    begin, end = first // HEADS, (stop - 1) // HEADS + 1  # of queries
    last = lead + end
    for start in range(tl.maximum(lead + begin - WINDOW + 1, 0) if WINDOW else last, last, KEYS):
        token = start + tl.arange(0, KEYS)
        keys = load_rows(kv, batch * (lead + length) + token, token < last, WIDTH, PADDED)
        seen = in_window(lead + query[:, None], token[None, :], WINDOW)
        top, total, acc = _meet(x, keys, seen, top, total, acc, SCALE)
    if KIND == ALL:
        for start in range(0, tl.minimum((past + end) // RATIO, blocks_count), KEYS):
            block = start + tl.arange(0, KEYS)
            keys = load_rows(blocks, batch * blocks_count + block, block < blocks_count, WIDTH, PADDED)
            seen = (block[None, :] < (past + query[:, None] + 1) // RATIO) & (block < blocks_count)[None, :]
            top, total, acc = _meet(x, keys, seen, top, total, acc, SCALE)
    if KIND == CHOSEN:
        own = chosen + (batch * length + begin) * chosen_count
        for start in range(0, last_choice(own, chosen_count), KEYS):
            place = start + tl.arange(0, KEYS)
            block = tl.load(own + place, mask=place < chosen_count, other=-1)
            keys = load_rows(blocks, batch * blocks_count + block, block >= 0, WIDTH, PADDED)
            top, total, acc = _meet(x, keys, (block >= 0)[None, :], top, total, acc, SCALE)
    column = tl.arange(0, PADDED)
    where = at[:, None] * WIDTH + column[None, :]
    tl.store(out + where, (acc / total[:, None]).to(out.dtype.element_ty), there[:, None] & (column < WIDTH)[None, :])
    tl.store(lse + at, top + tl.log2(total), there)


@triton.jit
def _meet(x, keys, seen, top, total, acc, SCALE: tl.constexpr):
    """One tile of keys: the maximum, the sum of weights and the weighted sum of values with it."""
    scores = tl.where(seen, dot(x, tl.trans(keys)) * (SCALE * LOG2E), -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    shrink = tl.exp2(top - higher)
    weights = tl.exp2(scores - higher[:, None])
    acc = acc * shrink[:, None] + dot(weights.to(keys.dtype), keys)
    return higher, total * shrink + tl.sum(weights, 1), acc
