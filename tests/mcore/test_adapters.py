"""Adapters in one process: peft on transformers' model computes and learns the same, and the base stays as it is."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_tools import adapter_values
from peft import LoraConfig, PeftModel, get_peft_model
from reference import (
    assert_same_choices,
    distance,
    new_folder,
    our_model,
    recording_choices,
    reference_model,
    replaying,
    small_spec,
    some_ids,
)
from safetensors.torch import load_file
from transformers import DeepseekV4ForCausalLM

from dsv4_bridge.convert.merge import merge
from dsv4_bridge.errors import BridgeError
from dsv4_bridge.lora.adapters import Adapter, Adapters
from dsv4_bridge.lora.peft import export_peft, import_peft
from dsv4_bridge.mcore import load_weights, stream_weights
from dsv4_bridge.mcore.adapters.adapters import (
    add_adapters,
    bank_of,
    gather_adapters,
    load_adapters,
    sharded_adapters,
    trainable,
)
from dsv4_bridge.mcore.weights.places import places
from dsv4_bridge.spec.lora import CARRIERS, Lora, targets

pytestmark = [pytest.mark.megatron, pytest.mark.hf]

SPEC = small_spec(num_hidden_layers=2, compress_ratios=(0, 4))
SHARED = ("ffn.shared_experts",)
KINDS: dict[str, tuple[Lora, dict[str, Any]]] = {
    "attention": (Lora(4, 6), {}),
    "dora": (Lora(4, 6, targets=("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_b", *SHARED), dora=True), {}),
    "everything": (Lora(4, 6, targets=CARRIERS), {}),
    "grouped": (Lora(4, 6, targets=("attn.wo_a", "ffn.experts")), {"expert_layout": "grouped"}),
    "gate and up": (Lora(4, 6, targets=("ffn.experts.w1", "ffn.experts.w3")), {}),
}


def some_adapters(lora: Lora, weights: Any = None, seed: int = 3) -> Adapters:
    """Random adapters of a size that matters; magnitudes a tenth off the norms that `weights` tells."""
    random, values = torch.Generator().manual_seed(seed), {}
    for target in targets(SPEC, lora.keys):
        out, into = target.shape
        a = torch.randn(lora.rank, into, generator=random) * into**-0.5
        b = torch.randn(out, lora.rank, generator=random) * 0.3
        magnitude = weights(target) * (1 + 0.1 * torch.randn(out, generator=random)) if lora.dora else None
        values[target.name] = Adapter(a, b, magnitude)
    return Adapters(lora, values)


def adapted(kind: str) -> tuple[DeepseekV4ForCausalLM, Any, Adapters]:
    """The reference, and our model of the same weights with adapters."""
    lora, settings = KINDS[kind]
    folder = new_folder()
    reference = reference_model(SPEC, folder)
    model = our_model(reference, SPEC, folder, **settings)
    add_adapters(model, lora)
    adapters = some_adapters(lora, lambda t: reference.get_submodule(t.module).weight.detach().norm(dim=1))
    load_adapters(model, adapters)
    return reference, model, adapters


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest) -> Iterator[tuple[PeftModel, Any, Adapters, Path]]:
    """peft's model with the exported adapters, ours, the adapters and the folder."""
    reference, model, adapters = adapted(request.param)
    out = export_peft(gather_adapters(model), SPEC, new_folder() / "adapter")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|mismatch).*")
        theirs = PeftModel.from_pretrained(reference, out, is_trainable=True)
    yield theirs.eval(), model.eval(), adapters, out


def test_peft_computes_the_same(both: tuple[PeftModel, Any, Adapters, Path]) -> None:
    theirs, model, *_ = both
    ids = some_ids(SPEC, 2, 40)
    with torch.no_grad():
        with theirs.disable_adapter():
            base = theirs(ids).logits
        with recording_choices(theirs.get_base_model(), 2) as choices:
            expected = theirs(ids).logits
        with replaying(choices) as own:
            ours = model(ids)
    assert_same_choices(own, choices)
    assert distance(ours, expected) <= 1e-5
    assert distance(base, expected) > 0.1


