"""The inverse root mean square, and the norm with a weight."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .choice import AUTO, Choice
from .direct import applied


class _InverseRMS(torch.autograd.Function):
    """One pass over x each way; by single operations, three and six, each with a copy of x."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square()
        inverse = torch.rsqrt(square / x.shape[-1] + eps)
        ctx.save_for_backward(x, inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, inverse = ctx.saved_tensors
        return (x * (grad * inverse.pow(3) / -x.shape[-1])).to(x.dtype), None


def inverse_rms(x: Tensor, eps: float, by: Choice = AUTO) -> Tensor:
    """1 / root of the mean square over the last axis, float32: […, n] -> […, 1]."""
    if by.fused(x):
        from .norm_triton import inverse_rms as fused

        return fused(x, eps)
    return applied(_InverseRMS, x, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float, by: Choice = AUTO) -> Tensor:
    """Divide by the root of the mean square and multiply by a weight, in float32: […, n], [n] -> […, n] in x's type.

    eps is added to the mean square, and the weight multiplies in front of the one rounding.
    """
    if by.fused(x, weight):
        from .norm_triton import rms_norm as fused

        return fused(x, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
