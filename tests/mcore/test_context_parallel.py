"""Rows cut over context-parallel ranks: real ranks compute what one rank computes.

Documents begin and end before, at and behind the cuts, some over several ranks; shares are no multiples of 4 or 128.
Every kind of layer, one routed by id, two MTP depths. Logits and losses within 1e-5, gradients within 1e-4.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from context_bugs import BUGS
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import losses, run_ranks, whole, with_scales
from reference import draft_spec

from dsv4_bridge import BridgeError, make_toy
from dsv4_bridge.mcore.layers.context import share_of
from dsv4_bridge.mcore.schedule import Batch, cut
from dsv4_bridge.parallel.topology import Sizes, check_rows, least_share
from dsv4_bridge.planning.index_queries import query_costs
from dsv4_bridge.spec.variants import VARIANTS

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
PLAIN: dict[str, Any] = {"mtp_loss_scaling_factor": 0.3}
SPREAD: dict[str, Any] = {"index_queries": "spread"}
DENSE: dict[str, Any] = OBJECTIVES | {"csa_dense_attention": True, "dsa_indexer_use_sparse_loss": False}
FULL: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
# The last document of each is padding. Two ranks cut at 131, four at 131, 262 and 393.
TWO = [[0, 3, 250, 262], [0, 5, 133, 262], [0, 60, 131, 262], [0, 129, 130, 255, 262]]
FOUR = [[0, 100, 420, 524], [0, 131, 262, 520, 524], [0, 7, 390, 393, 524], [0, 1, 2, 515, 524]]
# Processes, the case of one rank that they must equal, and how they are cut.
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "few": (2, "few", {"parallel": {"cp": 2}}),
    "few-per-token": (2, "few-per-token", {"parallel": {"cp": 2}, "settings": PER_TOKEN | SPREAD}),
    "cp2": (2, "two", {"parallel": {"cp": 2}}),
    "cp2-recompute": (2, "two", {"parallel": {"cp": 2}, "settings": OBJECTIVES | FULL}),
    "cp2-chunks": (2, "two", {"parallel": {"cp": 2}, "settings": OBJECTIVES | {"loss_chunk": 50}}),
    "cp2tp2-chunks": (4, "even", {"parallel": {"cp": 2, "tp": 2}, "settings": OBJECTIVES | {"loss_chunk": 50}}),
    "cp2-fractions": (2, "fractions", {"parallel": {"cp": 2}}),
    "cp2-per-token": (2, "per-token", {"parallel": {"cp": 2}}),
    "cp2-spread-recompute": (2, "per-token", {"parallel": {"cp": 2}, "settings": PER_TOKEN | SPREAD | FULL}),
    "cp2-spread-objective": (2, "two", {"parallel": {"cp": 2}, "settings": OBJECTIVES | SPREAD | FULL}),
    "cp4-spread": (4, "four-plain", {"parallel": {"cp": 4}, "settings": PLAIN | SPREAD}),
    "cp2tp2-spread": (4, "even-plain", {"parallel": {"cp": 2, "tp": 2}, "settings": PLAIN | SPREAD}),
    "cp2-dense": (2, "dense", {"parallel": {"cp": 2}}),
    "cp2ep2": (2, "two", {"parallel": {"cp": 2, "ep": 2}}),
    "cp4": (4, "four", {"parallel": {"cp": 4}}),
    "cp2tp2": (4, "even", {"parallel": {"cp": 2, "tp": 2}}),
    "cp2tp2-whole-logits": (4, "even", {"parallel": {"cp": 2, "tp": 2}, "settings": OBJECTIVES | {"loss_chunk": 0}}),
    "cp2pp2vp2": (4, "two", {"parallel": {"cp": 2, "pp": 2}, "vp": 2}),
    "cp2pp2vp2-spread": (4, "per-token", {"parallel": {"cp": 2, "pp": 2}, "vp": 2, "settings": PER_TOKEN | SPREAD}),
    "cp2pp2": (4, "two", {"parallel": {"cp": 2, "pp": 2}}),
    "cp2dp2": (4, "two", {"parallel": {"cp": 2}}),
    "cp2dp2ep4": (4, "two", {"parallel": {"cp": 2, "ep": 4}}),
    "cp2dp2-fractions": (4, "fractions", {"parallel": {"cp": 2}}),
}
ALONE: dict[str, dict[str, Any]] = {
    "few": {"boundaries": TWO[:2], "settings": OBJECTIVES},
    "few-per-token": {"boundaries": TWO[::3], "settings": PER_TOKEN, "fractions": True},
    "two": {"boundaries": TWO, "settings": OBJECTIVES},
    "even": {"boundaries": [[*ends[:-1], 264] for ends in TWO], "settings": OBJECTIVES},
    "four": {"boundaries": FOUR, "settings": OBJECTIVES},
    "even-plain": {"boundaries": [[*ends[:-1], 264] for ends in TWO], "settings": PLAIN},
    "four-plain": {"boundaries": FOUR, "settings": PLAIN},
    "dense": {"boundaries": TWO, "settings": DENSE},
    "fractions": {"boundaries": TWO, "settings": PLAIN, "fractions": True},
    "per-token": {"boundaries": TWO, "settings": PER_TOKEN, "fractions": True},
}
QUICK = ("few", "few-per-token")
COSTS = query_costs(VARIANTS["Flash"].spec, 2)
ROWS: dict[str, Any] = {"batch": 2, "length": 262}


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


def logits(toy: Path, parallel: dict[str, int], ends: list[int] | None = None, **settings: Any) -> torch.Tensor:
    """Of whole rows, put together from the shares of the context-parallel ranks."""
    world = parallel.get("cp", 1) * parallel.get("tp", 1)
    shape = ROWS if ends is None else {"batch": 1, "length": ends[-1]}
    case = {"action": "logits", "parallel": parallel, "ends": ends, "settings": settings}
    (found,) = run_ranks(toy.parent, f"logits{world}", world, [case], weights=toy, **shape)
    return torch.cat(found[:: parallel.get("tp", 1)], 1)


def assert_equal_one_rank(several: list[Any], one: list[Any], dense: bool = False) -> None:
    """With dense attention the objective weighs every block, and of so many dots one may be 0 but for its rounding.

    Then what a ReLU lets through jumps: one rank's own gradients by 2e-3 to 5e-3, where its weights move by 6e-8.
    """
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    theirs, ours = (with_scales(whole(results, "gradients")) for results in (one, several))
    assert set(ours) == set(theirs)
    wrong = {n: float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items() if g.norm() > 1e-7}
    assert len(wrong) > 150 and sum(n.startswith("mtp.1.") for n in wrong) > 30
    bent = {n for n in wrong if dense and ".indexer." in n and "weights_proj" not in n}
    assert {n: e for n, e in wrong.items() if e > (1e-2 if n in bent else 1e-4)} == {}
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
    assert_equal_one_rank(*slow[name], dense=name == "cp2-dense")


@pytest.mark.slow
@pytest.mark.parametrize("queries", ["home", "spread"])
def test_bf16_is_no_further_from_float32_than_on_one_rank(toy: Path, queries: str) -> None:
    case: dict[str, Any] = {"action": "objectives", "boundaries": TWO}
    narrow = PLAIN | {"dtype": "bfloat16", "index_queries": queries}
    tag, cases = f"bf16-{queries}", [case | {"settings": PLAIN}, case | {"settings": narrow}]
    exact, one = run_ranks(toy.parent, f"{tag}1", 1, cases, weights=toy)
    (several,) = run_ranks(toy.parent, f"{tag}2", 2, [cases[1] | {"parallel": {"cp": 2}}], weights=toy)
    assert losses(several) == pytest.approx(losses(exact), rel=1e-2)
    theirs = with_scales(whole(exact, "gradients"))
    far = {}
    for name, results in (("one", one), ("several", several)):
        found = with_scales(whole(results, "gradients"))
        each = {n: float((found[n].float() - g).norm() / g.norm()) for n, g in theirs.items() if g.norm() > 1e-6}
        far[name] = sorted(each.values())
    assert len(far["one"]) > 100
    for share in (0.5, 0.9):  # a near tie may go either way, and moves some
        at = int(share * len(far["one"]))
        assert far["several"][at] <= 1.3 * far["one"][at], far


@pytest.mark.slow
@pytest.mark.parametrize(("cut_up", "ends"), [({"cp": 2}, None), ({"cp": 2, "tp": 2}, [0, 3, 250, 264])], ids=str)
def test_logits(toy: Path, cut_up: dict[str, int], ends: list[int] | None) -> None:
    """Of two rows that are a document each, and of a packed one with a cut vocabulary."""
    one, several = logits(toy, {}, ends), logits(toy, cut_up, ends, index_queries="spread")
    assert one.shape == several.shape
    assert (several - one).abs().max() <= 1e-5 * one.abs().max()


@pytest.mark.slow
def test_a_step_on_whole_rows_and_what_it_saved(toy: Path) -> None:
    """Four rows without boundaries in two micro-batches; the checkpoint is resumed by one rank."""
    run: dict[str, Any] = {"batch": 4, "length": 262, "seeds": [1, 3], "weights": toy}
    step = {"action": "step"}
    (one,) = run_ranks(toy.parent, "whole1", 1, [step], **run)
    four = [step | {"parallel": {"cp": 2}, "save": "saved"}, step | {"parallel": {"cp": 2, "ep": 2}}]
    cut_up = run_ranks(toy.parent, "whole4", 4, four, **run)
    theirs = with_scales(whole(one, "gradients"))
    for several in cut_up:
        assert losses(several) == pytest.approx(losses(one), rel=1e-5)
        assert several[0]["norm"] == pytest.approx(one[0]["norm"], rel=1e-5)
        ours = with_scales(whole(several, "gradients"))
        wrong = {n: float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items() if g.norm() > 1e-7}
        assert len(wrong) > 150 and {n: e for n, e in wrong.items() if e > 1e-4} == {}
    (resumed,) = run_ranks(toy.parent, "resumed", 1, [{"action": "resume", "load": "saved"}], **run)
    assert losses(resumed) == pytest.approx(losses(cut_up[0], "after"), rel=1e-5)


@pytest.mark.slow
def test_a_mistake_at_a_cut_is_seen(toy: Path) -> None:
    case = {"action": "objectives"} | ALONE["two"]
    ((one,),) = run_ranks(toy.parent, "right", 1, [case], weights=toy)
    cases = [case | {"parallel": {"cp": 2}, "bug": name} for name in BUGS]
    for name, several in zip(BUGS, run_ranks(toy.parent, "wrong", 2, cases, weights=toy), strict=True):
        theirs, ours = whole([one], "gradients"), whole(several, "gradients")
        far = max(float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items() if g.norm() > 1e-7)
        assert far > 1e-3, name


class Rank:
    """One place in a group that nobody talks over."""

    def __init__(self, rank: int, ranks: int):
        self._rank, self._ranks = rank, ranks

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._ranks


@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_every_rank_sees_the_entries_of_its_documents(data: st.DataObject) -> None:
    """For any documents: positions, and which of all ranks' entries are the blocks of a segment's document."""
    ranks, size = data.draw(st.integers(2, 4)), data.draw(st.integers(127, 300))
    bounds = data.draw(st.sets(st.integers(1, ranks * size - 1), max_size=9))
    ends = torch.tensor([0, *sorted(bounds), ranks * size], dtype=torch.int32)
    cpu = torch.device("cpu")
    shares = [share_of(Rank(rank, ranks), 1, size, ends, cpu, COSTS) for rank in range(ranks)]  # type: ignore[arg-type]
    lengths = ends.diff().tolist()
    expected = torch.cat([torch.arange(length) for length in lengths])
    assert torch.equal(torch.cat([share.positions() for share in shares]), expected)
    assert torch.equal(ends[1:] - 1, shares[0].ends.nonzero().flatten())
    for ratio in (4, 128):
        # Row among all ranks' entries -> document and block.
        made: dict[int, tuple[int, int]] = {}
        for rank, share in enumerate(shares):
            blocks, at = share.blocks[ratio], 0
            for segment in share.segments:
                for number in range(segment.start // ratio, (segment.start + segment.size) // ratio):
                    made[rank * blocks.most + at] = segment.document, number
                    assert blocks.positions[at] == number * ratio
                    at += 1
            assert at == len(blocks.positions) <= blocks.most
        assert len(made) == sum(length // ratio for length in lengths)
        for share in shares:
            parts = share.blocks[ratio].rows.split(share.blocks[ratio].counts)
            for segment, rows in zip(share.segments, parts, strict=True):
                visible = range((segment.start + segment.size) // ratio)
                assert [made[row] for row in rows.tolist()] == [(segment.document, number) for number in visible]


def test_a_micro_batch_is_cut_along_its_rows() -> None:
    ids = torch.arange(24).view(2, 12)
    batch = Batch(ids, ids + 1, (ids % 3 == 0).float(), ids > 20, torch.tensor([0, 12]))
    parts = [cut(batch, rank, 3) for rank in range(3)]
    for name in ("input_ids", "labels", "loss_mask", "padding_mask"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(batch, name))
    assert all(part.cu_seqlens is batch.cu_seqlens for part in parts)
    assert not parts[0].padding_mask.any()  # and still a mask: all ranks count alike
    assert cut(batch, 0, 1) is batch and cut(Batch(ids, ids), 1, 2).loss_mask is None
    with pytest.raises(BridgeError, match="12 tokens do not divide over 5"):
        cut(batch, 0, 5)


@pytest.mark.parametrize(
    ("length", "sizes", "nearest"),
    [
        (4097, Sizes(cp=2), 4096),
        (4098, Sizes(cp=2, tp=4), 4096),
        (100, Sizes(cp=2), 254),
        (508, Sizes(cp=4, tp=2), 512),
        (509, Sizes(cp=4), 508),
    ],
    ids=str,
)
def test_lengths_that_ranks_cannot_share_are_refused(length: int, sizes: Sizes, nearest: int) -> None:
    with pytest.raises(BridgeError, match=rf"trying: {length} tokens a row over cp .* Nearest that works: {nearest}$"):
        check_rows(length, sizes, 128, "trying")
    check_rows(nearest, sizes, 128, "trying")
    check_rows(length, Sizes(tp=sizes.tp), 128, "trying")  # uncut rows are others' to judge
    assert least_share(128) == 127 and least_share(200) == 199
