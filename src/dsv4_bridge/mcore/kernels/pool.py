"""Compressed entries: a gated mean over the tokens of a block, of one before it too where blocks overlap."""

import math

import torch
from torch import Tensor

from .choice import AUTO, Choice


def pool(kv: Tensor, gate: Tensor, ape: Tensor, ratio: int, overlaps: bool, by: Choice = AUTO) -> Tensor:
    """Entries of all whole blocks, in front of their norm (technical report 2.3.1-2.3.2).

    A channel's weights are a softmax, in float32, over the tokens of the entry. Where blocks overlap, kv and gate are
    twice as wide: the first half is for a token's block as the *previous* one, the second as the *current* one, and
    an entry has 2 * ratio tokens; the first entry has no previous block.

    Args:
        kv: [b, s, width], or [b, s, 2 * width]; any strides.
        gate: the same.
        ape: [ratio, the same width] float32, added to the gate by the token's place in its block.
        ratio: tokens a block; a tail of fewer is left out.
        overlaps: whether they do.
        by: torch or Triton.

    Returns:
        [b, s // ratio, width] in kv's type.
    """
    if by.fused(kv, gate, ape):
        from .pool_triton import pool as fused

        return fused(kv, gate, ape, ratio, overlaps)
    count = kv.shape[1] // ratio
    whole = count * ratio
    kv_blocks = kv[:, :whole].unflatten(1, (count, ratio))  # [b, n, ratio, wide]
    gate_blocks = gate[:, :whole].unflatten(1, (count, ratio)) + ape
    if overlaps:
        kv_blocks = overlapped(kv_blocks, 0.0)
        gate_blocks = overlapped(gate_blocks, -math.inf)
    return gated_mean(kv_blocks, gate_blocks)


def gated_mean(kv: Tensor, gate: Tensor) -> Tensor:
    """[b, n, slots, width] twice -> [b, n, width]: the mean over slots, weighted by the gate's softmax in float32."""
    weights = torch.softmax(gate, dim=2, dtype=torch.float32).to(kv.dtype)
    return (kv * weights).sum(2)


def overlapped(blocks: Tensor, nothing: float) -> Tensor:
    """[b, n, r, 2w] -> [b, n, 2r, w]: the previous block's first half, then the own second half."""
    first, second = blocks.chunk(2, -1)
    before = torch.nn.functional.pad(first, (0, 0, 0, 0, 1, 0), value=nothing)[:, :-1]
    return torch.cat([before, second], 2)
