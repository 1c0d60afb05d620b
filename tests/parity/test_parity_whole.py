"""By default parity looks at what it judges: whole tables, a choice of the indexers, MTP blocks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from html_page import Page
from reference import draft_spec

import faults
from dsv4_bridge import make_toy
from dsv4_bridge.mcore.layers.indexer import Indexer
from dsv4_bridge.parity import Inputs, parity
from dsv4_bridge.parity.inputs import token_ids
from dsv4_bridge.parity.report import write_report
from dsv4_bridge.parity.tables import compare_tables, digests, kept

pytestmark = [pytest.mark.megatron, pytest.mark.hf]

# As of real models: more ids than a sample has, and more blocks to choose than it makes.
SPEC = draft_spec(vocab_size=3000, index_topk=512)
UNSEEN = sorted(set(range(SPEC.vocab_size)) - set(token_ids(Inputs(), SPEC, ())[0].flatten().tolist()))[7]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("whole") / "good", "Flash", 5, spec=SPEC)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_model_agrees_with_itself_in_all_parts(dtype: str, good: Path, tmp_path: Path) -> None:
    report = parity(good, dtype=dtype)
    assert report.passed, report.verdict.text
    assert report.inputs["chosen"] == 0 and report.inputs["ids"] < 700
    assert report.narrow is not None and (report.narrow.index_topk, report.narrow.chosen) == (8, 266)
    choices = [s for s in report.narrow.free.sites if s.site == "attn.index"]
    assert [s.layer for s in choices] == [1, 3]
    assert len(report.drafts) == 1 and len(report.drafts[0].sites) == 7
    assert sum(t.rows for t in report.tables) == 2 * 3000 + 3 * 8 and not any(t.differing for t in report.tables)
    for told in ("index_topk 8 in both models instead of 512", "MTP block by the formula", "all 3,000 rows"):
        assert told in report.verdict.text.replace("All", "all")
    assert "the indexers' choice" not in report.verdict.text and report.left_out is None
    page = Page(write_report(report, tmp_path / "page").read_text())
    assert page.open == page.fetched == []
    runs = 2 + (report.replayed is not None) + (report.narrow.replayed is not None)
    assert page.rows[: runs + 2] == [8] * (runs + 2)
    assert json.loads((tmp_path / "page" / "parity.json").read_text())["narrow"]["index_topk"] == 8


SEEN = {
    "an expert of an unseen token": (
        faults.on("layers.0.ffn.gate.tid2eid", faults.another_expert(UNSEEN)),
        (0, "ffn.router", f"layers.0.ffn.gate.tid2eid: 1 of 3,000 rows differ, the first is {UNSEEN:,}"),
    ),
    "two rows of the embedding": (
        faults.on("embed.weight", faults.rows(UNSEEN, 2999 if UNSEEN != 2999 else 2998)),
        (0, "attn.mix", "embed.weight: "),
    ),
    "indexer weights negated": (
        faults.on("layers.3.attn.indexer.weights_proj.weight", lambda v: v ^ 0x8000),
        (3, "attn.index", "with index_topk 8 in both models"),
    ),
    "indexer queries": (
        faults.on("layers.1.attn.indexer.wq_b.weight", faults.flipped),
        (1, "attn.index", "layers.1.attn.indexer.wq_b.weight"),
    ),
    "indexer positions": (
        faults.on("layers.1.attn.indexer.compressor.ape", faults.flipped),
        (1, "attn.index", "layers.1.attn.indexer.wq_b.weight"),
    ),
    "an expert's bias": (
        faults.on("layers.2.ffn.gate.bias", faults.at((3,), faults.plus(1e-3))),
        (2, "ffn.router", ""),
    ),
    "draft projections": (
        faults.swapped("mtp.0.e_proj", "mtp.0.h_proj"),
        (None, "attn.mix", "MTP block 0 is not what the formula gives"),
    ),
    "draft bias": (
        faults.on("mtp.0.ffn.gate.bias", faults.at((3,), faults.plus(1))),
        (None, "ffn.router", "mtp.0.ffn.gate.bias"),
    ),
    "draft expert": (
        faults.on("mtp.0.ffn.experts.3.w2.scale", lambda v: v + 1),
        (None, "ffn.experts", "mtp.0.ffn.exp"),
    ),
    "draft norm": (faults.on("mtp.0.norm.weight", faults.times(1.02)), (None, "logits", "mtp.0.norm.weight")),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_a_sample_does_not_reach_is_seen(name: str, good: Path) -> None:
    plant, (layer, site, told) = SEEN[name]
    with faults.planted(faults.Fault(name, plant), good) as bad:
        report = parity(bad, reference_checkpoint=good)
    assert not report.passed
    assert (report.verdict.layer, report.verdict.site) == (layer, site), report.verdict.text
    assert told in report.verdict.text


@pytest.mark.parametrize("name", ["indexer weights negated", "draft projections", "an expert of an unseen token"])
def test_bf16_sees_what_is_no_rounding(name: str, good: Path) -> None:
    with faults.planted(faults.Fault(name, SEEN[name][0]), good) as bad:
        assert not parity(bad, reference_checkpoint=good, dtype="bf16").passed


def test_tokens_that_are_given_are_all_that_is_run(good: Path) -> None:
    report = parity(good, inputs=Inputs(seq_length=40, batch=1))
    assert report.passed and report.narrow is None
    assert "the indexers' choice, for no query had more than index_topk 512 blocks" in report.verdict.text


def test_a_checkpoint_without_the_block_is_compared_without(good: Path, tmp_path: Path) -> None:
    other = make_toy(tmp_path / "other", "Flash", 5, spec=SPEC.without_draft())
    report = parity(good, reference_checkpoint=other, inputs=Inputs(seq_length=9, batch=1))
    assert report.passed and report.drafts == ()
    assert report.left_out == "MTP blocks, for one checkpoint has 1 and the other 0"


def test_rows_are_compared_exactly() -> None:
    table = torch.randn(9000, 5)
    table[3, 2] = 0.0
    other = table.clone()
    other[3, 2] = -0.0
    (same,) = compare_tables({"embed.weight": digests(other)}, {"embed.weight": digests(table)})
    assert (same.rows, same.differing, same.first) == (9000, 0, None)
    other[8191, 4] = torch.nextafter(other[8191, 4], torch.tensor(9.0))
    other[8999] = table[0]
    (found,) = compare_tables({"embed.weight": digests(other)}, {"embed.weight": digests(table)})
    assert (found.differing, found.first, found.layer, found.site) == (2, 8191, 0, "attn.mix")
    experts = torch.tensor([[1, 2], [3, 4]])
    name = "layers.0.ffn.gate.tid2eid"
    one, other, third = (kept(iter([(name, t)])) for t in (experts, experts.flip(1).int(), experts + 1))
    assert [compare_tables(x, one)[0].differing for x in (other, third)] == [0, 2]
    name, bias = "layers.4.ffn.gate.bias", np.array([1.0, -2.0])
    for step, differing in ((1e-4, 0), (3e-4, 1), (np.nan, 1)):
        (found,) = compare_tables({name: bias + np.array([step, 0])}, {name: bias})
        assert (found.layer, found.differing) == (4, differing)


@pytest.mark.parametrize("toy", ["F", "B"])
def test_every_fault_of_the_benchmark_can_be_planted(toy: str, tmp_path: Path) -> None:
    """And the smallest of them are seen where every byte is compared."""
    faults.make_toys(tmp_path, toy)
    here = [f for f in faults.FAULTS if toy in f.toys]
    for fault in here:
        with faults.planted(fault, tmp_path / toy) as bad:
            assert faults.by_verify(tmp_path / toy, bad, "bytes") == "SEEN", fault.name
    assert len(here) == {"F": 49, "B": 2}[toy]


def test_the_choice_is_as_wide_as_before_in_other_models(good: Path) -> None:
    """The other pass narrows the indexers of its own model alone."""
    parity(good)
    from dsv4_bridge.mcore import build_model

    model = build_model(SPEC)
    assert {m.topk for m in model.modules() if isinstance(m, Indexer)} == {512}
