"""Operations with a backward of their own, against autograd through the plain formula, in float64 and bfloat16."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dsv4_bridge.mcore.kernels.choice import AUTO
from dsv4_bridge.mcore.kernels.norm import inverse_rms
from dsv4_bridge.mcore.kernels.rotary import rotate
from dsv4_bridge.mcore.kernels.streams import collapse, project, sinkhorn
from dsv4_bridge.mcore.layers.hyper_connection import HyperConnection

pytestmark = pytest.mark.megatron

S, B, N, H = 5, 3, 4, 6


class Streams:
    """What `HyperConnection.expand` reads of its module."""

    n = N
    config = SimpleNamespace(kernel_choice=AUTO)


def plain_inverse_rms(x: Tensor) -> Tensor:
    return (x.square().mean(-1, keepdim=True) + 1e-3) ** -0.5


def plain_sinkhorn(matrix: Tensor) -> Tensor:
    matrix = matrix.exp()
    for axis in (-2, -1, -2, -1, -2):
        matrix = matrix / (matrix.sum(axis, keepdim=True) + 1e-3)
    return matrix


def plain_rotation(x: Tensor, sign: float) -> Tensor:
    out = [*x[..., :2].unbind(-1)]
    for pair in range(2):
        a, b = x[..., 2 + 2 * pair], x[..., 3 + 2 * pair]
        angle = sign * ANGLES[:, None, pair]
        out += [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.stack(out, -1)


def turn_of(x: Tensor) -> Tensor:
    kind = torch.complex128 if x.dtype is torch.float64 else torch.complex64
    return torch.polar(torch.ones_like(ANGLES), ANGLES).to(kind)[:, None]


def plain_expand(output: Tensor, streams: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    parts = streams.unflatten(-1, (N, H))
    return (torch.einsum("sbij,sbih->sbjh", mix, parts) + torch.einsum("sbj,sbh->sbjh", post, output)).flatten(-2)


ANGLES = torch.arange(S, dtype=torch.float64)[:, None] * torch.tensor([0.9, 0.2], dtype=torch.float64)
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "inverse_rms": (lambda x: inverse_rms(x, 1e-3), plain_inverse_rms, [(S, B, H)]),
    "sinkhorn": (lambda x: sinkhorn(x.exp(), 3, 1e-3), plain_sinkhorn, [(S, B, N, N)]),
    "sinkhorn, 3": (lambda x: sinkhorn(x.exp(), 3, 1e-3), plain_sinkhorn, [(3, 3)]),
    "rotate": (lambda x: rotate(x, turn_of(x)), lambda x: plain_rotation(x, 1.0), [(S, B, H)]),
    "inverse": (lambda x: rotate(x, turn_of(x), inverse=True), lambda x: plain_rotation(x, -1.0), [(S, B, H)]),
    "project": (
        lambda x, w: project(x, w, 1e-3),
        lambda x, w: torch.einsum("sbh,mh->sbm", x * plain_inverse_rms(x), w),
        [(S, B, N * H), (7, N * H)],
    ),
    "collapse": (
        collapse,
        lambda x, w: torch.einsum("sbnh,sbn->sbh", x.unflatten(-1, (N, H)), w),
        [(S, B, N * H), (S, B, N)],
    ),
    "expand": (
        lambda *given: HyperConnection.expand(Streams, *given),  # type: ignore[arg-type]
        plain_expand,
        [(S, B, H), (S, B, N * H), (S, B, N), (S, B, N, N)],
    ),
}
# What the model keeps in float32 when its activations are bfloat16.
WIDE = {"sinkhorn": (0,), "sinkhorn, 3": (0,), "project": (1,), "collapse": (1,), "expand": (2, 3)}


def run(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The value, and the gradient of every input under a fixed random pull."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    pull = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    (out * pull.to(out.dtype)).sum().backward()
    found = [out.detach(), *(t.grad for t in leaves if t.grad is not None)]
    assert len(found) == 1 + len(inputs)
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_the_formula(name: str, dtype: torch.dtype, tolerance: float) -> None:
    ours, plain, shapes = CASES[name]
    make = torch.Generator().manual_seed(3)
    exact = [torch.randn(shape, dtype=torch.float64, generator=make) for shape in shapes]
    given = [
        t.float() if dtype is torch.bfloat16 and i in WIDE.get(name, ()) else t.to(dtype) for i, t in enumerate(exact)
    ]
    for mine, theirs, like in zip(
        run(ours, given), run(plain, [t.double() for t in given]), [None, *given], strict=True
    ):
        assert like is None or mine.dtype == like.dtype
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()
