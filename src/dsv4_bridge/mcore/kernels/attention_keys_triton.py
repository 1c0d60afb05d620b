"""Gradients of attention's keys in Triton: a tile of keys over all rows, (query, head) pairs, that see it.

Window and visible blocks are shared by many queries: their rows are cut into as many parts as fill the machine,
each with its own sums, and the parts are added in order. Chosen blocks are one query's: a tile's sums go to the
blocks' by atomic additions in float32; or, in a fixed order, they are written down for some queries at a time,
sorted by block (torch's stable sort), and added block by block.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import CHOSEN, LOG2E, constants, in_window, load_rows, most_rows, padded, tiles
from .tiles import dot

_ROWS, _KEYS = 32, 64
# Programs that fill a machine, and rows that are worth one.
_PROGRAMS, _LEAST_ROWS = 264, 512
# Bytes of chosen blocks' gradients that wait to be added in order.
_WAITING = 1 << 29
_AT_ONCE = 16
_NO = tl.constexpr(0)


class Rows(NamedTuple):
    """What every kernel reads of rows; all contiguous."""

    q: Tensor
    grad: Tensor
    lse: Tensor
    delta: Tensor  # [b, s, h] float32: output times its gradient, which softmax subtracts

    @property
    def apart(self) -> int:
        """Elements from q to grad, for a kernel reads both as one tile.

        As a number of the launch: Triton sees whether it is a multiple of 16, and rows may be read in long words.
        """
        return (self.grad.data_ptr() - self.q.data_ptr()) // self.q.element_size()

    @property
    def constants(self) -> dict[str, Any]:
        """Of every kernel."""
        heads, width = self.q.shape[2:]
        return {"HEADS": heads, "WIDTH": width, "PADDED": padded(width), "SCALE": width**-0.5}


def grad_shared(call: Rows, keys: Tensor, window: int, ratio: int, shift: int = 0) -> Tensor:
    """Of keys [b, n, d] that all queries share, in their type: of the window, or blocks if the window is 0.

    `shift` is the first query's place: among the window's keys, or in its document.
    """
    batch, length, heads, _ = call.q.shape
    cut = tiles(_ROWS, _KEYS, (0, 1), (2, 0), padded(call.q.shape[3]), call.q)
    count = triton.cdiv(keys.shape[1], cut.keys)
    rows = heads * (min(length, cut.keys + window - 1) if window else length)
    splits = max(1, min(triton.cdiv(_PROGRAMS, max(1, count * batch)), triton.cdiv(rows, _LEAST_ROWS)))
    found = keys.new_empty((splits, *keys.shape), dtype=torch.float32)
    if count and batch:
        _grad_shared[count, splits, batch](
            call.q,
            call.apart,
            call.lse,
            call.delta,
            keys,
            found,
            length,
            shift,
            keys.shape[1],
            **constants(WINDOW=window, RATIO=ratio),
            **call.constants,
            **cut.constants,
        )
    return (found[0] if splits == 1 else found.sum(0)).to(keys.dtype)


def grad_chosen(call: Rows, blocks: Tensor, chosen: Tensor, deterministic: bool) -> Tensor:
    """Of blocks [b, n, d], in their type, for the choices of each query, [b, s, k]."""
    batch, length, heads, width = call.q.shape
    count = chosen.shape[2]
    rows = min(_ROWS, most_rows(CHOSEN.value, heads))
    cut = tiles(rows, _KEYS, (0, 1), (2, 0), padded(call.q.shape[3]), call.q)
    found = torch.zeros_like(blocks, dtype=torch.float32)
    # Queries at a time: all, or as many as may wait.
    step = max(1, _WAITING // (4 * width * batch * count)) if deterministic else length
    for start in range(0, length, step):
        queries = min(step, length - start)
        into = found
        if deterministic:
            into = found.new_empty((batch, queries * count, width))
        _grad_chosen[queries * triton.cdiv(count, cut.keys), batch](
            call.q,
            call.apart,
            call.lse,
            call.delta,
            blocks,
            chosen,
            into,
            start,
            length,
            blocks.shape[1],
            count,
            **constants(ORDERED=deterministic),
            **call.constants,
            **cut.constants,
        )
        if deterministic:
            _add_in_order(into, chosen[:, start : start + queries].flatten(1), found)
    return found.to(blocks.dtype)


def _add_in_order(waiting: Tensor, block: Tensor, found: Tensor) -> None:
    """Add waiting [b, m, d] to the rows of found [b, n, d] that block [b, m] names, in the order of m; -1: none."""
    batch, count, width = found.shape
    blocks, order = block.sort(dim=1, stable=True)
    names = torch.arange(count + 1, device=block.device).expand(batch, -1).contiguous()
    edges = torch.searchsorted(blocks, names)
    _add_sorted[count, batch](
        waiting,
        order,
        edges,
        found,
        waiting.shape[1],
        count,
        **constants(WIDTH=width, PADDED=padded(width), AT_ONCE=_AT_ONCE),
    )


@triton.jit
def _pulled(
    tile,  # [KEYS, d]
    key,  # [KEYS], their numbers
    valid,  # [KEYS] bool
    low,
    high,
    past,  # rows of the batches before
    shift,  # place of the first query
    q,
    apart,  # elements from q to its gradient
    lse,
    delta,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """What rows low to high pull on keys, as values and as keys, [KEYS, d]; without window and ratio they see all.

    Queries and gradients alternate in one tile of 2 x ROWS: one product gives both scores and pulls, next to each
    other in a thread's registers, and another adds up both parts.
    """
    acc = tl.zeros((KEYS, PADDED), tl.float32)
    both = tl.arange(0, 2 * ROWS)
    origin = q + ((both % 2) * apart.to(tl.int64))[:, None]
    for first in range(low, high, ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < high
        double = first + both // 2
        pairs = load_rows(origin, past + double, double < high, WIDTH, PADDED)
        level = tl.load(lse + past + row, mask=there, other=0.0)
        mean = tl.load(delta + past + row, mask=there, other=0.0)
        seen = valid[:, None] & there[None, :]
        query = shift + row // HEADS
        if WINDOW:
            seen = seen & in_window(query[None, :], key[:, None], WINDOW)
        elif RATIO:
            seen = seen & (key[:, None] < (query[None, :] + 1) // RATIO)
        # Always so. Triton would give a product that feeds another all warps along its few keys, twice each; a branch
        # hides what follows.
        products = tl.zeros((KEYS, 2 * ROWS), tl.float32)
        if first < high:
            products = dot(tile, tl.trans(pairs))
        scores, pull = tl.split(tl.reshape(products, (KEYS, ROWS, 2)))
        weights = tl.exp2(tl.where(seen, scores * (SCALE * LOG2E), -float("inf")) - level[None, :])
        pull = weights * (pull - mean[None, :]) * SCALE
        acc += dot(tl.reshape(tl.join(pull, weights), (KEYS, 2 * ROWS)).to(tile.dtype), pairs)
    return acc


@triton.jit(do_not_specialize=["shift"])
def _grad_shared(
    q,  # [b, s * h, d]
    apart,  # elements from q to the output's gradient, which is as q
    lse,  # [b, s * h]
    delta,  # [b, s * h]
    keys,  # [b, n, d]
    found,  # [parts, b, n, d] float32
    length,
    shift,  # place of the first query: among the window's keys, or in its document
    count,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A tile of keys over one part of the rows that see some of it."""
    batch = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(0) * KEYS
    key = begin + tl.arange(0, KEYS)
    tile = load_rows(keys, batch * count + key, key < count, WIDTH, PADDED)
    if WINDOW:
        low, high = begin - shift, tl.minimum(begin - shift + KEYS - 1 + WINDOW, length)
    else:
        low, high = (begin + 1) * RATIO - 1 - shift, length
    low, high = tl.maximum(low, 0) * HEADS, high * HEADS
    part = tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(1))
    low += tl.program_id(1) * part
    high = tl.minimum(low + part, high)
    past = batch * length * HEADS
    acc = _pulled(
        tile, key, key < count, low, high, past, shift, q, apart, lse, delta,
        WINDOW, RATIO, HEADS, WIDTH, PADDED, SCALE, ROWS, KEYS,
    )  # fmt: skip
    column = tl.arange(0, PADDED)
    at = (tl.program_id(1) * tl.num_programs(2) + batch) * count + key
    tl.store(found + at[:, None] * WIDTH + column[None, :], acc, (key < count)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _grad_chosen(
    q,  # [b, s * h, d]
    apart,  # elements from q to the output's gradient, which is as q
    lse,  # [b, s * h]
    delta,  # [b, s * h]
    blocks,  # [b, n, d]
    chosen,  # [b, s, k]
    found,  # [b, n, d] float32, added to; ORDERED: [b, queries * k, d] float32, written
    start,
    length,
    blocks_count,
    chosen_count,
    ORDERED: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The heads of one query over a tile of the blocks it chose."""
    batch = tl.program_id(1).to(tl.int64)
    parts = tl.cdiv(chosen_count, KEYS)  # of a query follow each other: its rows come out of the L2 cache
    here = tl.program_id(0) // parts
    query = start + here
    place = tl.program_id(0) % parts * KEYS + tl.arange(0, KEYS)
    block = tl.load(chosen + (batch * length + query) * chosen_count + place, mask=place < chosen_count, other=-1)
    tile = load_rows(blocks, batch * blocks_count + block, block >= 0, WIDTH, PADDED)
    low = query * HEADS
    high = low + HEADS * (tl.max((block >= 0).to(tl.int32), 0))  # nothing to do for a tile of none
    past = batch * length * HEADS
    acc = _pulled(
        tile, block, block >= 0, low, high, past, 0, q, apart, lse, delta,
        _NO, _NO, HEADS, WIDTH, PADDED, SCALE, ROWS, KEYS,
    )  # fmt: skip
    if ORDERED:
        to = (batch * (tl.num_programs(0) // parts) + here) * chosen_count + place
    else:
        to = batch * blocks_count + block
    column = tl.arange(0, PADDED)
    where = found + to[:, None] * WIDTH + column[None, :]
    seen = (block >= 0)[:, None] & (column < WIDTH)[None, :]
    if ORDERED:
        tl.store(where, acc, seen)
    else:
        tl.atomic_add(where, acc, seen, sem="relaxed")


@triton.jit
def _add_sorted(
    waiting,  # [b, m, d]
    order,  # [b, m]: waiting rows, sorted by their block
    edges,  # [b, n + 1]: where a block's begin
    found,  # [b, n, d], added to
    rows,
    count,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    edge = edges + batch * (count + 1) + tl.program_id(0)
    stop = tl.load(edge + 1)
    acc = tl.zeros((PADDED,), tl.float32)
    for start in range(tl.load(edge), stop, AT_ONCE):
        place = start + tl.arange(0, AT_ONCE)
        row = tl.load(order + batch * rows + place, mask=place < stop, other=0)
        acc += tl.sum(load_rows(waiting, batch * rows + row, place < stop, WIDTH, PADDED), 0)
    column = tl.arange(0, PADDED)
    where = found + (batch * count + tl.program_id(0)) * WIDTH + column
    tl.store(where, tl.load(where, mask=column < WIDTH, other=0.0) + acc, column < WIDTH)
