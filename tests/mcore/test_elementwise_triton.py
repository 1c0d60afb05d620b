"""Triton's norms, rotation and SwiGLU against the torch definitions, in both types, and against float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import DEVICE, TORCH, TRITON, assert_close, values_and_gradients
from torch import Tensor

from dsv4_bridge.mcore.kernels import norm_triton
from dsv4_bridge.mcore.kernels.choice import Choice
from dsv4_bridge.mcore.kernels.grouped import clamped_swiglu
from dsv4_bridge.mcore.kernels.norm import inverse_rms, rms_norm
from dsv4_bridge.mcore.kernels.norm_triton import rows_and_warps
from dsv4_bridge.mcore.kernels.rotary import norm_rotate, rotate
from dsv4_bridge.mcore.kernels.rotary_triton import rows_of

pytestmark = [pytest.mark.megatron, pytest.mark.kernel]

TYPES = [torch.float32, torch.bfloat16]
EXACT = 4e-6
Compute = Callable[..., Tensor | tuple[Tensor, ...]]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(DEVICE, dtype)


def turns(seed: int, *shape: int) -> Tensor:
    """Unit complex numbers."""
    angles = 3 * normal(seed, *shape)
    return torch.complex(angles.cos(), angles.sin())


def against_torch(make: Callable[[Choice], Compute], *tensors: Tensor, narrow: float | None = None) -> None:
    """Values and every gradient beside the definition's, in the same types."""
    found, expected = (values_and_gradients(make(by), tensors) for by in (TRITON, TORCH))
    for one, other in zip(found, expected, strict=True):
        assert_close([one], [other], EXACT if other.dtype is torch.float32 else narrow)


def against_float64(make: Callable[[Choice], Compute], plain: Compute, *tensors: Tensor) -> None:
    """Beside a plain formula in float64."""
    found = values_and_gradients(make(TRITON), tensors)
    truth = values_and_gradients(plain, [t.double() for t in tensors])
    assert_close([t.double() for t in found], truth, EXACT)


def plain_rotation(x: Tensor, turn: Tensor) -> Tensor:
    width = 2 * turn.shape[-1]
    still, moved = x[..., : x.shape[-1] - width], x[..., x.shape[-1] - width :]
    even, odd = moved[..., ::2], moved[..., 1::2]
    cos, sin = turn.real.double(), turn.imag.double()
    return torch.cat([still, torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)], -1)


def plain_norm(x: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps) ** -0.5


# As the layers call them: queries, keys, a step's queries, entries of one row and of all, an indexer's step.
ROTATED = [
    ((3, 2, 5, 64), (3, 1, 1, 8)),
    ((3, 2, 512), (3, 1, 32)),
    ((1, 3, 2, 100), (1, 3, 1, 12)),
    ((2, 3, 64), (3, 16)),
    ((2, 3, 24), (2, 3, 12)),
    ((3, 5, 20), (3, 1, 4)),
    ((7, 20), (4,)),
    ((2, 1, 2, 3, 20), (3, 4)),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("shape", "turn"), ROTATED)
@pytest.mark.parametrize("inverse", [False, True])
def test_rotate(shape: tuple[int, ...], turn: tuple[int, ...], inverse: bool, dtype: torch.dtype) -> None:
    x, turn = normal(0, *shape, dtype=dtype), turns(1, *turn)
    against_torch(lambda by: lambda x: rotate(x, turn, inverse, by), x)
    if dtype is torch.float32:
        way = turn.conj() if inverse else turn
        against_float64(lambda by: lambda x: rotate(x, turn, inverse, by), lambda x: plain_rotation(x, way), x)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("shape", "turn"), ROTATED)
def test_norm_rotate(shape: tuple[int, ...], turn: tuple[int, ...], dtype: torch.dtype) -> None:
    """The definition rounds to bfloat16 three times, the kernel once."""
    x, turn = normal(0, *shape, dtype=dtype), turns(1, *turn)
    against_torch(lambda by: lambda x: norm_rotate(x, turn, 1e-6, by), x, narrow=2**-5)
    if dtype is torch.float32:
        against_float64(
            lambda by: lambda x: norm_rotate(x, turn, 0.5, by),
            lambda x: plain_rotation(plain_norm(x, 0.5), turn),
            x,
        )


