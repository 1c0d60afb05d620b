"""A small kernel, for the tests of what compiles kernels."""

import torch
import triton
import triton.language as tl

from dsv4_bridge.mcore.kernels.tiles import dot


@triton.jit
def _gram(x, out, n, WIDE: tl.constexpr):
    at = tl.arange(0, WIDE)
    tile = tl.load(x + at[:, None] * n + at[None, :], mask=(at < n)[:, None] & (at < n)[None, :], other=0.0)
    tl.store(out + at[:, None] * n + at[None, :], dot(tile, tl.trans(tile)), mask=(at < n)[:, None] & (at < n)[None, :])


@triton.jit
def _broken(x, out, WIDE: tl.constexpr):
    at = tl.arange(0, WIDE)
    tl.store(out + at, tl.load(x + at)[:, None])


def gram(x: torch.Tensor, kernel: object = None) -> torch.Tensor:
    out = torch.empty_like(x, dtype=torch.float32)
    _gram[(1,)](x, out, len(x), WIDE=32)
    return out


def broken(x: torch.Tensor) -> None:
    _broken[(1,)](x, x, WIDE=32)


def compilations() -> list:
    return [
        lambda: gram(torch.empty(24, 24, device="meta")),
        lambda: gram(torch.empty(32, 32, device="meta", dtype=torch.bfloat16)),
        lambda: broken(torch.empty(32, device="meta")),
    ]
