"""Backward of attention in Triton: weights are computed again from the saved log-sum-exp.

Two kernels, the queries' here and the keys' beside, as both sums, 64 x 512 in float32 each, would be all registers
there are. The price: scores and pulls are computed twice, seven products instead of five. Both kernels read queries
and the output's gradients as one tile, so one product gives scores and pulls at once.

All is equal from run to run but the gradient of chosen blocks, and that too where it is asked for.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import Reach
from .attention_keys_triton import Rows, grad_chosen, grad_shared
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
from .tiles import dot

_KEYS = 32


class Saved(NamedTuple):
    """What the forward had and found, all contiguous; shapes as in `attend`, lse [b, s, h] of base 2."""

    q: Tensor
    kv: Tensor
    blocks: Tensor | None
    chosen: Tensor | None
    sink: Tensor
    out: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    """In the inputs' shapes and types."""

    q: Tensor
    kv: Tensor
    blocks: Tensor | None
    sink: Tensor


def gradients(saved: Saved, grad: Tensor, reach: Reach, deterministic: bool) -> Gradients:
    """Of q, kv, blocks and sink, for the gradient of the output, [b, s, h, d] contiguous."""
    call = Rows(saved.q, grad, saved.lse, torch.empty_like(saved.lse))
    of_q = _of_queries(call, saved, reach)
    of_sink = (saved.sink.float() * LOG2E.value - saved.lse).exp2_().mul_(call.delta).sum((0, 1)).neg_()
    of_kv = grad_shared(call, saved.kv, reach.window, 0, saved.kv.shape[1] - saved.q.shape[1])
    of_blocks = None
    if saved.blocks is not None and saved.chosen is None:
        of_blocks = grad_shared(call, saved.blocks, 0, reach.ratio, reach.start)
    elif saved.blocks is not None and saved.chosen is not None:
        of_blocks = grad_chosen(call, saved.blocks, saved.chosen, deterministic)
    return Gradients(of_q, of_kv, of_blocks, of_sink.to(saved.sink.dtype))


def _of_queries(call: Rows, saved: Saved, reach: Reach) -> Tensor:
    """Also fills delta."""
    batch, length, heads, width = call.q.shape
    kind = kind_of(saved.blocks, saved.chosen)
    cut = tiles(most_rows(kind, heads), _KEYS, (2, 0), (0, 1), padded(width), call.q)
    programs = row_programs(kind, length, heads, cut.rows)
    found = torch.empty_like(call.q)
    if programs and batch:
        _grad_queries[programs, batch](
            call.q,
            call.apart,
            call.lse,
            call.delta,
            saved.out,
            saved.kv,
            saved.kv if saved.blocks is None else saved.blocks,
            saved.q if saved.chosen is None else saved.chosen,
            found,
            length,
            saved.kv.shape[1] - length,
            reach.start,
            0 if saved.blocks is None else saved.blocks.shape[1],
            0 if saved.chosen is None else saved.chosen.shape[2],
            **constants(WINDOW=reach.window, RATIO=max(1, reach.ratio), KIND=kind),
            **call.constants,
            **cut.constants,
        )
    return found


@triton.jit(do_not_specialize=["lead", "past"])
def _grad_queries(
    q,  # [b, s * h, d]
    apart,  # elements from q to the output's gradient, which is as q
    lse,  # [b, s * h]
    delta,  # [b, s * h], written
    out,  # as q
    kv,  # [b, lead + s, d]
    blocks,  # [b, n, d]
    chosen,  # [b, s, k]
    found,  # as q
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
    batch = tl.program_id(1).to(tl.int64)
    first, stop = rows_of(tl.program_id(0), length, KIND, HEADS, ROWS)
    row = first + tl.arange(0, ROWS)
    there = row < stop
    query = row // HEADS
    at = batch * length * HEADS + row
    level = tl.load(lse + at, mask=there, other=0.0)
    mean = _inner(q + apart, out, at, there, WIDTH, PADDED)
    tl.store(delta + at, mean, there)
    # Eight queries and their gradients by turns: both products of a row end up in the same thread.
    both = tl.arange(0, 2 * ROWS)
    double = first + both // 16 * 8 + both % 8
    origin = q + (both // 8 % 2 * apart.to(tl.int64))[:, None]
    pairs = load_rows(origin, batch * length * HEADS + double, double < stop, WIDTH, PADDED)
    acc = tl.zeros((ROWS, PADDED), tl.float32)
    begin, end = first // HEADS, (stop - 1) // HEADS + 1  # of queries
    last = lead + end
    for start in range(tl.maximum(lead + begin - WINDOW + 1, 0) if WINDOW else last, last, KEYS):
        token = start + tl.arange(0, KEYS)
        keys = load_rows(kv, batch * (lead + length) + token, token < last, WIDTH, PADDED)
        seen = in_window(lead + query[:, None], token[None, :], WINDOW)
        acc = _pulled_queries(pairs, level, mean, keys, seen, acc, SCALE, ROWS, KEYS)
    if KIND == ALL:
        for start in range(0, tl.minimum((past + end) // RATIO, blocks_count), KEYS):
            block = start + tl.arange(0, KEYS)
            keys = load_rows(blocks, batch * blocks_count + block, block < blocks_count, WIDTH, PADDED)
            seen = (block[None, :] < (past + query[:, None] + 1) // RATIO) & (block < blocks_count)[None, :]
            acc = _pulled_queries(pairs, level, mean, keys, seen, acc, SCALE, ROWS, KEYS)
    if KIND == CHOSEN:
        own = chosen + (batch * length + begin) * chosen_count
        for start in range(0, last_choice(own, chosen_count), KEYS):
            place = start + tl.arange(0, KEYS)
            block = tl.load(own + place, mask=place < chosen_count, other=-1)
            keys = load_rows(blocks, batch * blocks_count + block, block >= 0, WIDTH, PADDED)
            acc = _pulled_queries(pairs, level, mean, keys, (block >= 0)[None, :], acc, SCALE, ROWS, KEYS)
    column = tl.arange(0, PADDED)
    where = at[:, None] * WIDTH + column[None, :]
    tl.store(found + where, (acc * SCALE).to(found.dtype.element_ty), there[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _pulled_queries(pairs, level, mean, keys, seen, acc, SCALE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Add what a tile of keys pulls on rows, but for the scale: one product gives both scores and pulls."""
    products = tl.reshape(dot(pairs, tl.trans(keys)), (ROWS // 8, 2, 8, KEYS))
    scores, pull = tl.split(tl.permute(products, (0, 2, 3, 1)))
    scores, pull = tl.reshape(scores, (ROWS, KEYS)), tl.reshape(pull, (ROWS, KEYS))
    weights = tl.exp2(tl.where(seen, scores * (SCALE * LOG2E), -float("inf")) - level[:, None])
    return acc + dot((weights * (pull - mean[:, None])).to(keys.dtype), keys)


@triton.jit
def _inner(a, b, at, there, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Inner products of the rows of two matrices, some columns at a time: whole rows would take all registers."""
    some: tl.constexpr = PADDED if PADDED < 64 else 64  # type: ignore[assignment]
    total = tl.zeros(at.shape, tl.float32)
    for start in range(0, PADDED, some):
        column = start + tl.arange(0, some)
        where, mask = at[:, None] * WIDTH + column[None, :], there[:, None] & (column < WIDTH)[None, :]
        left, right = tl.load(a + where, mask, 0.0), tl.load(b + where, mask, 0.0)
        total += tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    return total