def test_rotation_reads_transposed_values_and_gradients_where_they_lie() -> None:
    """What attention gives lies batch first; what flows back into queries does too."""
    x, turn = normal(0, 2, 3, 4, 20).transpose(0, 1), turns(1, 3, 1, 1, 4)
    assert rows_of(x, turn).x.data_ptr() == x.data_ptr()
    against_torch(lambda by: lambda x: rotate(x, turn, by=by).transpose(0, 1), x)
    against_torch(lambda by: lambda x: norm_rotate(x, turn, 1e-6, by).transpose(0, 1), x)
    channels_first = normal(0, 20, 5).mT
    against_torch(lambda by: lambda x: norm_rotate(x, turn[0, 0, 0], 1e-6, by), channels_first)
    against_torch(lambda by: lambda x: rotate(x, turn[0, 0, 0].conj(), by=by), channels_first)


def test_channels_in_front_of_the_pairs_stay_as_they_are() -> None:
    x, turn = normal(0, 5, 30), turns(1, 5, 4)
    assert torch.equal(rotate(x, turn, by=TRITON)[:, :22], x[:, :22])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(3, 2, 64), (5, 100), (2, 3, 5, 512), (2,), (17, 3)])
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = normal(0, *shape, dtype=dtype), normal(1, shape[-1], dtype=dtype)
    against_torch(lambda by: lambda x: inverse_rms(x, 1e-6, by), x)
    against_torch(lambda by: lambda x, w: rms_norm(x, w, 1e-6, by), x, weight)
    if dtype is torch.float32:
        against_float64(
            lambda by: lambda x: inverse_rms(x, 0.5, by), lambda x: (x.square().mean(-1, keepdim=True) + 0.5) ** -0.5, x
        )
        against_float64(lambda by: lambda x, w: rms_norm(x, w, 0.5, by), lambda x, w: plain_norm(x, 0.5) * w, x, weight)


@pytest.mark.parametrize(("rows", "width"), [(13, 2049), (40, 260)])
def test_programs_that_have_several_rows(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_triton, "PARTS", 3)
    x, weight = normal(0, rows, width), normal(1, width)
    against_torch(lambda by: lambda x, w: rms_norm(x, w, 1e-6, by), x, weight)


def test_norms_of_transposed_values_of_mixed_types() -> None:
    x, weight = normal(0, 2, 3, 40, dtype=torch.bfloat16).transpose(0, 1), normal(1, 40)
    against_torch(lambda by: lambda x, w: rms_norm(x, w, 1e-6, by).transpose(0, 1), x, weight)
    against_torch(lambda by: lambda x: inverse_rms(x, 1e-6, by).transpose(0, 1), x)


def test_a_frozen_weight_gets_no_gradient_and_x_its_own() -> None:
    x, weight = normal(0, 5, 40), normal(1, 40)
    against_torch(lambda by: lambda x: rms_norm(x, weight, 1e-6, by), x)


def beside(x: Tensor, limit: float | None) -> Tensor:
    """Not on the limit, where torch's clamp passes a gradient or not, by its version."""
    return x if limit is None else torch.where((x.abs() - limit).abs() < 0.01 * limit, 0.5 * x, x)


