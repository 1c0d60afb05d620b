"""`collapse` and `expand` of streams.py in one pass over the streams each way.

A program has one token and all n streams of a piece of its channels: what is summed over streams lies in a
thread's registers, what is summed over channels crosses threads once a piece. Everything is float32 inside and
rounded once, on its way out. Nothing is added up by several programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .direct import applied

PIECE = 1024  # channels of a program: four warps with 16 bytes of bfloat16 a thread


def channels_and_warps(width: int) -> tuple[int, int]:
    """Channels that a program has at a time, and its warps."""
    piece = min(PIECE, triton.next_power_of_2(width))
    return piece, max(1, min(4, piece // 256))


@triton.jit
def _collapse(streams, weights, out, width, N: tl.constexpr, NP: tl.constexpr, PIECE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NP)
    c = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    seen = (i < N)[:, None] & (c < width)[None, :]
    w = tl.load(weights + token * N + i, mask=i < N, other=0.0).to(tl.float32)
    x = tl.load(streams + (token * N + i[:, None]) * width + c[None, :], mask=seen, other=0.0).to(tl.float32)
    total = tl.sum(x * w[:, None], 0)
    tl.store(out + token * width + c, total.to(out.dtype.element_ty), mask=c < width)


@triton.jit
def _collapse_backward(
    streams,
    weights,
    grad,
    grad_streams,
    grad_weights,
    width,
    N: tl.constexpr,
    NP: tl.constexpr,
    PIECE: tl.constexpr,
    SPREAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NP)
    dots = tl.zeros([NP], tl.float32)
    w = tl.zeros([NP], tl.float32)
    if SPREAD:
        w = tl.load(weights + token * N + i, mask=i < N, other=0.0).to(tl.float32)
    for start in range(0, width, PIECE):
        c = start + tl.arange(0, PIECE)
        at = (token * N + i[:, None]) * width + c[None, :]
        seen = (i < N)[:, None] & (c < width)[None, :]
        x = tl.load(streams + at, mask=seen, other=0.0).to(tl.float32)
        g = tl.load(grad + token * width + c, mask=c < width, other=0.0).to(tl.float32)
        dots += tl.sum(x * g[None, :], 1)
        if SPREAD:
            spread = w[:, None] * g[None, :]
            tl.store(grad_streams + at, spread.to(grad_streams.dtype.element_ty), mask=seen)
    tl.store(grad_weights + token * N + i, dots.to(grad_weights.dtype.element_ty), mask=i < N)


@triton.jit
def _expand(output, streams, post, mix, out, width, N: tl.constexpr, NP: tl.constexpr, PIECE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NP)
    c = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    seen = (i < N)[:, None] & (c < width)[None, :]
    x = tl.load(streams + (token * N + i[:, None]) * width + c[None, :], mask=seen, other=0.0).to(tl.float32)
    o = tl.load(output + token * width + c, mask=c < width, other=0.0).to(tl.float32)
    for j in tl.static_range(N):
        column = tl.load(mix + (token * N + i) * N + j, mask=i < N, other=0.0).to(tl.float32)
        total = tl.load(post + token * N + j).to(tl.float32) * o + tl.sum(column[:, None] * x, 0)
        tl.store(out + (token * N + j) * width + c, total.to(out.dtype.element_ty), mask=c < width)


@triton.jit
def _expand_backward(
    grad,
    output,
    streams,
    post,
    mix,
    grad_output,
    grad_streams,
    grad_post,
    grad_mix,
    width,
    N: tl.constexpr,
    NP: tl.constexpr,
    PIECE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, NP)
    pull_post = tl.zeros([NP], tl.float32)
    pull_mix = tl.zeros([NP, NP], tl.float32)
    for start in range(0, width, PIECE):
        c = start + tl.arange(0, PIECE)
        at = (token * N + i[:, None]) * width + c[None, :]
        seen = (i < N)[:, None] & (c < width)[None, :]
        x = tl.load(streams + at, mask=seen, other=0.0).to(tl.float32)
        o = tl.load(output + token * width + c, mask=c < width, other=0.0).to(tl.float32)
        to_output = tl.zeros([PIECE], tl.float32)
        to_streams = tl.zeros([NP, PIECE], tl.float32)
        for j in tl.static_range(N):
            g = tl.load(grad + (token * N + j) * width + c, mask=c < width, other=0.0).to(tl.float32)
            column = tl.load(mix + (token * N + i) * N + j, mask=i < N, other=0.0).to(tl.float32)
            to_output += tl.load(post + token * N + j).to(tl.float32) * g
            to_streams += column[:, None] * g[None, :]
            pull_post += tl.where(i == j, tl.sum(o * g, 0), 0.0)
            pull_mix += tl.where((i == j)[None, :], tl.sum(x * g[None, :], 1)[:, None], 0.0)
        tl.store(grad_output + token * width + c, to_output.to(grad_output.dtype.element_ty), mask=c < width)
        tl.store(grad_streams + at, to_streams.to(grad_streams.dtype.element_ty), mask=seen)
    cells = (token * N + i[:, None]) * N + i[None, :]
    tl.store(grad_post + token * N + i, pull_post.to(grad_post.dtype.element_ty), mask=i < N)
    tl.store(
        grad_mix + cells,
        pull_mix.to(grad_mix.dtype.element_ty),
        mask=(i < N)[:, None] & (i < N)[None, :],
    )


def summed(streams: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of streams: contiguous [T, n, h] and [T, n] -> [T, h] in the streams' type."""
    tokens, count, width = streams.shape
    out = streams.new_empty(tokens, width)
    if out.numel():
        piece, warps = channels_and_warps(width)
        grid = (tokens, triton.cdiv(width, piece))
        _collapse[grid](streams, weights, out, width, count, triton.next_power_of_2(count), piece, num_warps=warps)
    return out


