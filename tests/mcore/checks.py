"""Checks of the model for `traps.py`: each passes on the model as it is, and raises AssertionError otherwise."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.transformer.module import Float16Module
from mtp_formula import assert_mtp_is_the_formula
from reference import (
    RECOMPUTING,
    assert_equal_to_reference,
    draft_spec,
    loaded_model,
    new_folder,
    pair,
    randomise,
    recorded,
    saved_folder,
    small_spec,
    some_ids,
    two_in_flight,
)
from torch.nn import functional as F

from dsv4_bridge import BridgeError, make_toy
from dsv4_bridge.mcore import build_model
from dsv4_bridge.mcore.config import model_config
from dsv4_bridge.mcore.layers.block import HyperConnectedBlock
from dsv4_bridge.mcore.layers.rope import make_rotary
from dsv4_bridge.mcore.model import DeepSeekV4Model
from dsv4_bridge.spec.megatron import extra_state_keys, regions
from dsv4_bridge.spec.plan import expand
from dsv4_bridge.spec.variants import VARIANTS

# Large and unequal eps, few Sinkhorn iterations, a short YaRN: what is 1e-6 of the released numbers'
# values is a per cent of these. The two wq_b have one shape, so that nothing but names tells them apart.
SIZES: dict[str, object] = {
    "hidden_size": 64,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "num_attention_heads": 4,
    "q_lora_rank": 48,
    "o_lora_rank": 16,
    "o_groups": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 6,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 5,
    "vocab_size": 128,
    "hc_eps": 1e-2,
    "rms_norm_eps": 1e-3,
    "hc_sinkhorn_iters": 3,
    "rope_factor": 8.0,
    "rope_original_max_position_embeddings": 4096,
    "swiglu_limit": 1.5,
}
TINY = small_spec(**SIZES)
TINY_DRAFT = draft_spec(1, **SIZES)
# More experts than bf16 counts exactly.
MANY = small_spec(
    **SIZES | {"n_routed_experts": 384, "num_hidden_layers": 1, "num_hash_layers": 1, "compress_ratios": (0,)}
)


def warm() -> None:
    """Make what the checks share, before any bug is in."""
    recorded(TINY, 2, 260)
    recorded(small_spec(), 2, 20)
    saved_folder(TINY)
    saved_folder(MANY)
    _toy_draft()
    _precise()


def equal_to_transformers() -> None:
    assert_equal_to_reference(TINY, 2, 260)


def equal_to_transformers_at_released_eps() -> None:
    """eps 1e-6 and embeddings of RMS 0.005."""
    assert_equal_to_reference(small_spec(), 2, 20)


def loaded_equals_transformers() -> None:
    """From the folder that transformers saved, anew."""
    assert_equal_to_reference(TINY, 2, 260, loaded_model(TINY, saved_folder(TINY)))


def refuses(**settings: object) -> Callable[[], None]:
    """That these settings are refused, each by its name."""

    def check() -> None:
        for name, value in settings.items():
            try:
                model_config(TINY_DRAFT, **{name: value})
            except BridgeError as error:
                assert f"  {name}" in str(error), error
            else:
                raise AssertionError(f"{name}={value} is accepted")

    return check


@cache
def _precise() -> dict[str, torch.Tensor]:
    """Values of a model whose every float32 number has bits that bf16 lacks."""
    model = randomise(build_model(TINY_DRAFT, initialize_weights=False), 5)
    return {n: t.clone() for n, t in model.state_dict().items() if t is not None}


FLOAT32 = ("hc_head_", "_hyper_connection.", "attn_sink", ".ape", "expert_bias")


def _float32_survives(wrap: Callable[[DeepSeekV4Model], torch.nn.Module], parts: tuple[str, ...]) -> None:
    model = build_model(TINY_DRAFT, dtype=torch.bfloat16)
    values = _precise()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor is not None:
                tensor.copy_(values[name])
    after = wrap(model).state_dict()
    kept = [n for n in values if any(part in n for part in parts)]
    assert len(kept) >= 4
    assert [n for n in kept if after[n].dtype is not torch.float32 or not torch.equal(after[n], values[n])] == []
    assert after["output_layer.weight"].dtype is torch.bfloat16


def float32_survives_a_cast() -> None:
    _float32_survives(lambda m: m.to(torch.bfloat16), FLOAT32)


def float32_survives_float16_module() -> None:
    _float32_survives(lambda m: Float16Module(m.config, m).module, FLOAT32)


def bias_survives_float16_module() -> None:
    _float32_survives(lambda m: Float16Module(m.config, m).module, ("expert_bias",))


def checkpoint_has_every_tensor() -> None:
    """In-memory names all there; on disk exactly the keys that import and export know, with their sizes."""
    model = build_model(TINY_DRAFT)
    sharded = model.sharded_state_dict()
    assert set(sharded) == set(model.state_dict()) - {"output_layer._extra_state"}
    plan = expand(TINY_DRAFT)
    sizes = {r.key: r.global_shape for item in plan.items for r in regions(item, TINY_DRAFT)}
    objects = {e.unique_key for e in sharded.values() if isinstance(e, ShardedObject)}
    assert {e.key for e in sharded.values() if not isinstance(e, ShardedObject)} == set(sizes)
    assert objects == set(extra_state_keys(plan))
    for entry in sharded.values():
        if isinstance(entry, ShardedTensor):
            assert tuple(entry.global_shape) == sizes[entry.key], entry.key


def bf16_collapse_equals_transformers() -> None:
    reference, ours = pair(TINY)
    make = torch.Generator().manual_seed(6)
    streams = torch.randn((2, 30, TINY.hc_mult, TINY.hidden_size), generator=make).bfloat16()  # [b, s, n, h]
    with torch.no_grad():
        theirs = reference.model.layers[1].attn_hc(streams)[2]
        mine = ours.decoder.layers[1].self_attention_hyper_connection(streams.transpose(0, 1).flatten(2))[0]
    off = (mine.transpose(0, 1).float() - theirs.float()).norm() / theirs.float().norm()
    # The last bit of a sum may fall either way.
    assert off <= 5e-4, off


def shapes_tell_the_ratios_apart() -> None:
    layers = build_model(TINY).decoder.layers
    cores = [layer.self_attention.core_attention for layer in layers]
    found = [core.compressor and tuple(core.compressor.ape.shape) for core in cores]
    assert found == [None, (4, 64), (128, 32), (4, 64)]
    assert [core.indexer is not None for core in cores] == [False, True, False, True]
    assert [tuple(core.compressor.linear_wkv.weight.shape) for core in cores[1:]] == [(64, 64), (32, 64), (64, 64)]


def only_the_indexer_is_frozen() -> None:
    model = randomise(build_model(TINY, initialize_weights=False)).train()
    ids = some_ids(TINY, 2, 130)
    model(ids, labels=ids).sum().backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen == {name for name, _ in model.named_parameters() if ".indexer." in name}


def names_find_their_own_tensor() -> None:
    """wq_b is no indexer.wq_b, and a head no hc_head."""
    model, reference = loaded_model(TINY, saved_folder(TINY)), pair(TINY).reference
    attention, theirs = model.decoder.layers[1].self_attention, reference.model.layers[1].self_attn
    for mine, other in (
        (attention.linear_q_up_proj.weight, theirs.q_b_proj.weight),
        (attention.core_attention.indexer.linear_wq_b.weight, theirs.compressor.indexer.q_b_proj.weight),
        (model.output_layer.weight, reference.lm_head.weight),
        (model.decoder.hc_head_fn, reference.model.hc_head.hc_fn),
    ):
        assert torch.equal(mine, other)


def tables_of_ids_arrive_whole() -> None:
    table = loaded_model(MANY, saved_folder(MANY)).decoder.layers[0].mlp.router.tid2eid
    expected = pair(MANY).reference.model.layers[0].mlp.gate.tid2eid
    assert table.dtype is torch.int32
    assert int(expected.max()) > 256
    assert torch.equal(table.long(), expected)


def each_row_has_its_own_ids() -> None:
    """With embeddings given, ids still route the hash layer: other ids, other experts."""
    model = pair(TINY).ours
    ids = some_ids(TINY, 2, 12)
    embedded = torch.randn((12, 2, TINY.hidden_size), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        first = model(ids, decoder_input=embedded)
        exchanged = model(ids.flip(0), decoder_input=embedded.flip(1)).flip(0)
        other = model((ids + 1) % TINY.vocab_size, decoder_input=embedded)
    assert torch.allclose(first, exchanged, atol=1e-5)
    assert not torch.allclose(first, other, atol=1e-2)


def recomputed_with_its_own_ids() -> None:
    losses, gradients, _ = two_in_flight(TINY)
    again, recomputed, _ = two_in_flight(TINY, **RECOMPUTING["full"])
    assert all(torch.equal(a, b) for a, b in zip(losses, again, strict=True))
    assert [n for n in gradients if not torch.equal(gradients[n], recomputed[n])] == []


def weight_multiplies_before_the_second_matrix() -> None:
    """Bit for bit: behind it, the product would round elsewhere."""
    experts = pair(TINY).ours.decoder.layers[1].mlp.experts
    make = torch.Generator().manual_seed(8)
    x, weight = torch.randn((12, TINY.hidden_size), generator=make), torch.rand(12, generator=make)
    counts = torch.full((TINY.n_routed_experts,), 2)
    limit = TINY.swiglu_limit
    with torch.no_grad():
        ours, _ = experts(x, counts, weight)
        for e, expert in enumerate(experts.local_experts):
            here = slice(2 * e, 2 * e + 2)
            gate, up = F.linear(x[here], expert.linear_fc1.weight).chunk(2, -1)
            inner = F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weight[here, None]
            assert torch.equal(ours[here], F.linear(inner, expert.linear_fc2.weight)), e


def hash_layers_have_tables_and_others_biases() -> None:
    state = build_model(TINY_DRAFT).state_dict()
    routed = [f"decoder.layers.{i}" for i in (1, 2, 3)] + ["mtp.layers.0.mtp_model_layer"]
    assert {n for n in state if n.endswith("tid2eid")} == {"decoder.layers.0.mlp.router.tid2eid"}
    assert {n for n in state if n.endswith("expert_bias")} == {f"{at}.mlp.router.expert_bias" for at in routed}


@cache
def _toy_draft() -> Path:
    return make_toy(new_folder() / "toy", "Flash", 3, spec=TINY_DRAFT)


def mtp_is_loaded() -> None:
    loaded = [loaded_model(TINY_DRAFT, _toy_draft(), dtype=torch.bfloat16).state_dict() for _ in range(2)]
    names = [n for n, t in loaded[0].items() if t is not None and n.startswith("mtp.")]
    assert len(names) > 30
    assert [n for n in names if not torch.equal(loaded[0][n], loaded[1][n])] == []
    spread = loaded[0]["mtp.layers.0.mtp_model_layer.self_attention.linear_proj.weight"].float().std()
    assert 1e-3 < spread < 1


def mtp_is_its_formula() -> None:
    assert_mtp_is_the_formula(2, 40)


def mtp_has_gradients() -> None:
    model = randomise(build_model(TINY_DRAFT, initialize_weights=False)).train()
    ids = some_ids(TINY_DRAFT, 2, 9)
    try:
        model(ids, labels=ids).sum().backward()
    except RuntimeError as error:
        raise AssertionError(str(error)) from None
    assert model.mtp.layers[0].h_proj.weight.grad.any()


def ratios_are_those_of_every_release() -> None:
    for variant in VARIANTS.values():
        if variant.name.startswith("V4.1"):  # no model is built of it
            continue
        spec = variant.spec
        made = model_config(spec)
        pro = spec.num_hidden_layers == 61
        start, count = ((128, 128), 29) if pro else ((0, 0), 20)
        expected = start + (4, 128) * count + (4,) + (0,) * spec.mtp_layers
        assert tuple(made.csa_compress_ratios) == expected, variant.name
        assert made.csa_compress_rotary_base == 160000.0
        assert made.moe_router_topk_scaling_factor == (2.5 if pro else 1.5)
        assert made.qk_pos_emb_head_dim == 64


def an_inner_stage_hands_on_all_streams() -> None:
    """What comes before the last stage has neither head nor final norm."""
    whole = pair(TINY).ours
    stage = HyperConnectedBlock(whole.config, pre_process=True, post_process=False, pg_collection=whole.pg_collection)
    assert not any("hc_head" in n or "final_layernorm" in n for n in stage.state_dict())
    stage.load_state_dict({n: t for n, t in whole.decoder.state_dict().items() if n.startswith("layers.")})
    ids = some_ids(TINY, 2, 9)
    rotary = make_rotary(whole.config, torch.arange(9))
    with torch.no_grad():
        embedded = whole.embedding(input_ids=ids, position_ids=None)
        hidden, streams = stage(embedded, rotary, ids)
        _, expected = whole.decoder(embedded, rotary, ids)
    assert hidden is None
    assert tuple(streams.shape) == (9, 2, TINY.hc_mult * TINY.hidden_size)
    assert torch.equal(streams, expected)