def plain_swiglu(x: Tensor, weights: Tensor, limit: float | None) -> Tensor:
    gate, up = x.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate / (1 + (-gate).exp()) * up * weights.unsqueeze(-1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("limit", [None, 0.9, 50.0])
@pytest.mark.parametrize(("rows", "width"), [(3, 64), (5, 100), (1, 512), (2, 1100), (0, 64)])
def test_swiglu(rows: int, width: int, limit: float | None, dtype: torch.dtype) -> None:
    """0.9 clamps a fifth of the gates and a third of the ups; 50 none. The definition rounds after each operation."""
    x, weights = beside(normal(0, rows, 2 * width, dtype=dtype), limit), normal(1, rows).abs()
    found, expected = (
        values_and_gradients(lambda x, w: clamped_swiglu(x, w, limit, by), [x, weights])  # noqa: B023
        for by in (TRITON, TORCH)
    )
    assert_close(found, expected, EXACT if dtype is torch.float32 else 2**-5)
    if dtype is torch.float32:
        against_float64(
            lambda by: lambda x, w: clamped_swiglu(x, w, limit, by), lambda x, w: plain_swiglu(x, w, limit), x, weights
        )


def test_swiglu_at_its_limits_and_far_from_them() -> None:
    """On a limit no gradient passes; far out nothing overflows."""
    gate = torch.tensor([1.0, -80.0, 1e4, 0.0, 2.0, 1.0, 1.0], device=DEVICE)
    up = torch.tensor([-1e4, 1e4, 0.5, 0.0, 1.0, 2.0, -2.0], device=DEVICE)
    x, weights = torch.cat([gate, up]).unsqueeze(0), torch.tensor([0.5], device=DEVICE)
    away = torch.tensor([0, 1, 2, 3, 7, 8, 9, 10], device=DEVICE)
    against_torch(lambda by: lambda x, w: clamped_swiglu(x, w, 2.0, by), x[:, away], weights)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(clamped_swiglu(x, weights, 2.0, TRITON).sum(), x)
    assert (grad[0] == 0).nonzero().flatten().tolist() == [2, 3, 4, 7, 8, 10, 12, 13]


def test_swiglu_of_what_lies_across() -> None:
    x, weights = beside(normal(0, 80, 6).mT, 0.9), normal(1, 6, 2)[:, 0]
    against_torch(lambda by: lambda x, w: clamped_swiglu(x, w, 0.9, by), x, weights)
    x, weights = beside(x.bfloat16(), 0.9), weights.bfloat16()
    against_torch(lambda by: lambda x, w: clamped_swiglu(x, w, 0.9, by), x, weights, narrow=2**-5)


def test_nothing() -> None:
    x, weight, turn = normal(0, 0, 3, 8), normal(1, 8), turns(2, 1, 1, 2)
    against_torch(lambda by: lambda x, w: rms_norm(x, w, 1e-6, by), x, weight)
    against_torch(lambda by: lambda x: inverse_rms(x, 1e-6, by), x)
    against_torch(lambda by: lambda x: rotate(x, turn, by=by), x)
    against_torch(lambda by: lambda x: norm_rotate(x, turn, 1e-6, by), x)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_any_sizes(data: st.DataObject) -> None:
    channels = 2 * data.draw(st.integers(1, 40))
    pairs = data.draw(st.integers(1, channels // 2))
    lead = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shared = [data.draw(st.sampled_from([1, size])) for size in lead]
    dtype = data.draw(st.sampled_from(TYPES))
    x, turn = normal(channels, *lead, channels, dtype=dtype), turns(1, *shared, pairs)
    weight = normal(2, channels)
    against_torch(lambda by: lambda x: norm_rotate(x, turn, 1e-3, by), x, narrow=2**-5)
    against_torch(lambda by: lambda x: rotate(x, turn, True, by), x)
    against_torch(lambda by: lambda x, w: rms_norm(x, w, 1e-3, by), x, weight)
    rows = beside(x.flatten(0, -2), 0.9)
    against_torch(
        lambda by: lambda x, w: clamped_swiglu(x, w, 0.9, by), rows, normal(3, len(rows)).to(dtype), narrow=2**-5
    )


@given(st.integers(1, 1 << 15))
def test_a_program_has_some_rows(width: int) -> None:
    rows, warps = rows_and_warps(width)
    assert rows & (rows - 1) == 0
    assert rows == 1 or rows * width <= 4096
    assert warps in (4, 8)