def test_peft_learns_the_same(both: tuple[PeftModel, Any, Adapters, Path]) -> None:
    """The gradient of every adapter, in the names and order of its file; nothing else has one."""
    theirs, model, adapters, out = both
    ids = some_ids(SPEC, 2, 40)
    weights = torch.randn(SPEC.vocab_size, generator=torch.Generator().manual_seed(1))
    with recording_choices(theirs.get_base_model(), 2) as choices:
        (theirs(ids).logits * weights).sum().backward()
    with replaying(choices):
        (model(ids) * weights).sum().backward()
    held = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in held.values())
    assert all(p.grad is None for n, p in model.named_parameters() if n not in held)
    for adapter in bank_of(model) or ():
        for part in adapter.held():
            part.tensor.data, part.tensor.grad = part.tensor.grad, None
    ours = load_file(export_peft(gather_adapters(model), SPEC, new_folder() / "x") / "adapter_model.safetensors")  # type: ignore[arg-type]
    load_adapters(model, adapters)
    found = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    found = {n.replace("magnitude_vector.weight", "magnitude_vector"): g for n, g in found.items()}
    theirs.zero_grad()
    assert set(found) == set(ours) == set(load_file(out / "adapter_model.safetensors"))
    for name, grad in found.items():
        assert grad is not None and grad.norm() > 0, name
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm(), name


def test_it_comes_back_from_its_file_and_from_pefts(
    both: tuple[PeftModel, Any, Adapters, Path], tmp_path: Path
) -> None:
    theirs, _, adapters, out = both
    theirs.save_pretrained(tmp_path)
    for folder in (out, tmp_path):
        back = import_peft(folder, SPEC)
        assert set(back.lora.keys) == set(adapters.lora.keys)
        assert (back.lora.rank, back.lora.scale, back.lora.dora) == (4, 1.5, adapters.lora.dora)
        assert set(back.values) == set(adapters.values)
        for name, adapter in back.values.items():
            for ours, wanted in zip(adapter, adapters.values[name], strict=True):
                assert (ours is None and wanted is None) or torch.equal(ours, wanted), name


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_began_goes_into_our_model(rslora: bool, tmp_path: Path) -> None:
    lora = Lora(4, 6, targets=("attn.wq_b", "attn.wo_a", "ffn.experts"))
    folder = new_folder()
    reference = reference_model(SPEC, folder)
    model = our_model(reference, SPEC, folder)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["self_attn.q_b_proj"],
        target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "self_attn.o_a_proj.weight"],
        init_lora_weights=False,
    )
    theirs = get_peft_model(reference, config).eval()
    theirs.save_pretrained(tmp_path)
    found = import_peft(tmp_path, SPEC)
    assert found.lora.scale == pytest.approx(3.0 if rslora else 1.5)
    add_adapters(model, Lora(4, found.lora.alpha, targets=lora.targets))
    load_adapters(model, found)
    ids = some_ids(SPEC, 1, 40)
    with torch.no_grad(), recording_choices(reference, 1) as choices:
        expected = theirs(ids).logits
    with torch.no_grad(), replaying(choices):
        assert distance(model(ids), expected) <= 1e-5


def test_adapters_of_some_layers_go_into_our_model(tmp_path: Path) -> None:
    """The other layers' add nothing, whatever they were before; ranks of their own are for merges."""
    folder = new_folder()
    reference = reference_model(SPEC, folder)
    model = our_model(reference, SPEC, folder)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    settings |= {"target_modules": ["self_attn.q_b_proj", "self_attn.o_b_proj"], "layers_to_transform": [1]}
    for dora in (True, False):
        theirs = get_peft_model(reference, LoraConfig(use_dora=dora, **settings)).eval()
        theirs.save_pretrained(tmp_path / str(dora))
        reference = theirs.unload()
    found = import_peft(tmp_path / "False", SPEC)
    assert {name.partition(".attn")[0] for name in found.values} == {"layers.1"}
    lora = Lora(4, 6, targets=("attn.wq_b", "attn.wo_b"))
    add_adapters(model, lora)
    load_adapters(model, some_adapters(lora))
    load_adapters(model, found)
    theirs = PeftModel.from_pretrained(reference, tmp_path / "False").eval()
    ids = some_ids(SPEC, 1, 40)
    with torch.no_grad(), recording_choices(reference, 1) as choices:
        expected = theirs(ids).logits
    with torch.no_grad(), replaying(choices):
        assert distance(model(ids), expected) <= 1e-5
    reference = theirs.unload()
    settings |= {"rank_pattern": {"q_b_proj": 2}, "layers_to_transform": None}
    get_peft_model(reference, LoraConfig(**settings)).save_pretrained(tmp_path / "ranks")
    ranks = import_peft(tmp_path / "ranks", SPEC)
    with pytest.raises(BridgeError, match=r"2 have a rank or alpha of their own .layers.0.attn.wq_b: rank 2.*merge"):
        load_adapters(model, ranks)
    again = our_model(reference_model(SPEC, folder / "dora"), SPEC, folder / "dora")
    add_adapters(again, Lora(4, 6, targets=("attn.wq_b", "attn.wo_b"), dora=True))
    load_adapters(again, import_peft(tmp_path / "True", SPEC))
    theirs = PeftModel.from_pretrained(reference_model(SPEC, folder / "dora"), tmp_path / "True").eval()
    with torch.no_grad(), recording_choices(theirs.get_base_model(), 1) as choices:
        expected = theirs(ids).logits
    with torch.no_grad(), replaying(choices):
        assert distance(again(ids), expected) <= 1e-5


