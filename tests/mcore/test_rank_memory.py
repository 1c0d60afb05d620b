"""The plan's bytes are those that real ranks hold: weights, gradients, optimizer state, activations, cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_memory import Kept
from ranks import run_ranks
from reference import draft_spec

from dsv4_bridge import make_toy
from dsv4_bridge.mcore import build_model, load_weights
from dsv4_bridge.mcore.adapters.adapters import add_adapters
from dsv4_bridge.mcore.layers.cache import new_cache
from dsv4_bridge.parallel.balance import solve
from dsv4_bridge.parallel.topology import Sizes
from dsv4_bridge.planning import activations
from dsv4_bridge.planning.activations import Shape, cache_bytes, chunk_bytes
from dsv4_bridge.planning.memory import MemoryPlan, Run, make_run_topology, plan_memory
from dsv4_bridge.spec.lora import CARRIERS, Lora
from dsv4_bridge.spec.spec import ModelSpec, replace_spec
from dsv4_bridge.store.hf import open_hf

pytestmark = [pytest.mark.megatron, pytest.mark.slow]

# Rows over all ranks, and tokens a row: with no block of 128 tokens, and with one and a rest.
SHAPES = ((4, 72), (2, 136))
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LEARNS = {"dsa_indexer_loss_coeff": 0.01, "dsa_indexer_use_sparse_loss": True}
CASES: dict[str, dict[str, Any]] = {
    "dp2-whole-optimizer": {"distributed_optimizer": False, "settings": {"dtype": "bfloat16"}},
    "dp2-bf16": {"settings": {"dtype": "bfloat16"}, "grad_dtype": "bf16"},
    "etp2": {"parallel": {"tp": 2, "etp": 2}},
    "ep2": {"parallel": {"ep": 2}},
    "cp2": {"parallel": {"cp": 2}, "shapes": ((2, 254), (2, 544))},
    "etp2-chunks": {"parallel": {"tp": 2, "etp": 2}, "settings": {"loss_chunk": 50}},
    "cp2-chunks": {"parallel": {"cp": 2}, "shapes": ((2, 254), (2, 544)), "settings": {"loss_chunk": 50}},
    "pp2-chunks": {"parallel": {"pp": 2}, "seeds": [0, 1, 2], "settings": FULL | {"loss_chunk": 50}},
    "pp2": {"parallel": {"pp": 2}, "seeds": [0, 1, 2], "settings": {"expert_layout": "grouped"}},
    "pp2-recompute": {"parallel": {"pp": 2}, "seeds": [0, 1, 2], "settings": FULL},
    "dp2-indexer": {"settings": LEARNS},
    "dp2-indexer-bf16": {"settings": LEARNS | {"dtype": "bfloat16"}},
    "cp2-indexer": {"parallel": {"cp": 2}, "shapes": ((2, 254), (2, 544)), "settings": LEARNS},
    "pp2-indexer-recompute": {"parallel": {"pp": 2}, "seeds": [0, 1, 2], "settings": FULL | LEARNS},
    "pp2vp2": {"parallel": {"pp": 2}, "vp": 2, "seeds": [0, 1, 2, 3]},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = replace_spec(draft_spec(), swiglu_limit=5.0)
    return make_toy(tmp_path_factory.mktemp("memory") / "toy", "Flash", 4, spec=spec, payload="natural")


@pytest.fixture(scope="module")
def measured(toy: Path) -> dict[str, list[dict[str, Any]]]:
    cases = [{"action": "memory"} | told for told in CASES.values()]
    told = {"weights": toy, "shapes": SHAPES, "seeds": [0]}
    return dict(zip(CASES, run_ranks(toy.parent, "memory", 2, cases, **told), strict=True))


def planned(toy: Path, name: str, rows: int = SHAPES[0][0], length: int = SHAPES[0][1]) -> MemoryPlan:
    spec: ModelSpec = open_hf(toy).spec
    told = CASES[name]
    sizes = Sizes(**told.get("parallel", {}), vp=told.get("vp", 1))
    topology, _ = make_run_topology(spec, sizes)
    dp = 2 // (topology.tp * topology.pp * topology.cp)
    settings = told.get("settings", {})
    run = Run(
        dtype="bf16" if "dtype" in settings else "float32",
        seq_length=length,
        micro_batch=rows // dp,
        micro_batches=len(told.get("seeds", [0])),
        recompute="recompute_method" in settings,
        grad_dtype=told.get("grad_dtype", "float32"),
        distributed_optimizer=told.get("distributed_optimizer", True),
        fused=False,
        loss_chunk=settings.get("loss_chunk", 0),
        indexer="dsa_indexer_loss_coeff" in settings,
    )
    return plan_memory(spec, topology, dp, run)


def by_stage(plan: MemoryPlan, results: list[Any]) -> list[list[Any]]:
    """What the ranks of each stage returned; two ranks are two stages, or one stage."""
    return [[r] for r in results] if plan.topology.pp == 2 else [results]


@pytest.mark.parametrize("name", CASES)
def test_ranks_hold_the_planned_state(toy: Path, measured: dict[str, Any], name: str) -> None:
    plan = planned(toy, name, *CASES[name].get("shapes", SHAPES)[0])
    for stage, ranks in zip(plan.stages, by_stage(plan, measured[name]), strict=True):
        for rank in ranks:
            assert rank["values"] == stage.parameters
            assert rank["weights"] == stage.weights
            # Buffers are padded to whole shares.
            assert stage.gradients <= rank["gradients"] <= stage.gradients * 1.01
        optimizer = sum(r["optimizer"] for r in ranks) / len(ranks)
        assert stage.optimizer == pytest.approx(optimizer, rel=0.01)
        assert stage.step == pytest.approx(sum(r["step"] for r in ranks) / len(ranks), rel=0.01)
        assert bool(stage.step) == (plan.run.grad_dtype == "bf16")


@pytest.mark.parametrize("name", CASES)
def test_autograd_keeps_the_planned_activations(
    toy: Path, measured: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "head_sum_bytes", lambda *_: 0)  # it is no tensor that autograd keeps
    for at, (rows, length) in enumerate(CASES[name].get("shapes", SHAPES)):
        plan = planned(toy, name, rows, length)
        for stage, ranks in zip(plan.stages, by_stage(plan, measured[name]), strict=True):
            # Ranks with other experts get more rows or fewer: together, as many as planned. Of ranks that share a
            # row, the last one is planned.
            kept = sum(r["activations"][at] for r in ranks) / len(ranks)
            if plan.topology.cp > 1:
                kept = ranks[-1]["activations"][at]
            assert stage.activations == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize(("batch", "length"), [(2, 136), (3, 61)])
@pytest.mark.parametrize("targets", [(), ("attn",), ("attn.wkv", "ffn.experts.w2"), CARRIERS], ids=len)
def test_a_frozen_model_keeps_less(toy: Path, targets: tuple[str, ...], batch: int, length: int, dtype: str) -> None:
    """What a model with adapters keeps: the inputs of those linears that have some, and what is between A and B.

    Some of a frozen path's own is planned and not kept where nothing in front of it is adapted.
    """
    spec = open_hf(toy).spec.without_draft()
    model = build_model(spec, dtype=getattr(torch, {"bf16": "bfloat16"}.get(dtype, dtype)))
    load_weights(model, toy)
    lora = Lora(3, targets=targets)
    add_adapters(model, lora)
    kept = Kept([*model.parameters(), *model.buffers()])
    ids = torch.randint(0, spec.vocab_size, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.tensor):
        model.train()(ids, labels=ids.roll(-1, 1)).mean().backward()
    (chunk,) = solve(spec, 1).chunks
    planned = chunk_bytes(spec, chunk, Shape(batch, length, dtype, lora=lora))
    assert planned == pytest.approx(kept.most, rel=0.03 if len(targets) == 2 else 0.01)


@pytest.mark.parametrize("length", [7, 300])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_cache_has_the_planned_bytes(toy: Path, length: int, dtype: str) -> None:
    spec = open_hf(toy).spec
    model = build_model(spec, dtype=getattr(torch, {"bf16": "bfloat16"}.get(dtype, dtype)))
    load_weights(model, toy)
    lengths = torch.full((3,), 5)
    cache = new_cache(model.config, lengths, length)
    with torch.no_grad():
        model.eval()(torch.randint(0, spec.vocab_size, (3, 5)), cache=cache)
    chunks = solve(spec, 1).chunks
    assert cache_bytes(spec, chunks, Shape(3, length, dtype)) == cache.nbytes
