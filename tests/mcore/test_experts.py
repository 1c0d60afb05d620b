"""Experts computed together equal experts one by one: values, gradients, names, bytes, checkpoints, ranks."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.moe.experts import SequentialMLP
from rank_worker import boxes, digest, train, wrap
from ranks import losses, run_ranks, whole
from reference import (
    RECOMPUTING,
    assert_equal_to_reference,
    draft_spec,
    gradients_of,
    loaded_model,
    pair,
    randomise,
    record,
    replaying,
    saved_folder,
    small_spec,
    some_ids,
)
from safetensors.torch import load_file, save_file

from conftest import same_files
from dsv4_bridge import BridgeError, export_hf, import_hf, make_toy
from dsv4_bridge.mcore import DeepSeekV4Model, build_model, load_checkpoint, load_weights, save_checkpoint
from dsv4_bridge.mcore.kernels.grouped import grouped_linear, stacked
from dsv4_bridge.mcore.layers.experts import GroupedExperts
from dsv4_bridge.mcore.layers.moe import Experts
from dsv4_bridge.mcore.weights.stream import stream_weights
from dsv4_bridge.store.hf import open_hf

pytestmark = pytest.mark.megatron

# Tokens of each expert: uneven, some without, all for one (the last, the first), none at all.
COUNTS = {
    "uneven": (3, 17, 1, 9),
    "some empty": (0, 21, 0, 8),
    "all for the last": (0, 0, 0, 30),
    "all for the first": (30, 0, 0, 0),
    "none": (0, 0, 0, 0),
}
SPEC = small_spec(n_routed_experts=4, num_experts_per_tok=2)
RUN: dict[str, Any] = {"batch": 4, "length": 40, "seeds": [1, 2]}


def row_by_row(x: torch.Tensor, counts: tuple[int, ...], weights: list[torch.Tensor]) -> torch.Tensor:
    """The definition: every row times its expert's matrix."""
    expert = [j for j, count in enumerate(counts) for _ in range(count)]
    rows = [weights[j] @ row for row, j in zip(x, expert, strict=True)]
    return torch.stack(rows) if rows else x @ weights[0].t()