def test_the_base_does_not_see_its_adapters() -> None:
    """Names, states, places, loading and streaming are those of the model without."""
    folder = new_folder()
    model = our_model(reference_model(SPEC, folder), SPEC, folder)
    ids = some_ids(SPEC, 1, 20)
    with torch.no_grad():
        before, state = model(ids), {n: v for n, v in model.state_dict().items() if v is not None}
    sharded, streamed = set(model.sharded_state_dict()), dict(stream_weights(model))
    found = places(model)[1].keys()
    lora = Lora(4, 6, targets=CARRIERS)
    add_adapters(model, lora)
    with torch.no_grad():
        assert torch.equal(model(ids), before), "new adapters add nothing"
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.uniform_(-0.1, 0.1)
        assert not torch.allclose(model(ids), before, atol=0.1)
    assert {n for n, v in model.state_dict().items() if v is not None} == set(state)
    assert set(model.sharded_state_dict()) == sharded and places(model)[1].keys() == found
    again = dict(stream_weights(model))
    assert again.keys() == streamed.keys() and all(torch.equal(again[n], t) for n, t in streamed.items())
    kept = {n: t.detach().clone() for n, t in model.adapters.named_parameters()}
    model.load_state_dict(state | {n: v for n, v in model.state_dict().items() if v is None})
    load_weights(model, folder / "saved", allow_lossy=True)
    assert all(torch.equal(t, kept[n]) for n, t in model.adapters.named_parameters()) and len(kept) > 50
    count, total = trainable(model)
    assert count == adapter_values(SPEC, lora) == sum(t.numel() for t in kept.values())
    assert total == count + sum(p.numel() for n, p in model.named_parameters() if n in state)
    keys = sharded_adapters(model)
    assert keys["adapters.layers.1.attn.wo_b.lora_A"].global_shape == (4, SPEC.o_groups * SPEC.o_lora_rank)
    stacked = keys["adapters.layers.1.ffn.experts.w3.lora_B.5"]
    assert stacked.key == "adapters.layers.1.ffn.experts.w3.lora_B"
    assert stacked.global_shape == (SPEC.n_routed_experts, SPEC.moe_intermediate_size, 4)


def test_dropout_is_of_the_adapters_input_in_training() -> None:
    folder = new_folder()
    model = our_model(reference_model(SPEC, folder), SPEC, folder)
    lora = Lora(4, 6, 0.5, targets=("attn",))
    add_adapters(model, lora)
    ids = some_ids(SPEC, 1, 20)
    with torch.no_grad():
        base = model.train()(ids)
        assert torch.equal(model(ids), base), "B is zero: nothing to drop"
        load_adapters(model, some_adapters(lora))
        one, other = model(ids), model(ids)
        assert not torch.allclose(one, other)
        assert torch.equal(model.eval()(ids), model(ids))


