"""`project` of streams.py: normed streams times a small float32 weight, and what flows back into both.

One pass over the streams gives products and sums of squares; one pass back gives the whole gradient of the streams,
that of their weighted sum with it (`mix_triton.py`), and over a chunk of tokens that of the weight. Programs that
share a sum write parts of it, and torch adds them up.

bfloat16 streams meet the weight on tensor cores: a float32 is the sum of three bfloat16, so three products are that
of float32. float32 streams are multiplied in float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .direct import applied
from .tiles import dot

COLUMNS = 64
PROGRAMS = 1024  # fill the largest GPUs some times over


class Cut(NamedTuple):
    """How work on [T, K] is cut: tokens a tile, parts of the other axis, and how much of it a part has."""

    tile: int
    parts: int
    size: int


def cut_columns(tokens: int, columns: int, narrow: bool) -> Cut:
    """For sums over columns: few tokens, as in decoding, take more parts. Tiles of float32 are smaller."""
    tile = (64 if narrow else 32) if tokens > 32 else 16
    wanted = max(1, min(triton.cdiv(PROGRAMS // 2, triton.cdiv(tokens, tile)), columns // 512))
    size = triton.cdiv(triton.cdiv(columns, wanted), COLUMNS) * COLUMNS
    return Cut(tile, triton.cdiv(columns, size), size)


def cut_tokens(tokens: int, columns: int, narrow: bool) -> Cut:
    """For sums over tokens: a part costs a sum's memory, so there are no more than fill the GPU.

    Larger tiles than these leave the registers, of an A100 at 64.
    """
    tile = 32 if narrow and tokens > 32 else 16
    wanted = max(1, min(triton.cdiv(PROGRAMS, triton.cdiv(columns, COLUMNS)), tokens // 256))
    size = triton.cdiv(triton.cdiv(tokens, wanted), tile) * tile
    return Cut(tile, triton.cdiv(tokens, size), size)


def tokens_of_numbers(tokens: int) -> int:
    """Tokens of a program that computes with the few numbers each has."""
    return 32 if tokens > 1024 else 8


@triton.jit
def _thirds(x):
    """Three bfloat16 tiles whose sum is a float32 tile."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _products(
    streams,
    weight,
    products,
    squares,
    tokens,
    width,
    size,
    M: tl.constexpr,
    MP: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    NARROW: tl.constexpr,
):
    t = tl.program_id(0) * TILE + tl.arange(0, TILE)
    part = tl.program_id(1)
    m = tl.arange(0, MP)
    here = t < tokens
    rows = streams + t.to(tl.int64)[:, None] * width
    total = tl.zeros([TILE], tl.float32)
    found = tl.zeros([TILE, MP], tl.float32)
    for start in range(part * size, tl.minimum(part * size + size, width), COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        x = tl.load(rows + c[None, :], mask=here[:, None] & (c < width)[None, :], other=0.0)
        w = tl.load(weight + m[None, :] * width + c[:, None], mask=(m < M)[None, :] & (c < width)[:, None], other=0.0)
        w = w.to(tl.float32)
        wide = x.to(tl.float32)
        total += tl.sum(wide * wide, 1)
        if NARROW:
            high, middle, low = _thirds(w)
            found += dot(x, low)
            found += dot(x, middle)
            found += dot(x, high)
        else:
            found += dot(x, w)
    at = part.to(tl.int64) * tokens + t
    tl.store(squares + at, total, mask=here)
    tl.store(products + at[:, None] * M + m[None, :], found, mask=here[:, None] & (m < M)[None, :])


@triton.jit
def _scale(
    products, squares, mapped, inverse, tokens, parts, width, eps, M: tl.constexpr, MP: tl.constexpr, T: tl.constexpr
):
    t = (tl.program_id(0) * T + tl.arange(0, T)).to(tl.int64)
    m = tl.arange(0, MP)
    here = t < tokens
    seen = here[:, None] & (m < M)[None, :]
    total = tl.zeros([T], tl.float32)
    found = tl.zeros([T, MP], tl.float32)
    for part in range(parts):
        at = t + part * tokens
        total += tl.load(squares + at, mask=here, other=0.0)
        found += tl.load(products + at[:, None] * M + m[None, :], mask=seen, other=0.0)
    scale = tl.rsqrt(total / width + eps)
    tl.store(inverse + t, scale, mask=here)
    tl.store(mapped + t[:, None] * M + m[None, :], found * scale[:, None], mask=seen)


@triton.jit
def _streams_backward(
    streams,
    weight,
    scaled,
    shrink,
    pre,
    grad,
    grad_streams,
    parts,
    tokens,
    width,
    size,
    N: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    NARROW: tl.constexpr,
    COLLAPSED: tl.constexpr,
    WEIGHED: tl.constexpr,
):
    """Some columns of one stream, a chunk of tokens: gradients of the streams, and a part of the weight's."""
    stream = tl.program_id(0) % N
    part = tl.program_id(1)
    c = tl.program_id(0) // N * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.arange(0, MP)
    column = stream * width + c
    wide = width * N
    inside = (m < M)[:, None] & (c < width)[None, :]
    w = tl.load(weight + m[:, None] * wide + column[None, :], mask=inside, other=0.0).to(tl.float32)
    to_weight = tl.zeros([COLUMNS, MP], tl.float32)
    for start in range(part * size, tl.minimum(part * size + size, tokens), TILE):
        t = start + tl.arange(0, TILE)
        here = t < tokens
        row = t.to(tl.int64)
        at = row[:, None] * wide + column[None, :]
        seen = here[:, None] & (c < width)[None, :]
        x = tl.load(streams + at, mask=seen, other=0.0)
        g = tl.load(scaled + row[:, None] * M + m[None, :], mask=here[:, None] & (m < M)[None, :], other=0.0)
        back = x.to(tl.float32) * tl.load(shrink + t, mask=here, other=0.0)[:, None]
        if COLLAPSED:
            d = tl.load(grad + row[:, None] * width + c[None, :], mask=seen, other=0.0).to(tl.float32)
            back += d * tl.load(pre + row * N + stream, mask=here, other=0.0)[:, None]
        if NARROW:
            # The gradient is rounded to bfloat16, 2^-9 of it: what is left out here is 2^-16 of a product.
            high, middle, low = _thirds(g)
            w_high = w.to(tl.bfloat16)
            back += dot(middle, w_high)
            back += dot(high, (w - w_high.to(tl.float32)).to(tl.bfloat16))
            back += dot(high, w_high)
            if WEIGHED:
                across = tl.trans(x)
                to_weight += dot(across, low)
                to_weight += dot(across, middle)
                to_weight += dot(across, high)
        else:
            back += dot(g, w)
            if WEIGHED:
                to_weight += dot(tl.trans(x), g)
        tl.store(grad_streams + at, back.to(grad_streams.dtype.element_ty), mask=seen)
    if WEIGHED:
        place = (part.to(tl.int64) * M + m[None, :]) * wide + column[:, None]
        tl.store(parts + place, to_weight, mask=(m < M)[None, :] & (c < width)[:, None])


def mapped_streams(streams: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normed streams [T, K] times weight^T, and the inverse root mean squares: [T, m], [T], float32."""
    (tokens, width), outs = streams.shape, len(weight)
    padded = max(16, triton.next_power_of_2(outs))
    mapped, inverse = (streams.new_empty(shape, dtype=torch.float32) for shape in ((tokens, outs), (tokens,)))
    if tokens:
        narrow = streams.dtype is torch.bfloat16
        tile, parts, size = cut_columns(tokens, width, narrow)
        products = mapped.new_empty(parts, tokens, outs)
        squares = mapped.new_empty(parts, tokens)
        grid = (triton.cdiv(tokens, tile), parts)
        _products[grid](
            streams, weight, products, squares, tokens, width, size, outs, padded, tile, COLUMNS, narrow, num_warps=4
        )
        few = tokens_of_numbers(tokens)
        _scale[(triton.cdiv(tokens, few),)](
            products, squares, mapped, inverse, tokens, parts, width, eps, outs, padded, few, num_warps=2
        )
    return mapped, inverse


class Pull(NamedTuple):
    """What flows back into streams: by their projection, and where they were collapsed, by that."""

    scaled: Tensor  # [T, m], gradient of the projection times the inverse root mean square
    shrink: Tensor  # [T], times a stream: by its norm
    pre: Tensor | None = None  # [T, n]
    grad: Tensor | None = None  # [T, h]


def into_streams(streams: Tensor, weight: Tensor, pull: Pull, weighed: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of streams [T, K] and weight."""
    (tokens, wide), outs = streams.shape, len(weight)
    count = 1 if pull.pre is None else pull.pre.shape[1]
    width = wide // count
    grad_streams = torch.empty_like(streams)
    if not tokens:
        return grad_streams, torch.zeros_like(weight) if weighed else None
    narrow = streams.dtype is torch.bfloat16
    tile, chunks, size = cut_tokens(tokens, wide, narrow)
    parts = weight.new_empty((chunks, *weight.shape) if weighed else (0,), dtype=torch.float32)
    _streams_backward[(triton.cdiv(width, COLUMNS) * count, chunks)](
        streams,
        weight,
        pull.scaled,
        pull.shrink,
        pull.shrink if pull.pre is None else pull.pre,
        streams if pull.grad is None else pull.grad,
        grad_streams,
        parts,
        tokens,
        width,
        size,
        count,
        outs,
        max(16, triton.next_power_of_2(outs)),
        tile,
        COLUMNS,
        narrow,
        pull.pre is not None,
        weighed,
        num_warps=4,
    )
    return grad_streams, parts.sum(0).to(weight.dtype) if weighed else None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, streams: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        flat, weight = streams.reshape(-1, streams.shape[-1]).contiguous(), weight.contiguous()
        mapped, inverse = mapped_streams(flat, weight, eps)
        ctx.save_for_backward(flat, weight, mapped, inverse)
        ctx.shape = streams.shape
        return mapped.view(*streams.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        flat, weight, mapped, inverse = ctx.saved_tensors
        grad = grad.reshape(mapped.shape)
        shrink = (grad * mapped).sum(-1) * inverse.square() / -flat.shape[-1]
        pull = Pull((grad * inverse.unsqueeze(-1)).contiguous(), shrink)
        to_streams, to_weight = into_streams(flat, weight, pull, ctx.needs_input_grad[1])
        return to_streams.view(ctx.shape), to_weight, None


def project(streams: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See streams.py."""
    return applied(_Project, streams, weight, eps)
