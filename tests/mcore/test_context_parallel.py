"""Rows cut over context-parallel ranks: real ranks compute what one rank computes.

Documents begin and end before, at and behind the cuts, some over several ranks; shares are no multiples of 4 or 128.
Every kind of layer, one routed by id, two MTP depths. Logits and losses within 1e-5, gradients within 1e-4.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import losses, run_ranks, whole
from reference import draft_spec

from dsv4_bridge import make_toy

pytestmark = pytest.mark.megatron

OBJECTIVES: dict[str, Any] = {
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.5,
    "moe_router_bias_update_rate": 0.01,
    "dsa_indexer_loss_coeff": 0.3,
    "dsa_indexer_use_sparse_loss": True,
    "mtp_loss_scaling_factor": 0.3,
}
PER_TOKEN: dict[str, Any] = {"mtp_loss_scaling_factor": 0.3, "calculate_per_token_loss": True}
DENSE: dict[str, Any] = OBJECTIVES | {"csa_dense_attention": True, "dsa_indexer_use_sparse_loss": False}
FULL: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
# The last document of each is padding. Two ranks cut at 131, four at 131, 262 and 393.
TWO = [[0, 3, 250, 262], [0, 5, 133, 262], [0, 60, 131, 262], [0, 129, 130, 255, 262]]
FOUR = [[0, 100, 420, 524], [0, 131, 262, 520, 524], [0, 7, 390, 393, 524], [0, 1, 2, 515, 524]]
"""Row lengths, the 1-rank case that a cut one must equal, and the ranks."""
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "cp2": (2, "two", {"parallel": {"cp": 2}}),
    "cp2-recompute": (2, "two", {"parallel": {"cp": 2}, "settings": OBJECTIVES | FULL}),
    "cp2-fractions": (2, "fractions", {"parallel": {"cp": 2}}),
    "cp2-per-token": (2, "per-token", {"parallel": {"cp": 2}}),
    "cp2-dense": (2, "dense", {"parallel": {"cp": 2}}),
    "cp2ep2": (2, "two", {"parallel": {"cp": 2, "ep": 2}}),
    "cp4": (4, "four", {"parallel": {"cp": 4}}),
    "cp2tp2": (4, "even", {"parallel": {"cp": 2, "tp": 2}}),
    "cp2pp2": (4, "two", {"parallel": {"cp": 2, "pp": 2}}),
    "cp2dp2": (4, "two", {"parallel": {"cp": 2}}),
    "cp2dp2ep4": (4, "two", {"parallel": {"cp": 2, "ep": 4}}),
    "cp2dp2-fractions": (4, "fractions", {"parallel": {"cp": 2}}),
}
ALONE: dict[str, dict[str, Any]] = {
    "two": {"boundaries": TWO, "settings": OBJECTIVES},
    "even": {"boundaries": [[*ends[:-1], 264] for ends in TWO], "settings": OBJECTIVES},
    "four": {"boundaries": FOUR, "settings": OBJECTIVES},
    "dense": {"boundaries": TWO, "settings": DENSE},
    "fractions": {"boundaries": TWO, "settings": {"mtp_loss_scaling_factor": 0.3}, "fractions": True},
    "per-token": {"boundaries": TWO, "settings": PER_TOKEN, "fractions": True},
}
QUICK = ("cp2", "cp2-per-token")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = draft_spec(2, swiglu_limit=5.0, index_topk=5)
    return make_toy(tmp_path_factory.mktemp("context") / "toy", "Flash", 4, spec=spec, payload="natural")


def ran(toy: Path, tag: str, names: list[str]) -> dict[str, tuple[list[Any], list[Any]]]:
    """What the ranks of each case found, and what one rank did."""
    alone = sorted({CASES[name][1] for name in names})
    objectives = {"action": "objectives"}
    one = run_ranks(toy.parent, f"{tag}1", 1, [objectives | ALONE[kind] for kind in alone], weights=toy)
    expected, found = dict(zip(alone, one, strict=True)), {}
    for world in sorted({CASES[name][0] for name in names}):
        here = [name for name in names if CASES[name][0] == world]
        cases = [objectives | ALONE[CASES[name][1]] | CASES[name][2] for name in here]
        found |= dict(zip(here, run_ranks(toy.parent, f"{tag}{world}", world, cases, weights=toy), strict=True))
    return {name: (found[name], expected[CASES[name][1]]) for name in names}


def assert_equal_one_rank(several: list[Any], one: list[Any]) -> None:
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    theirs, ours = whole(one, "gradients"), whole(several, "gradients")
    assert set(ours) == set(theirs)
    wrong = {n: float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items() if g.norm() > 1e-7}
    assert len(wrong) > 150 and sum(n.startswith("mtp.1.") for n in wrong) > 30
    assert {n: e for n, e in wrong.items() if e > 1e-4} == {}
    biases, moved = whole(one, "biases"), whole(several, "biases")
    assert biases and all(torch.equal(moved[n], bias) for n, bias in biases.items())
    for rank in several:
        assert rank["metrics"] == pytest.approx(one[0]["metrics"], rel=1e-5)


@pytest.fixture(scope="module")
def quick(toy: Path) -> dict[str, tuple[list[Any], list[Any]]]:
    return ran(toy, "quick", list(QUICK))


@pytest.fixture(scope="module")
def slow(toy: Path) -> dict[str, tuple[list[Any], list[Any]]]:
    return ran(toy, "slow", [name for name in CASES if name not in QUICK])


@pytest.mark.parametrize("name", QUICK)
def test_two_ranks_equal_one(quick: dict[str, tuple[list[Any], list[Any]]], name: str) -> None:
    assert_equal_one_rank(*quick[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_ranks_equal_one(slow: dict[str, tuple[list[Any], list[Any]]], name: str) -> None:
    assert_equal_one_rank(*slow[name])
