"""The indexer's queries over context-parallel ranks: who scores what, and that the choice stays the same."""

from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from reference import small_spec

from dsv4_bridge import BridgeError, make_toy
from dsv4_bridge.mcore.config import model_config
from dsv4_bridge.parallel.rows import segments_of
from dsv4_bridge.planning.index_queries import MODES, Costs, query_costs, spread, work_of
from dsv4_bridge.spec.variants import VARIANTS

FLASH = VARIANTS["Flash"].spec
# Cut by two ranks at 131 or 262, by four at 131, 262 and 393; the last blocks are short.
CASES: dict[str, dict[str, Any]] = {
    "whole rows": {"ends": [0, 524], "batch": 2},
    "documents": {"ends": [0, 100, 470, 524]},
    "many": {"ends": [0, 3, 30, 131, 262, 263, 300, 470, 524]},
    "the long one in front": {"ends": [0, 300, 320, 340, 360, 380, 524]},
    "bf16": {"ends": [0, 60, 524], "settings": {"dtype": "bfloat16"}},
    "at home": {"ends": [0, 100, 470, 524], "queries": "home"},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # One head: a query of negative weight has many best blocks, of score 0.
    spec = small_spec(index_topk=5, index_n_heads=1)
    return make_toy(tmp_path_factory.mktemp("queries") / "toy", "Flash", 4, spec=spec, payload="natural")


@pytest.mark.megatron
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_choose_what_one_rank_chooses(toy: Path, ranks: int) -> None:
    """Sets of blocks; another one where scores differ by rounding alone, and of equal ones the first."""
    base = {"action": "chosen", "parallel": {"cp": ranks}, "batch": 1, "queries": "spread", "seed": 3}
    every = run_ranks(toy.parent, f"chosen{ranks}", ranks, [base | case for case in CASES.values()], weights=toy)
    for name, case, found in zip(CASES, CASES.values(), every, strict=True):
        queries = sum(rank["queries"] for rank in found)
        assert queries == case["ends"][-1] * case.get("batch", 1), name
        assert sum(rank["ties"] for rank in found) > queries // 10, name
        assert sum(rank["other"] for rank in found) <= queries // 100, (name, found)
        assert max(rank["gap"] for rank in found) <= (1e-2 if name == "bf16" else 1e-5), name
        home, level = found[0]["spread"]
        assert (found[0]["sent"] > 0 and level < min(home, 1.05)) == (name != "at home"), (name, home, level)


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_query_is_scored_once_and_the_work_is_level(data: st.DataObject) -> None:
    ranks, size = data.draw(st.integers(1, 9)), data.draw(st.integers(127, 3000))
    bounds = data.draw(st.sets(st.integers(1, ranks * size - 1), max_size=12))
    costs = Costs(data.draw(st.integers(1, 200)), data.draw(st.integers(0, 300)), 100, 10, 10)
    mode = data.draw(st.sampled_from(MODES))
    every = segments_of([slice(*ends) for ends in pairwise([0, *sorted(bounds), ranks * size])], ranks, size)
    found = spread(every, costs, mode)
    tokens: dict[tuple[int, int], int] = {}
    work = [0] * ranks
    for run in found.runs:
        segment = every[run.home][run.segment]
        before = sum(s.size for s in every[run.home][: run.segment])
        assert segment.start <= run.place and run.place + run.size <= segment.start + segment.size
        assert run.first - before == run.place - segment.start and run.size > 0
        for token in range(run.first, run.first + run.size):
            assert tokens.setdefault((run.home, token), run.at) == run.at
        work[run.at] += work_of(run.place, run.size, costs)
    seeing = [(s.start + s.size) // 4 > costs.topk for own in every for s in own]
    assert sum(run.size for run in found.runs) == len(tokens)
    assert len(tokens) == sum(s.size for s, sees in zip((s for own in every for s in own), seeing, strict=True) if sees)
    assert tuple(work) == found.work and sum(found.home) == sum(work) and max(work) <= max(found.home)
    assert list(tokens) == sorted(tokens)
    assert not {run.at for run in found.sent} & {run.home for run in found.sent}
    if mode == "home":
        assert not found.sent and found.work == found.home
    if mode == "spread":
        costliest = max((work_of(run.place + run.size - 1, 1, costs) for run in found.runs), default=0)
        assert max(work) <= sum(work) // ranks + ranks * (costliest + 1)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=8), st.integers(1, 6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_work_is_what_queries_see_one_by_one(sizes: list[int], making: int) -> None:
    costs, place = Costs(1, making, 1, 1, 1), 0
    for size in sizes:
        expected = sum((at + 1) // 4 + making for at in range(place, place + size))
        assert work_of(place, size, costs) == expected
        place += size


@pytest.mark.parametrize(
    ("length", "cp", "sent"), [(1 << 20, 8, True), (1 << 16, 16, True), (4096, 8, False), (2048, 2, False)]
)
def test_queries_are_sent_where_that_pays(length: int, cp: int, sent: bool) -> None:
    every = segments_of([slice(0, length)], cp, length // cp)
    found = spread(every, query_costs(FLASH, 2))
    assert bool(found.sent) == sent
    if sent:
        assert max(found.work) * cp / sum(found.work) < 1.001
        assert max(found.home) * cp / sum(found.home) > 1.7
        assert "saves" in found.reason
    packed = segments_of([slice(at, at + 2000) for at in range(0, 64000, 2000)], 8, 8000)
    assert not spread(packed, query_costs(FLASH, 2)).sent  # no query sees more than index_topk blocks


def test_another_mode_is_refused() -> None:
    with pytest.raises(BridgeError, match="index_queries='near': expected one of auto, home, spread"):
        model_config(small_spec(), index_queries="near")


@pytest.mark.megatron
def test_queries_made_in_pieces_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4_bridge.mcore import build_model
    from dsv4_bridge.mcore.layers import indexer as module
    from dsv4_bridge.mcore.layers.rope import turns

    model = build_model(small_spec(index_topk=5), dtype=torch.float32)
    indexer = next(part for part in model.modules() if isinstance(part, module.Indexer))
    make = torch.Generator().manual_seed(5)
    for parameter in indexer.parameters():
        parameter.data.normal_(generator=make)
    width, low = model.config.hidden_size, model.config.q_lora_rank
    x, qr = (torch.randn(131, 2, size, generator=make) for size in (width, low))
    turn = turns(model.config, 4, torch.arange(131))
    whole = indexer.choose(indexer.terms(x, qr, turn))
    monkeypatch.setattr(module, "_MADE", 25)
    with patch.object(indexer, "choose", wraps=indexer.choose) as choose:
        found = indexer(x, qr, turn)
    assert torch.equal(found.sort(-1).values, whole.sort(-1).values)
    assert [call.args[1] for call in choose.call_args_list] == [0, 25, 50, 75, 100, 125]
