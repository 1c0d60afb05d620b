"""`mix` and `sinkhorn` of streams.py: what a token's few numbers become, and the whole of a hyper-connection's front.

Forward, two passes over the streams: products with the weight and sums of squares; then, pre known, the weighted sum.
Backward, two passes: dots of streams with the gradient of that sum; then the whole gradient of the streams. The
numbers of a token (sigmoids, softmax, Sinkhorn) are computed in registers, and again in the backward: the matrix in
front of an iteration comes from the begin of its segment of five, which costs less than to keep forty matrices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .direct import applied
from .project_triton import Pull, into_streams, mapped_streams, tokens_of_numbers
from .streams_triton import dots, summed

SEGMENT = tl.constexpr(5)


@triton.jit
def _total(matrix, AXIS: tl.constexpr, eps, PADDED: tl.constexpr):
    total = tl.sum(matrix, AXIS, keep_dims=True)
    if PADDED:
        return tl.where(total > 0.0, total + eps, 1.0)
    return total + eps


@triton.jit
def _advance(matrix, count, eps, PADDED: tl.constexpr):
    """So many times rows, then columns."""
    for _ in range(count):
        matrix = matrix / _total(matrix, 2, eps, PADDED)
        matrix = matrix / _total(matrix, 1, eps, PADDED)
    return matrix


@triton.jit
def _doubly(start, eps, ITERATIONS: tl.constexpr, PADDED: tl.constexpr):
    """Sinkhorn of [T, n, n]."""
    return _advance(start / _total(start, 1, eps, PADDED), ITERATIONS - 1, eps, PADDED)


@triton.jit
def _back(pull, before, AXIS: tl.constexpr, eps, PADDED: tl.constexpr):
    """Gradient in front of one normalisation of `before`."""
    total = _total(before, AXIS, eps, PADDED)
    return (pull - tl.sum(pull * (before / total), AXIS, keep_dims=True)) / total


@triton.jit
def _doubly_back(start, pull, eps, ITERATIONS: tl.constexpr, PADDED: tl.constexpr):
    """Gradient of `_doubly`: the matrices in front of each iteration again, from the begin of its segment."""
    first = start / _total(start, 1, eps, PADDED)
    steps = ITERATIONS - 1
    segments = (steps + SEGMENT - 1) // SEGMENT
    for number in range(segments):
        begin = (segments - 1 - number) * SEGMENT
        length = tl.minimum(steps - begin, SEGMENT)
        base = _advance(first, begin, eps, PADDED)
        for done in range(length):
            matrix = _advance(base, length - 1 - done, eps, PADDED)
            pull = _back(pull, matrix / _total(matrix, 2, eps, PADDED), 1, eps, PADDED)
            pull = _back(pull, matrix, 2, eps, PADDED)
    return _back(pull, start, 1, eps, PADDED)


@triton.jit
def _cells(tokens, N: tl.constexpr, NP: tl.constexpr, T: tl.constexpr):
    """Tokens of a program, where their [n, n] lie, and which of them there are."""
    t = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64)
    i = tl.arange(0, NP)
    cells = i[None, :, None] * N + i[None, None, :]
    seen = (t < tokens)[:, None, None] & (i < N)[None, :, None] & (i < N)[None, None, :]
    return t, cells, seen


@triton.jit
def _sinkhorn(start, out, tokens, eps, N: tl.constexpr, NP: tl.constexpr, ITERATIONS: tl.constexpr, T: tl.constexpr):
    t, cells, seen = _cells(tokens, N, NP, T)
    at = t[:, None, None] * (N * N) + cells
    matrix = tl.load(start + at, mask=seen, other=0.0).to(tl.float32)
    matrix = _doubly(tl.where((t < tokens)[:, None, None], matrix, 1.0), eps, ITERATIONS, N < NP)
    tl.store(out + at, matrix.to(out.dtype.element_ty), mask=seen)


@triton.jit
def _sinkhorn_backward(
    start, grad, out, tokens, eps, N: tl.constexpr, NP: tl.constexpr, ITERATIONS: tl.constexpr, T: tl.constexpr
):
    t, cells, seen = _cells(tokens, N, NP, T)
    at = t[:, None, None] * (N * N) + cells
    matrix = tl.load(start + at, mask=seen, other=0.0).to(tl.float32)
    pull = tl.load(grad + at, mask=seen, other=0.0).to(tl.float32)
    pull = _doubly_back(tl.where((t < tokens)[:, None, None], matrix, 1.0), pull, eps, ITERATIONS, N < NP)
    tl.store(out + at, pull.to(out.dtype.element_ty), mask=seen)


@triton.jit
def _softmax(logits, seen):
    """Over the last axis, 0 where there is nothing."""
    high = tl.max(tl.where(seen, logits, float("-inf")), 2, keep_dims=True)
    weights = tl.where(seen, tl.exp(logits - tl.where(high > float("-inf"), high, 0.0)), 0.0)
    total = tl.sum(weights, 2, keep_dims=True)
    return weights / tl.where(total > 0.0, total, 1.0)


@triton.jit
def _numbers(
    mapped,
    bias,
    alpha_pre,
    alpha_post,
    alpha_res,
    pre,
    post,
    mix,
    tokens,
    eps,
    N: tl.constexpr,
    NP: tl.constexpr,
    ITERATIONS: tl.constexpr,
    T: tl.constexpr,
):
    M: tl.constexpr = N * (N + 2)
    t, cells, seen = _cells(tokens, N, NP, T)
    i = tl.arange(0, NP)
    both = (t < tokens)[:, None] & (i < N)[None, :]
    row = mapped + t[:, None] * M + i[None, :]
    first = tl.load(row, mask=both, other=0.0) * tl.load(alpha_pre)
    first += tl.load(bias + i, mask=i < N, other=0.0)[None, :]
    tl.store(pre + t[:, None] * N + i[None, :], tl.sigmoid(first) + eps, mask=both)
    second = tl.load(row + N, mask=both, other=0.0) * tl.load(alpha_post)
    second += tl.load(bias + N + i, mask=i < N, other=0.0)[None, :]
    tl.store(post + t[:, None] * N + i[None, :], 2 * tl.sigmoid(second), mask=both)
    logits = tl.load(mapped + t[:, None, None] * M + 2 * N + cells, mask=seen, other=0.0) * tl.load(alpha_res)
    logits += tl.load(bias + 2 * N + cells, mask=seen, other=0.0)
    start = tl.where(seen, _softmax(logits, seen) + eps, tl.where((t < tokens)[:, None, None], 0.0, 1.0))
    tl.store(mix + t[:, None, None] * (N * N) + cells, _doubly(start, eps, ITERATIONS, N < NP), mask=seen)


@triton.jit
def _numbers_backward(
    mapped,
    inverse,
    bias,
    alpha_pre,
    alpha_post,
    alpha_res,
    grad_pre,
    grad_post,
    grad_mix,
    scaled,
    shrink,
    sums,
    tokens,
    width,
    eps,
    N: tl.constexpr,
    NP: tl.constexpr,
    ITERATIONS: tl.constexpr,
    T: tl.constexpr,
):
    """Gradients of `mapped` times `inverse` and, summed over a program's tokens, of logits and logits x mapped."""
    M: tl.constexpr = N * (N + 2)
    t, cells, seen = _cells(tokens, N, NP, T)
    i = tl.arange(0, NP)
    here = t < tokens
    both = here[:, None] & (i < N)[None, :]
    at = t[:, None] * N + i[None, :]
    row = t[:, None] * M + i[None, :]
    part = tl.program_id(0)
    scale = tl.load(inverse + t, mask=here, other=0.0)
    pulled = tl.zeros([T], tl.float32)
    for half in tl.static_range(2):
        x = tl.load(mapped + row + half * N, mask=both, other=0.0)
        if half == 0:
            alpha, grad = tl.load(alpha_pre), tl.load(grad_pre + at, mask=both, other=0.0)
        else:
            alpha, grad = tl.load(alpha_post), 2 * tl.load(grad_post + at, mask=both, other=0.0)
        gate = tl.sigmoid(x * alpha + tl.load(bias + half * N + i, mask=i < N, other=0.0)[None, :])
        pull = grad * gate * (1 - gate)
        pulled += tl.sum(pull * x, 1) * alpha
        tl.store(scaled + row + half * N, pull * alpha * scale[:, None], mask=both)
        tl.store(sums + part * 2 * M + half * N + i, tl.sum(pull, 0), mask=i < N)
        tl.store(sums + (part * 2 + 1) * M + half * N + i, tl.sum(pull * x, 0), mask=i < N)
    place = t[:, None, None] * M + 2 * N + cells
    x = tl.load(mapped + place, mask=seen, other=0.0)
    alpha = tl.load(alpha_res)
    weights = _softmax(x * alpha + tl.load(bias + 2 * N + cells, mask=seen, other=0.0), seen)
    start = tl.where(seen, weights + eps, tl.where(here[:, None, None], 0.0, 1.0))
    grad = tl.load(grad_mix + t[:, None, None] * (N * N) + cells, mask=seen, other=0.0)
    pull = _doubly_back(start, grad, eps, ITERATIONS, N < NP)
    pull = weights * (pull - tl.sum(pull * weights, 2, keep_dims=True))
    pulled += tl.sum(tl.sum(pull * x, 2), 1) * alpha
    tl.store(scaled + place, pull * alpha * scale[:, None, None], mask=seen)
    tl.store(shrink + t, pulled * scale * scale / -width, mask=here)
    flat = i[:, None] * N + i[None, :]
    square = (i < N)[:, None] & (i < N)[None, :]
    tl.store(sums + part * 2 * M + 2 * N + flat, tl.sum(pull, 0), mask=square)
    tl.store(sums + (part * 2 + 1) * M + 2 * N + flat, tl.sum(pull * x, 0), mask=square)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, start: Tensor, iterations: int, eps: float) -> Tensor:  # type: ignore[override]
        start = start.contiguous()
        ctx.save_for_backward(start)
        ctx.settings = iterations, eps
        return _on_matrices(_sinkhorn, iterations, eps, start)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _on_matrices(_sinkhorn_backward, *ctx.settings, ctx.saved_tensors[0], grad.contiguous()), None, None


