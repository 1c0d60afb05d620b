"""The indexer's choice by Triton: the same set as `best_blocks` of the same scores, and scores as torch's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import DEVICE, TORCH, TRITON

from dsv4_bridge.mcore.kernels import index_triton
from dsv4_bridge.mcore.kernels.index import IndexTerms, best_blocks, choose_blocks, every_block, index_scores

pytestmark = [pytest.mark.megatron, pytest.mark.kernel]

SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38)


def some_terms(
    batch: int, length: int, heads: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> IndexTerms:
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    shapes = (batch, length, heads, width), (batch, length // 4, width)
    return IndexTerms(*(normal(*shape).to(DEVICE, dtype) for shape in shapes), normal(batch, length, heads).to(DEVICE))


def visible(length: int) -> torch.Tensor:
    return (torch.arange(length, device=DEVICE) + 1) // 4


def expect_best(found: torch.Tensor, scores: torch.Tensor, seen: torch.Tensor) -> None:
    """The set is that of `best_blocks`; the order is ascending, with -1 behind."""
    best = best_blocks(scores, seen.unsqueeze(0), found.shape[-1])
    assert found.dtype == torch.int64
    assert torch.equal(found.sort(-1).values, best.sort(-1).values)
    behind = torch.where(found < 0, scores.shape[-1], found)
    assert torch.equal(behind.sort(-1).values, behind)


SHAPES = [  # batch, length, heads, width, topk
    (2, 70, 8, 32, 5),
    (1, 101, 2, 16, 3),
    (1, 47, 64, 128, 9),
    (2, 75, 3, 24, 17),  # all but one; channels that are no power of two
    (3, 8, 2, 16, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length", "heads", "width", "topk"), SHAPES)
def test_the_choice_is_that_of_its_own_scores(
    batch: int, length: int, heads: int, width: int, topk: int, dtype: torch.dtype
) -> None:
    terms = some_terms(batch, length, heads, width, dtype)
    scores = index_triton.block_scores(terms)
    found = choose_blocks(terms, topk, TRITON)
    assert found.shape == (batch, length, topk)
    expect_best(found, scores, visible(length))
    seen = torch.arange(length // 4, device=DEVICE) < visible(length).unsqueeze(-1)
    assert torch.equal(scores > -math.inf, seen.expand_as(scores))
    theirs = index_scores(*terms)
    largest = theirs.abs().max()
    assert float((scores - theirs)[seen.expand_as(scores)].abs().max()) <= 2e-6 * float(largest)
    # Where torch chooses another block, the two scores differ by rounding.
    for mine, other in zip(
        *(
            theirs.masked_fill(~seen, -math.inf).gather(2, c.clamp(min=0)).sort(-1).values
            for c in (found, choose_blocks(terms, topk, TORCH))
        ),
        strict=True,
    ):
        near = (mine == other) | ((mine - other).abs() <= 1e-5 * largest)
        assert bool(near[topk * 4 :].all())


@pytest.mark.parametrize("kind", ["zero", "equal", "negative", "not finite"])
def test_scores_that_are_equal_or_strange(kind: str) -> None:
    terms = some_terms(1, 90, 2, 16)
    queries, keys, weights = terms
    if kind == "zero":  # relu leaves nothing; a negative weight makes it -0
        keys = keys.abs() * -1
        queries = queries.abs()
    elif kind == "equal":
        keys = keys[:, :3].repeat_interleave(8, 1)[:, : keys.shape[1]]
    elif kind == "negative":
        weights = -weights.abs()
    else:
        keys[0, 3, 0], keys[0, 9, 0], keys[0, 15, 2] = math.nan, math.inf, -math.inf
    terms = IndexTerms(queries, keys, weights)
    scores = index_triton.block_scores(terms)
    if kind == "zero":
        assert not scores[:, -1].any()
    elif kind == "negative":
        assert scores[:, -1].max() <= 0 and scores[:, -1].min() < 0
    elif kind == "not finite":
        theirs = index_scores(*terms)[:, -1]
        assert torch.equal(scores[:, -1].isnan(), theirs.isnan()) and theirs.isnan().any()
        assert torch.equal(scores[:, -1].isinf(), theirs.isinf()) and theirs.isinf().any()
    expect_best(choose_blocks(terms, 4, TRITON), scores, visible(90))


def test_few_blocks_are_all_chosen() -> None:
    for length, topk in ((3, 5), (11, 2), (40, 10)):
        terms = some_terms(2, length, 2, 16)
        assert torch.equal(choose_blocks(terms, topk, TRITON), every_block(length, 2, length // 4, terms.keys.device))


def test_rows_and_chunks_do_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 queries, whose scores are all that is held, choose what one chunk does."""
    terms = some_terms(2, 150, 2, 16)
    whole = choose_blocks(terms, 6, TRITON)
    held: list[int] = []
    select = index_triton.select

    def watched(scores: torch.Tensor, *rest: torch.Tensor) -> None:
        held.append(scores.numel())
        select(scores, *rest)

    monkeypatch.setattr(index_triton, "_SCRATCH", 0)
    monkeypatch.setattr(index_triton, "select", watched)
    assert torch.equal(choose_blocks(terms, 6, TRITON), whole)
    assert len(held) == 3 and max(held) <= 2 * 64 * 37