@pytest.mark.parametrize("given", [tuple, torch.tensor], ids=["numbers", "tensor"])
@pytest.mark.parametrize("kernel", [False, True], ids=["loop", "kernel"])
@pytest.mark.parametrize("name", COUNTS)
def test_grouped_products_equal_the_definition(name: str, kernel: bool, given: Any) -> None:
    counts = COUNTS[name]
    random = torch.Generator().manual_seed(len(name))
    x = torch.randn(24, sum(counts), generator=random).t().requires_grad_()  # neither rows nor gradient lie in order
    weights = [torch.randn(16, 24, generator=random).requires_grad_() for _ in counts]
    grad = torch.randn(16, sum(counts), generator=random).t()
    ours = grouped_linear(x, given(counts), weights, kernel)
    theirs = row_by_row(x, counts, weights)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-5)
    wanted = torch.autograd.grad(theirs, [x, *weights], grad, allow_unused=True)
    got = torch.autograd.grad(ours, [x, *weights], grad)
    for ours, theirs, tensor in zip(got, wanted, [x, *weights], strict=True):
        assert torch.allclose(ours, torch.zeros_like(tensor) if theirs is None else theirs, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kernel", [False, True], ids=["loop", "kernel"])
def test_frozen_matrices_get_no_gradient_and_pass_it_on(kernel: bool) -> None:
    counts = COUNTS["some empty"]
    x = torch.randn(29, 24, requires_grad=True)
    weights = [torch.randn(16, 24) for _ in counts]
    weights[3].requires_grad_()
    grouped_linear(x, counts, weights, kernel).sum().backward()
    assert [w.grad is None for w in weights] == [True, True, True, False]
    wanted = torch.cat([w.detach().sum(0).expand(n, 24) for w, n in zip(weights, counts, strict=True)])
    assert torch.allclose(x.grad, wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("given", [tuple, torch.tensor], ids=["numbers", "tensor"])
def test_what_a_kernel_leaves_for_empty_groups_is_not_a_gradient(monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
    """Some write nothing there: their result is whatever the memory held (pytorch/pytorch#172439)."""
    product = torch.nn.functional.grouped_mm

    def careless(a: torch.Tensor, b: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        result = product(a, b, offs=offs)
        if result.ndim == 3:
            result[offs.diff(prepend=offs.new_zeros(1)) == 0] = float("nan")
        return result

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", careless)
    x = torch.randn(29, 24)
    weights = [torch.randn(16, 24).requires_grad_() for _ in range(4)]
    grouped_linear(x, given(COUNTS["some empty"]), weights, True).sum().backward()
    assert [float(w.grad.abs().sum()) > 0 for w in weights] == [False, True, False, True]
    assert not any(w.grad.isnan().any() for w in weights)


@pytest.fixture(scope="module")
def both() -> tuple[GroupedExperts, Experts]:
    """The experts of a layer, grouped and sequential, with the same random values."""
    one = randomise(build_model(SPEC, initialize_weights=False), 2).decoder.layers[1].mlp.experts
    together = build_model(SPEC, expert_layout="grouped").decoder.layers[1].mlp.experts
    with torch.no_grad():
        for j, expert in enumerate(one.local_experts):
            together.linear_fc1.weights[j].copy_(expert.linear_fc1.weight)
            together.linear_fc2.weights[j].copy_(expert.linear_fc2.weight)
    return together, one


@pytest.mark.parametrize("name", COUNTS)
def test_experts_equal_megatrons_sequential_ones(both: tuple[GroupedExperts, Experts], name: str) -> None:
    counts = torch.tensor(COUNTS[name])
    random = torch.Generator().manual_seed(len(name))
    tokens = int(counts.sum())
    hidden, grad = (torch.randn(tokens, SPEC.hidden_size, generator=random) for _ in range(2))
    probs = torch.rand(tokens, generator=random)
    together, one = both
    found = []
    runs: list[Callable[..., Any]] = [together, lambda *args: SequentialMLP.forward(one, *args)]
    for run in runs:
        together.zero_grad(), one.zero_grad()
        inputs = hidden.clone().requires_grad_(), probs.clone().requires_grad_()
        output, bias = run(inputs[0], counts, inputs[1])
        assert bias is None
        output.backward(grad)
        modules = [(e.linear_fc1.weight, e.linear_fc2.weight) for e in one.local_experts]
        if run is together:
            modules = list(zip(together.linear_fc1.weights, together.linear_fc2.weights, strict=True))
        found.append([output, *(x.grad for x in inputs), *(w.grad for pair in modules for w in pair)])
    assert tokens == 0 or found[1][0].abs().max() > 0.5
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max() if theirs.numel() else 0))


@pytest.mark.parametrize(
    "settings",
    [{}, {"moe_token_dispatcher_type": "alltoall"} | RECOMPUTING["moe"]],
    ids=["allgather", "alltoall, recomputed"],
)
def test_the_model_equals_transformers(settings: dict[str, Any]) -> None:
    spec = small_spec()
    model = loaded_model(spec, saved_folder(spec), expert_layout="grouped", **settings)
    assert isinstance(model.decoder.layers[0].mlp.experts, GroupedExperts)
    assert_equal_to_reference(spec, 2, 140, model)
    reference, ids = pair(spec).reference, some_ids(spec, 2, 60)
    with replaying(record(reference, ids).choices):
        ours = model.train()(ids)
    theirs = reference(ids).logits
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3))
    try:
        (theirs * weights).sum().backward()
        with replaying(record(reference, ids).choices):  # for what is computed again
            (ours * weights).sum().backward()
        compared = gradients_of(reference, model)
    finally:
        reference.zero_grad()
    assert sum("ffn.experts" in name for name in compared) == 3 * 4 * spec.n_routed_experts
    for name, (wanted, got) in compared.items():
        assert (wanted - got).norm() <= 1e-4 * wanted.norm() + 1e-9, name