def _on_matrices(kernel, iterations: int, eps: float, *given: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    out = torch.empty_like(given[0])
    count = out.shape[-1]
    if out.numel():
        tokens = out.numel() // count**2
        few = tokens_of_numbers(tokens)
        padded = triton.next_power_of_2(count)
        kernel[(triton.cdiv(tokens, few),)](
            *given, out, tokens, eps, count, padded, iterations, few, num_warps=max(1, few // 8)
        )
    return out


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        streams: Tensor,
        weight: Tensor,
        bias: Tensor,
        alpha_pre: Tensor,
        alpha_post: Tensor,
        alpha_res: Tensor,
        count: int,
        norm_eps: float,
        eps: float,
        iterations: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lead, width = streams.shape[:-1], streams.shape[-1] // count
        flat, weight = streams.reshape(-1, streams.shape[-1]).contiguous(), weight.contiguous()
        mapped, inverse = mapped_streams(flat, weight, norm_eps)
        tokens = len(flat)
        pre, post = mapped.new_empty(tokens, count), mapped.new_empty(*lead, count)
        mix = mapped.new_empty(*lead, count, count)
        parameters = bias, alpha_pre, alpha_post, alpha_res
        few, padded = tokens_of_numbers(tokens), triton.next_power_of_2(count)
        if tokens:
            _numbers[(triton.cdiv(tokens, few),)](
                mapped,
                *parameters,
                pre,
                post,
                mix,
                tokens,
                eps,
                count,
                padded,
                iterations,
                few,
                num_warps=max(1, few // 8),
            )
        ctx.save_for_backward(flat, weight, *parameters, mapped, inverse, pre)
        ctx.settings = lead, eps, iterations
        return summed(flat.view(tokens, count, width), pre).view(*lead, width), post, mix

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_post: Tensor, grad_mix: Tensor):  # type: ignore[override]
        flat, weight, *parameters, mapped, inverse, pre = ctx.saved_tensors
        lead, eps, iterations = ctx.settings
        (tokens, count), width = pre.shape, grad.shape[-1]
        grad = grad.reshape(tokens, width).contiguous()
        grad_pre, _ = dots(flat.view(tokens, count, width), grad, None, torch.float32)
        scaled, shrink = torch.empty_like(mapped), torch.empty_like(inverse)
        few, padded = tokens_of_numbers(tokens), triton.next_power_of_2(count)
        programs = triton.cdiv(tokens, few)
        sums = mapped.new_zeros(max(1, programs), 2, mapped.shape[1])
        if tokens:
            _numbers_backward[(programs,)](
                mapped,
                inverse,
                *parameters,
                grad_pre,
                grad_post.contiguous(),
                grad_mix.contiguous(),
                scaled,
                shrink,
                sums,
                tokens,
                count * width,
                eps,
                count,
                padded,
                iterations,
                few,
                num_warps=max(1, few // 8),
            )
        pull = Pull(scaled, shrink, pre, grad)
        to_streams, to_weight = into_streams(flat, weight, pull, ctx.needs_input_grad[1])
        to_bias, to_alphas = sums.sum(0)
        alphas = (part.sum().view(1) for part in to_alphas.split([count, count, count**2]))
        return to_streams.view(*lead, count * width), to_weight, to_bias, *alphas, None, None, None, None


def sinkhorn(start: Tensor, iterations: int, eps: float) -> Tensor:
    """See streams.py."""
    return applied(_Sinkhorn, start, iterations, eps)


def mix(
    streams: Tensor,
    weight: Tensor,
    bias: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    count: int,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See streams.py."""
    return _Mix.apply(streams, weight, bias, *alphas, count, norm_eps, eps, iterations)  # type: ignore[return-value]
