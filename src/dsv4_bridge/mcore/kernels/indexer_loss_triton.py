"""The indexer's objective by Triton: one program a query, for the attention's weights, then for the indexer.

The attention's heads, or the indexer's, are the rows of a tile, blocks its columns: dots and weights stay on the chip.
What reaches memory is the attention's weights summed over heads, [b, c, m] float32 of as many queries as fit
`_SCRATCH` bytes. Dots are computed again where they are needed a second time (the attention's after their softmax's
denominator is known, the indexer's after that of the scores): a block's channels are read again from the second-level
cache, which costs less than its dots with every head, written and read.

Gradients of keys come from many queries. Chosen blocks lie anywhere: each query adds its part with atomics. Of all
visible blocks, a program takes a tile of keys and walks over queries. In a fixed order means integers here: parts are
rounded to 2^-40 or so of what bounds them and added as such, whose sum is the same in every order.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import Reach
from .block_weights_triton import QueryTiles, fill_block_weights, last_chosen, slots_of
from .index import IndexTerms
from .index_triton import widened
from .tiles import dot, shared_memory

# Bytes of head-summed weights at a time.
_SCRATCH = 64 << 20
# Queries that a program of the dense gradient of keys walks over.
_WALK = 64


def divergence_tiles(heads: int, width: int, dtype: torch.dtype, shared: int) -> QueryTiles:
    """Tiles of the indexer's scores and gradients: all its heads at once."""
    rows = max(16, triton.next_power_of_2(heads))
    if dtype == torch.float32:
        return QueryTiles(rows, 16, min(width, 32), 8, 2)
    for blocks, stages in ((64, 2), (32, 2)):
        # Gradients of chosen keys, up to 8 bytes each, pass through shared memory.
        if 2 * width * (rows + stages * blocks) + 8 * width * blocks <= shared:
            return QueryTiles(rows, blocks, width, 8, stages)
    return QueryTiles(rows, 16, width, 8, 1)


def walk_tiles(heads: int, width: int, dtype: torch.dtype, shared: int) -> QueryTiles:
    """Tiles of the gradients of keys that all queries see: many keys for each query that is read."""
    rows = max(16, triton.next_power_of_2(heads))
    if dtype == torch.float32:
        return QueryTiles(rows, 16, min(width, 32), 8, 2)
    for blocks, stages in ((128, 3), (64, 2)):
        if max(2 * width * (blocks + stages * rows) + 2 * rows * blocks, 8 * width * blocks) <= shared:
            return QueryTiles(rows, blocks, width, 8, stages)
    return QueryTiles(rows, 32, width, 8, 1)


