"""The memory of ranks, planned: exact parameters, rules with what is nearest, and the layouts that fit."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from math import lcm
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_tools import adapter_values

from dsv4_bridge import BridgeError
from dsv4_bridge.cli import main
from dsv4_bridge.parallel.balance import solve
from dsv4_bridge.parallel.pieces import pieces
from dsv4_bridge.parallel.topology import Coordinate, Sizes, make_topology
from dsv4_bridge.planning.activations import Shape, chunk_bytes, in_flight, layer_bytes
from dsv4_bridge.planning.index_queries import rank_flops
from dsv4_bridge.planning.memory import Run, make_run_topology, plan_memory
from dsv4_bridge.planning.parameters import chunk_part
from dsv4_bridge.planning.ranks import GIB, Asked, plan_ranks
from dsv4_bridge.planning.search import USABLE, search
from dsv4_bridge.spec.lora import CARRIERS, Lora
from dsv4_bridge.spec.plan import expand
from dsv4_bridge.spec.spec import ModelSpec, replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.train.choose import choose

FLASH, PRO = VARIANTS["Flash"].spec, VARIANTS["Pro"].spec
# A small model that many sizes cut.
CUT = replace_spec(tiny(VARIANTS["Pro"]), num_attention_heads=16, o_groups=16, n_routed_experts=64)
ONE = Sizes()


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dsv4", *args])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


def counted(spec: ModelSpec, tp: int, pp: int, ep: int, etp: int, vp: int, at: Coordinate) -> tuple[int, int, int, int]:
    """What a rank holds, from every piece of every item: parameters of the model's type, float32, expert; buffers."""
    topology = make_topology(spec, Sizes(tp, pp, ep, etp, vp=vp))
    plain = wide = expert = buffers = 0
    for item, chunk in product(expand(spec).items, range(at.pp, pp * vp, pp)):
        for piece in pieces(item, spec, topology, at, chunk):
            size = (piece.rows[1] - piece.rows[0]) * (piece.columns[1] - piece.columns[0])
            if item.row.key in ("ffn.gate.bias", "ffn.gate.tid2eid"):
                buffers += size
            elif item.expert is not None:
                expert += size
            elif item.row.encoding == "f32":
                wide += size
            else:
                plain += size
    return plain, wide, expert, buffers


@pytest.mark.parametrize("name", ["Flash", "Pro", "Flash-0731"])
@pytest.mark.parametrize(("tp", "pp", "ep", "etp", "vp"), [(1, 1, 1, 1, 1), (2, 2, 4, 1, 1), (4, 2, 2, 2, 2)])
def test_parameters_are_those_of_every_piece(name: str, tp: int, pp: int, ep: int, etp: int, vp: int) -> None:
    spec = tiny(VARIANTS[name])
    topology = make_topology(spec, Sizes(tp, pp, ep, etp, vp=vp))
    for rank in range(pp):
        found = chunk_part(spec, topology.layout, rank, topology, Lora(8))
        for number in range(rank + pp, pp * vp, pp):
            found += chunk_part(spec, topology.layout, number, topology, Lora(8))
        first, last = Coordinate(0, rank, 0, 0), Coordinate(tp - 1, rank, ep - 1, etp - 1)
        want = counted(spec, tp, pp, ep, etp, vp, first)
        assert want == counted(spec, tp, pp, ep, etp, vp, last)  # one line stands for all ranks of a stage
        assert (found.dense.plain, found.dense.wide, found.expert.plain, found.dense.buffers) == want


def test_one_rank_has_the_published_parameters() -> None:
    topology, dp = make_run_topology(FLASH, ONE)
    (stage,) = plan_memory(FLASH, topology, dp, Run()).stages
    assert stage.parameters == 290_942_289_362 + 3 * 129_280 * 6  # the published count leaves tid2eid out