def test_names_are_those_of_the_dev_branch() -> None:
    model = build_model(SPEC, expert_layout="grouped")
    width, hidden = SPEC.moe_intermediate_size, SPEC.hidden_size
    for i in range(SPEC.num_hidden_layers):
        at = f"decoder.layers.{i}.mlp.experts."
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith(at)}
        assert shapes == {f"{at}linear_fc1.weight{j}": (2 * width, hidden) for j in range(4)} | {
            f"{at}linear_fc2.weight{j}": (hidden, width) for j in range(4)
        }


def entries(model: DeepSeekV4Model, **metadata: Any) -> set[tuple[Any, ...]]:
    """What a checkpoint of the model consists of: keys, shapes, places and replicas."""

    def parts(entry: Any) -> Iterator[Any]:
        return iter(entry.build()) if isinstance(entry, ShardedTensorFactory) else iter([entry])

    found = set()
    for entry in model.sharded_state_dict(metadata=metadata or None).values():
        for part in parts(entry):
            if isinstance(part, ShardedTensor):
                found.add((part.key, part.global_shape, part.global_offset, part.local_shape, part.replica_id))
            elif isinstance(part, ShardedObject):
                found.add((part.unique_key, part.replica_id))
    return found


def test_checkpoints_consist_of_the_same_entries() -> None:
    spec = draft_spec()
    one, together = build_model(spec), build_model(spec, expert_layout="grouped")
    assert entries(together) == entries(one)
    key = "decoder.layers.0.mlp.experts.experts.linear_fc1"
    experts = spec.n_routed_experts
    assert {e[1] for e in entries(together) if e[0] == f"{key}.weight"} == {
        (experts, 2 * spec.moe_intermediate_size, spec.hidden_size)
    }
    states = {e[0] for e in entries(together) if e[0].startswith(f"{key}._extra_state")}
    assert states == {f"{key}._extra_state/shard_{e}_{experts}" for e in range(experts)}
    assert entries(together, singleton_local_shards=True) == entries(one, singleton_local_shards=True)


def values(model: DeepSeekV4Model) -> dict[str, bytes]:
    return {n: t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in stream_weights(model, "bf16")}


def test_sequential_experts_load_what_grouped_ones_saved(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 21, payload="extreme")
    spec = open_hf(toy).spec
    model = build_model(spec, dtype=torch.bfloat16, initialize_weights=False, expert_layout="grouped")
    load_weights(model, toy)
    save_checkpoint(model, tmp_path / "saved", 3)
    other = build_model(spec, dtype=torch.bfloat16)
    before = values(other)
    assert load_checkpoint(other, tmp_path / "saved") == 3
    assert values(other) == values(model) != before
    export_hf(tmp_path / "saved", tmp_path / "back", toy)
    assert same_files(toy, tmp_path / "back") == []


def test_training_resumed_with_the_other_kind_is_training_continued(tmp_path: Path) -> None:
    """Optimizer state too, the step count among it: the second step is the same."""
    told = RUN | {"batch": 2}
    model = randomise(build_model(SPEC, expert_layout="grouped", initialize_weights=False), 4)
    wrapped, optimizer = wrap([model], {})
    train(told, [model], wrapped, optimizer)
    save_checkpoint(model, tmp_path, 1, optimizer)
    before = values(model)
    other = build_model(SPEC)
    again, its_optimizer = wrap([other], {})
    load_checkpoint(other, tmp_path, its_optimizer)
    assert values(other) == before
    # The sum over parameters of another order gives another last bit of the norm that gradients are clipped by.
    train(told, [model], wrapped, optimizer)
    train(told, [other], again, its_optimizer)
    ours, theirs = whole([{"data": boxes([other], "data")}], "data"), whole([{"data": boxes([model], "data")}], "data")
    for name, value in theirs.items():
        assert (ours[name] - value).float().norm() <= 1e-6 * value.float().norm(), name


