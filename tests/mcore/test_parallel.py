"""Real ranks compute what one rank computes: losses, every gradient, saved and loaded at any layout.

A batch of four rows, two micro-batches of different ids; the model has every kind of layer, one routed
by id, and an MTP layer. Tolerances are the issue's: losses and logits 1e-5, gradients 1e-4 of their norm.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import losses, run_ranks, whole
from reference import draft_spec

from dsv4_bridge import make_toy
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.store.hf import open_hf

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

RUN: dict[str, Any] = {"batch": 4, "length": 136, "seeds": [1, 2]}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"parallel": {"tp": 2}}),
    "ep2": (2, {"parallel": {"ep": 2}}),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "pp2vp2": (2, {"parallel": {"pp": 2}, "vp": 2}),
    "dp2": (2, {}),
    "dp2-buckets": (2, {"bucket_size": 20_000}),
    "etp2": (2, {"parallel": {"tp": 2, "etp": 2}}),
    "ep2-alltoall": (2, {"parallel": {"ep": 2}, "settings": {"moe_token_dispatcher_type": "alltoall"}}),
    "pp2-recompute": (
        2,
        {
            "parallel": {"pp": 2},
            "settings": {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            },
        },
    ),
    "tp2ep2": (4, {"parallel": {"tp": 2, "ep": 2}}),
    "pp2ep2": (4, {"parallel": {"pp": 2, "ep": 2}}),
}
CUT = [name for name in LAYOUTS if name != "one"]
EXCHANGED = ("one", "tp2", "ep2", "pp2", "pp2vp2", "dp2", "dp2-buckets", "etp2", "tp2ep2", "pp2ep2")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = replace_spec(draft_spec(), swiglu_limit=5.0)
    return make_toy(tmp_path_factory.mktemp("parallel") / "toy", "Flash", 4, spec=spec, payload="natural")


@pytest.fixture(scope="module")
def stepped(toy: Path) -> dict[str, list[Any]]:
    """Every layout's training step; those that are exchanged leave a checkpoint."""
    found = {}
    for world in (1, 2, 4):
        names = [name for name, (size, _) in LAYOUTS.items() if size == world]
        cases = [
            {"action": "step", "save": f"saved-{name}" if name in EXCHANGED else None} | LAYOUTS[name][1]
            for name in names
        ]
        found |= dict(zip(names, run_ranks(toy.parent, f"step{world}", world, cases, weights=toy, **RUN), strict=True))
    return found


@pytest.mark.parametrize("name", CUT)
def test_losses_and_every_gradient_equal_one_rank(stepped: dict[str, list[Any]], name: str) -> None:
    one, cut = stepped["one"], stepped[name]
    assert losses(cut) == pytest.approx(losses(one), rel=1e-5)
    assert cut[0]["norm"] == pytest.approx(one[0]["norm"], rel=1e-5)
    # Adam turns the sign of a gradient that is almost nothing into a whole step.
    assert losses(cut, "after") == pytest.approx(losses(one, "after"), rel=2e-3)
    theirs, ours = whole(one, "gradients"), whole(cut, "gradients")
    assert set(ours) == set(theirs)
    wrong = {n: float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items() if g.norm() > 1e-7}
    assert len(wrong) > 150
    assert {n: e for n, e in wrong.items() if e > 1e-4} == {}


def test_trap_59_a_missing_reduction_would_be_seen(stepped: dict[str, list[Any]]) -> None:
    """What tensor parallelism replicates has gradients that a rank alone has only part of."""
    gradients = whole(stepped["tp2"], "gradients")
    for name in ("attn.wq_a", "attn.wkv", "attn.kv_norm", "attn.compressor.wkv", "attn.compressor.ape", "attn_norm"):
        held = [n for n in gradients if n.startswith("layers.1.") and name in n and "indexer" not in n]
        assert held and all(gradients[n].norm() > 1e-6 for n in held), name


def test_saved_at_any_layout_and_resumed_at_any_other(toy: Path, stepped: dict[str, list[Any]]) -> None:
    """Weights and optimizer state: the next step's losses, gradient norm and weights do not depend on the layout.

    Each layout's checkpoint is resumed at one rank and at the layout behind it in the list; with DSV4_LAYOUTS=all at
    every one.
    """
    found: dict[tuple[str, str], list[Any]] = {}
    for world in (1, 2, 4):
        pairs = [(source, name) for source in EXCHANGED for name in _targets(source) if LAYOUTS[name][0] == world]
        cases = [{"action": "resume", "load": f"saved-{source}"} | LAYOUTS[name][1] for source, name in pairs]
        results = run_ranks(toy.parent, f"resume{world}", world, cases, weights=toy, **RUN)
        found |= dict(zip(pairs, results, strict=True))
    for source in EXCHANGED:
        one = found[source, "one"]
        expected = whole(one, "values")
        assert losses(one) == pytest.approx(losses(stepped[source], "after"), rel=1e-5)
        for name in _targets(source):
            results = found[source, name]
            assert losses(results) == pytest.approx(losses(one), rel=1e-5), (source, name)
            assert results[0]["norm"] == pytest.approx(one[0]["norm"], rel=1e-4), (source, name)
            values = whole(results, "values")
            assert set(values) == set(expected), (source, name)
            for key, wanted in expected.items():
                if wanted.is_floating_point():
                    assert (values[key] - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6, (source, name, key)
                else:
                    assert torch.equal(values[key], wanted), (source, name, key)


def _targets(source: str) -> list[str]:
    if os.environ.get("DSV4_LAYOUTS") == "all":
        return list(EXCHANGED)
    at = EXCHANGED.index(source)
    return list({"one": None, EXCHANGED[(at + 1) % len(EXCHANGED)]: None})


@pytest.mark.parametrize("world", [2, 4])
def test_stream_at_every_layout_gives_the_folder_back(toy: Path, world: int) -> None:
    names = [n for n in CUT if LAYOUTS[n][0] == world and "-" not in n]
    settings = {"settings": {"dtype": "bfloat16"}}
    cases = [{"action": "stream"} | LAYOUTS[n][1] | settings for n in names]
    results = run_ranks(toy.parent, f"stream{world}", world, cases, weights=toy)
    stored = _digests(toy)
    for name, ranks in zip(names, results, strict=True):
        for streamed in ranks:
            assert streamed == stored, name


def _digests(folder: Path) -> dict[str, Any]:
    import hashlib

    from safetensors import safe_open

    found = {}
    for file in sorted({info.file for info in open_hf(folder).folder.tensors.values()}):
        with safe_open(folder / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                found[name] = (str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(data).hexdigest())
    return found


def test_logits_of_cut_vocabularies_and_heads(toy: Path) -> None:
    one = run_ranks(toy.parent, "logits1", 1, [{"action": "logits"}], weights=toy, **RUN)[0][0]
    cases = [{"action": "logits"} | LAYOUTS[name][1] for name in ("tp2", "ep2", "etp2")]
    for ranks in run_ranks(toy.parent, "logits2", 2, cases, weights=toy, **RUN):
        for found in ranks:
            assert (found - one).abs().max() <= 1e-5 * one.abs().max()


def test_trap_55_the_layout_is_saved_as_plain_lists(stepped: dict[str, list[Any]], toy: Path) -> None:
    import yaml

    saved = yaml.safe_load((toy.parent / "saved-pp2vp2" / "iter_0000001" / "run_config.yaml").read_text())
    layout = saved["model"]["pipeline_model_parallel_layout"]
    assert json.loads(json.dumps(layout)) == layout
    assert len(layout) == 4 and layout[0][0] == "embedding" and layout[-1][-2:] == ["mtp", "loss"]
