"""`inverse_rms` and `rms_norm` of norm.py: a row stays in registers, so each direction is one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .direct import applied

ELEMENTS = 4096  # of a program at a time
PARTS = 256  # at most, of a sum over rows: more cost memory, fewer leave a GPU idle


def rows_and_warps(width: int) -> tuple[int, int]:
    """Rows of a program at a time, and its warps."""
    padded = triton.next_power_of_2(width)
    return max(1, min(16, ELEMENTS // padded)), 4 if padded <= ELEMENTS else 8


@triton.jit
def _inverse_rms(x, out, rows, width, eps, P: tl.constexpr, R: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.arange(0, P)
    seen = (r < rows)[:, None] & (c < width)[None, :]
    value = tl.load(x + r[:, None] * width + c[None, :], mask=seen, other=0.0).to(tl.float32)
    tl.store(out + r, tl.rsqrt(tl.sum(value * value, 1) / width + eps), mask=r < rows)


@triton.jit
def _inverse_rms_backward(x, inverse, grad, out, rows, width, P: tl.constexpr, R: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.arange(0, P)
    at = r[:, None] * width + c[None, :]
    seen = (r < rows)[:, None] & (c < width)[None, :]
    value = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    scale = tl.load(inverse + r, mask=r < rows, other=0.0)
    pull = tl.load(grad + r, mask=r < rows, other=0.0) * scale * scale * scale / -width
    tl.store(out + at, (value * pull[:, None]).to(out.dtype.element_ty), mask=seen)


@triton.jit
def _rms_norm(x, weight, out, inverse, rows, width, eps, P: tl.constexpr, R: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.arange(0, P)
    at = r[:, None] * width + c[None, :]
    seen = (r < rows)[:, None] & (c < width)[None, :]
    value = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
    tl.store(inverse + r, scale, mask=r < rows)
    tl.store(out + at, (value * scale[:, None] * gain[None, :]).to(out.dtype.element_ty), mask=seen)


@triton.jit
def _rms_norm_backward(
    x, weight, inverse, grad, out, parts, rows, width, size, P: tl.constexpr, R: tl.constexpr, WEIGHED: tl.constexpr
):
    part = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, P)
    gain = tl.load(weight + c, mask=c < width, other=0.0).to(tl.float32)
    total = tl.zeros([P], tl.float32)
    for start in range(0, size, R):
        r = part * size + start + tl.arange(0, R)
        here = r < rows
        at = r[:, None] * width + c[None, :]
        seen = here[:, None] & (c < width)[None, :]
        scale = tl.load(inverse + r, mask=here, other=0.0)[:, None]
        value = tl.load(x + at, mask=seen, other=0.0).to(tl.float32) * scale
        pull = tl.load(grad + at, mask=seen, other=0.0).to(tl.float32)
        if WEIGHED:
            total += tl.sum(pull * value, 0)
        pull *= gain[None, :]
        pull = (pull - value * (tl.sum(pull * value, 1) / width)[:, None]) * scale
        tl.store(out + at, pull.to(out.dtype.element_ty), mask=seen)
    if WEIGHED:
        tl.store(parts + part * width + c, total, mask=c < width)


class _InverseRMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        x = x.contiguous()
        width = x.shape[-1]
        inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        if inverse.numel():
            rows, warps = rows_and_warps(width)
            grid = (triton.cdiv(inverse.numel(), rows),)
            padded = triton.next_power_of_2(width)
            _inverse_rms[grid](x, inverse, inverse.numel(), width, eps, padded, rows, num_warps=warps)
        ctx.save_for_backward(x, inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, inverse = ctx.saved_tensors
        out = torch.empty_like(x)
        if out.numel():
            width = x.shape[-1]
            rows, warps = rows_and_warps(width)
            grid = (triton.cdiv(inverse.numel(), rows),)
            padded = triton.next_power_of_2(width)
            _inverse_rms_backward[grid](
                x, inverse, grad.contiguous(), out, inverse.numel(), width, padded, rows, num_warps=warps
            )
        return out, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        x, weight = x.contiguous(), weight.contiguous()
        count, width = x.numel() // len(weight), len(weight)
        out, inverse = torch.empty_like(x), x.new_empty(count, dtype=torch.float32)
        if count:
            rows, warps = rows_and_warps(width)
            grid = (triton.cdiv(count, rows),)
            padded = triton.next_power_of_2(width)
            _rms_norm[grid](x, weight, out, inverse, count, width, eps, padded, rows, num_warps=warps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        count, width = len(inverse), len(weight)
        out, weighed = torch.empty_like(x), ctx.needs_input_grad[1]
        if not count:
            return out, torch.zeros_like(weight), None
        rows, warps = rows_and_warps(width)
        size = triton.cdiv(triton.cdiv(count, PARTS), rows) * rows
        programs = triton.cdiv(count, size)
        parts = inverse.new_empty(programs, width) if weighed else inverse
        _rms_norm_backward[(programs,)](
            x,
            weight,
            inverse,
            grad.contiguous(),
            out,
            parts,
            count,
            width,
            size,
            triton.next_power_of_2(width),
            rows,
            weighed,
            num_warps=warps,
        )
        return out, parts.sum(0).to(weight.dtype) if weighed else None, None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """See norm.py."""
    return applied(_InverseRMS, x, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See norm.py."""
    return applied(_RMSNorm, x, weight, eps)
