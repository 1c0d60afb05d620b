"""Rotation of pairs of channels."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .choice import AUTO, Choice
from .direct import applied
from .norm import inverse_rms


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the inverse rotation of the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, turn: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(turn)
        return _rotated(x, turn)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (turn,) = ctx.saved_tensors
        return _rotated(grad, turn.conj()), None


def _rotated(x: Tensor, turn: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    moved = out[..., -2 * turn.shape[-1] :]
    if x.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(moved.unflatten(-1, (-1, 2))).mul_(turn)
    else:
        pairs = torch.view_as_complex(moved.float().unflatten(-1, (-1, 2)))
        moved.copy_(torch.view_as_real(pairs.mul_(turn)).flatten(-2))
    return out


def rotate(x: Tensor, turn: Tensor, inverse: bool = False, by: Choice = AUTO) -> Tensor:
    """Rotate the last `2 * turn.shape[-1]` channels of x by pairs (2i, 2i+1), in float32.

    Args:
        x: […, channels], an even number of them.
        turn: broadcastable to […, pairs], complex64.
        inverse: rotate backwards.
        by: torch or Triton.

    Returns:
        The same shape and type as x.
    """
    if by.fused(x):
        from .rotary_triton import rotate as fused

        return fused(x, turn, inverse)
    return applied(_Rotate, x, turn.conj() if inverse else turn)


def norm_rotate(x: Tensor, turn: Tensor, eps: float, by: Choice = AUTO) -> Tensor:
    """Divide x by the root of its mean square over the channels, without a weight, then `rotate` it.

    Args:
        x: […, channels].
        turn: as of `rotate`.
        eps: added to the mean square.
        by: torch or Triton.

    Returns:
        The same shape and type as x.
    """
    if by.fused(x):
        from .rotary_triton import norm_rotate as fused

        return fused(x, turn, eps)
    return rotate(x * inverse_rms(x, eps, by).to(x.dtype), turn, by=by)