def test_rows_that_lie_apart() -> None:
    """Queries and weights as the model makes them: a transposed [s, b, …]."""
    terms = some_terms(2, 60, 2, 16)
    apart = IndexTerms(
        terms.queries.transpose(0, 1).contiguous().transpose(0, 1),
        terms.keys,
        terms.weights.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert torch.equal(choose_blocks(apart, 4, TRITON), choose_blocks(terms, 4, TRITON))


def selected(scores: torch.Tensor, seen: torch.Tensor, topk: int, piece: int | None = None) -> torch.Tensor:
    out = torch.full((*scores.shape[:2], topk), -7, dtype=torch.int64, device=DEVICE)
    pieces = {} if piece is None else {"piece": piece}
    index_triton.select(scores, seen.int(), topk, out, **pieces)
    return out


@pytest.mark.parametrize("kind", ["special", "few values", "all differ", "one value"])
def test_selection_is_exact(kind: str) -> None:
    source = torch.Generator().manual_seed(6)
    for n, k, rows in ((1, 1, 3), (5, 5, 7), (9, 4, 16), (33, 8, 16), (300, 64, 6)):
        scores = torch.randn((2, rows, n), generator=source)
        if kind == "special":
            scores = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (2, rows, n), generator=source)]
        elif kind == "few values":
            scores = (scores * 2).round() / 2
        elif kind == "one value":
            scores = scores[..., :1].expand(2, rows, n).contiguous()
        seen = torch.randint(0, n + 1, (rows,), generator=source).to(DEVICE)
        expect_best(selected(scores.to(DEVICE), seen, k), scores.to(DEVICE), seen)


def test_the_real_number_of_blocks_to_choose() -> None:
    source = torch.Generator().manual_seed(2)
    scores = torch.randn((1, 3, 2100), generator=source)
    scores[0, 1] = (scores[0, 1] * 3).round()
    scores[0, 2, ::5] = -0.0
    seen = torch.tensor([2100, 2050, 400], device=DEVICE)
    expect_best(selected(scores.to(DEVICE), seen, 512), scores.to(DEVICE), seen)


def test_a_row_longer_than_a_program_holds() -> None:
    """Pieces of 16 and their winners, again and again: two rounds and three."""
    source = torch.Generator().manual_seed(3)
    for n, k, values in (
        (40, 5, torch.randn((1, 5, 40), generator=source)),
        (90, 8, torch.randint(0, 4, (1, 5, 90), generator=source).float()),
    ):
        seen = torch.tensor([n, n - 1, 17, 3, 0], device=DEVICE)
        expect_best(selected(values.to(DEVICE), seen, k, 16), values.to(DEVICE), seen)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 90), st.integers(1, 12), st.integers(1, 20), st.integers(0, 6), st.integers(0, 99))
def test_any_size(length: int, topk: int, rows: int, spread: int, seed: int) -> None:
    """Blocks of any number, few values or many, choices of any number."""
    source = torch.Generator().manual_seed(seed)
    scores = torch.randint(-spread, spread + 1, (1, rows, length), generator=source).float().to(DEVICE)
    seen = torch.randint(0, length + 1, (rows,), generator=source).to(DEVICE)
    topk = min(topk, length)
    expect_best(selected(scores, seen, topk), scores, seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_fit_what_there_is(dtype: torch.dtype) -> None:
    """Of an H100, an A100, a card of 99 KB; and narrow or wide channels."""
    for shared in (227 << 10, 163 << 10, 99 << 10):
        for width in (16, 128, 512):
            tiles = index_triton.score_tiles(width, dtype, shared)
            bytes_each = 2 if dtype == torch.bfloat16 else 4
            resident = tiles.blocks if tiles.depth == width else tiles.blocks * tiles.stages
            assert bytes_each * tiles.depth * (resident + tiles.stages * tiles.queries) <= shared
            assert width % tiles.depth == 0
