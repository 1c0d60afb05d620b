"""Triton's hyper-connections against the torch definitions, in both types, and against those in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import DEVICE, TORCH, TRITON, assert_close, values_and_gradients
from torch import Tensor

from dsv4_bridge.mcore.kernels.choice import Choice
from dsv4_bridge.mcore.kernels.project_triton import cut_columns, cut_tokens
from dsv4_bridge.mcore.kernels.streams import MixRule, collapse, expand, mix, project, sinkhorn
from dsv4_bridge.mcore.kernels.streams_triton import channels_and_warps

pytestmark = [pytest.mark.megatron, pytest.mark.kernel]

TYPES = [torch.float32, torch.bfloat16]
# Sums of terms that cancel, as an alpha's gradient is; shares of the largest value otherwise.
EXACT, CANCELLING = 4e-6, 4e-5
Compute = Callable[..., Tensor | tuple[Tensor, ...]]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(DEVICE, dtype)


def as_transposed(x: Tensor) -> Tensor:
    """The same values, in memory with the first two axes exchanged."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def against_float64(make: Callable[[Choice], Compute], tensors: list[Tensor], tolerance: float = EXACT) -> None:
    """float32 by Triton beside the definition in float64, values and every gradient."""
    found = values_and_gradients(make(TRITON), tensors)
    truth = values_and_gradients(make(TORCH), [t.double() for t in tensors])
    assert_close([t.double() for t in found], truth, tolerance)


def against_torch(make: Callable[[Choice], Compute], tensors: list[Tensor], wide: float = EXACT) -> None:
    """Beside the definition in the same types; what both give in float32 within `wide`."""
    found, expected = (values_and_gradients(make(by), tensors) for by in (TRITON, TORCH))
    for one, other in zip(found, expected, strict=True):
        assert_close([one], [other], wide if other.dtype is torch.float32 else None)


def mix_inputs(n: int, width: int, s: int, b: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    outs = n * (n + 2)
    return [
        normal(seed, s, b, n * width, dtype=dtype),
        normal(seed + 1, outs, n * width) * (n * width) ** -0.5,
        normal(seed + 2, outs) * 0.7,
        *(normal(seed + 3 + i, 1) * 0.5 + 0.8 for i in range(3)),
    ]


def mixing(iterations: int, eps: float = 1e-6, norm_eps: float = 1e-6) -> Callable[[Choice], Compute]:
    rule = MixRule(norm_eps, eps, iterations)
    return lambda by: lambda x, weight, bias, *alphas: mix(x, weight, bias, alphas, rule, by)


def expand_inputs(n: int, width: int, s: int, b: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(s, b, width), (s, b, n, width), (s, b, n), (s, b, n, n)]
    return [normal(i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "width", "s", "b"), [(4, 64, 3, 1), (2, 100, 3, 3), (3, 20, 5, 1)])
def test_mix(n: int, width: int, s: int, b: int, dtype: torch.dtype) -> None:
    """n = 3: no power of two, so matrices are padded."""
    against_torch(mixing(4), mix_inputs(n, width, s, b, dtype), CANCELLING)


@pytest.mark.parametrize(("n", "width", "s", "b"), [(4, 64, 3, 3), (4, 512, 9, 1), (2, 100, 35, 1)])
def test_mix_and_the_definition_in_float64(n: int, width: int, s: int, b: int) -> None:
    """Large eps, for where they stand to show; 35 tokens take another tile than few."""
    against_float64(mixing(3, 1e-2, 1e-1), mix_inputs(n, width, s, b, torch.float32, 11), CANCELLING)


def test_mix_of_twenty_iterations() -> None:
    against_float64(mixing(20), mix_inputs(4, 16, 2, 1, torch.float32, 5), CANCELLING)


def test_mix_takes_streams_and_gradients_as_they_lie() -> None:
    inputs = mix_inputs(4, 20, 3, 2, torch.float32)
    inputs[0] = as_transposed(inputs[0])

    def transposed(by: Choice) -> Compute:
        def run(*given: Tensor) -> tuple[Tensor, ...]:
            x, post, mixed = mixing(2)(by)(*given)
            return x.transpose(0, 1), post, mixed.mT.contiguous()

        return run

    against_torch(transposed, inputs, CANCELLING)


def test_mix_with_frozen_weights_gives_streams_their_gradient() -> None:
    x, weight, bias, *alphas = mix_inputs(4, 20, 3, 1, torch.float32)
    grads = []
    for by in (TRITON, TORCH):
        leaf = x.clone().requires_grad_()
        out, _, _ = mix(leaf, weight, bias, tuple(alphas), MixRule(1e-6, 1e-6, 2), by)
        grads += torch.autograd.grad(out.square().sum(), leaf)
    assert_close([grads[0]], [grads[1]], EXACT)


def test_mix_of_what_nothing_is_asked_of() -> None:
    """Only `post` has a gradient: the others flow back as zeros."""
    run = lambda by: lambda *given: mixing(2)(by)(*given)[1]  # noqa: E731
    against_torch(run, mix_inputs(2, 20, 3, 1, torch.float32), CANCELLING)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("outs", "columns", "s", "b"), [(24, 256, 5, 1), (4, 400, 3, 3), (4, 1100, 33, 1), (24, 40, 1, 1)]
)
def test_project(outs: int, columns: int, s: int, b: int, dtype: torch.dtype) -> None:
    x, weight = normal(0, s, b, columns, dtype=dtype), normal(1, outs, columns) * columns**-0.5
    against_torch(lambda by: lambda x, w: project(x, w, 1e-6, by), [x, weight])
    if dtype is torch.float32:
        against_float64(lambda by: lambda x, w: project(x, w, 1e-1, by), [x, weight])


