"""Attention over a window and compressed blocks, a chunk of queries at a time.

One key head serves all query heads, and keys are values. The scores of a chunk exist only while it
is computed, forward and backward, so memory grows with S x heads x head_dim, never with S x S.

Shapes: b batch, s queries, n compressed blocks, h heads, d head_dim, k chosen blocks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .choice import AUTO, Choice
from .direct import applied

# Scores held at a time, in elements; a chunk shrinks to stay below it. Half a megabyte stays in a core's
# cache: measured on one, with 8 heads of 64, 16 of 128 and 64 of 512 channels, chunks of 64 to 128, 32 to 64
# and 16 to 32 queries are fastest, which this gives; 256 are 1.5 to 2.3 times slower.
_BUDGET = 1 << 17
_LEAST = 32
# A GPU wants more work at a time.
_GPU_TIMES = 32
# Up to so many blocks a chosen one, computing them all and masking beats gathering the chosen: measured, they
# are even at 4 (32 heads of 256, 64 chosen), 6 (16 of 128, 128 chosen) and 8 (8 of 64, 8 chosen).
_DENSE = 5


@dataclass(frozen=True)
class Reach:
    """What queries may see.

    Attributes:
        window: tokens of the sliding window, the query's own among them.
        ratio: tokens a compressed block; query t sees block i if i < (start + t + 1) // ratio. 0: no blocks.
        chunk: queries at a time at most.
        start: tokens of the document in front of the first query.
    """

    window: int
    ratio: int
    chunk: int
    start: int = 0

    def blocks(self, queries: int) -> int:
        """Blocks that the last of so many queries sees."""
        return (self.start + queries) // self.ratio if self.ratio else 0


def attend(
    q: Tensor,
    kv: Tensor,
    blocks: Tensor | None,
    chosen: Tensor | None,
    sink: Tensor,
    reach: Reach,
    by: Choice = AUTO,
) -> Tensor:
    """Softmax over window, visible blocks and the sink; the sink adds to the denominator only.

    Args:
        q: [b, s, h, d].
        kv: [b, l + s, d], keys and values of the window; l of them are of tokens in front of the first query.
        blocks: [b, n, d] compressed entries, or None.
        chosen: [b, s, k] int64 indices of the blocks each query attends to, -1 for none; None: all visible.
        sink: [h] float32.
        reach: what queries may see.
        by: torch or Triton.

    Returns:
        [b, s, h, d] in q's type. Scores are scaled by d^-0.5 (no YaRN factor).
    """
    if by.fused(q, kv, blocks, sink):
        from .attention_triton import attend_fused

        return attend_fused(q, kv, blocks, chosen, sink, reach, by.deterministic)
    return applied(_Attend, q, kv, blocks, chosen, sink, reach)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, blocks, chosen, sink, reach):  # type: ignore[override]
        out = torch.empty_like(q)
        for part in _parts(q, kv, blocks, chosen, reach):
            here = slice(part.start, part.stop)
            out[:, here] = part.mix(part.weights(q[:, here], sink)[..., :-1].to(q.dtype))
        ctx.save_for_backward(q, kv, blocks, chosen, sink)
        ctx.reach = reach
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        q, kv, blocks, chosen, sink = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.empty_like(q)
        grad_kv = torch.zeros_like(kv, dtype=wide)
        grad_blocks = None if blocks is None else torch.zeros_like(blocks, dtype=wide)
        grad_sink = torch.zeros_like(sink)
        for part in _parts(q, kv, blocks, chosen, ctx.reach):
            here = slice(part.start, part.stop)
            weights = part.weights(q[:, here], sink)
            weights, on_sink = weights[..., :-1], weights[..., -1]
            # Softmax backward: weights * (pull - sum of weights * pull); the sink itself pulls nothing.
            pull = part.dot(grad[:, here]).to(wide).mul_(weights)
            spread = pull.sum(-1)  # [b, c, h]
            pull.addcmul_(weights, spread.unsqueeze(-1), value=-1)
            grad_sink -= (on_sink * spread).sum((0, 1)).to(sink.dtype)
            pull, weights = pull.to(q.dtype), weights.to(q.dtype)
            grad_q[:, here] = part.mix(pull).mul_(part.scale)
            part.gather_grad(pull, q[:, here] * part.scale, grad_kv, grad_blocks)
            part.gather_grad(weights, grad[:, here], grad_kv, grad_blocks)
        return (
            grad_q,
            grad_kv.to(kv.dtype),
            None if grad_blocks is None or blocks is None else grad_blocks.to(blocks.dtype),
            None,
            grad_sink,
            None,
        )


class OnBlocks(NamedTuple):
    """What the queries of one chunk put on compressed blocks, m at a time.

    Attributes:
        here: the queries.
        weights: [b, c, h, m], of the softmax over window, these blocks and the sink; 0 where not seen.
        seen: [1 or b, c, m] bool.
        picked: [b, c, m] indices of the blocks (any where not seen); None: the first m blocks.
    """

    here: slice
    weights: Tensor
    seen: Tensor
    picked: Tensor | None


def weights_on_blocks(
    q: Tensor, kv: Tensor, blocks: Tensor, chosen: Tensor | None, sink: Tensor, reach: Reach
) -> Iterator[OnBlocks]:
    """The weights that `attend` gives to blocks, a chunk of queries at a time; arguments as there."""
    for part in _parts(q, kv, blocks, chosen, reach):
        here = slice(part.start, part.stop)
        weights = part.weights(q[:, here], sink)
        shared = part.keys.shape[1]
        if part.picked is not None:
            yield OnBlocks(here, weights[..., shared:-1], part.picked >= 0, part.picked.clamp(min=0))
        else:
            wide = shared - part.seen
            yield OnBlocks(here, weights[..., wide:shared], part.mask[..., wide:], None)


@dataclass(frozen=True)
class _Part:
    """One chunk of queries with its keys: a shared piece [b, m, d], and maybe a piece of its own [b, c, k, d]."""

    start: int
    stop: int
    first: int  # place of the first window key
    seen: int  # blocks that are computed for all queries of the chunk
    keys: Tensor  # [b, window keys + seen, d]
    mask: Tensor  # [1 or b, c, keys], True: visible
    own: Tensor | None  # [b, c, k, d], gathered blocks
    picked: Tensor | None  # [b, c, k], their indices; -1: none

    @property
    def scale(self) -> float:
        return self.keys.shape[-1] ** -0.5

    def dots(self, x: Tensor) -> list[Tensor]:
        """[b, c, h, d] times the shared keys, and times the own: [b, c, h, …] each."""
        shared = torch.matmul(x.flatten(1, 2), self.keys.mT).unflatten(1, x.shape[1:3])
        return [shared] if self.own is None else [shared, torch.matmul(x, self.own.mT)]

    def dot(self, x: Tensor) -> Tensor:
        """[b, c, h, d] times every key: [b, c, h, keys]."""
        dots = self.dots(x)
        return dots[0] if len(dots) == 1 else torch.cat(dots, -1)

    def weights(self, q: Tensor, sink: Tensor) -> Tensor:
        """Softmax over keys and, last, the sink, float32: [b, c, h, keys + 1]."""
        dots = self.dots(q)
        seen = [self.mask] if self.picked is None else [self.mask, self.picked >= 0]
        keys = sum(dot.shape[-1] for dot in dots)
        # One buffer takes scale, mask and sink in one pass, then torch's fused softmax: measured 6 to 10
        # times faster than masked_fill, amax, exp, sum and division by themselves.
        scores = q.new_empty((*q.shape[:3], keys + 1), dtype=torch.promote_types(q.dtype, torch.float32))
        at = 0
        for dot, visible in zip(dots, seen, strict=True):
            bias = torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, -math.inf)
            torch.add(bias.unsqueeze(2), dot, alpha=self.scale, out=scores[..., at : at + dot.shape[-1]])
            at += dot.shape[-1]
        scores[..., -1] = sink
        return torch.softmax(scores, -1)

    def mix(self, weights: Tensor) -> Tensor:
        """Weighted sum of the keys: [b, c, h, keys] -> [b, c, h, d]."""
        split = self.keys.shape[1]
        mixed = torch.matmul(weights[..., :split].flatten(1, 2), self.keys).unflatten(1, weights.shape[1:3])
        return mixed if self.own is None else mixed + torch.matmul(weights[..., split:], self.own)

    def gather_grad(self, weights: Tensor, x: Tensor, grad_kv: Tensor, grad_blocks: Tensor | None) -> None:
        """Add weights^T x to the gradients of the keys: [b, c, h, keys], [b, c, h, d]."""
        split = self.keys.shape[1]
        shared = torch.matmul(weights[..., :split].flatten(1, 2).mT, x.flatten(1, 2))
        wide = split - self.seen
        grad_kv[:, self.first : self.first + wide] += shared[:, :wide]
        if grad_blocks is None:
            return
        if self.seen:
            grad_blocks[:, : self.seen] += shared[:, wide:]
        if self.own is not None and self.picked is not None:
            mine = torch.matmul(weights[..., split:].mT, x).to(
                grad_blocks.dtype
            )  # [b, c, k, d]; zero where nothing is picked
            at = self.picked.clamp(min=0).flatten(1, 2).unsqueeze(-1).expand(-1, -1, x.shape[-1])
            grad_blocks.scatter_add_(1, at, mine.flatten(1, 2))


def _parts(q: Tensor, kv: Tensor, blocks: Tensor | None, chosen: Tensor | None, reach: Reach) -> Iterator[_Part]:
    if blocks is not None and blocks.shape[1] == 0:  # they get a gradient of no entries: their weights, of zeros
        blocks = chosen = None
    batch, length, heads, _ = q.shape
    budget = _BUDGET if q.device.type == "cpu" else _GPU_TIMES * _BUDGET
    start = 0
    while start < length:
        most = reach.blocks(min(start + reach.chunk, length)) if blocks is not None else 0
        apart = chosen is not None and most > _DENSE * chosen.shape[2]
        keys = reach.window + (chosen.shape[2] if apart and chosen is not None else most)
        size = budget // (batch * heads * keys)
        stop = min(start + max(_LEAST, min(size, reach.chunk)), length)
        yield _part(start, stop, kv, kv.shape[1] - length, blocks, chosen, reach, apart)
        start = stop


def _part(
    start: int,
    stop: int,
    kv: Tensor,
    lead: int,
    blocks: Tensor | None,
    chosen: Tensor | None,
    reach: Reach,
    apart: bool,
) -> _Part:
    first = max(0, lead + start - reach.window + 1)
    query = torch.arange(start, stop, device=kv.device)[:, None]
    token = torch.arange(first - lead, stop, device=kv.device)
    mask = ((token <= query) & (token > query - reach.window)).unsqueeze(0)
    keys = kv[:, first : lead + stop]
    if blocks is None:
        return _Part(start, stop, first, 0, keys, mask, None, None)
    if apart and chosen is not None:
        picked = chosen[:, start:stop]
        at = picked.clamp(min=0).flatten(1, 2).unsqueeze(-1).expand(-1, -1, blocks.shape[-1])
        own = blocks.gather(1, at).unflatten(1, picked.shape[1:])
        return _Part(start, stop, first, 0, keys, mask, own, picked)
    seen = reach.blocks(stop)
    if chosen is None:
        visible = torch.arange(seen, device=kv.device) < (reach.start + query + 1) // reach.ratio
        visible = visible.unsqueeze(0)
    else:
        picked = chosen[:, start:stop]
        visible = torch.zeros((*picked.shape[:2], seen + 1), dtype=torch.bool, device=kv.device)
        visible.scatter_(2, torch.where(picked < 0, seen, picked), True)
        visible = visible[..., :seen]
        mask = mask.expand(len(picked), -1, -1)
    return _Part(
        start, stop, first, seen, torch.cat([keys, blocks[:, :seen]], 1), torch.cat([mask, visible], -1), None, None
    )


def attend_one(q: Tensor, keys: Tensor, visible: Tensor, sink: Tensor) -> Tensor:
    """The same for one query a row, over keys gathered already.

    Args:
        q: [b, h, d].
        keys: [b, m, d].
        visible: [b, m] bool.
        sink: [h] float32.

    Returns:
        [b, h, d].
    """
    scores = torch.matmul(q, keys.mT).float() * keys.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible.unsqueeze(1), -math.inf)
    weights = torch.softmax(torch.cat([scores, sink.expand(len(q), -1).unsqueeze(-1)], -1), -1)[..., :-1]
    return torch.matmul(weights.to(q.dtype), keys)