def dots(streams: Tensor, x: Tensor, weights: Tensor | None, kind: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Dot of each stream with x: contiguous [T, n, h], [T, h] -> [T, n] of that type.

    With weights [T, n], in the same pass their product with x, too: the gradient of the streams, [T, n, h].
    """
    tokens, count, width = streams.shape
    found = streams.new_empty((tokens, count), dtype=kind)
    spread = None if weights is None else torch.empty_like(streams)
    if not width:
        found.zero_()
    elif tokens:
        piece, warps = channels_and_warps(width)
        _collapse_backward[(tokens,)](
            streams,
            found if weights is None else weights,
            x,
            streams if spread is None else spread,
            found,
            width,
            count,
            triton.next_power_of_2(count),
            piece,
            weights is not None,
            num_warps=warps,
        )
    return found, spread


class _Collapse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        lead, count = weights.shape[:-1], weights.shape[-1]
        streams, weights = streams.reshape(-1, count, streams.shape[-1] // count).contiguous(), weights.contiguous()
        ctx.save_for_backward(streams, weights)
        return summed(streams, weights).view(*lead, streams.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        streams, weights = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).contiguous()
        to_weights, to_streams = dots(streams, grad, weights, weights.dtype)
        assert to_streams is not None
        return to_streams.view(*weights.shape[:-1], streams.shape[1] * streams.shape[2]), to_weights.view(weights.shape)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, streams: Tensor, post: Tensor, mix: Tensor) -> Tensor:  # type: ignore[override]
        output, streams, post, mix = (t.contiguous() for t in (output, streams, post, mix))
        ctx.save_for_backward(output, streams, post, mix)
        out = torch.empty_like(streams)
        count, width = streams.shape[-2:]
        if out.numel():
            piece, warps = channels_and_warps(width)
            grid = (post.numel() // count, triton.cdiv(width, piece))
            _expand[grid](
                output, streams, post, mix, out, width, count, triton.next_power_of_2(count), piece, num_warps=warps
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        saved = ctx.saved_tensors
        found = tuple(torch.empty_like(t) for t in saved)
        count, width = saved[1].shape[-2:]
        tokens = saved[2].numel() // count
        if tokens:
            piece, warps = channels_and_warps(width)
            _expand_backward[(tokens,)](
                grad.contiguous(),
                *saved,
                *found,
                width,
                count,
                triton.next_power_of_2(count),
                piece,
                num_warps=warps,
            )
        return found


def collapse(streams: Tensor, weights: Tensor) -> Tensor:
    """See streams.py."""
    return applied(_Collapse, streams, weights)


def expand(output: Tensor, streams: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    """See streams.py."""
    return applied(_Expand, output, streams, post, mix)
