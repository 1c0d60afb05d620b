"""The choice among very many blocks on a CPU, compiled, is the definition's; shorter rows do not go through it."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4_bridge.mcore.kernels import choice, index, index_long
from dsv4_bridge.mcore.kernels.choice import AUTO, Choice
from dsv4_bridge.mcore.kernels.index import IndexTerms, best_blocks, choose_blocks

pytestmark = pytest.mark.megatron

TORCH = Choice("torch")
SPECIAL = (math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, 2.0, -1.0)


def whole_numbers(batch: int, length: int, count: int, heads: int, width: int, seed: int) -> IndexTerms:
    """Scores in which no sum is rounded where `width` is a power of four, and many are equal."""
    make = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=make).float()

    return IndexTerms(some(batch, length, heads, width), some(batch, count, width), some(batch, length, heads))


def same(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found.sort(-1).values, expected.sort(-1).values)


@given(st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_it_is_the_definition(data: st.DataObject) -> None:
    batch, heads, width = (data.draw(st.integers(1, most)) for most in (3, 4, 6))
    length, topk = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 40))
    first = data.draw(st.integers(0, 5000))
    count = max(topk + 1, (first + length) // 4)
    terms = whole_numbers(batch, length, count, heads, 4**width, data.draw(st.integers(0, 99)))
    with patch.object(choice, "_LONG", 1):
        found = choose_blocks(terms, topk, AUTO, first)
    assert same(found, choose_blocks(terms, topk, TORCH, first))


@pytest.mark.parametrize("seed", range(6))
def test_not_a_number_is_the_best(seed: int) -> None:
    """One channel and head: keys are scores; NaN counts as infinite, and of equal scores those in front are taken."""
    make = torch.Generator().manual_seed(seed)
    count = int(torch.randint(100, 900, (), generator=make))
    scores = torch.randn((1, count, 1), generator=make).abs()
    at = torch.randint(0, count, (40,), generator=make)
    scores[0, at, 0] = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (40,), generator=make)]
    terms = IndexTerms(torch.ones(1, 9, 1, 1), scores, torch.ones(1, 9, 1))
    found = index_long.choose(terms, 30, 4 * count)
    expected = best_blocks(scores.mT.relu().expand(1, 9, count), torch.full((1, 9), count), 30)
    assert same(found, expected)


def test_narrow_types_and_rows_of_any_stride() -> None:
    terms = whole_numbers(2, 70, 333, 3, 16, 1)
    narrow = IndexTerms(terms.queries.bfloat16().transpose(0, 1).contiguous().transpose(0, 1), *terms[1:])
    assert same(index_long.choose(narrow, 5, 1200), choose_blocks(terms, 5, TORCH, 1200))


def test_long_rows_alone_go_through_it() -> None:
    keys = torch.zeros(1, 3, 2)
    assert AUTO.long(1 << 14, keys) and AUTO.long(1 << 18, keys.bfloat16())
    assert not AUTO.long((1 << 14) - 1, keys) and not AUTO.long(1 << 14, keys.double())
    assert not TORCH.long(1 << 18, keys)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_by_groups_are_the_best_of_all(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many columns for each that is wanted: the definition looks at groups first. A stable sort has the same."""
    make = torch.Generator().manual_seed(seed)
    count, topk = (int(torch.randint(1, most, (), generator=make)) for most in (3000, 30))
    scores = torch.randn((2, 7, max(count, topk)), generator=make)
    if seed % 2:
        scores = scores.round()
    if seed % 3 == 0:
        there = torch.rand(scores.shape, generator=make) < 0.03
        scores[there] = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (int(there.sum()),), generator=make)]
    seen = torch.randint(0, scores.shape[-1] + 1, (1 + seed % 2, 7), generator=make)
    hidden = torch.arange(scores.shape[-1]) >= seen.unsqueeze(-1)
    order = scores.nan_to_num(math.inf, math.inf, -math.inf).masked_fill(hidden, -math.inf)
    best = order.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    expected = torch.where(best < seen.unsqueeze(-1), best, -1)
    assert same(best_blocks(scores.clone(), seen, topk), expected)
    for many in (index._MANY, 0):  # a step of decoding: few are looked at one by one
        monkeypatch.setattr(index, "_MANY", many)
        assert same(best_blocks(scores[:, 3:4].clone(), seen[:, 3:4], topk), expected[:, 3:4])
