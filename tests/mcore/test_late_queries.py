"""Kernels on queries that begin in the middle of a document: part by part, what the definitions compute of all.

That is how a context-parallel rank calls them: keys of the window reach in front of the first query, blocks are those
of the whole document.
"""

from itertools import pairwise

import pytest
import torch
from kernel_tools import DEVICE, TORCH, TRITON, values_and_gradients
from torch import Tensor

from dsv4_bridge.mcore.kernels import indexer_loss
from dsv4_bridge.mcore.kernels.attention import Reach, attend
from dsv4_bridge.mcore.kernels.choice import Choice
from dsv4_bridge.mcore.kernels.index import IndexTerms, choose_blocks

pytestmark = [pytest.mark.megatron, pytest.mark.kernel]

LENGTH, CUTS = 37, (0, 9, 10, 25, 37)
WAYS = pytest.mark.parametrize("by", [TORCH, TRITON], ids=["torch", "triton"])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def parts(window: int) -> list[tuple[slice, slice]]:
    """Queries, and the window's keys that they need."""
    return [(slice(low, high), slice(max(0, low - window + 1), high)) for low, high in pairwise(CUTS)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert other.abs().max() > 0, number
        assert (one - other).abs().max() <= 4e-6 * other.abs().max(), number


@WAYS
@pytest.mark.parametrize(
    ("window", "ratio", "topk"), [(7, 0, None), (1, 4, None), (20, 5, None), (7, 4, 3), (50, 4, 6)]
)
def test_attention(window: int, ratio: int, topk: int | None, by: Choice) -> None:
    count = LENGTH // ratio if ratio else 0
    given = [normal(2, LENGTH, 3, 16, seed=1), normal(2, LENGTH, 16, seed=2), normal(3, seed=3)]
    given += [normal(2, count, 16, seed=4)] if ratio else []
    chosen = None
    if topk:
        terms = IndexTerms(normal(2, LENGTH, 2, 16, seed=5), normal(2, count, 16, seed=6), normal(2, LENGTH, 2, seed=7))
        chosen = choose_blocks(terms, topk, TORCH)

    def of_all(q: Tensor, kv: Tensor, sink: Tensor, blocks: Tensor | None = None) -> Tensor:
        return attend(q, kv, blocks, chosen, sink, Reach(window, ratio, 16), TORCH)

    def of_parts(q: Tensor, kv: Tensor, sink: Tensor, blocks: Tensor | None = None) -> Tensor:
        outs = []
        for here, keys in parts(window):
            some = None if blocks is None else blocks[:, : here.stop // ratio]
            own = None if chosen is None else chosen[:, here]
            outs.append(attend(q[:, here], kv[:, keys], some, own, sink, Reach(window, ratio, 16, here.start), by))
        return torch.cat(outs, 1)

    assert_same(values_and_gradients(of_parts, given), values_and_gradients(of_all, given))


@WAYS
@pytest.mark.parametrize("topk", [1, 4, 9])
def test_choice(topk: int, by: Choice) -> None:
    terms = IndexTerms(
        normal(2, LENGTH, 3, 16, seed=1), normal(2, LENGTH // 4, 16, seed=2), normal(2, LENGTH, 3, seed=3)
    )
    expected = choose_blocks(terms, topk, TORCH)
    for here, _ in parts(1):
        count = here.stop // 4
        some = IndexTerms(terms.queries[:, here], terms.keys[:, :count], terms.weights[:, here])
        found = choose_blocks(some, topk, by, here.start)
        wanted = expected[:, here].sort(-1, descending=True).values[..., : found.shape[-1]]
        assert torch.equal(found.sort(-1, descending=True).values, wanted)


@WAYS
@pytest.mark.parametrize("topk", [None, 3])
def test_objective_of_the_indexer(topk: int | None, by: Choice) -> None:
    window, count = 7, LENGTH // 4
    terms = [normal(1, LENGTH, 3, 16, seed=1), normal(1, count, 16, seed=2), normal(1, LENGTH, 3, seed=3)]
    q, kv, blocks, sink = (
        normal(*s, seed=n) for n, s in enumerate([(1, LENGTH, 2, 16), (1, LENGTH, 16), (1, count, 16), (2,)])
    )
    chosen = topk and choose_blocks(IndexTerms(*terms), topk, TORCH)
    counted = normal(1, LENGTH, seed=9) > -0.5

    def of_all(*of: Tensor) -> Tensor:
        reach = Reach(window, 4, 16)
        return indexer_loss.indexer_loss(IndexTerms(*of), q, kv, blocks, chosen, sink, reach, counted, None, TORCH)

    def of_parts(queries: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        total = queries.new_zeros(())
        for here, near in parts(window):
            many = here.stop // 4
            some = IndexTerms(queries[:, here], keys[:, :many], weights[:, here])
            own = None if chosen is None else chosen[:, here]
            given = some, q[:, here], kv[:, near], blocks[:, :many], own, sink, Reach(window, 4, 16, here.start)
            total = total + indexer_loss.indexer_loss(*given, counted[:, here], None, by)
        return total

    assert_same(values_and_gradients(of_parts, terms), values_and_gradients(of_all, terms))