def test_bf16_model_with_float32_adapters() -> None:
    """They are multiplied in the model's type, and keep their own."""
    folder = new_folder()
    model = our_model(reference_model(SPEC, folder), SPEC, folder, dtype=torch.bfloat16)
    dora = Lora(4, 6, targets=("attn.wq_a", "attn.wo_b"), dora=True, dtype="float32")
    add_adapters(model, dora)
    ids = some_ids(SPEC, 1, 20)
    logits = model(ids)
    assert logits.dtype is torch.bfloat16
    logits.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype is torch.float32 and parameter.grad is not None, name
            assert parameter.grad.isfinite().all() and ("lora_A" in name or parameter.grad.norm() > 0)


def test_refused() -> None:
    folder = new_folder()
    model = our_model(reference_model(SPEC, folder), SPEC, folder)
    for lora, words in (
        (Lora(targets=("attn.indexer.wq_b",)), "no target 'attn.indexer.wq_b'"),
        (Lora(targets=("attn.wo_a",), dora=True), "DoRA on attn.wo_a"),
        (Lora(targets=("ffn.experts",), dora=True), "DoRA on ffn.experts.w1"),
        (Lora(targets=("ffn.experts.w1", "ffn.experts.w2")), "ffn.experts.w1 and ffn.experts.w3 are one tensor"),
        (Lora(rank=0), "rank 0"),
        (Lora(dropout=1.0), "dropout 1.0"),
        (Lora(dtype="float16"), "float16"),
    ):
        with pytest.raises(BridgeError, match=words):
            add_adapters(model, lora)
    with pytest.raises(BridgeError, match="add_adapters first"):
        gather_adapters(model)
    add_adapters(model, Lora(4, 6))
    before = {n: t.detach().clone() for n, t in model.adapters.named_parameters()}
    with pytest.raises(BridgeError, match="some already"):
        add_adapters(model, Lora())
    for lora, words in (
        (Lora(8, 6), r"rank 8, the model's 4; .* \(lora\.rank of a recipe\)"),
        (Lora(4, 8), "alpha 8"),
        (Lora(4, 6, targets=("attn.wq_a",)), "6 that the model has, and they lack .*lora.targets='attn.wq_a'$"),
        (Lora(4, 6, targets=("attn",)), "2 that they have, and the model lacks .layers.0.attn.wo_a"),
    ):
        with pytest.raises(BridgeError, match=words):
            load_adapters(model, some_adapters(lora))
    assert all(torch.equal(t, before[n]) for n, t in model.adapters.named_parameters())


def on_a_grid(lora: Lora, reference: DeepseekV4ForCausalLM) -> Adapters:
    """Adapters, and weights under them, whose sum is exact in bf16: multiples of 2^-8 below 1."""
    random, values = torch.Generator().manual_seed(7), {}
    state = reference.state_dict()
    for target in targets(SPEC, lora.keys):
        out, into = target.shape
        name = target.module if target.parameter else f"{target.module}.weight"
        expert = target.items[0].expert
        held = state[name] if expert is None else state[name][expert]
        held.copy_(torch.randint(-120, 121, held.shape, generator=random) / 256 * (held != 0))
        # A has one entry a column, so each value of B A is one of B's.
        a = torch.nn.functional.one_hot(torch.randint(0, lora.rank, (into,), generator=random), lora.rank).T.float()
        b = torch.randint(-60, 61, (out, lora.rank), generator=random) / 256
        values[target.name] = Adapter(a, b)
    return Adapters(lora, values)


def test_merged_in_bf16_transformers_computes_what_peft_computes(tmp_path: Path) -> None:
    lora = Lora(2, 4.0, targets=CARRIERS)
    reference = reference_model(SPEC, tmp_path / "model")
    adapters = on_a_grid(lora, reference)
    reference.bfloat16().save_pretrained(tmp_path / "base")
    export_peft(adapters, SPEC, tmp_path / "adapter")
    report = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert report.total.error <= 1e-7 and report.warnings == ()
    assert len(report.tensors) == SPEC.num_hidden_layers * (5 + 3 + 3 * SPEC.n_routed_experts)
    ids = some_ids(SPEC, 2, 40)
    load = {"dtype": torch.float32, "attn_implementation": "eager"}
    with torch.no_grad():
        merged = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "merged", **load).eval()(ids).logits
        base = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "base", **load).eval()
        plain = base(ids).logits
        expected = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(ids).logits
    assert distance(plain, expected) > 0.1
    assert distance(merged, expected) <= 1e-5
