"""Adapters on real ranks: the gradients of one rank at every layout, and nothing else is trained.

The model has every kind of layer and an MTP layer; adapters stand wherever they may. Two micro-batches of two
rows; tolerances are the issue's: losses 1e-5, gradients 1e-4 of their norm.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from lora_tools import adapter_values
from reference import RECOMPUTING, draft_spec

from dsv4_bridge import make_toy
from dsv4_bridge.lora.checkpoint import read_adapters
from dsv4_bridge.spec.lora import CARRIERS, Lora, targets

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

RUN: dict[str, Any] = {"batch": 2, "length": 24, "seeds": [1, 2]}
ALL = {"rank": 4, "alpha": 12.0, "targets": CARRIERS}
DORA = {"rank": 4, "alpha": 12.0, "targets": [*Lora().keys, "ffn.shared_experts"], "dora": True}
GROUPED = {"settings": {"expert_layout": "grouped"}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "recompute": (1, {"settings": RECOMPUTING["full"]}),
    "ep2": (2, {"parallel": {"ep": 2}}),  # and two data-parallel ranks
    "etp2-grouped": (2, {"parallel": {"tp": 2, "etp": 2}} | GROUPED),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "dora-one": (1, {"lora": DORA}),
    "dora-tp2": (2, {"lora": DORA, "parallel": {"tp": 2}}),
}
MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "grouped": (1, GROUPED),
    "tp2": (2, {"parallel": {"tp": 2}}),
    "etp2": (2, {"parallel": {"tp": 2, "etp": 2}}),
    "ep2-grouped": (2, {"parallel": {"ep": 2}} | GROUPED),
    "pp2vp2": (2, {"parallel": {"pp": 2}, "vp": 2}),
    "tp2ep2": (4, {"parallel": {"tp": 2, "ep": 2}}),
}
if os.environ.get("DSV4_LAYOUTS") == "all":
    LAYOUTS |= MORE
CUT = [name for name in LAYOUTS if name not in ("one", "dora-one")]
RESUMED = {"one": "one", "pp2": "etp2-grouped", "etp2-grouped": "ep2"}


def _run(folder: Path, tag: str, cases: dict[str, dict[str, Any]], worlds: dict[str, int]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for world in sorted({worlds[name] for name in cases}):
        names = [name for name in cases if worlds[name] == world]
        told = {"weights": folder / "toy", "lora": ALL} | RUN
        results = ranks.run_ranks(folder, f"{tag}{world}", world, [cases[n] for n in names], **told)
        found |= dict(zip(names, results, strict=True))
    return found


@pytest.fixture(scope="module")
def spec() -> Any:
    """A window and a CSA layer, routed by id and by score, and an MTP layer."""
    return draft_spec(num_hidden_layers=2, compress_ratios=(0, 4), swiglu_limit=5.0)


@pytest.fixture(scope="module")
def stepped(spec: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Every layout's training step, and the next one from what another layout saved."""
    folder = tmp_path_factory.mktemp("adapters")
    make_toy(folder / "toy", "Flash", 4, spec=spec, payload="natural")
    cases, worlds = {}, {}
    for name, (world, told) in LAYOUTS.items():
        cases[name] = {"action": "adapt", "save": f"saved-{name}" if name in RESUMED else None} | told
        worlds[name] = world
    for source, name in RESUMED.items():
        worlds[f"{source} to {name}"], told = LAYOUTS[name]
        cases[f"{source} to {name}"] = {"action": "resume", "load": f"saved-{source}"} | told
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "WORKER", Path(__file__).with_name("adapter_worker.py"))
        return {"folder": [folder]} | _run(folder, "step", cases, worlds)


