"""`rotate` and `norm_rotate` of rotary.py: rows of channels as they lie, whatever the strides in front of them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .direct import applied

ELEMENTS = 4096  # of a program


class Rows(NamedTuple):
    """How rows of x and their turns lie: three axes in front of the channels, the first two maybe of length 1."""

    x: Tensor
    turn: Tensor  # […, pairs, 2] float32, stride 0 where one turn serves many rows
    sizes: tuple[int, int]  # of the second and the third axis
    strides: tuple[int, ...]  # of x, then of the turns


def rows_of(x: Tensor, turn: Tensor) -> Rows:
    """As few copies as strides of three axes allow: none for what the layers give."""
    turn = torch.view_as_real(turn.resolve_conj())
    if x.dim() > 4:
        turn = turn.expand(*x.shape[:-1], *turn.shape[-2:]).flatten(0, -4)
        x = x.flatten(0, -3)
    while x.dim() < 4:
        x = x.unsqueeze(0)
    if x.stride(-1) != 1:
        x = x.contiguous()
    turn = turn.expand(*x.shape[:-1], *turn.shape[-2:])
    if turn.stride(-1) != 1 or turn.stride(-2) != 2:
        turn = turn.contiguous()
    return Rows(x, turn, (x.shape[1], x.shape[2]), (*x.stride()[:3], *turn.stride()[:3]))


def rows_a_program(channels: int) -> int:
    """Rows of a program, of so many channels."""
    return max(1, min(16, ELEMENTS // triton.next_power_of_2(channels)))


@triton.jit
def _where(rows, second, third, sa, sb, sc, R: tl.constexpr):
    """Rows of a program, which there are, and where they begin."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    first = (r // (second * third)).to(tl.int64)
    return r, r < rows, first * sa + (r // third % second).to(tl.int64) * sb + (r % third).to(tl.int64) * sc


@triton.jit
def _load(x, at, here, STILL: tl.constexpr, PAIRS: tl.constexpr, P: tl.constexpr, H: tl.constexpr, R: tl.constexpr):
    """Rows in float32: channels that stay [R, P], and the two of each pair [R, H]."""
    c, k = tl.arange(0, P), tl.arange(0, 2 * H)
    still = tl.load(x + at[:, None] + c[None, :], mask=here[:, None] & (c < STILL)[None, :], other=0.0)
    place = x + at[:, None] + STILL + k[None, :]
    pairs = tl.load(place, mask=here[:, None] & (k < 2 * PAIRS)[None, :], other=0.0)
    even, odd = tl.split(tl.reshape(pairs.to(tl.float32), (R, H, 2)))
    return still.to(tl.float32), even, odd


@triton.jit
def _store(
    out,
    r,
    here,
    still,
    even,
    odd,
    STILL: tl.constexpr,
    PAIRS: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
):
    """The same back, into rows one behind the other."""
    c, k = tl.arange(0, P), tl.arange(0, 2 * H)
    row = out + r.to(tl.int64)[:, None] * (STILL + 2 * PAIRS)
    kind = out.dtype.element_ty
    tl.store(row + c[None, :], still.to(kind), mask=here[:, None] & (c < STILL)[None, :])
    pairs = tl.reshape(tl.join(even, odd), (R, 2 * H)).to(kind)
    tl.store(row + STILL + k[None, :], pairs, mask=here[:, None] & (k < 2 * PAIRS)[None, :])


@triton.jit
def _turned(even, odd, turn, at, here, BACK: tl.constexpr, PAIRS: tl.constexpr, H: tl.constexpr):
    k = tl.arange(0, H)
    seen = here[:, None] & (k < PAIRS)[None, :]
    place = turn + at[:, None] + 2 * k[None, :]
    cos = tl.load(place, mask=seen, other=0.0)
    sin = tl.load(place + 1, mask=seen, other=0.0)
    if BACK:
        sin = -sin
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def _dots(still, even, odd, other_still, other_even, other_odd):
    """Dots of rows."""
    return tl.sum(still * other_still, 1) + tl.sum(even * other_even, 1) + tl.sum(odd * other_odd, 1)


@triton.jit
def _rotate(
    x,
    turn,
    out,
    rows,
    second,
    third,
    xa,
    xb,
    xc,
    ta,
    tb,
    tc,
    eps,
    BACK: tl.constexpr,
    NORMED: tl.constexpr,
    STILL: tl.constexpr,
    PAIRS: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
):
    r, here, at = _where(rows, second, third, xa, xb, xc, R)
    still, even, odd = _load(x, at, here, STILL, PAIRS, P, H, R)
    if NORMED:
        square = _dots(still, even, odd, still, even, odd)
        inverse = tl.rsqrt(square / (STILL + 2 * PAIRS) + eps)[:, None]
        still, even, odd = still * inverse, even * inverse, odd * inverse
    _, _, at = _where(rows, second, third, ta, tb, tc, R)
    even, odd = _turned(even, odd, turn, at, here, BACK, PAIRS, H)
    _store(out, r, here, still, even, odd, STILL, PAIRS, P, H, R)


@triton.jit
def _norm_rotate_backward(
    grad,
    turn,
    x,
    out,
    rows,
    second,
    third,
    ga,
    gb,
    gc,
    ta,
    tb,
    tc,
    xa,
    xb,
    xc,
    eps,
    STILL: tl.constexpr,
    PAIRS: tl.constexpr,
    P: tl.constexpr,
    H: tl.constexpr,
    R: tl.constexpr,
):
    r, here, at = _where(rows, second, third, ga, gb, gc, R)
    pull, pull_even, pull_odd = _load(grad, at, here, STILL, PAIRS, P, H, R)
    _, _, at = _where(rows, second, third, ta, tb, tc, R)
    pull_even, pull_odd = _turned(pull_even, pull_odd, turn, at, here, True, PAIRS, H)
    _, _, at = _where(rows, second, third, xa, xb, xc, R)
    still, even, odd = _load(x, at, here, STILL, PAIRS, P, H, R)
    inverse = tl.rsqrt(_dots(still, even, odd, still, even, odd) / (STILL + 2 * PAIRS) + eps)
    dot = _dots(still, even, odd, pull, pull_even, pull_odd)
    shrink = (dot * inverse * inverse / (STILL + 2 * PAIRS))[:, None]
    scale = inverse[:, None]
    pull = (pull - still * shrink) * scale
    pull_even = (pull_even - even * shrink) * scale
    pull_odd = (pull_odd - odd * shrink) * scale
    _store(out, r, here, pull, pull_even, pull_odd, STILL, PAIRS, P, H, R)


def _sizes(x: Tensor, turn: Tensor) -> tuple[int, int, int, int, int]:
    """Channels that stay, pairs, both as powers of two, rows of a program."""
    pairs = turn.shape[-2]
    still = x.shape[-1] - 2 * pairs
    return (
        still,
        pairs,
        triton.next_power_of_2(max(1, still)),
        triton.next_power_of_2(pairs),
        rows_a_program(x.shape[-1]),
    )


def _turn(given: Tensor, turn: Tensor, back: bool, eps: float | None = None) -> Tensor:
    out = torch.empty(given.shape, dtype=given.dtype, device=given.device)
    if out.numel():
        x, turn, sizes, strides = rows_of(given, turn)
        rows, fixed = x.numel() // x.shape[-1], _sizes(x, turn)
        grid = (triton.cdiv(rows, fixed[-1]),)
        normed = eps is not None
        _rotate[grid](x, turn, out, rows, *sizes, *strides, eps or 0.0, back, normed, *fixed, num_warps=4)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, turn: Tensor, inverse: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(turn)
        ctx.inverse = inverse
        return _turn(x, turn, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _turn(grad, ctx.saved_tensors[0], not ctx.inverse), None, None


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, turn: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, turn)
        ctx.eps = eps
        return _turn(x, turn, False, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, turn = ctx.saved_tensors
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if out.numel():
            pull, real, sizes, strides = rows_of(grad, turn)
            held = rows_of(x, turn)
            rows, fixed = pull.numel() // pull.shape[-1], _sizes(pull, real)
            grid = (triton.cdiv(rows, fixed[-1]),)
            _norm_rotate_backward[grid](
                pull, real, held.x, out, rows, *sizes, *strides, *held.strides[:3], ctx.eps, *fixed, num_warps=4
            )
        return out, None, None


def rotate(x: Tensor, turn: Tensor, inverse: bool) -> Tensor:
    """See rotary.py."""
    return applied(_Rotate, x, turn, inverse)


def norm_rotate(x: Tensor, turn: Tensor, eps: float) -> Tensor:
    """See rotary.py."""
    return applied(_NormRotate, x, turn, eps)
