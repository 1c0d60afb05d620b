"""The indexer's objective by Triton against the torch definition in float32: the loss and every gradient."""

from typing import Any, NamedTuple

import pytest
import torch
from kernel_tools import DEVICE, IN_ORDER, TOLERANCE, TORCH, TRITON

from dsv4_bridge.mcore.kernels import block_weights_triton, indexer_loss_triton
from dsv4_bridge.mcore.kernels.attention import Reach
from dsv4_bridge.mcore.kernels.choice import Choice
from dsv4_bridge.mcore.kernels.index import IndexTerms, best_blocks, index_scores
from dsv4_bridge.mcore.kernels.indexer_loss import indexer_loss

pytestmark = [pytest.mark.megatron, pytest.mark.kernel]


class Case(NamedTuple):
    """What the loss is given."""

    terms: IndexTerms
    q: torch.Tensor
    kv: torch.Tensor
    blocks: torch.Tensor
    chosen: torch.Tensor | None
    sink: torch.Tensor
    reach: Reach
    counted: torch.Tensor | None

    def widened(self) -> "Case":
        return self._replace(
            terms=IndexTerms(*(t.float() for t in self.terms)),
            q=self.q.float(),
            kv=self.kv.float(),
            blocks=self.blocks.float(),
        )


class Sizes(NamedTuple):
    """Of a case; `topk` None: all visible blocks."""

    batch: int
    length: int
    index_heads: int
    index_width: int
    heads: int
    width: int
    topk: int | None
    ratio: int = 4
    window: int = 5

    def case(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
        make = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=make).to(DEVICE, dtype)

        batch, length, count = self.batch, self.length, self.length // self.ratio
        terms = IndexTerms(
            normal(batch, length, self.index_heads, self.index_width),
            normal(batch, count, self.index_width),
            normal(batch, length, self.index_heads).float(),
        )
        chosen = None
        if self.topk is not None:
            visible = (torch.arange(length, device=DEVICE)[None] + 1) // self.ratio
            chosen = best_blocks(index_scores(*terms), visible, min(self.topk, count))
        counted = torch.rand((batch, length), generator=make).to(DEVICE) < 0.7
        return Case(
            terms,
            normal(batch, length, self.heads, self.width) * 2,
            normal(batch, length, self.width),
            normal(batch, count, self.width),
            chosen,
            normal(self.heads).float(),
            Reach(self.window, self.ratio, 32),
            counted,
        )


def results(given: Case, by: Choice, over_ranks: Any = None) -> list[torch.Tensor]:
    """Loss, gradients of queries, keys and weights."""
    terms = IndexTerms(*(t.clone().requires_grad_() for t in given.terms))
    loss = indexer_loss(terms, *given[1:], over_ranks, by)
    (loss * 1.7).backward()
    return [loss.detach(), *(t.grad for t in terms if t.grad is not None)]


def expect_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Loss and weights' gradients to float32, whatever queries and keys are; the expected come in float32."""
    assert len(found) == len(expected) == 4
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        limit = 2 * TOLERANCE[one.dtype] * max(1e-6, float(other.abs().max()))
        assert one.shape == other.shape
        assert float((one.float() - other).abs().max()) <= limit, number


CASES = {
    "chosen": Sizes(2, 13, 3, 16, 2, 16, 2),
    "dense": Sizes(2, 14, 8, 32, 8, 32, None),
    "few blocks": Sizes(1, 9, 2, 16, 2, 16, 8),
    "several tiles of chosen": Sizes(1, 35, 2, 16, 3, 16, 34, ratio=1, window=34),
    "several tiles, dense": Sizes(1, 35, 2, 16, 3, 16, None, ratio=1),
    "many heads": Sizes(1, 9, 64, 128, 64, 128, 2),
    "odd channels": Sizes(1, 10, 5, 24, 5, 40, None),
}


BOTH = ("chosen", "dense", "many heads")  # these in bfloat16, too, and added up in order


@pytest.mark.parametrize(
    ("name", "dtype", "by"),
    [
        *((name, torch.float32, TRITON) for name in CASES),
        *((name, torch.bfloat16, TRITON) for name in BOTH),
        *((name, torch.float32, IN_ORDER) for name in BOTH[:2]),
    ],
)
def test_values_and_gradients(name: str, dtype: torch.dtype, by: Choice) -> None:
    given = CASES[name].case(dtype)
    expected = results(given.widened(), TORCH)
    assert all(float(t.abs().max()) > 0 for t in expected)
    found = results(given, by)
    assert [t.dtype for t in found] == [torch.float32, dtype, dtype, torch.float32]
    expect_close(found, expected)


