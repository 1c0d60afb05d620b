"""Residual streams: mixing, projection, collapse, with backwards that keep little."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .choice import AUTO, Choice
from .direct import applied
from .norm import inverse_rms


class _Sinkhorn(torch.autograd.Function):
    """Alternate column and row normalisation; the backward repeats the forward instead of storing it.

    Computed as [n, n, tokens]: sums over four numbers that lie next to each other are no work for a
    vector unit (measured 3 to 7 times slower).
    """

    @staticmethod
    def forward(ctx, start: Tensor, iterations: int, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(start)
        ctx.iterations, ctx.eps = iterations, eps
        matrix = _tokens_last(start)
        for axis in _axes(iterations):
            matrix.div_(matrix.sum(axis, keepdim=True).add_(eps))
        return _tokens_first(matrix, start.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (start,) = ctx.saved_tensors
        matrix = _tokens_last(start)
        steps = []
        for axis in _axes(ctx.iterations):
            total = matrix.sum(axis, keepdim=True).add_(ctx.eps)
            matrix = matrix / total
            steps.append((axis, matrix, total))
        pull = _tokens_last(grad)
        for axis, normalised, total in reversed(steps):
            pull.sub_((pull * normalised).sum(axis, keepdim=True)).div_(total)
        return _tokens_first(pull, start.shape), None, None


def _tokens_last(matrices: Tensor) -> Tensor:
    """[…, n, n] -> a new [n, n, tokens]."""
    return matrices.reshape(-1, *matrices.shape[-2:]).permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


def _tokens_first(matrices: Tensor, shape: torch.Size) -> Tensor:
    # Contiguous, for a batched product clones strided matrices one by one.
    return matrices.permute(2, 0, 1).reshape(shape).contiguous()


def _axes(iterations: int) -> list[int]:
    return [0] + [1, 0] * (iterations - 1)


def sinkhorn(start: Tensor, iterations: int, eps: float, by: Choice = AUTO) -> Tensor:
    """Make a positive matrix nearly doubly stochastic: columns, then (iterations - 1) times rows and columns.

    Args:
        start: […, n, n] float32, positive.
        iterations: 20 in the released models.
        eps: added to every sum.
        by: torch or Triton.
    """
    if by.fused(start):
        from .mix_triton import sinkhorn as fused

        return fused(start, iterations, eps)
    return applied(_Sinkhorn, start, iterations, eps)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        inverse = inverse_rms(streams, eps)
        # The projection is linear: scaling its few outputs costs less than scaling its input.
        mapped = F.linear(streams.to(weight.dtype), weight).mul_(inverse)
        ctx.save_for_backward(streams, weight, inverse, mapped)
        return mapped

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        streams, weight, inverse, mapped = (t.flatten(0, -2) if t.dim() > 2 else t for t in ctx.saved_tensors)
        grad = grad.reshape(mapped.shape)
        wide, scaled = streams.to(weight.dtype), grad * inverse
        shrink = (grad * mapped).sum(-1, keepdim=True) * inverse.square() / -streams.shape[-1]
        grad_streams = (wide * shrink).addmm_(scaled, weight)
        return grad_streams.to(streams.dtype).view(ctx.saved_tensors[0].shape), scaled.mT @ wide, None


def project(streams: Tensor, weight: Tensor, eps: float, by: Choice = AUTO) -> Tensor:
    """Normed streams times weight^T: [s, b, n*h], [m, n*h] float32 -> [s, b, m] float32."""
    if by.fused(streams, weight):
        from .project_triton import project as fused

        return fused(streams, weight, eps)
    return applied(_Project, streams, weight, eps)


class _Collapse(torch.autograd.Function):
    """[…, n, h], [..., n] -> […, h]."""

    @staticmethod
    def forward(ctx, streams: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(streams, weights)
        return torch.matmul(weights.unsqueeze(-2), streams.to(weights.dtype)).squeeze(-2).to(streams.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        streams, weights = ctx.saved_tensors
        grad = grad.to(weights.dtype)
        grad_streams = (weights.unsqueeze(-1) * grad.unsqueeze(-2)).to(streams.dtype)
        return grad_streams, _dots(streams, grad)


class _Expand(torch.autograd.Function):
    """See `expand`."""

    @staticmethod
    def forward(ctx, output: Tensor, streams: Tensor, post: Tensor, mix: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(output, streams, post, mix)
        mixed = torch.matmul(mix.mT.contiguous(), streams)
        return mixed.addcmul_(post.unsqueeze(-1), output.unsqueeze(-2))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        output, streams, post, mix = ctx.saved_tensors
        grad_output = torch.matmul(post.unsqueeze(-2), grad).squeeze(-2)
        grad_mix = torch.matmul(streams, grad.mT)
        return grad_output, torch.matmul(mix, grad), _dots(grad, output), grad_mix


def _dots(streams: Tensor, x: Tensor) -> Tensor:
    """Dot of each stream with x: […, n, h], […, h] -> […, n] in x's type; a stream at a time, to stay small."""
    return torch.stack([(stream * x).sum(-1) for stream in streams.unbind(-2)], -1)