def test_stream_gives_the_source_back_byte_for_byte(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 22, payload="extreme", ragged=True)
    import_hf(toy, tmp_path / "imported")
    stored = {}
    for file in toy.glob("*.safetensors"):
        stored |= load_file(file)
    loaders: list[tuple[Callable[..., Any], Path]] = [
        (load_weights, toy),
        (load_weights, tmp_path / "imported"),
        (load_checkpoint, tmp_path / "imported"),  # megatron's own loader, strict
    ]
    for load, source in loaders:
        model = build_model(open_hf(toy).spec, dtype=torch.bfloat16, expert_layout="grouped")
        load(model, source)
        streamed = dict(stream_weights(model, "source", like=toy))
        assert set(streamed) == set(stored)
        for name, tensor in stored.items():
            assert tensor.dtype == streamed[name].dtype, name
            assert torch.equal(streamed[name].contiguous().view(torch.uint8), tensor.view(torch.uint8)), name


def test_states_of_a_foreign_checkpoint_are_accepted() -> None:
    """Megatron-LM hands everything that a checkpoint held to `load_state_dict`, the empty states too."""
    model = build_model(SPEC, expert_layout="grouped")
    experts = model.decoder.layers[0].mlp.experts
    state = experts.state_dict() | {n: None for n in experts.sharded_state_dict() if "_extra_state" in n}
    assert len(state) == 4 * SPEC.n_routed_experts
    experts.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight3"):
        experts.load_state_dict({n: v for n, v in state.items() if n != "linear_fc1.weight3"})


def test_a_layers_experts_are_one_block_of_memory_and_stay_one_under_the_distributed_optimizer() -> None:
    """Else every step would copy all of them, to hand the kernel one tensor."""
    model = build_model(SPEC, expert_layout="grouped")
    for _ in range(2):
        for layer in model.decoder.layers:
            for matrices in (layer.mlp.experts.linear_fc1, layer.mlp.experts.linear_fc2):
                block = stacked(matrices.weights)
                assert block.data_ptr() == matrices.weights[0].data_ptr()
                assert all(torch.equal(a, b) for a, b in zip(block, matrices.weights, strict=True))
                assert all(a.data_ptr() < b.data_ptr() for a, b in pairwise(matrices.weights))
        where = model.decoder.layers[0].mlp.experts.linear_fc1.weights[0].data_ptr()
        wrap([model], {})
    assert where != model.decoder.layers[0].mlp.experts.linear_fc1.weights[0].data_ptr()
    scattered = [w.clone() for w in reversed(matrices.weights)]
    assert torch.equal(stacked(scattered), block.flip(0))


def test_layouts_that_do_not_exist_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4_bridge.mcore.config.HAVE_TE", False)
    with pytest.raises(BridgeError, match="expert_layout='fused': expected one of sequential, grouped"):
        build_model(SPEC, expert_layout="fused")
    with pytest.raises(BridgeError, match="Transformer Engine is not installed; 'grouped' does the same"):
        build_model(SPEC, expert_layout="transformer_engine")
    with pytest.raises(BridgeError, match="say expert_layout='grouped'"):
        build_model(SPEC, moe_grouped_gemm=True)


# ---------------------------------------------------------------- ranks