@pytest.mark.parametrize("topk", [2, None])
def test_chunks_change_nothing(topk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 8 queries, and programs that walk over 8: what each query adds in order is the same to the bit."""
    given = Sizes(1, 19, 2, 16, 2, 16, topk).case()._replace(counted=None)
    whole = results(given, IN_ORDER)
    held: list[int] = []
    fill = block_weights_triton.fill_block_weights

    def watched(target: torch.Tensor, *rest: Any) -> None:
        held.append(target.numel())
        fill(target, *rest)

    monkeypatch.setattr(indexer_loss_triton, "_WALK", 8)
    monkeypatch.setattr(indexer_loss_triton, "_SCRATCH", 0)
    monkeypatch.setattr(indexer_loss_triton, "fill_block_weights", watched)
    found = results(given, IN_ORDER)
    assert len(held) == 3 and max(held) <= 8 * 4
    expect_close(found, whole)
    same = [torch.equal(a, b) for a, b in zip(found, whole, strict=True)]
    assert all(same) or (topk is None and same[1] and same[3])


@pytest.mark.parametrize("topk", [2, None])
def test_heads_of_several_ranks(topk: int | None) -> None:
    """The weights of all ranks' heads are summed before they are normalised."""
    given = Sizes(1, 14, 2, 16, 5, 16, topk).case()
    mine, other = (
        given._replace(q=given.q[:, :, part].contiguous(), sink=given.sink[part]) for part in (slice(2), slice(2, 5))
    )
    theirs: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        theirs.append(x.clone())
        return x

    results(other, TRITON, keep)
    assert len(theirs) == 1
    expect_close(results(mine, TRITON, lambda x: x + theirs[0]), results(given, TORCH))


def test_queries_that_choose_nothing_add_nothing() -> None:
    """Rows of -1 alone, and -1 in front of what is chosen."""
    given = Sizes(1, 16, 2, 16, 2, 16, 3).case()
    assert given.chosen is not None
    chosen = given.chosen.clone()
    chosen[:, 9:11] = -1
    chosen[:, 15, 0] = -1
    given = given._replace(chosen=chosen, counted=None)
    found = results(given, TRITON)
    expect_close(found, results(given, TORCH))
    for gradient in (found[1], found[3]):
        assert not gradient[:, 9:11].any() and not gradient[:, :3].any() and gradient[:, 15].any()
    nothing = results(given._replace(chosen=torch.full_like(chosen, -1)), TRITON)
    assert not any(t.any() for t in nothing)


def test_nothing_to_see() -> None:
    for sizes in (Sizes(2, 3, 2, 16, 2, 16, None), Sizes(1, 3, 2, 16, 2, 16, 2)):
        assert not any(t.any() for t in results(sizes.case(), TRITON))


@pytest.mark.parametrize("by", [TRITON, IN_ORDER])
def test_what_is_no_number_is_seen(by: Choice) -> None:
    """In the loss and in every gradient; also where gradients are added up as integers."""
    given = Sizes(1, 9, 2, 16, 2, 16, 2).case()._replace(counted=None)
    given.terms.queries[0, 8, 1, 3] = torch.nan
    loss, queries, keys, weights = results(given, by)
    assert loss.isnan() and queries[0, 8].isnan().any() and keys.isnan().any() and weights[0, 8].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_fit_what_there_is(dtype: torch.dtype) -> None:
    """Of an H100, an A100, a card of 99 KB; the heads of a rank of Flash and Pro."""
    item = 2 if dtype == torch.bfloat16 else 4
    for shared in (227 << 10, 163 << 10, 99 << 10):
        for heads in (1, 8, 64, 128):
            tiles = block_weights_triton.target_tiles(heads, 512, dtype, shared)
            assert item * tiles.depth * (tiles.heads + tiles.stages * tiles.blocks) <= shared
            assert tiles.heads >= 16 and tiles.heads & (tiles.heads - 1) == 0
        for choose in (indexer_loss_triton.divergence_tiles, indexer_loss_triton.walk_tiles):
            tiles = choose(64, 128, dtype, shared)
            held, read = tiles.heads, tiles.blocks
            if choose is indexer_loss_triton.walk_tiles:
                held, read = read, held
            assert tiles.heads == 64 and item * 128 * (held + tiles.stages * read) <= shared
