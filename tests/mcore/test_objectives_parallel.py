"""Packed rows, balance, indexer and multi-token prediction at once: real ranks compute what one computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import losses, run_ranks, whole
from reference import draft_spec

from dsv4_bridge import make_toy
from dsv4_bridge.spec.spec import replace_spec

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

SETTINGS: dict[str, Any] = {
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.5,
    "moe_router_bias_update_rate": 0.01,
    "dsa_indexer_loss_coeff": 0.3,
    "dsa_indexer_use_sparse_loss": True,
    "mtp_loss_scaling_factor": 0.3,
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel": {"tp": 2}},
    "ep2": {"parallel": {"ep": 2}},
    "pp2vp2-recompute": {"parallel": {"pp": 2}, "vp": 2, "settings": SETTINGS | FULL},
}
# Weights that are no whole numbers and a micro-batch that learns nothing, over labels and over micro-batches.
DRAFT: dict[str, Any] = {"mtp_loss_scaling_factor": 0.3}
FRACTIONS: dict[str, dict[str, Any]] = {
    "per-token": {"fractions": True, "settings": DRAFT | {"calculate_per_token_loss": True}},
    "per-micro-batch": {"fractions": True, "settings": DRAFT},
}
CUTS: dict[str, dict[str, Any]] = {
    "dp2": {"parallel": {}},
    "tp2": {"parallel": {"tp": 2}},
    "pp2vp2": {"parallel": {"pp": 2}, "vp": 2},
}
RUN: dict[str, Any] = {
    "settings": SETTINGS,
    "boundaries": [[0, 5, 133, 136], [0, 1, 70, 136], [0, 129, 130, 136], [0, 60, 131, 136]],
}


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    spec = replace_spec(draft_spec(), swiglu_limit=5.0, index_topk=5)
    toy: Path = make_toy(tmp_path_factory.mktemp("objectives") / "toy", "Flash", 4, spec=spec, payload="natural")
    action = {"action": "objectives"}
    found = {"one": run_ranks(toy.parent, "one", 1, [action], weights=toy, **RUN)[0]}
    cases = [action | layout for layout in LAYOUTS.values()]
    return found | dict(zip(LAYOUTS, run_ranks(toy.parent, "two", 2, cases, weights=toy, **RUN), strict=True))


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Any]]:
    toy: Path = make_toy(tmp_path_factory.mktemp("weighted") / "toy", "Flash", 4, spec=draft_spec(2), payload="natural")
    action = {"action": "objectives"}
    names = [(cut, kind) for cut in CUTS for kind in FRACTIONS]
    alone = run_ranks(toy.parent, "one", 1, [action | how for how in FRACTIONS.values()], weights=toy, **RUN)
    cases = [action | CUTS[cut] | FRACTIONS[kind] for cut, kind in names]
    found = {("one", kind): results for kind, results in zip(FRACTIONS, alone, strict=True)}
    return found | dict(zip(names, run_ranks(toy.parent, "two", 2, cases, weights=toy, **RUN), strict=True))


@pytest.mark.parametrize("kind", FRACTIONS)
@pytest.mark.parametrize("cut", CUTS)
def test_weighted_draft_losses_equal_one_rank(weighted: dict[tuple[str, str], list[Any]], cut: str, kind: str) -> None:
    one, several = weighted["one", kind], weighted[cut, kind]
    theirs, ours = whole(one, "gradients"), whole(several, "gradients")
    assert set(ours) == set(theirs)
    wrong = {n: float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items() if g.norm() > 1e-7}
    assert sum(n.startswith("mtp.1.") for n in wrong) > 30
    assert {n: e for n, e in wrong.items() if e > 1e-4} == {}
    for rank in several:
        assert rank["metrics"]["mtp_loss"] == pytest.approx(one[0]["metrics"]["mtp_loss"], rel=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_gradients_and_biases_equal_one_rank(stepped: dict[str, list[Any]], name: str) -> None:
    one, cut = stepped["one"], stepped[name]
    assert losses(cut) == pytest.approx(losses(one), rel=1e-5)
    theirs, ours = whole(one, "gradients"), whole(cut, "gradients")
    assert set(ours) == set(theirs)
    wrong = {n: float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items() if g.norm() > 1e-7}
    assert sum(".indexer." in n for n in wrong) == 12  # all of two indexers
    assert {n: e for n, e in wrong.items() if e > 1e-4} == {}
    biases, moved = whole(one, "biases"), whole(cut, "biases")
    assert len(biases) == 4
    assert all(torch.equal(moved[n], bias) for n, bias in biases.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_metrics_are_those_of_one_rank_on_every_rank(stepped: dict[str, list[Any]], name: str) -> None:
    expected = stepped["one"][0]["metrics"]
    assert set(expected) == {"balance_loss", "indexer_loss", "mtp_loss", "expert_load_max", "expert_load_min"}
    assert expected["expert_load_max"] > 1 > expected["expert_load_min"] >= 0
    for rank in stepped[name]:
        assert rank["metrics"] == pytest.approx(expected, rel=1e-5)
        assert rank["again"] == {}
