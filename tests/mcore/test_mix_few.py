"""The mixing of few tokens on a CPU, compiled, is the definition's; nothing else goes through it."""

import math

import pytest
import torch
from torch import Tensor

from dsv4_bridge.mcore.kernels.choice import AUTO, Choice
from dsv4_bridge.mcore.kernels.streams import MixRule, mix

pytestmark = pytest.mark.megatron

TORCH = Choice("torch")
Inputs = tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]


def inputs(shape: tuple[int, ...], n: int, width: int, seed: int, scale: float = 1.0) -> Inputs:
    """Streams [*shape, n * width], weight, bias and alphas; the numbers grow with `scale`."""
    make = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=make)

    size = n * (n + 2)
    alphas = (normal(1), normal(1), normal(1))
    return normal(*shape, n * width), scale * normal(size, n * width), normal(size), alphas


def exact(given: Inputs, rule: MixRule) -> tuple[Tensor, ...]:
    streams, weight, bias, alphas = given
    return mix(streams.double(), weight.double(), bias.double(), tuple(a.double() for a in alphas), rule, TORCH)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_it_is_the_formula(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    batch, n, width = (int(torch.randint(1, high, (), generator=draw)) for high in (17, 6, 90))
    given = inputs((1, batch), n, width, seed, 0.3)
    rule = MixRule(1e-3, 10.0 ** -(seed % 7), 1 + seed % 20)
    for found, wanted in zip(mix(*given, rule), exact(given, rule), strict=True):
        assert found.dtype is torch.float32 and found.shape == wanted.shape
        assert (found - wanted).abs().max() <= 4e-6 * wanted.abs().max()


@torch.no_grad()
def test_bfloat16_streams_are_rounded_once() -> None:
    streams, *rest = inputs((1, 7), 4, 64, 3, 0.1)
    given, rule = (streams.bfloat16(), *rest), MixRule(1e-6, 1e-6, 20)
    found = mix(*given, rule)
    wanted = exact(given, rule)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert (found[0] - wanted[0]).abs().max() <= 2**-8 * wanted[0].abs().max()
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(found[1:], wanted[1:], strict=True))


@torch.no_grad()
def test_numbers_that_overflow_are_what_torch_has() -> None:
    """Sigmoids of 0 and 1, a softmax of one number; zeros, infinities and NaN in the streams."""
    streams, *rest = inputs((1, 6), 4, 16, 5, 1e4)
    streams[0, 1], streams[0, 2, 3], streams[0, 3, 3] = 0, math.inf, math.nan
    for eps in (1e-6, 0.0):
        rule = MixRule(1e-6, eps, 4)
        for found, wanted in zip(mix(streams, *rest, rule), mix(streams, *rest, rule, TORCH), strict=True):
            assert torch.equal(found.isfinite(), wanted.isfinite())
            # A column that is 1e-6 in all rows but for rounding: its shares are no better known than that.
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_many_tokens_gradients_and_other_kernels_have_the_definition() -> None:
    rule = MixRule(1e-6, 1e-6, 4)

    def compiled(given: Inputs, by: Choice = AUTO) -> bool:
        return not all(map(torch.equal, mix(*given, rule, by), mix(*given, rule, TORCH)))

    few, many = inputs((1, 8), 4, 64, 7), inputs((3, 40), 4, 64, 7)
    assert not compiled(few)
    with torch.no_grad():
        assert compiled(few)
        assert not compiled(few, TORCH)
        assert not compiled(many)


@torch.no_grad()
def test_any_strides() -> None:
    streams, weight, bias, alphas = inputs((5, 2), 4, 32, 9, 0.3)
    rule = MixRule(1e-6, 1e-6, 4)
    apart = streams.transpose(0, 1).contiguous().transpose(0, 1)
    loose = weight.mT.contiguous().mT
    for found, wanted in zip(
        mix(apart, loose, bias, alphas, rule), mix(streams, weight, bias, alphas, rule), strict=True
    ):
        assert torch.equal(found, wanted)