def test_bfloat16_streams_lose_nothing_of_a_float32_weight() -> None:
    """Three bfloat16 products are a float32 one: rounding the weight would be seen at 2^-9."""
    x, weight = normal(0, 4, 1, 256, dtype=torch.bfloat16), normal(1, 24, 256)
    found = project(x, weight, 1e-6, TRITON)
    assert_close([found.double()], [project(x.double(), weight.double(), 1e-6, TORCH)], 1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (5, 2, 2), (9, 3, 3)])
@pytest.mark.parametrize("iterations", [1, 2, 8])
def test_sinkhorn(shape: tuple[int, ...], iterations: int) -> None:
    """Eight iterations are more than one segment of the backward."""
    start = [normal(0, *shape).exp()]
    against_torch(lambda by: lambda m: sinkhorn(m, iterations, 1e-6, by), start, CANCELLING)
    against_float64(lambda by: lambda m: sinkhorn(m, iterations, 1e-1, by), start)


def test_sinkhorn_of_transposed_matrices() -> None:
    start = [normal(0, 3, 4, 4).exp().mT]
    against_torch(lambda by: lambda m: sinkhorn(m, 2, 1e-3, by).mT, start)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("n", "width", "s", "b"), [(4, 64, 3, 1), (2, 100, 3, 3), (4, 512, 1, 1), (4, 1100, 2, 1)])
def test_collapse_and_expand(n: int, width: int, s: int, b: int, dtype: torch.dtype) -> None:
    """1100 channels are more than one piece."""
    x, weights = normal(0, s, b, n * width, dtype=dtype), normal(1, s, b, n)
    against_torch(lambda by: lambda x, w: collapse(x, w, by), [x, weights])
    inputs = expand_inputs(n, width, s, b, dtype)
    against_torch(lambda by: lambda *given: expand(*given, by), inputs)
    if dtype is torch.float32:
        against_float64(lambda by: lambda x, w: collapse(x, w, by), [x, weights])
        against_float64(lambda by: lambda *given: expand(*given, by), inputs)


def test_collapse_and_expand_take_tensors_as_they_lie() -> None:
    inputs = [as_transposed(t) for t in expand_inputs(4, 20, 3, 2, torch.float32)]
    against_torch(lambda by: lambda *given: expand(*given, by).transpose(0, 1), inputs)
    inputs = [as_transposed(normal(0, 3, 2, 80)), as_transposed(normal(1, 3, 2, 4))]
    against_torch(lambda by: lambda x, w: collapse(x, w, by).transpose(0, 1), inputs)


@pytest.mark.parametrize("dtype", TYPES)
def test_no_tokens(dtype: torch.dtype) -> None:
    against_torch(mixing(2), mix_inputs(4, 8, 0, 2, dtype))
    against_torch(lambda by: lambda *given: expand(*given, by), expand_inputs(4, 8, 0, 2, dtype))
    against_torch(lambda by: lambda x, w: collapse(x, w, by), [normal(0, 0, 2, 32, dtype=dtype), normal(1, 0, 2, 4)])
    against_torch(lambda by: lambda x, w: project(x, w, 1e-6, by), [normal(0, 0, 2, 32, dtype=dtype), normal(1, 4, 32)])


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.sampled_from([2, 4]), st.integers(1, 70), st.integers(1, 4), st.integers(1, 3), st.sampled_from(TYPES))
def test_any_sizes(n: int, width: int, s: int, b: int, dtype: torch.dtype) -> None:
    against_torch(mixing(2), mix_inputs(n, width, s, b, dtype, width), 1e-4)
    against_torch(lambda by: lambda *given: expand(*given, by), expand_inputs(n, width, s, b, dtype))


@given(st.integers(1, 1 << 17), st.integers(1, 1 << 15), st.booleans())
def test_cuts_cover_everything_once(tokens: int, columns: int, narrow: bool) -> None:
    for whole, cut, of in (
        (columns, cut_columns(tokens, columns, narrow), 64),
        (tokens, cut_tokens(tokens, columns, narrow), cut_tokens(tokens, columns, narrow).tile),
    ):
        assert cut.size % of == 0
        assert (cut.parts - 1) * cut.size < whole <= cut.parts * cut.size
        assert cut.tile >= 16  # what a product of tiles takes


@given(st.integers(1, 1 << 15))
def test_a_piece_is_a_power_of_two_and_no_wider_than_asked(width: int) -> None:
    piece, warps = channels_and_warps(width)
    assert piece & (piece - 1) == 0
    assert piece <= 1024
    assert piece == 1024 or piece >= width
    assert warps in (1, 2, 4)