def loss_and_gradients(
    terms: IndexTerms,
    q: Tensor,
    kv: Tensor,
    blocks: Tensor,
    chosen: Tensor | None,
    sink: Tensor,
    reach: Reach,
    counted: Tensor | None,
    over_ranks: Callable[[Tensor], Tensor] | None,
    deterministic: bool,
) -> tuple[Tensor, IndexTerms]:
    """The loss and the gradients of `terms`, those of keys and weights in float32; arguments as `indexer_loss`."""
    width, scale = terms.queries.shape[3], terms.queries.shape[3] ** -0.5
    kind = torch.promote_types(terms.queries.dtype, terms.keys.dtype)
    queries, keys = (widened(t.to(kind)).contiguous() for t in terms[:2])
    weights = terms.weights.float().contiguous()
    indexer = IndexTerms(queries, keys, weights)
    attention = (*(widened(t).contiguous() for t in (q, kv, blocks)), sink.float().contiguous())
    batch, length = queries.shape[:2]
    count = blocks.shape[1] if chosen is None else chosen.shape[2]
    losses = torch.zeros((batch, length), dtype=torch.float32, device=q.device)
    unit = _unit(indexer, width) if deterministic else None
    grads = IndexTerms(
        torch.zeros_like(queries),
        torch.zeros_like(keys, dtype=torch.float32 if unit is None else torch.int64),
        torch.zeros_like(weights),
    )
    rows = max(_WALK, _SCRATCH // (4 * batch * max(1, count)) // _WALK * _WALK)
    for start in range(0, length, rows):
        stop = min(length, start + rows)
        columns = min(count, reach.blocks(stop))
        if columns == 0 or blocks.shape[1] == 0:
            continue
        columns = columns if chosen is None else count
        picked = None if chosen is None else chosen[:, start:stop].contiguous()
        target = weights.new_zeros((batch, stop - start, columns))
        fill_block_weights(target, attention, picked, start, reach, q.shape[3] ** -0.5)
        if over_ranks is not None:
            target = over_ranks(target)
        _diverge(losses, target, indexer, grads, picked, counted, unit, start, reach, scale)
        if picked is None:
            _walk(target, indexer, grads.keys, unit, start, reach, scale)
    summed = grads.keys if unit is None else (grads.keys.double() / unit.double()).float()
    return losses.sum(), IndexTerms(grads.queries[..., :width], summed[..., :width], grads.weights)


def _unit(terms: IndexTerms, width: int) -> Tensor:
    """How many integers make 1 in gradients of keys: a power of two, so that no sum leaves 62 bits; NaN of NaN.

    A part of one query is at most the sum of its heads' weights, scaled, times its largest channel.
    """
    queries, _, weights = terms
    most = weights.abs().sum(-1).amax() * queries.abs().amax().float() * (width**-0.5 * queries.shape[1])
    bits = (61.0 - torch.log2(most.clamp(min=2.0**-60)).ceil()).clamp(min=-100.0, max=100.0)
    return torch.where(most.isfinite(), torch.exp2(bits), torch.nan)


def _diverge(
    losses: Tensor,
    target: Tensor,
    terms: IndexTerms,
    grads: IndexTerms,
    picked: Tensor | None,
    counted: Tensor | None,
    unit: Tensor | None,
    start: int,
    reach: Reach,
    scale: float,
) -> None:
    """Losses of a chunk and its gradients; without `picked` those of keys are left, and `target` becomes the pull."""
    queries, keys, weights = terms
    batch, rows, columns = target.shape
    tiles = divergence_tiles(queries.shape[2], queries.shape[3], queries.dtype, shared_memory(queries.device))
    _divergence[(rows, batch)](
        queries,
        keys,
        weights,
        target,
        target if picked is None else picked,
        target if counted is None else counted.contiguous(),
        target if unit is None else unit,
        losses,
        *grads,
        start,
        reach.start,
        queries.shape[1],
        keys.shape[1],
        rows,
        columns,
        queries.shape[2],
        scale,
        **tiles.launch(
            RATIO=reach.ratio,
            CHOSEN=picked is not None,
            SLOTS=slots_of(picked),
            COUNTED=counted is not None,
            FIXED=unit is not None,
            WIDTH=queries.shape[3],
        ),
    )


def _walk(
    pull: Tensor, terms: IndexTerms, grad_keys: Tensor, unit: Tensor | None, start: int, reach: Reach, scale: float
) -> None:
    """Gradients of the keys, where each query sees all that are visible."""
    queries, keys, weights = terms
    batch, rows, columns = pull.shape
    tiles = walk_tiles(queries.shape[2], queries.shape[3], queries.dtype, shared_memory(queries.device))
    _keys_gradient[(triton.cdiv(columns, tiles.blocks), triton.cdiv(rows, _WALK), batch)](
        queries,
        keys,
        weights,
        pull,
        pull if unit is None else unit,
        grad_keys,
        start,
        reach.start,
        queries.shape[1],
        keys.shape[1],
        rows,
        columns,
        queries.shape[2],
        scale,
        **tiles.launch(RATIO=reach.ratio, FIXED=unit is not None, WIDTH=queries.shape[3], WALK=_WALK),
    )


@triton.jit(do_not_specialize=["start", "past", "length", "count", "rows", "columns"])
def _divergence(
    queries,
    keys,
    weights,
    target,
    picked,
    counted,
    unit,
    losses,
    grad_queries,
    grad_keys,
    grad_weights,
    start,
    past,  # tokens of the document in front of query 0
    length,
    count,
    rows,
    columns,
    heads,
    scale,
    RATIO: tl.constexpr,
    CHOSEN: tl.constexpr,
    SLOTS: tl.constexpr,
    COUNTED: tl.constexpr,
    FIXED: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """KL of one query: a pass for the scores' log-sum-exp, another for the loss and the gradients."""
    row, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    line, token = batch * rows + row, batch * length + start + row  # of the chunk, of all
    each, channel, part_of = tl.arange(0, BLOCKS), tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    head = tl.arange(0, HEADS)
    real = head < heads
    if CHOSEN:
        end = last_chosen(picked + line * columns, columns, SLOTS)
    else:
        end = tl.minimum(columns, (past + start + row + 1) // RATIO)
    query = queries + (token * heads + head[:, None]) * WIDTH
    held = tl.load(query + channel[None, :], mask=real[:, None], other=0.0)
    weight = tl.load(weights + token * heads + head, mask=real, other=0.0) * scale
    keys += batch * count * WIDTH
    grad_keys += batch * count * WIDTH
    target += line * columns
    picked += line * columns
    top, norm = -3.4e38, 0.0
    masses = tl.full((BLOCKS,), 0.0, tl.float32)
    for begin in range(0, end, BLOCKS):
        slot = begin + each
        place, seen = slot, slot < end
        if CHOSEN:
            place = tl.load(picked + slot, mask=seen, other=-1)
            seen = place >= 0
        key = keys + place.to(tl.int64)[:, None] * WIDTH
        if DEPTH == WIDTH:
            dots = dot(tl.load(key + channel[None, :], mask=seen[:, None], other=0.0), tl.trans(held))
        else:
            dots = tl.full((BLOCKS, HEADS), 0.0, tl.float32)
            for part in range(0, WIDTH, DEPTH):
                some = tl.load(key + part + part_of[None, :], mask=seen[:, None], other=0.0)
                other = tl.load(query + part + part_of[None, :], mask=real[:, None], other=0.0)
                dots += dot(some, tl.trans(other))
        relu = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)
        score = tl.where(seen, tl.sum(relu * weight[None, :], 1), -3.4e38)
        new = tl.maximum(top, tl.max(score, 0))
        norm = norm * tl.exp(top - new) + tl.sum(tl.exp(score - new), 0)
        top = new
        masses += tl.load(target + slot, mask=seen, other=0.0)
    mass = tl.sum(masses, 0)
    whole = top + tl.log(norm)
    share = 1.0 / tl.maximum(mass, 1.1754944e-38, propagate_nan=tl.PropagateNan.ALL)
    if COUNTED:
        share *= tl.load(counted + token).to(tl.float32)
    pushed = tl.full((BLOCKS, HEADS), 0.0, tl.float32)
    turned = tl.full((HEADS, WIDTH), 0.0, tl.float32)
    loss = tl.full((BLOCKS,), 0.0, tl.float32)
    for begin in range(0, end, BLOCKS):
        slot = begin + each
        place, seen = slot, slot < end
        if CHOSEN:
            place = tl.load(picked + slot, mask=seen, other=-1)
            seen = place >= 0
        key = keys + place.to(tl.int64)[:, None] * WIDTH
        near = tl.load(key + channel[None, :], mask=seen[:, None], other=0.0)
        if DEPTH == WIDTH:
            dots = dot(near, tl.trans(held))
        else:
            dots = tl.full((BLOCKS, HEADS), 0.0, tl.float32)
            for part in range(0, WIDTH, DEPTH):
                some = tl.load(key + part + part_of[None, :], mask=seen[:, None], other=0.0)
                other = tl.load(query + part + part_of[None, :], mask=real[:, None], other=0.0)
                dots += dot(some, tl.trans(other))
        relu = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)
        log = tl.where(seen, tl.sum(relu * weight[None, :], 1) - whole, 0.0)
        wanted = tl.load(target + slot, mask=seen, other=0.0) * share
        loss += wanted * (tl.log(tl.where(wanted == 0.0, 1.0, wanted)) - log)
        pull = tl.where(seen, tl.exp(log) * (mass * share) - wanted, 0.0)
        pushed += relu * pull[:, None]
        back = tl.where(dots > 0.0, pull[:, None] * weight[None, :], 0.0).to(near.dtype)
        turned += dot(tl.trans(back), near)
        if CHOSEN:
            mine = dot(back, held)
            into = grad_keys + place.to(tl.int64)[:, None] * WIDTH + channel[None, :]
            if FIXED:
                tl.atomic_add(into, (mine * tl.load(unit)).to(tl.int64), mask=seen[:, None], sem="relaxed")
            else:
                tl.atomic_add(into, mine, mask=seen[:, None], sem="relaxed")
        else:
            tl.store(target + slot, pull, mask=seen)
    tl.store(losses + token, tl.sum(loss, 0))
    tl.store(grad_weights + token * heads + head, tl.sum(pushed, 0) * scale, mask=real)
    into = grad_queries + (token * heads + head[:, None]) * WIDTH + channel[None, :]
    tl.store(into, turned.to(grad_queries.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["start", "past", "length", "count", "rows", "columns"])
def _keys_gradient(
    queries,
    keys,
    weights,
    pulls,
    unit,
    grad_keys,
    start,
    past,  # tokens of the document in front of query 0
    length,
    count,
    rows,
    columns,
    heads,
    scale,
    RATIO: tl.constexpr,
    FIXED: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr,
    WALK: tl.constexpr,
):
    """What some queries, one after another, add to the gradients of a tile of keys that they all may see."""
    least, first, batch = tl.program_id(0) * BLOCKS, tl.program_id(1) * WALK, tl.program_id(2).to(tl.int64)
    block = least + tl.arange(0, BLOCKS)
    channel, part_of, head = tl.arange(0, WIDTH), tl.arange(0, DEPTH), tl.arange(0, HEADS)
    real, there = head < heads, block < columns
    key = keys + (batch * count + block[:, None]) * WIDTH
    held = tl.load(key + channel[None, :], mask=there[:, None], other=0.0)
    total = tl.full((BLOCKS, WIDTH), 0.0, tl.float32)
    # Query t sees block i from past + t = RATIO (i + 1) - 1 on.
    begin = tl.maximum(first, RATIO * (least + 1) - 1 - past - start)
    for row in range(begin, tl.minimum(first + WALK, rows)):
        token = batch * length + start + row
        pull = tl.load(
            pulls + (batch * rows + row) * columns + block,
            mask=there & (block < (past + start + row + 1) // RATIO),
            other=0.0,
        )
        weight = tl.load(weights + token * heads + head, mask=real, other=0.0) * scale
        query = queries + (token * heads + head[:, None]) * WIDTH
        near = tl.load(query + channel[None, :], mask=real[:, None], other=0.0)
        if DEPTH == WIDTH:
            dots = dot(held, tl.trans(near))
        else:
            dots = tl.full((BLOCKS, HEADS), 0.0, tl.float32)
            for part in range(0, WIDTH, DEPTH):
                some = tl.load(key + part + part_of[None, :], mask=there[:, None], other=0.0)
                other = tl.load(query + part + part_of[None, :], mask=real[:, None], other=0.0)
                dots += dot(some, tl.trans(other))
        back = tl.where(dots > 0.0, pull[:, None] * weight[None, :], 0.0)
        total += dot(back.to(near.dtype), near)
    if begin < tl.minimum(first + WALK, rows):
        into = grad_keys + (batch * count + block[:, None]) * WIDTH + channel[None, :]
        if FIXED:
            tl.atomic_add(into, (total * tl.load(unit)).to(tl.int64), mask=there[:, None], sem="relaxed")
        else:
            tl.atomic_add(into, total, mask=there[:, None], sem="relaxed")