GROUPED = {"expert_layout": "grouped"}
ALLTOALL = {"moe_token_dispatcher_type": "alltoall"}
EP2: dict[str, Any] = {"parallel": {"ep": 2}}
ETP2: dict[str, Any] = {"parallel": {"tp": 2, "etp": 2}}
# Two ranks, always: sequential experts are then whole on each, which test_parallel.py compares with one rank.
STEPS: dict[str, dict[str, Any]] = {
    "whole": {},
    "ep2": EP2 | {"settings": GROUPED},
    "ep2 alltoall": EP2 | {"settings": GROUPED | ALLTOALL},
    "etp2": ETP2 | {"settings": GROUPED},
    "etp2 alone alltoall": {"parallel": {"etp": 2}, "settings": GROUPED | ALLTOALL},
    "starved whole": {},
    "starved ep2": EP2 | {"settings": GROUPED},
    "starved ep2 alltoall": EP2 | {"settings": GROUPED | ALLTOALL},
}
RESUMED = (("etp2", "whole"), ("etp2", "ep2"))  # where it was saved, where it goes on
STREAMED = [("sequential", EP2), ("grouped", EP2), ("grouped", ETP2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`toy`, and `starved`, where all tokens go to the experts of the first half."""
    root = tmp_path_factory.mktemp("experts")
    spec = draft_spec(num_hidden_layers=2, compress_ratios=(0, 4), n_routed_experts=4, swiglu_limit=5.0)
    for name in ("toy", "starved"):
        make_toy(root / name, "Flash", 23, spec=spec, payload="natural")
    for file in (root / "starved").glob("*.safetensors"):
        held = load_file(file)
        for name, tensor in held.items():
            if name.endswith("gate.bias"):
                tensor[2:] -= 1000
            elif name.endswith("tid2eid"):
                tensor.copy_(torch.stack([torch.randperm(2) for _ in tensor]))
        save_file(held, file)
    return root


@pytest.fixture(scope="module")
def ran(folder: Path) -> dict[str, list[Any]]:
    """A training step of every case, the next from checkpoints, and what each kind of experts streams."""
    cases: dict[str, dict[str, Any]] = {}
    for name, case in STEPS.items():
        weights = folder / ("starved" if "starved" in name else "toy")
        save = f"saved-{name}" if name in dict(RESUMED) else None
        cases[name] = {"action": "step", "save": save, "weights": weights} | case
    for source, name in RESUMED:
        cases[f"{source} to {name}"] = {"action": "resume", "load": f"saved-{source}"} | STEPS[name]
    for kind, parallel in STREAMED:
        settings = {"expert_layout": kind, "dtype": "bfloat16"}
        cases[f"stream {kind} {parallel}"] = {"action": "stream", "settings": settings} | parallel
    results = run_ranks(folder, "experts", 2, list(cases.values()), weights=folder / "toy", **RUN)
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize("name", [name for name in STEPS if "whole" not in name.split()])
def test_cut_and_grouped_experts_have_the_gradients_of_whole_sequential_ones(
    ran: dict[str, list[Any]], name: str
) -> None:
    starved = "starved" in name
    one, ours = ran["starved whole" if starved else "whole"], ran[name]
    assert losses(ours) == pytest.approx(losses(one), rel=1e-5)
    assert ours[0]["norm"] == pytest.approx(one[0]["norm"], rel=1e-5)
    wanted, got = whole(one, "gradients"), whole(ours, "gradients")
    assert set(got) == set(wanted)
    for key, grad in wanted.items():
        assert (got[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-9, key
    experts = {e: [g for k, g in wanted.items() if f"layers.1.ffn.experts.{e}." in k] for e in range(4)}
    assert all(len(grads) == 3 for grads in experts.values())
    assert any(g.any() for g in experts[0])
    assert any(g.any() for g in experts[2] + experts[3]) != starved


@pytest.mark.parametrize(("source", "name"), RESUMED)
def test_training_goes_on_from_cut_experts_at_another_layout(ran: dict[str, list[Any]], source: str, name: str) -> None:
    resumed = ran[f"{source} to {name}"]
    assert losses(resumed) == pytest.approx(losses(ran[source], "after"), rel=1e-5)
    assert losses(resumed) != pytest.approx(losses(ran[source]), rel=1e-4)


def test_trap_32_exports_of_every_kind_and_layout_are_the_folder(ran: dict[str, list[Any]], folder: Path) -> None:
    files = (folder / "toy").glob("*.safetensors")
    stored = {n: (str(t.dtype), tuple(t.shape), digest(t)) for f in files for n, t in load_file(f).items()}
    exports = [streamed for name, ranks in ran.items() if name.startswith("stream ") for streamed in ranks]
    assert len(exports) == 2 * len(STREAMED)
    assert all(streamed == stored for streamed in exports)
    assert sum("ffn.experts" in name for name in stored) == 3 * 4 * 3 * 2  # layers, experts, matrices, scales too
