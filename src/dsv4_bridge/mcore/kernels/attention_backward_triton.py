"""Backward of attention in Triton: weights are computed again from the saved log-sum-exp.

Two kernels, each with its own sums in registers, as those of queries and of keys, 64 x 512 float32 each, are all
the registers there are. The price: scores and pulls are computed twice, seven products instead of five.

- Queries: as the forward, over all keys that a tile of rows sees.
- Keys: a tile of keys over all rows that see it. Window and visible blocks are shared by many queries: their rows
  are cut into as many parts as fill the machine, and the parts' sums are added in order. Chosen blocks are one
  query's: their sums go to the block's by atomic additions, in float32; or, in a fixed order, they are written
  down for some queries at a time, sorted by block (torch's stable sort), and added block by block.

So all is equal from run to run but the gradient of chosen blocks, and that too where it is asked for.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import ALL, CHOSEN, LOG2E, NONE, in_window, last_choice, load_rows, rows_of, tiles
from .tiles import dot

_ROWS = 64
# Programs that fill a machine, and rows that are worth one.
_PROGRAMS, _LEAST_ROWS = 264, 512
# Bytes of chosen blocks' gradients that wait to be added in order.
_WAITING = 1 << 29
_AT_ONCE = 16


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


class _Call(NamedTuple):
    """What all kernels of a call take."""

    q: Tensor
    grad: Tensor
    lse: Tensor
    delta: Tensor  # [b, s, h] float32: output times its gradient, which softmax subtracts

    @property
    def apart(self) -> int:
        """Elements from q to grad: a kernel reads both as one tile. As a number of the launch, so that Triton sees
        by itself whether it is a multiple of 16, and rows may be read in long words."""
        return (self.grad.data_ptr() - self.q.data_ptr()) // self.q.element_size()

    @property
    def padded(self) -> int:
        return max(16, triton.next_power_of_2(self.q.shape[3]))

    @property
    def constants(self) -> dict[str, float | int]:
        heads, width = self.q.shape[2:]
        return {"HEADS": heads, "WIDTH": width, "PADDED": self.padded, "SCALE": width**-0.5}


def gradients(saved: Saved, grad: Tensor, window: int, ratio: int, deterministic: bool) -> Gradients:
    """Of q, kv, blocks and sink, for the gradient of the output, [b, s, h, d] contiguous."""
    call = _Call(saved.q, grad, saved.lse, torch.empty_like(saved.lse))
    of_q = _of_queries(call, saved, window, ratio)
    of_sink = (saved.sink.float() * LOG2E.value - saved.lse).exp2_().mul_(call.delta).sum((0, 1)).neg_()
    of_kv = _of_shared(call, saved.kv, window, 0)
    of_blocks = None
    if saved.blocks is not None and saved.chosen is None:
        of_blocks = _of_shared(call, saved.blocks, 0, ratio)
    elif saved.blocks is not None and saved.chosen is not None:
        of_blocks = _of_chosen(call, saved.blocks, saved.chosen, deterministic)
    return Gradients(of_q, of_kv, of_blocks, of_sink.to(saved.sink.dtype))


def _of_queries(call: _Call, saved: Saved, window: int, ratio: int) -> Tensor:
    """Also fills delta."""
    batch, length, heads, _ = call.q.shape
    most, programs = _ROWS, 0
    if saved.chosen is not None:
        most = min(_ROWS, max(16, triton.next_power_of_2(heads)))
    cut = tiles(most, 32, (2, 0), (0, 1), call.padded, call.q)
    programs = triton.cdiv(length * heads, cut.rows)
    if saved.chosen is not None:
        programs = length * triton.cdiv(heads, cut.rows)
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
            0 if saved.blocks is None else saved.blocks.shape[1],
            0 if saved.chosen is None else saved.chosen.shape[2],
            WINDOW=window,
            RATIO=max(1, ratio),
            KIND=(NONE if saved.blocks is None else ALL if saved.chosen is None else CHOSEN).value,
            **call.constants,
            ROWS=cut.rows,
            KEYS=cut.keys,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return found


def _of_shared(call: _Call, keys: Tensor, window: int, ratio: int) -> Tensor:
    """Of keys [b, n, d] that all queries share: of the window, or blocks if the window is 0."""
    batch, length, heads, _ = call.q.shape
    cut = tiles(32, 64, (0, 1), (2, 0), call.padded, call.q)
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
            keys.shape[1],
            WINDOW=window,
            RATIO=ratio,
            **call.constants,
            ROWS=cut.rows,
            KEYS=cut.keys,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return (found[0] if splits == 1 else found.sum(0)).to(keys.dtype)


def _of_chosen(call: _Call, blocks: Tensor, chosen: Tensor, deterministic: bool) -> Tensor:
    batch, length, heads, width = call.q.shape
    count = chosen.shape[2]
    cut = tiles(32, 64, (0, 1), (2, 0), call.padded, call.q)
    found = torch.zeros_like(blocks, dtype=torch.float32)
    # Queries at a time: all, or as many as may wait.
    step = max(1, _WAITING // (4 * width * batch * count)) if deterministic else length
    for start in range(0, length, step):
        queries = min(step, length - start)
        into = found
        if deterministic:
            into = found.new_empty((batch, queries * count, width))
        _grad_chosen[queries, triton.cdiv(count, cut.keys), batch](
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
            ORDERED=deterministic,
            **call.constants,
            ROWS=cut.rows,
            KEYS=cut.keys,
            num_warps=cut.warps,
            num_stages=cut.stages,
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
        WIDTH=width,
        PADDED=max(16, triton.next_power_of_2(width)),
        AT_ONCE=_AT_ONCE,
    )


@triton.jit
def _grad_queries(
    q,  # [b, s * h, d]
    apart,  # elements from q to the output's gradient, which is as q
    lse,  # [b, s * h]
    delta,  # [b, s * h], written
    out,  # as q
    kv,  # [b, s, d]
    blocks,  # [b, n, d]
    chosen,  # [b, s, k]
    found,  # as q
    length,
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
    for start in range(tl.maximum(begin - WINDOW + 1, 0) if WINDOW else end, end, KEYS):
        token = start + tl.arange(0, KEYS)
        keys = load_rows(kv, batch * length + token, token < end, WIDTH, PADDED)
        seen = in_window(query[:, None], token[None, :], WINDOW)
        acc = _pulled_queries(pairs, level, mean, keys, seen, acc, SCALE, ROWS, KEYS)
    if KIND == ALL:
        for start in range(0, tl.minimum(end // RATIO, blocks_count), KEYS):
            block = start + tl.arange(0, KEYS)
            keys = load_rows(blocks, batch * blocks_count + block, block < blocks_count, WIDTH, PADDED)
            seen = (block[None, :] < (query[:, None] + 1) // RATIO) & (block < blocks_count)[None, :]
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
    some: tl.constexpr = min(PADDED, 64)
    total = tl.zeros(at.shape, tl.float32)
    for start in range(0, PADDED, some):
        column = start + tl.arange(0, some)
        where, mask = at[:, None] * WIDTH + column[None, :], there[:, None] & (column < WIDTH)[None, :]
        left, right = tl.load(a + where, mask, 0.0), tl.load(b + where, mask, 0.0)
        total += tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    return total


@triton.jit
def _pulled(
    tile,  # [KEYS, d]
    key,  # [KEYS], their numbers
    valid,  # [KEYS] bool
    low,
    high,
    past,  # rows of the batches before
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
        query = row // HEADS
        if WINDOW:
            seen = seen & in_window(query[None, :], key[:, None], WINDOW)
        elif RATIO:
            seen = seen & (key[:, None] < (query[None, :] + 1) // RATIO)
        products = tl.zeros((KEYS, 2 * ROWS), tl.float32)
        if first < high:
            products = dot(tile, tl.trans(pairs))
        scores, pull = tl.split(tl.reshape(products, (KEYS, ROWS, 2)))
        weights = tl.exp2(tl.where(seen, scores * (SCALE * LOG2E), -float("inf")) - level[None, :])
        pull = weights * (pull - mean[None, :]) * SCALE
        acc += dot(tl.reshape(tl.join(pull, weights), (KEYS, 2 * ROWS)).to(tile.dtype), pairs)
    return acc


@triton.jit
def _grad_shared(
    q,  # [b, s * h, d]
    apart,  # elements from q to the output's gradient, which is as q
    lse,  # [b, s * h]
    delta,  # [b, s * h]
    keys,  # [b, n, d]
    found,  # [parts, b, n, d] float32
    length,
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
        low, high = begin, tl.minimum(begin + KEYS - 1 + WINDOW, length)
    else:
        low, high = (begin + 1) * RATIO - 1, length
    low, high = low * HEADS, high * HEADS
    part = tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(1))
    low += tl.program_id(1) * part
    high = tl.minimum(low + part, high)
    past = batch * length * HEADS
    acc = _pulled(
        tile, key, key < count, low, high, past, q, apart, lse, delta,
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
    batch = tl.program_id(2).to(tl.int64)
    query = start + tl.program_id(0)
    place = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    block = tl.load(chosen + (batch * length + query) * chosen_count + place, mask=place < chosen_count, other=-1)
    tile = load_rows(blocks, batch * blocks_count + block, block >= 0, WIDTH, PADDED)
    low = query * HEADS
    high = low + HEADS * (tl.max(block) >= 0).to(tl.int32)  # nothing to do for a tile of none
    past = batch * length * HEADS
    acc = _pulled(
        tile, block, block >= 0, low, high, past, q, apart, lse, delta,
        0, 0, HEADS, WIDTH, PADDED, SCALE, ROWS, KEYS,
    )  # fmt: skip
    if ORDERED:
        to = (batch * tl.num_programs(0) + tl.program_id(0)) * chosen_count + place
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