@pytest.mark.parametrize("name", CUT)
def test_every_adapter_gets_the_gradient_of_one_rank(stepped: dict[str, list[Any]], name: str) -> None:
    one, cut = stepped["dora-one" if "dora" in name else "one"], stepped[name]
    assert ranks.losses(cut) == pytest.approx(ranks.losses(one), rel=1e-5)
    assert cut[0]["norm"] == pytest.approx(one[0]["norm"], rel=1e-5)
    theirs, ours = ranks.whole(one, "gradients"), ranks.whole(cut, "gradients")
    assert set(ours) == set(theirs)
    wrong = {n: float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items() if g.norm() > 1e-8}
    assert len(wrong) > 0.9 * len(theirs)
    assert {n: e for n, e in wrong.items() if e > 1e-4} == {}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_changes_adapters_only(stepped: dict[str, list[Any]], spec: Any, name: str) -> None:
    """Also the balance bias rests, and optimizer state is for adapters alone."""
    results = stepped[name]
    assert all(result["base"] for result in results)
    assert all(result["still"] == [] for result in results)
    for result in results:
        count, total = result["counts"]
        assert 0 < result["moments"] <= count < total / 10
    if name in ("one", "pp2", "dora-one"):
        told = LAYOUTS[name][1].get("lora", ALL)
        lora = Lora(**told | {"targets": tuple(told["targets"])})
        assert sum(result["counts"][0] for result in results) == adapter_values(spec, lora)
        assert sum(result["moments"] for result in results) == adapter_values(spec, lora)


@pytest.mark.parametrize("name", [n for n in LAYOUTS if "grouped" not in n])
def test_whole_adapters_on_every_rank(stepped: dict[str, list[Any]], spec: Any, name: str) -> None:
    wanted = ranks.whole(stepped[name], "values")
    told = LAYOUTS[name][1].get("lora", ALL)
    lora = Lora(**told | {"targets": tuple(told["targets"])})
    for result in stepped[name]:
        assert list(result["gathered"]) == [t.name for t in targets(spec, lora.keys)]
        for target in targets(spec, lora.keys):
            a, b, magnitude = result["gathered"][target.name]
            parts = [wanted[f"{target.name} lora_B {n}"] for n in range(1, 1 + len(target.items))]
            assert torch.equal(a, wanted[f"{target.name} lora_A 0"])
            assert torch.equal(b, torch.cat(parts))
            if lora.dora:
                assert torch.equal(magnitude, wanted[f"{target.name} magnitude 2"])


@pytest.mark.parametrize("source", RESUMED)
def test_saved_at_one_layout_and_resumed_at_another(stepped: dict[str, list[Any]], source: str) -> None:
    """Adapters bit for bit; and with the optimizer's state the next step is that of one rank."""
    one, results = stepped["one to one"], stepped[f"{source} to {RESUMED[source]}"]
    saved, loaded = ranks.whole(stepped[source], "values"), ranks.whole(results, "loaded")
    assert set(saved) == set(loaded) and all(torch.equal(loaded[n], saved[n]) for n in saved)
    assert ranks.losses(results) == pytest.approx(ranks.losses(stepped[source], "after"), rel=1e-5)
    assert results[0]["norm"] == pytest.approx(one[0]["norm"], rel=1e-3)
    theirs, ours = ranks.whole(one, "values"), ranks.whole(results, "values")
    for key, value in theirs.items():
        assert (ours[key] - value).norm() <= 2e-3 * value.norm(), key


def test_a_checkpoint_is_read_without_megatron(stepped: dict[str, list[Any]], spec: Any) -> None:
    """The tensors that ranks saved, whole, with their settings."""
    found, numbers = read_adapters(stepped["folder"][0] / "saved-etp2-grouped")
    assert numbers == spec
    assert found.lora == Lora(4, 12.0, targets=CARRIERS)
    (first, *_) = stepped["etp2-grouped"]
    assert list(found.values) == list(first["gathered"])
    for name, adapter in found.values.items():
        a, b, _ = first["gathered"][name]
        assert torch.equal(adapter.a, a) and torch.equal(adapter.b, b)