def test_rows_over_ranks() -> None:
    """Two context-parallel ranks share optimizer state as two data-parallel ones do, and tokens besides."""
    spec = tiny(VARIANTS["Flash"])
    run = Run(seq_length=1 << 15)
    whole, cut = (
        plan_memory(spec, *make_run_topology(spec, sizes, dp=dp), run) for sizes, dp in ((ONE, 4), (Sizes(cp=2), 2))
    )
    assert (whole.gpus, whole.edp) == (cut.gpus, cut.edp) == (4, 4)
    (of_whole,), (of_cut,) = whole.stages, cut.stages
    assert of_cut.ranks == 4
    for name in ("parameters", "weights", "gradients", "optimizer"):
        assert getattr(of_cut, name) == getattr(of_whole, name), name
    assert 0.5 < of_cut.activations / of_whole.activations < 0.55
    assert cut.to_json()["sizes"]["cp"] == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked(cp=2, run=Run(seq_length=4097)), "cp 2 and tp 1 .* Nearest that works: 4096"),
        (Asked(cp=64, run=Run(seq_length=4096)), "127 or more.*Nearest that works: 8128"),
        (Asked(cp=2, tp=2, run=Run(seq_length=4098)), "cp 2 and tp 2 .* Nearest that works: 4096"),
        (Asked(cp=2, run=Run(mode="inference")), "a cache holds whole rows"),
        (Asked(cp=3, gpus=8), r"8 GPUs are not tp\*pp\*cp\*dp = 1\*1\*3\*any .* Nearest that works: --gpus 9"),
        (Asked(cp=2, ep=8, dp=2), r"tp\*cp\*dp = 1\*2\*2 = 4 ranks .* Nearest that works: dp 4, with 8 ranks"),
        (Asked(cp=0), "cp 0; every size is 1 or more"),
    ],
    ids=str,
)
def test_rows_that_ranks_cannot_share(asked: Asked, message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        plan_ranks("Flash", FLASH, asked)


def test_bytes_follow_from_the_counts() -> None:
    spec = tiny(VARIANTS["Flash"])
    topology, dp = make_run_topology(spec, Sizes(ep=2), dp=6)
    part = chunk_part(spec, topology.layout, 0, topology, None)
    plain, wide = part.dense.plain, part.dense.wide
    (full,) = plan_memory(spec, topology, dp, Run()).stages
    assert full.weights == 2 * (plain + part.expert.plain) + 4 * (wide + part.dense.buffers)
    assert full.gradients == 4 * (plain + wide + part.expert.plain)
    # 12 bytes of a bf16 parameter, 8 of a float32 one; six ranks share the dense ones, three the experts.
    assert full.optimizer == -(-(12 * plain + 8 * wide) // 6) + 4 * part.expert.plain
    assert full.cache == 0 < full.activations
    (small,) = plan_memory(spec, topology, dp, Run(grad_dtype="bf16")).stages
    assert small.gradients == 2 * (plain + part.expert.plain) + 4 * wide
    # At the step the shares' gradients once more, in float32, in place of the activations.
    assert (full.step, small.step) == (0, -(-4 * plain // 6) + -(-4 * part.expert.plain // 3))
    kept = small.weights + small.gradients + small.optimizer
    assert small.total == kept + max(small.activations, small.step)
    (short_rows,) = plan_memory(spec, topology, dp, Run(grad_dtype="bf16", seq_length=8)).stages
    assert short_rows.activations < short_rows.step and short_rows.total == kept + short_rows.step
    assert plan_memory(spec, topology, dp, Run(grad_dtype="bf16", moments_dtype="bf16")).stages[0].step == 0
    (alone,) = plan_memory(spec, topology, dp, Run(grad_dtype="bf16", distributed_optimizer=False)).stages
    assert alone.step == 4 * (plain + part.expert.plain)
    (copied,) = plan_memory(spec, topology, dp, Run(distributed_optimizer=False)).stages
    assert copied.optimizer == 12 * (plain + part.expert.plain) + 8 * wide
    (lora,) = plan_memory(spec, topology, dp, Run(mode="lora", lora=Lora(4, targets=("attn",)))).stages
    hidden, heads = spec.hidden_size, spec.num_attention_heads * spec.head_dim
    grouped = spec.o_groups * spec.o_lora_rank
    ends = (
        spec.q_lora_rank + hidden,
        heads + spec.q_lora_rank,
        spec.head_dim + hidden,
        grouped + heads // spec.o_groups,
        hidden + grouped,
    )
    adapters = 4 * sum(ends) * spec.num_hidden_layers  # the draft block has none
    assert lora.weights == full.weights + 2 * adapters
    assert (lora.gradients, lora.optimizer) == (4 * adapters, 2 * adapters)
    assert lora.activations < full.activations
    everything = Lora(3, targets=CARRIERS)
    (wide,) = plan_memory(spec, topology, dp, Run(mode="lora", lora=everything)).stages
    (dora,) = plan_memory(spec, topology, dp, Run(mode="lora", lora=Lora(3, dora=True))).stages
    shared = replace_spec(spec, n_routed_experts=spec.n_routed_experts // topology.ep)
    assert wide.weights == full.weights + 2 * adapter_values(shared, everything)
    assert dora.weights == full.weights + 2 * adapter_values(spec, Lora(3, dora=True))
    assert lora.activations < wide.activations
    (still,) = plan_memory(spec, topology, dp, Run(mode="inference")).stages
    assert (still.weights, still.gradients, still.optimizer, still.activations) == (full.weights, 0, 0, 0)
    assert still.cache > 0


def test_micro_batches_in_flight() -> None:
    assert [in_flight([7], rank, 4, 32) for rank in range(4)] == [28, 21, 14, 7]
    assert in_flight([7], 0, 4, 2) == 14
    # Two ranks of two chunks, by hand: forwards 0 0 1 1, then 0 | back 1, 0 | back 1, 1 | back 0, ...
    assert in_flight([100, 10], 0, 2, 4) == 4 * 100 + 10
    assert in_flight([10, 100], 0, 2, 4) == 3 * 10 + 2 * 100
    assert in_flight([10, 100], 1, 2, 4) == 2 * 10 + 100
    # A long step needs no more than a short one that fills the pipeline.
    assert in_flight([3, 5, 7], 1, 4, 400) == in_flight([3, 5, 7], 1, 4, 16)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([512, 4096]), st.integers(1, 3), st.sampled_from([0, 4, 128]))
def test_activations_grow_with_rows_and_shrink_with_cuts(tp: int, length: int, batch: int, ratio: int) -> None:
    shape = Shape(batch, length, tp=tp)
    whole = layer_bytes(FLASH, ratio, replace(shape, tp=1))
    # Chosen blocks may be one table for all rows.
    assert layer_bytes(FLASH, ratio, replace(shape, batch=2 * batch)) <= 2 * layer_bytes(FLASH, ratio, shape)
    assert whole / tp <= layer_bytes(FLASH, ratio, shape) <= whole
    (chunk,) = solve(FLASH, 1).chunks
    assert chunk_bytes(FLASH, chunk, replace(shape, recompute=True)) < chunk_bytes(FLASH, chunk, shape) / 4


REFUSED = (
    (("--tp", "3"), "tp 3 does not divide o_groups 16 (nearest that does: 2)"),
    (("--tp", "32"), "tp 32 does not divide o_groups 16 (nearest that does: 16)"),
    (("--ep", "7"), "ep 7 does not divide n_routed_experts 384 (nearest that does: 6)"),
    (("--etp", "5"), "etp 5 does not divide moe_intermediate_size 3072 (nearest that does: 4)"),
    (("--pp", "64"), "64 chunks, at most 59 are possible"),
    (("--pp", "0"), "pp 0; every size is 1 or more"),
    (("--ep", "16", "--dp", "9"), "Nearest that works: dp 16, with 16 ranks"),
    (("--ep", "16", "--dp", "9"), "rule: tp*pp*dp = etp*ep*edp*pp"),
    (("--tp", "2", "--gpus", "7"), "Nearest that works: --gpus 8"),
    (("--tp", "2", "--dp", "2", "--gpus", "8"), "Nearest that works: --gpus 4"),
    (("--tp", "4", "--seq-length", "4097"), "Nearest that works: --seq-length 4096"),
    (("--pp", "2", "--layout", "Et*2|t*59mL"), "A layout that keeps them: Et*31|t*30mL"),
    (("--vp", "2"), "Nearest that works: vp 1"),
    (("--pp", "4", "--vp", "2", "--global-batch", "6"), "Nearest that works: 8"),
    (("--ep", "8", "--global-batch", "12"), "Nearest that works: --global-batch 16"),
    (("--tp", "2", "--lora-rank", "8"), "--lora-rank without --mode lora"),
    (("--tp", "2", "--lora-target", "attn"), "--lora-target without --mode lora"),
    (("--mode", "lora", "--lora-target", "attn.q"), "no target 'attn.q'; may carry one: attn.wq_a"),
    (("--tp", "2", "--seq-length", "2097152"), "the model takes 1048576 at most"),
    (("--tp", "2", "--gpu-memory", "-1"), "gpu_memory is -1.0, expected more than 0"),
    (("--gpus", "101", "--global-batch", "5"), "try a power of two of GPUs"),
)


@pytest.mark.parametrize(("args", "why"), REFUSED, ids=lambda x: " ".join(x) if isinstance(x, tuple) else None)
def test_what_cannot_work_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], why: str
) -> None:
    code, out, err = run(capsys, monkeypatch, "plan", "Pro", *args)
    assert (code, out) == (2, "")
    assert why in err
    assert "Traceback" not in err


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(0, 6), st.integers(0, 2), st.integers(1, 70))
def test_what_a_refusal_offers_works(tp: int, ep: int, etp: int, dp: int) -> None:
    sizes = Sizes(1 << tp, ep=1 << ep, etp=1 << etp)
    try:
        topology, _ = make_run_topology(CUT, sizes, dp=dp)
    except BridgeError as error:
        offered = int(str(error).rsplit("dp ", 1)[1].split(",")[0])
        topology, dp = make_run_topology(CUT, sizes, dp=offered)
    assert (topology.tp * dp) % (topology.ep * topology.etp) == 0
    _, least = make_run_topology(CUT, sizes)
    assert least * topology.tp == lcm(topology.tp, topology.ep * topology.etp)


@pytest.fixture(scope="module")
def small() -> ModelSpec:
    return replace_spec(tiny(VARIANTS["Flash"]), num_hidden_layers=8, compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128, 0))