def collapse(streams: Tensor, weights: Tensor, by: Choice = AUTO) -> Tensor:
    """Weighted sum of the streams, in float32: [s, b, n*h], [s, b, n] -> [s, b, h] in the streams' type."""
    if by.fused(streams, weights):
        from .streams_triton import collapse as fused

        return fused(streams, weights)
    return applied(_Collapse, streams.unflatten(-1, (weights.shape[-1], -1)), weights)


def expand(output: Tensor, streams: Tensor, post: Tensor, mix: Tensor, by: Choice = AUTO) -> Tensor:
    """Stream j = post[j] * output + the sum over i of mix[i, j] * stream i.

    […, h], [..., n, h], [..., n], [..., n, n], all of one type -> […, n, h].
    """
    if by.fused(output, streams, post, mix):
        from .streams_triton import expand as fused

        return fused(output, streams, post, mix)
    return applied(_Expand, output, streams, post, mix)


class MixRule(NamedTuple):
    """The numbers of `mix`.

    Attributes:
        norm_eps: added to the mean square of the streams.
        eps: added to pre, to the softmax and to Sinkhorn's sums.
        iterations: of Sinkhorn.
    """

    norm_eps: float
    eps: float
    iterations: int


def mix(
    streams: Tensor,
    weight: Tensor,
    bias: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    rule: MixRule,
    by: Choice = AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """What stands in front of a sub-layer: the streams' weighted sum, and the weights of what follows it.

    Of the normed streams' projection, n numbers give pre = sigmoid + eps, n give post = 2 sigmoid, and n x n the
    mixing matrix, a softmax by rows + eps made nearly doubly stochastic (technical report 2.2; transformers'
    DeepseekV4HyperConnection).

    Args:
        streams: [s, b, n*h].
        weight: [n*n+2n, n*h] float32.
        bias: [n*n+2n] float32.
        alphas: factors of the three projections, [1] float32 each.
        rule: eps and iterations.
        by: torch or Triton.

    Returns:
        [s, b, h] in the streams' type, post [s, b, n] and mixing matrix [s, b, n, n], both float32.
    """
    n = math.isqrt(len(bias) + 1) - 1
    if by.fused(streams, weight, bias, *alphas):
        from .mix_triton import mix as fused

        return fused(streams, weight, bias, alphas, n, *rule)
    if by.few(streams, weight, bias, *alphas):
        from .mix_few import mix as compiled

        return compiled(streams, weight, bias, alphas, n, rule)
    mapped = project(streams, weight, rule.norm_eps, by)
    pre, post, mixing = mapped.split([n, n, n * n], dim=-1)
    bias_pre, bias_post, bias_mix = bias.split([n, n, n * n])
    alpha_pre, alpha_post, alpha_res = alphas
    pre = torch.sigmoid(pre * alpha_pre + bias_pre) + rule.eps
    post = 2 * torch.sigmoid(post * alpha_post + bias_post)
    mixing = torch.softmax((mixing * alpha_res + bias_mix).unflatten(-1, (n, n)), dim=-1) + rule.eps
    return collapse(streams, pre, by), post, sinkhorn(mixing, rule.iterations, rule.eps, by)
