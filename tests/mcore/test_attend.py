"""Attention over a window and blocks, against a softmax over everything with a mask, in float64."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from dsv4_bridge.mcore.kernels import attention as attend_module
from dsv4_bridge.mcore.kernels.attention import Reach, attend
from dsv4_bridge.mcore.kernels.index import best_blocks, index_scores

pytestmark = pytest.mark.megatron

BATCH, HEADS, WIDTH, WINDOW = 2, 3, 16, 9


class Case(NamedTuple):
    """What attention is given: q [b, s, h, d], kv [b, s, d], blocks [b, n, d], chosen [b, s, k], sink [h]."""

    q: torch.Tensor
    kv: torch.Tensor
    blocks: torch.Tensor | None
    chosen: torch.Tensor | None
    sink: torch.Tensor


def case(length: int, ratio: int, topk: int | None) -> Case:
    make = torch.Generator().manual_seed(length + ratio)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    count = length // ratio if ratio else 0
    chosen = None
    if topk is not None and count:
        scores = normal(BATCH, length, count)
        chosen = best_blocks(scores, (torch.arange(length) + 1).unsqueeze(0) // ratio, min(topk, count))
    return Case(
        normal(BATCH, length, HEADS, WIDTH) * 2,
        normal(BATCH, length, WIDTH),
        normal(BATCH, count, WIDTH) if ratio else None,
        chosen,
        normal(HEADS),
    )


def plain(given: Case, ratio: int) -> torch.Tensor:
    """One row of keys for all, one mask, one softmax with the sink as a column that is dropped."""
    length = given.q.shape[1]
    query, token = torch.arange(length)[:, None], torch.arange(length)
    visible = ((token <= query) & (query - token < WINDOW)).expand(BATCH, -1, -1)
    keys = given.kv
    if given.blocks is not None:
        count = given.blocks.shape[1]
        seen = (torch.arange(count) < (query + 1) // ratio).expand(BATCH, -1, -1)
        if given.chosen is not None:
            seen = (given.chosen.unsqueeze(-1) == torch.arange(count)).any(2)
        visible, keys = torch.cat([visible, seen], -1), torch.cat([keys, given.blocks], 1)
    scores = torch.einsum("bshd,bkd->bshk", given.q, keys) / math.sqrt(WIDTH)
    scores = scores.masked_fill(~visible.unsqueeze(2), -math.inf)
    column = given.sink.view(1, 1, -1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return torch.einsum("bshk,bkd->bshd", weights, keys)


def with_gradients(run: Callable[[Case], torch.Tensor], given: Case) -> list[torch.Tensor]:
    """The output, and the gradients of q, kv, blocks and sink under a fixed random pull."""
    inputs = [t for t in (given.q, given.kv, given.blocks, given.sink) if t is not None]
    leaves = iter([t.clone().requires_grad_() for t in inputs])
    q, kv = next(leaves), next(leaves)
    blocks = next(leaves) if given.blocks is not None else None
    sink = next(leaves)
    out = run(Case(q, kv, blocks, given.chosen, sink))
    pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    (out * pull).sum().backward()
    gradients = [t.grad for t in (q, kv, blocks, sink) if t is not None]
    return [out.detach(), *(torch.zeros(()) if g is None else g for g in gradients)]


def off(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(ours, theirs, strict=True)]


CASES = [(1, 4, 2), (3, 4, 2), (8, 4, 2), (50, 0, None), (70, 16, None), (150, 4, 3), (150, 4, 100), (150, 4, None)]


@pytest.mark.parametrize(("length", "ratio", "topk"), CASES)
@pytest.mark.parametrize("chunk", [16, 23, 1000])
def test_values_and_gradients_equal_a_masked_softmax(length: int, ratio: int, topk: int | None, chunk: int) -> None:
    given = case(length, ratio, topk)
    exact = Case(*(t.double() if t is not None and t.is_floating_point() else t for t in given))
    theirs = with_gradients(lambda c: plain(c, ratio), exact)
    ours = with_gradients(lambda c: attend(*c, Reach(WINDOW, ratio, chunk)), given)
    assert all(value <= 2e-6 for value in off(ours, theirs)), off(ours, theirs)


def test_gathering_the_chosen_equals_masking_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the count of blocks each chunk takes one way or the other; here all take either."""
    given, reach = case(150, 4, 3), Reach(WINDOW, 4, 32)
    theirs = with_gradients(lambda c: plain(c, 4), given)
    ways, made = [], []
    part = attend_module._part
    monkeypatch.setattr(attend_module, "_part", lambda *args: made.append(part(*args)) or made[-1])
    for dense in (10**6, 0):
        monkeypatch.setattr(attend_module, "_DENSE", dense)
        made.clear()
        ways.append(with_gradients(lambda c: attend(*c, reach), given))
        assert {p.own is None for p in made} == {dense > 0}
    assert all(value <= 2e-6 for value in off(ways[0], theirs) + off(ways[1], theirs))


def test_a_small_budget_changes_chunks_and_not_values(monkeypatch: pytest.MonkeyPatch) -> None:
    given, reach = case(150, 4, 3), Reach(WINDOW, 4, 128)
    wide = with_gradients(lambda c: attend(*c, reach), given)
    monkeypatch.setattr(attend_module, "_BUDGET", 1)
    narrow = with_gradients(lambda c: attend(*c, reach), given)
    assert all(value <= 2e-6 for value in off(narrow, wide))


@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_a_sink_that_is_nothing_or_everything(sink: float) -> None:
    """Far outside the scores' range: neither overflows, forward or backward."""
    given = case(50, 16, None)._replace(sink=torch.full((HEADS,), sink))
    theirs = with_gradients(lambda c: plain(c, 16), given)
    ours = with_gradients(lambda c: attend(*c, Reach(WINDOW, 16, 16)), given)
    assert all(bool(t.isfinite().all()) for t in ours)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_scores_and_choices_of_the_indexer_are_the_formula() -> None:
    make = torch.Generator().manual_seed(4)
    q, keys = torch.randn((2, 30, 5, 8), generator=make), torch.randn((2, 7, 8), generator=make)
    weights = torch.randn((2, 30, 5), generator=make)
    scores = index_scores(q, keys, weights)
    visible = (torch.arange(30) + 1) // 4
    chosen = best_blocks(scores, visible.unsqueeze(0), 3)
    for b in range(2):
        for t in range(30):
            row = [
                sum(float(weights[b, t, h]) * max(0.0, float(q[b, t, h] @ keys[b, i])) * 8**-0.5 for h in range(5))
                for i in range(7)
            ]
            assert torch.allclose(scores[b, t], torch.tensor(row), atol=1e-5)
            best = sorted(range(int(visible[t])), key=lambda i: -row[i])[:3]
            assert sorted(chosen[b, t].tolist()) == sorted(best + [-1] * (3 - len(best)))
