"""`pool` of pool.py without copies: a program reads an entry's tokens where they lie, each way once.

In the backward a program takes some blocks one after the other and adds up what they pull on `ape`; parts of that
sum are added by torch. Block n, which is not there, lets zeros flow into the last block as a previous one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .direct import applied

ELEMENTS = 4096  # of a tile of tokens x channels
PROGRAMS = 256  # that share the sum for ape, at most


class Shape(NamedTuple):
    """How entries are made: their number, tokens of a block as a power of two, channels of a program, its warps."""

    blocks: int
    slots: int
    channels: int
    warps: int


def shape_of(tokens: int, ratio: int, width: int) -> Shape:
    """For entries of so many channels."""
    slots = triton.next_power_of_2(ratio)
    channels = min(triton.next_power_of_2(width), max(32, min(512, ELEMENTS // slots)))
    return Shape(tokens // ratio, slots, channels, max(1, min(4, slots * channels // 512)))


@triton.jit
def _tile(
    kv,
    gate,
    ape,
    batch,
    block,
    count,
    half,
    c,
    kb,
    ks,
    gb,
    gs,
    wide,
    width,
    RATIO: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Tokens of a block: kv, gate + ape (-inf where there is none), float32, and which there are."""
    slot = tl.arange(0, SLOTS)
    token = block * RATIO + slot
    there = (slot < RATIO) & (token >= 0) & (token < count * RATIO)
    seen = there[:, None] & (c < width)[None, :]
    token = token.to(tl.int64)[:, None]
    column = half * width + c[None, :]
    value = tl.load(kv + batch * kb + token * ks + column, mask=seen, other=0.0).to(tl.float32)
    logit = tl.load(gate + batch * gb + token * gs + column, mask=seen, other=0.0).to(tl.float32)
    logit += tl.load(ape + slot[:, None] * wide + column, mask=seen, other=0.0)
    return value, tl.where(seen, logit, float("-inf")), seen


@triton.jit
def _highest(logit):
    """By channel; 0 where there is nothing."""
    high = tl.max(logit, 0)
    return tl.where(high > float("-inf"), high, 0.0)


