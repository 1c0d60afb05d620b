"""Scores of compressed blocks and the best of them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .choice import AUTO, Choice

# Scores held and queries scored at a time: what stays in a core's cache, and more for a GPU.
_BUDGET, _CHUNK = 1 << 18, 64
_GPU_TIMES = 16
# Queries scored at a time at least, however long the row; and blocks a wanted one from which they are grouped, of one
# query a row (a step of decoding) if there are many: the calls themselves take longer than to look at few.
_LEAST, _GROUPED, _MANY = 64, 16, 1 << 15


class IndexTerms(NamedTuple):
    """What scores are made of.

    Attributes:
        queries: [b, s, heads, width], rotated.
        keys: [b, n, width], entries of the indexer's own compressor.
        weights: [b, s, heads] float32, of the heads.
    """

    queries: Tensor
    keys: Tensor
    weights: Tensor


def every_block(length: int, batch: int, count: int, device: torch.device, first: int = 0) -> Tensor:
    """All visible blocks of every query, [b, s, count] int64, -1 where a block is not complete yet.

    `first` is the place of the first query in its document.
    """
    visible = (torch.arange(length, device=device) + first + 1) // 4
    block = torch.arange(count, device=device)
    return torch.where(block < visible[:, None], block, -1).expand(batch, -1, -1)


def index_scores(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Scores in float32: q [b, s, heads, w], keys [b, n, w], weights [b, s, heads] -> [b, s, n]."""
    dots = torch.matmul(q.float().flatten(1, 2), keys.float().mT).unflatten(1, q.shape[1:3])
    return torch.matmul(weights.unsqueeze(2) * q.shape[-1] ** -0.5, dots.relu_()).squeeze(2)


def choose_blocks(terms: IndexTerms, topk: int, by: Choice = AUTO, first: int = 0) -> Tensor:
    """The best visible blocks of every query: [b, s, topk] int64, -1 where a query sees fewer.

    `first` is the place of the first query in its document.

    Where there are no more blocks than `topk`, all of them: [b, s, n]. Torch and Triton add a score up in different
    orders: where two differ by rounding alone they may choose another one.
    """
    queries, keys, weights = terms
    batch, length, heads = queries.shape[:3]
    count = keys.shape[1]
    if count <= topk:
        return every_block(length, batch, count, keys.device, first)
    if by.fused(*terms):
        from . import index_triton

        return index_triton.choose(terms, topk, first)
    if by.long(count, *terms):
        from . import index_long

        return index_long.choose(terms, topk, first)
    visible = (torch.arange(length, device=keys.device) + first + 1) // 4  # [s]
    times = 1 if keys.device.type == "cpu" else _GPU_TIMES
    chosen = queries.new_full((batch, length, topk), -1, dtype=torch.int64)
    start = 0
    while start < length:
        # No more blocks than the chunk's last query sees: over a sequence, half of all.
        most = min(count, (first + start + times * _CHUNK) // 4)
        size = times * _BUDGET // (batch * heads * max(1, most))
        stop = min(length, start + min(times * _CHUNK, max(_LEAST, size)))
        here, least = slice(start, stop), min(topk, most)
        scores = _scores(IndexTerms(queries[:, here], keys[:, :most], weights[:, here]), times * _BUDGET)
        chosen[:, here, :least] = best_blocks(scores, visible[here].unsqueeze(0), least)
        start = stop
    return chosen


def _scores(terms: IndexTerms, budget: int) -> Tensor:
    """`index_scores`, so many blocks at a time that the products of all heads stay within a budget."""
    queries, keys, weights = terms
    wide = max(1, budget // max(1, queries.shape[:3].numel()))
    if wide >= keys.shape[1]:
        return index_scores(queries, keys, weights)
    scores = weights.new_empty((*queries.shape[:2], keys.shape[1]))
    for part, into in zip(keys.split(wide, 1), scores.split(wide, -1), strict=True):
        into.copy_(index_scores(queries, part, weights))
    return scores


def best_blocks(scores: Tensor, visible: Tensor, topk: int) -> Tensor:
    """Indices of the best visible blocks, in any order.

    Of blocks with equal scores those in front are taken. `torch.topk` takes any, other ones for another number of
    columns: then a choice would depend on how queries are cut into chunks, on the device, and on whether a
    sequence is decoded step by step. So a block's score and its place make one integer, and no two are equal: what
    is chosen is what a stable sort has in front, without waiting for the device.

    Args:
        scores: [b, s, n], float32 or narrower; -0 equals 0, and NaN counts as +inf.
        visible: [1 or b, s], how many blocks a query sees.
        topk: of n blocks.

    Returns:
        [b, s, topk] int64, -1 where there are fewer.
    """
    count = scores.shape[-1]
    column = torch.arange(count, device=scores.device)
    # The best blocks lie in the groups with the best blocks in front, no more of them than blocks are wanted: most
    # are looked at once, by the maximum of their group.
    size = int((count / max(1, topk)) ** 0.5) if count >= _GROUPED * topk else 1
    if size > 1 and (scores.shape[-2] > 1 or scores.numel() >= _MANY):
        whole = count // size * size
        most = scores[..., :whole].unflatten(-1, (-1, size)).amax(-1)
        if whole < count:
            most = torch.cat([most, scores[..., whole:].amax(-1, keepdim=True)], -1)
        # What the query does not see has no place in a maximum: the group where that begins is looked at in any case.
        begun = torch.arange(most.shape[-1], device=scores.device) * size
        most = most.masked_fill(begun + size > visible.unsqueeze(-1), math.inf)
        groups = _best(most, begun, visible, min(topk + 1, most.shape[-1]))
        column = (groups.unsqueeze(-1) + column[:size]).flatten(-2)  # below 0 or beyond the end: none
        column = torch.where((column < count) & (groups >= 0).repeat_interleave(size, -1), column, count)
        scores = scores.gather(-1, column.clamp(max=count - 1))
    return _best(scores, column, visible.clamp(max=count), topk)


def _best(scores: Tensor, column: Tensor, visible: Tensor, topk: int) -> Tensor:
    """The columns of the best scores: [b, s, m], columns [m] or [b, s, m] below 2**31, visible [1 or b, s]."""
    hidden = column >= visible.unsqueeze(-1)
    seen = torch.nan_to_num(scores.float(), nan=math.inf, posinf=math.inf, neginf=-math.inf)
    seen = seen.add_(0.0).masked_fill_(hidden, -math.inf)  # -0 + 0 is 0
    # The bits of positive floats order them as integers do; those of negative ones the other way round.
    bits = seen.view(torch.int32)
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    last = 0x7FFFFFFF
    keys = bits.long().bitwise_left_shift_(32).bitwise_or_(last - column)
    best = last - keys.topk(topk, dim=-1, sorted=False).values.bitwise_and_(0xFFFFFFFF)
    return best.masked_fill_(best >= visible.unsqueeze(-1), -1)