def test_the_layouts_that_fit_are_those_and_the_quickest_first(small: ModelSpec) -> None:
    run_of = Run(seq_length=512)
    everything = search(small, 16, 1 << 60, run_of, 64)
    assert everything.fitting == everything.considered
    sizes = sorted(r.plan.worst.total for r in everything.best)
    memory = int(sizes[len(sizes) // 2] / USABLE)
    found = search(small, 16, memory, run_of, 64)
    assert 0 < found.fitting < found.considered == everything.considered
    assert [r.time for r in found.best] == sorted(r.time for r in found.best)
    for ranked in found.best:
        plan, t = ranked.plan, ranked.plan.topology
        assert plan.worst.total <= USABLE * memory
        assert plan.gpus == 16 == t.tp * t.pp * plan.dp == t.etp * t.ep * plan.edp * t.pp
        # Planned by itself, a layout has the same bytes.
        asked = Asked(t.tp, t.pp, t.ep, t.etp, plan.dp, global_batch=64, run=run_of)
        assert plan_ranks("small", small, asked).chosen.plan == plan
        assert ranked.time >= (1 + ranked.bubble) * (1 + ranked.imbalance) - 1e-9
    none = search(small, 16, 1000, run_of, 64)
    assert none.fitting == 0
    assert [r.plan.worst.total for r in none.best] == sorted(r.plan.worst.total for r in none.best)


STAGE = {
    "stage", "ranks", "chunks", "parameters", "weights", "gradients", "optimizer", "activations", "cache", "step",
    "total",
}  # fmt: skip


@pytest.mark.parametrize(("length", "level"), [(1 << 20, True), (8192, False)])
def test_the_command_tells_how_level_rows_are_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, length: int, level: bool
) -> None:
    args = ("plan", "Flash", "--cp", "8", "--pp", "4", "--ep", "8", "--seq-length", str(length), "--recompute")
    code, out, _ = run(capsys, monkeypatch, *args, "--json")
    rows = json.loads(out)["rows"]
    shares = rank_flops(FLASH, length, 8, 2)
    assert code == 0 and rows["slowest"] == pytest.approx(max(shares) * 8 / sum(shares), rel=1e-12)
    assert (rows["slowest"] < rows["at_home"] - 0.2) == level and (rows["slowest"] == rows["at_home"]) != level
    _, out, _ = run(capsys, monkeypatch, *args)
    assert f"the slowest of 8 ranks has {rows['slowest']:.3f} times the mean work" in out
    assert (f", {rows['at_home']:.3f} with every query" in out) == level and rows["queries"] in out


def test_the_command_says_what_fits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("plan", "Pro", "--tp", "2", "--pp", "8", "--ep", "16", "--gpu-memory", "80")
    code, out, _ = run(capsys, monkeypatch, *args, "--json")
    found: dict[str, Any] = json.loads(out)
    assert code == 1
    assert set(found) == {
        "schema",
        "verb",
        "version",
        "what",
        "plan",
        "estimate",
        "rows",
        "gpu_memory",
        "usable",
        "fits",
        "search",
    }
    assert (found["schema"], found["what"], found["fits"], found["gpu_memory"]) == (1, "Pro", False, 80 * GIB)
    plan = found["plan"]
    assert set(plan) == {"gpus", "sizes", "layout", "layout_lists", "run", "stages", "worst"}
    assert plan["sizes"] == {"tp": 2, "pp": 8, "vp": 1, "cp": 1, "ep": 16, "etp": 1, "dp": 8, "edp": 1}
    assert plan["gpus"] == 128 == sum(stage["ranks"] for stage in plan["stages"])
    parts = STAGE - {"stage", "ranks", "chunks", "parameters", "total"}
    for stage in plan["stages"]:
        assert set(stage) == STAGE
        assert stage["total"] == sum(stage[part] for part in parts)
    assert plan["worst"]["total"] == max(stage["total"] for stage in plan["stages"])
    assert {"considered", "fitting", "best"} <= set(found["search"])
    assert len(found["search"]["best"]) == 10

    assert found["rows"] is None

    code, out, _ = run(capsys, monkeypatch, "plan", "Flash", "--gpus", "128", "--gpu-memory", "80", "--recompute")
    assert code == 0
    assert "the quickest by estimate" in out
    assert "│ over │" not in out
    code, out, _ = run(capsys, monkeypatch, "plan", "Flash", "--tp", "2", "--gpu-memory", "80", "--mode", "inference")
    assert code == 1
    assert "│ over │" in out


def test_a_written_layout_is_planned_as_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, "plan", "Flash", "--layout", "Et*11|t*11|t*11|t*10mL", "--json")
    assert code == 0
    plan = json.loads(out)["plan"]
    assert [stage["chunks"] for stage in plan["stages"]] == [["Et*11"], ["t*11"], ["t*11"], ["t*10mL"]]
    # The last stage has a copy of the embedding, for MTP.
    topology, _ = make_run_topology(FLASH, Sizes(pp=4), "Et*11|t*11|t*11|t*10mL")
    last = chunk_part(FLASH, topology.layout, 3, topology, Lora(1))
    alone = chunk_part(
        FLASH.without_draft(), make_topology(FLASH.without_draft(), Sizes(pp=4)).layout, 3, topology, Lora(1)
    )
    assert last.dense.plain - alone.dense.plain > FLASH.vocab_size * FLASH.hidden_size


def test_a_folder_is_planned_by_its_config(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, toy_flash: Any
) -> None:
    code, out, _ = run(capsys, monkeypatch, "plan", str(toy_flash), "--tp", "2", "--json")
    assert code == 0
    stage = json.loads(out)["plan"]["stages"][0]
    topology, dp = make_run_topology(tiny(VARIANTS["Flash"]), Sizes(tp=2))
    (want,) = plan_memory(tiny(VARIANTS["Flash"]), topology, dp, Run(micro_batches=8)).stages
    assert (stage["parameters"], stage["total"]) == (want.parameters, want.total)


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; from dsv4_bridge.planning.ranks import Asked, plan_ranks;"
        "from dsv4_bridge.store.named import spec_of;"
        "plan_ranks('Flash', spec_of('Flash'), Asked(tp=2)); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_adapters_are_those_of_the_recipes_by_default() -> None:
    assert Run().lora.rank == choose("flash-lora").recipe.lora.rank
