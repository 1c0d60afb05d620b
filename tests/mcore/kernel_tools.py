"""Triton kernels against the torch definitions: devices, choices and tolerances."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv4_bridge.mcore.kernels.choice import Choice
from quick_interpreter import quicken

quicken()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH, TRITON, IN_ORDER = Choice("torch"), Choice("triton"), Choice("triton", deterministic=True)
# Of the largest value. The interpreter cuts a float32 off to bfloat16 instead of rounding it.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6}


def values_and_gradients(
    compute: Callable[..., Tensor | tuple[Tensor, ...]], tensors: Sequence[Tensor], seed: int = 0
) -> list[Tensor]:
    """What `compute` makes of the tensors, then the gradient of each that is floating, of a random weighting."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    results = compute(*inputs)
    outs = [results] if isinstance(results, Tensor) else list(results)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
    wanted = [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(outs, wanted, weights, allow_unused=True)
    return [out.detach() for out in outs] + [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted)]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float | None = None) -> None:
    """Each within a share of the largest value of what is expected."""
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape and one.dtype == other.dtype, number
        limit = TOLERANCE[other.dtype] if tolerance is None else tolerance
        far = (one.double() - other.double()).abs().max() if one.numel() else torch.zeros(())
        assert far <= limit * max(1e-30, float(other.double().abs().max()) if other.numel() else 0), (number, far)
