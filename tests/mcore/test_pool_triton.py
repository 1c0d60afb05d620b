"""Triton's pooling of compressed entries against the torch definition and a plain formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import DEVICE, TORCH, TRITON, assert_close, values_and_gradients
from torch import Tensor

from dsv4_bridge.mcore.kernels import pool_triton
from dsv4_bridge.mcore.kernels.pool import pool
from dsv4_bridge.mcore.kernels.pool_triton import shape_of

pytestmark = [pytest.mark.megatron, pytest.mark.kernel]

TYPES = [torch.float32, torch.bfloat16]
EXACT = 4e-6


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(DEVICE, dtype)


def inputs(
    ratio: int, width: int, tokens: int, batch: int, overlaps: bool, dtype: torch.dtype, scale: float = 1.0
) -> list[Tensor]:
    """As a compressor gives them: [b, s, wide], in memory [s, b, wide]."""
    wide = 2 * width if overlaps else width
    kv, gate = (normal(i, tokens, batch, wide, dtype=dtype).transpose(0, 1) for i in range(2))
    return [kv, gate * scale, normal(2, ratio, wide)]


def plain(kv: Tensor, gate: Tensor, ape: Tensor, ratio: int, overlaps: bool) -> Tensor:
    """An entry at a time."""
    width = kv.shape[-1] // 2 if overlaps else kv.shape[-1]
    entries = []
    for block in range(kv.shape[1] // ratio):
        here = slice(block * ratio, (block + 1) * ratio)
        values, logits = kv[:, here], gate[:, here] + ape
        if overlaps:
            values, logits = values[..., width:], logits[..., width:]
            if block:
                before = slice((block - 1) * ratio, block * ratio)
                values = torch.cat([kv[:, before, :width], values], 1)
                logits = torch.cat([gate[:, before, :width] + ape[:, :width], logits], 1)
        entries.append((logits.softmax(1) * values).sum(1))
    return torch.stack(entries, 1)


def against_torch(given: list[Tensor], ratio: int, overlaps: bool) -> None:
    """The definition rounds weights and products to bfloat16; what it then gives ape in float32 has that error."""
    found, expected = (
        values_and_gradients(lambda *t: pool(*t, ratio, overlaps, by), given)  # noqa: B023
        for by in (TRITON, TORCH)
    )
    assert_close(found, expected, EXACT if given[0].dtype is torch.float32 else 2**-5)


SIZES = [
    (4, 64, 15, 1, True),
    (4, 100, 5, 3, True),
    (128, 40, 259, 1, False),
    (4, 512, 9, 1, True),
    (16, 40, 50, 2, False),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("ratio", "width", "tokens", "batch", "overlaps"), SIZES)
def test_pool(ratio: int, width: int, tokens: int, batch: int, overlaps: bool, dtype: torch.dtype) -> None:
    given = inputs(ratio, width, tokens, batch, overlaps, dtype)
    against_torch(given, ratio, overlaps)
    found = values_and_gradients(lambda *t: pool(*t, ratio, overlaps, TRITON), given)
    truth = values_and_gradients(lambda *t: plain(*t, ratio, overlaps), [t.double() for t in given])
    # Beside float64 there is the rounding of results alone, and the interpreter cuts off instead.
    limit = EXACT if dtype is torch.float32 else 2**-7
    assert_close([t.double() for t in found], truth, limit)


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("tokens", [0, 3, 4, 5])
def test_no_block_or_one(tokens: int, overlaps: bool) -> None:
    against_torch(inputs(4, 20, tokens, 2, overlaps, torch.float32), 4, overlaps)
    against_torch(inputs(4, 20, tokens, 0, overlaps, torch.float32), 4, overlaps)


def test_gates_that_are_far_apart() -> None:
    """A softmax by its highest gate neither overflows nor divides by zero."""
    given = inputs(4, 20, 12, 1, True, torch.float32, scale=1e4)
    against_torch(given, 4, True)


@pytest.mark.parametrize("overlaps", [True, False])
def test_programs_that_have_several_blocks(overlaps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And begin and end in the midst of a row."""
    monkeypatch.setattr(pool_triton, "PROGRAMS", 3)
    against_torch(inputs(2, 5, 9, 3, overlaps, torch.float32), 2, overlaps)


def test_it_reads_what_lies_across() -> None:
    """Batch first, channels first, parts of wider tensors."""
    wide = normal(0, 2, 12, 100)
    across = [wide[..., 10:50], normal(1, 40, 12, 2).permute(2, 1, 0), normal(2, 40, 4).mT]
    leaves = [t.requires_grad_() for t in across]
    pull = normal(3, 2, 3, 20)
    grads = [torch.autograd.grad(pool(*leaves, 4, True, by), leaves, pull) for by in (TRITON, TORCH)]
    assert_close(grads[0], grads[1], EXACT)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.integers(1, 6), st.integers(1, 70), st.integers(0, 14), st.integers(1, 2), st.booleans(), st.sampled_from(TYPES)
)
def test_any_sizes(ratio: int, width: int, tokens: int, batch: int, overlaps: bool, dtype: torch.dtype) -> None:
    against_torch(inputs(ratio, width, tokens, batch, overlaps, dtype), ratio, overlaps)


@given(st.integers(1, 1 << 17), st.integers(1, 256), st.integers(1, 1024))
def test_tiles_are_powers_of_two_and_hold_a_block(tokens: int, ratio: int, width: int) -> None:
    shape = shape_of(tokens, ratio, width)
    assert shape.blocks == tokens // ratio
    assert all(size & (size - 1) == 0 for size in (shape.slots, shape.channels, shape.warps))
    assert shape.slots >= ratio
    assert shape.slots * shape.channels <= 8192
