"""`clamped_swiglu` of grouped.py: one pass each way, and in the backward the routing weight's dot in the same.

On a limit itself no gradient passes, as by torch's clamp in 2.15; that of 2.12 let it pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .direct import applied

COLUMNS = 1024


def columns_and_warps(width: int) -> tuple[int, int]:
    """Columns that a program has at a time, and its warps."""
    columns = min(COLUMNS, triton.next_power_of_2(width))
    return columns, max(1, min(4, columns // 256))


@triton.jit
def _halves(x, row, c, width, limit, CLAMPED: tl.constexpr):
    """Gate and up of some columns, float32, and where each passes its gradient on."""
    seen = c < width
    gate = tl.load(x + row * 2 * width + c, mask=seen, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + c, mask=seen, other=0.0).to(tl.float32)
    passes_gate, passes_up = seen, seen
    if CLAMPED:
        passes_gate = gate < limit
        passes_up = (up > -limit) & (up < limit)
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return gate, up, passes_gate, passes_up


@triton.jit
def _swiglu(x, weights, out, width, limit, CLAMPED: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate, up, _, _ = _halves(x, row, c, width, limit, CLAMPED)
    value = gate * tl.sigmoid(gate) * up * tl.load(weights + row).to(tl.float32)
    tl.store(out + row * width + c, value.to(out.dtype.element_ty), mask=c < width)


@triton.jit
def _swiglu_backward(
    x, weights, grad, grad_x, grad_weights, width, limit, CLAMPED: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        seen = c < width
        gate, up, passes_gate, passes_up = _halves(x, row, c, width, limit, CLAMPED)
        pull = tl.load(grad + row * width + c, mask=seen, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        active = gate * sigmoid
        total += pull * active * up
        pull *= weight
        to_gate = tl.where(passes_gate, pull * up * sigmoid * (1 + gate - active), 0.0)
        to_up = tl.where(passes_up, pull * active, 0.0)
        at = grad_x + row * 2 * width + c
        tl.store(at, to_gate.to(grad_x.dtype.element_ty), mask=seen)
        tl.store(at + width, to_up.to(grad_x.dtype.element_ty), mask=seen)
    tl.store(grad_weights + row, tl.sum(total, 0).to(grad_weights.dtype.element_ty))


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, limit: float | None) -> Tensor:  # type: ignore[override]
        x, weights = x.contiguous(), weights.contiguous()
        width = x.shape[1] // 2
        out = x.new_empty(len(x), width)
        ctx.save_for_backward(x, weights)
        ctx.limit = limit
        if out.numel():
            columns, warps = columns_and_warps(width)
            grid = (len(x), triton.cdiv(width, columns))
            _swiglu[grid](x, weights, out, width, limit or 0.0, limit is not None, columns, num_warps=warps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weights = ctx.saved_tensors
        limit, width = ctx.limit, x.shape[1] // 2
        to_x, to_weights = torch.empty_like(x), torch.empty_like(weights)
        if len(x):
            columns, warps = columns_and_warps(width)
            _swiglu_backward[(len(x),)](
                x,
                weights,
                grad.contiguous(),
                to_x,
                to_weights,
                width,
                limit or 0.0,
                limit is not None,
                columns,
                num_warps=warps,
            )
        return to_x, to_weights, None


def clamped_swiglu(x: Tensor, weights: Tensor, limit: float | None) -> Tensor:
    """See grouped.py."""
    return applied(_Swiglu, x, weights, limit)