@triton.jit
def _pool(
    kv,
    gate,
    ape,
    out,
    count,
    kb,
    ks,
    gb,
    gs,
    wide,
    width,
    RATIO: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    entry = tl.program_id(0)
    batch, block = (entry // count).to(tl.int64), entry % count
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    value, logit, _ = _tile(
        kv, gate, ape, batch, block, count, 1 if OVERLAPS else 0, c, kb, ks, gb, gs, wide, width, RATIO, SLOTS
    )
    high = _highest(logit)
    if OVERLAPS:
        value_0, logit_0, _ = _tile(
            kv, gate, ape, batch, block - 1, count, 0, c, kb, ks, gb, gs, wide, width, RATIO, SLOTS
        )
        high = tl.maximum(high, tl.max(logit_0, 0))
    weight = tl.exp(logit - high[None, :])
    total, mean = tl.sum(weight, 0), tl.sum(weight * value, 0)
    if OVERLAPS:
        weight = tl.exp(logit_0 - high[None, :])
        total += tl.sum(weight, 0)
        mean += tl.sum(weight * value_0, 0)
    mean = mean / tl.where(total > 0.0, total, 1.0)
    tl.store(out + entry.to(tl.int64) * width + c, mean.to(out.dtype.element_ty), mask=c < width)


@triton.jit
def _pool_backward(
    kv,
    gate,
    ape,
    grad,
    grad_kv,
    grad_gate,
    parts,
    blocks,
    count,
    size,
    kb,
    ks,
    gb,
    gs,
    db,
    ds,
    eb,
    es,
    wide,
    width,
    RATIO: tl.constexpr,
    SLOTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Blocks [part * size, … + size) of `blocks`: the entries and, where they overlap, one more of every row."""
    part = tl.program_id(0)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    slot = tl.arange(0, SLOTS)
    to_ape = tl.zeros([SLOTS, CHANNELS], tl.float32)
    to_ape_0 = tl.zeros([SLOTS, CHANNELS], tl.float32)
    own: tl.constexpr = 1 if OVERLAPS else 0
    for number in range(part * size, tl.minimum(part * size + size, blocks)):
        batch, block = (number // (count + own)).to(tl.int64), number % (count + own)
        real = (c < width) & (block + tl.zeros_like(c) < count)
        value, logit, seen = _tile(
            kv, gate, ape, batch, block, count, own, c, kb, ks, gb, gs, wide, width, RATIO, SLOTS
        )
        high = _highest(logit)
        if OVERLAPS:
            value_0, logit_0, seen_0 = _tile(
                kv, gate, ape, batch, block - 1, count, 0, c, kb, ks, gb, gs, wide, width, RATIO, SLOTS
            )
            high = tl.maximum(high, _highest(logit_0))
        at = (batch * count + block) * width + c
        pull = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
        weight = tl.exp(logit - high[None, :])
        total, mean = tl.sum(weight, 0), tl.sum(weight * value, 0)
        if OVERLAPS:
            weight_0 = tl.exp(logit_0 - high[None, :])
            total += tl.sum(weight_0, 0)
            mean += tl.sum(weight_0 * value_0, 0)
        total = tl.where(total > 0.0, total, 1.0)
        mean, pull = mean / total, pull / total
        token = (block * RATIO + slot).to(tl.int64)[:, None]
        column = own * width + c[None, :]
        to_kv = weight * pull[None, :]
        to_gate = to_kv * (value - mean[None, :])
        to_ape += to_gate
        tl.store(grad_kv + batch * db + token * ds + column, to_kv.to(grad_kv.dtype.element_ty), mask=seen)
        tl.store(grad_gate + batch * eb + token * es + column, to_gate.to(grad_gate.dtype.element_ty), mask=seen)
        if OVERLAPS:
            token = token - RATIO
            column = c[None, :]
            to_kv = weight_0 * pull[None, :]
            to_gate = to_kv * (value_0 - mean[None, :])
            to_ape_0 += to_gate
            tl.store(grad_kv + batch * db + token * ds + column, to_kv.to(grad_kv.dtype.element_ty), mask=seen_0)
            tl.store(grad_gate + batch * eb + token * es + column, to_gate.to(grad_gate.dtype.element_ty), mask=seen_0)
    place = (part * RATIO + slot[:, None]) * wide + c[None, :]
    inside = (slot < RATIO)[:, None] & (c < width)[None, :]
    tl.store(parts + place + own * width, to_ape, mask=inside)
    if OVERLAPS:
        tl.store(parts + place, to_ape_0, mask=inside)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, kv: Tensor, gate: Tensor, ape: Tensor, ratio: int, overlaps: bool
    ) -> Tensor:
        kv, gate = (t if t.stride(-1) == 1 else t.contiguous() for t in (kv, gate))
        ape = ape.contiguous()
        batch, tokens, wide = kv.shape
        width = wide // 2 if overlaps else wide
        count, slots, channels, warps = shape_of(tokens, ratio, width)
        out = kv.new_empty(batch, count, width)
        if out.numel():
            grid = (batch * count, triton.cdiv(width, channels))
            strides = (*kv.stride()[:2], *gate.stride()[:2])
            _pool[grid](
                kv, gate, ape, out, count, *strides, wide, width, ratio, slots, channels, overlaps, num_warps=warps
            )
        ctx.save_for_backward(kv, gate, ape)
        ctx.settings = ratio, overlaps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        kv, gate, ape = ctx.saved_tensors
        ratio, overlaps = ctx.settings
        batch, tokens, wide = kv.shape
        width = wide // 2 if overlaps else wide
        count, slots, channels, warps = shape_of(tokens, ratio, width)
        to_kv, to_gate = torch.empty_like(kv), torch.empty_like(gate)
        whole = count * ratio
        if whole < tokens:
            to_kv[:, whole:], to_gate[:, whole:] = 0, 0
        if not grad.numel():
            return to_kv, to_gate, torch.zeros_like(ape), None, None
        blocks = batch * (count + overlaps)
        pieces = triton.cdiv(width, channels)
        size = triton.cdiv(blocks, max(1, PROGRAMS // pieces))
        programs = triton.cdiv(blocks, size)
        parts = ape.new_empty((programs, *ape.shape), dtype=torch.float32)
        strides = (t.stride()[:2] for t in (kv, gate, to_kv, to_gate))
        _pool_backward[(programs, pieces)](
            kv,
            gate,
            ape,
            grad.contiguous(),
            to_kv,
            to_gate,
            parts,
            blocks,
            count,
            size,
            *(number for pair in strides for number in pair),
            wide,
            width,
            ratio,
            slots,
            channels,
            overlaps,
            num_warps=warps,
        )
        return to_kv, to_gate, parts.sum(0).to(ape.dtype), None, None


def pool(kv: Tensor, gate: Tensor, ape: Tensor, ratio: int, overlaps: bool) -> Tensor:
    """See pool.py."""
    return applied(_Pool, kv, gate, ape, ratio, overlaps)
