"""Both namings of Megatron's models: every kind of tensor, spelt out; and the way from one to the other."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_bridge import BridgeError
from dsv4_bridge.spec.megatron import NAMINGS, extra_state_keys, megatron_dtype, naming_of, of_model, regions, renamed
from dsv4_bridge.spec.megatron_config import layer_pattern, megatron_model, naming_of_settings, renamed_settings
from dsv4_bridge.spec.plan import Plan, expand
from dsv4_bridge.spec.variants import VARIANTS, tiny

# V4.1 has tests of its own: it has one naming, and no shorter form.
V4 = [name for name in VARIANTS if not name.startswith("V4.1")]

OTHER = {"gpt": "hybrid", "hybrid": "gpt"}
CORE = "inner_layer.self_attention.core_attention"
# As Megatron-LM main's HybridModel and Megatron-Bridge's mapping have it (pull request 5860): released name behind
# its block -> what it is called in layer 2i (attention) or 2i + 1 (MoE).
ATTENTION = {
    "attn_norm.weight": "inner_layer.input_layernorm.weight",
    "attn.wq_a.weight": "inner_layer.self_attention.linear_q_down_proj.weight",
    "attn.q_norm.weight": "inner_layer.self_attention.q_layernorm.weight",
    "attn.wq_b.weight": "inner_layer.self_attention.linear_q_up_proj.weight",
    "attn.wkv.weight": "inner_layer.self_attention.linear_kv_proj.weight",
    "attn.kv_norm.weight": "inner_layer.self_attention.kv_layernorm.weight",
    "attn.wo_a.weight": "inner_layer.self_attention.linear_o_group_proj",
    "attn.wo_b.weight": "inner_layer.self_attention.linear_proj.weight",
    "attn.attn_sink": f"{CORE}.attn_sink",
    "attn.compressor.ape": f"{CORE}.compressor.ape",
    "attn.compressor.wkv.weight": f"{CORE}.compressor.linear_wkv.weight",
    "attn.compressor.wgate.weight": f"{CORE}.compressor.linear_wgate.weight",
    "attn.compressor.norm.weight": f"{CORE}.compressor.norm.weight",
    "attn.indexer.wq_b.weight": f"{CORE}.indexer.linear_wq_b.weight",
    "attn.indexer.weights_proj.weight": f"{CORE}.indexer.linear_weights_proj.weight",
    "attn.indexer.compressor.ape": f"{CORE}.indexer.compressor.ape",
    "attn.indexer.compressor.wkv.weight": f"{CORE}.indexer.compressor.linear_wkv.weight",
    "attn.indexer.compressor.wgate.weight": f"{CORE}.indexer.compressor.linear_wgate.weight",
    "attn.indexer.compressor.norm.weight": f"{CORE}.indexer.compressor.norm.weight",
    "hc_attn_fn": "hyper_connection.mapping_proj.weight",
    "hc_attn_base": "hyper_connection.bias",
    "hc_attn_scale": "hyper_connection.alpha_pre hyper_connection.alpha_post hyper_connection.alpha_res",
}
MOE = {
    "ffn_norm.weight": "inner_layer.pre_mlp_layernorm.weight",
    "ffn.gate.weight": "inner_layer.mlp.router.weight",
    "ffn.gate.bias": "inner_layer.mlp.router.expert_bias",
    "ffn.gate.tid2eid": "inner_layer.mlp.router.tid2eid",
    "ffn.experts.E.w1.weight": "inner_layer.mlp.experts.experts.linear_fc1.weight",
    "ffn.experts.E.w3.weight": "inner_layer.mlp.experts.experts.linear_fc1.weight",
    "ffn.experts.E.w2.weight": "inner_layer.mlp.experts.experts.linear_fc2.weight",
    "ffn.shared_experts.w1.weight": "inner_layer.mlp.shared_experts.linear_fc1.weight",
    "ffn.shared_experts.w3.weight": "inner_layer.mlp.shared_experts.linear_fc1.weight",
    "ffn.shared_experts.w2.weight": "inner_layer.mlp.shared_experts.linear_fc2.weight",
    "hc_ffn_fn": "hyper_connection.mapping_proj.weight",
    "hc_ffn_base": "hyper_connection.bias",
    "hc_ffn_scale": "hyper_connection.alpha_pre hyper_connection.alpha_post hyper_connection.alpha_res",
}
MODEL = {
    "embed.weight": "embedding.word_embeddings.weight",
    "head.weight": "output_layer.weight",
    "norm.weight": "decoder.final_norm.weight",
    "hc_head_fn": "decoder.hc_head_fn",
    "hc_head_base": "decoder.hc_head_base",
    "hc_head_scale": "decoder.hc_head_scale",
}
MTP = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "e_proj.weight": "e_proj.weight",
    "h_proj.weight": "h_proj.weight",
    "norm.weight": "final_layernorm.weight",
    "hc_head_fn": "hc_head_fn",
    "hc_head_base": "hc_head_base",
    "hc_head_scale": "hc_head_scale",
}


def expected(name: str) -> list[str]:
    """Hybrid names of a released tensor, by the tables above."""
    words = name.split(".")
    if words[0] not in ("layers", "mtp"):
        return [MODEL[name]]
    number, inner = int(words[1]), words[2:]
    if inner[:2] == ["ffn", "experts"]:
        inner[2] = "E"
    key = ".".join(inner)
    if words[0] == "mtp" and key in MTP:
        return [f"mtp.layers.{number}.{MTP[key]}"]
    half = int(key in MOE)
    found = (MOE if half else ATTENTION)[key].split()
    stack = f"mtp.layers.{number}.mtp_model_layer.layers.{half}" if words[0] == "mtp" else None
    return [f"{stack or f'decoder.layers.{2 * number + half}'}.{tail}" for tail in found]


def plan_of(name: str, *, full: bool = False) -> Plan:
    variant = VARIANTS[name]
    return expand(variant.spec if full else tiny(variant), variant.own_mtp_head)


@pytest.mark.parametrize("variant", V4)
def test_hybrid_names_are_those_of_the_table_spelt_out(variant: str) -> None:
    plan, kinds = plan_of(variant), set[str]()
    for item in plan.items:
        if item.passenger:
            assert regions(item, plan.spec, "hybrid") == ()
            continue
        found = regions(item, plan.spec, "hybrid")
        assert [r.key for r in found] == expected(item.name)
        # Only keys differ: boxes and types are those of the other naming.
        before = regions(item, plan.spec)
        assert [r[1:] for r in found] == [r[1:] for r in before]
        assert megatron_dtype(item) in ("BF16", "F32", "I32")
        kinds.add(item.row.key)
    assert kinds >= {"embed", "hc_attn_scale", "attn.indexer.compressor.ape", "ffn.gate.tid2eid", "hc_head_fn"}


@pytest.mark.parametrize("variant", V4)
def test_every_key_is_renamed_both_ways(variant: str) -> None:
    plan = plan_of(variant)
    keys = {n: [r.key for i in plan.items for r in regions(i, plan.spec, n)] for n in NAMINGS}
    states = {n: list(extra_state_keys(plan, n)) for n in NAMINGS}
    for naming, other in OTHER.items():
        assert naming_of(keys[naming]) == naming
        assert [renamed(k, other) for k in keys[naming]] == keys[other]
        both = [k for k in states[naming] if not k.startswith("output_layer")]
        assert [renamed(k, other) for k in both] == [k for k in states[other] if not k.startswith("output_layer")]
        moments = [f"optimizer.state.exp_avg.{k}" for k in keys[naming]]
        assert [renamed(k, other) for k in moments] == [f"optimizer.state.exp_avg.{k}" for k in keys[other]]
        chained = [f"chained_1.optimizer.state.fp32_param.{k}" for k in keys[naming]]
        assert [renamed(k, other).removeprefix("chained_1.optimizer.state.fp32_param.") for k in chained] == keys[other]
    assert {*states["hybrid"]} > {"output_layer._extra_state/shard_0_1"}  # GPTModel takes its own away
    assert len({*keys["gpt"]}) == len({*keys["hybrid"]})


@given(st.integers(0, 200), st.sampled_from(["core_attention._extra_state/shard_0_1", "linear_proj._extra_state3"]))
def test_states_of_any_form_follow_their_module(layer: int, tail: str) -> None:
    old = f"decoder.layers.{layer}.self_attention.{tail}"
    new = f"decoder.layers.{2 * layer}.inner_layer.self_attention.{tail}"
    assert renamed(old, "hybrid") == new and renamed(new, "gpt") == old


@pytest.mark.parametrize(
    "key",
    [
        "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.exp_avg",
        "chained_0.optimizer.state.exp_avg",
        "decoder.layers.3.cross_attention.weight",
        "decoder.layers.x.mlp.router.weight",
    ],
)
@pytest.mark.parametrize("naming", NAMINGS)
def test_what_names_do_not_say_is_refused(key: str, naming: str) -> None:
    with pytest.raises(BridgeError, match="renaming"):
        renamed(key, naming)  # pyright: ignore[reportArgumentType]


def test_what_is_of_no_layer_keeps_its_name() -> None:
    for key in ("common_state/shard_0_1", "rng_state/shard_0_1", "rerun_state_machine_state/shard_0_1"):
        assert not of_model(key)
        for naming in NAMINGS:
            assert renamed(key, naming) == key


def test_released_sizes_are_listed_and_counted() -> None:
    counts = {}
    for name in ("Flash", "Pro", "Flash-0731"):
        plan = plan_of(name, full=True)
        for naming in NAMINGS:
            counts[name, naming] = len({r.key for i in plan.items for r in regions(i, plan.spec, naming)})
    layers = {"Flash": 43, "Pro": 61, "Flash-0731": 43}
    for name, count in layers.items():
        # Both namings have as many tensors: only what they are called differs.
        assert counts[name, "gpt"] == counts[name, "hybrid"]
        kinds = Counter(b.ratio for b in {i.block for i in plan_of(name, full=True).items if i.block.kind == "layer"})
        assert sum(kinds.values()) == count


def test_pattern_of_layers() -> None:
    assert layer_pattern(VARIANTS["Flash"].spec) == "WEWE" + "CEHE" * 20 + "CE/WE"
    assert layer_pattern(VARIANTS["Flash-0731"].spec) == "WEWE" + "CEHE" * 20 + "CE"  # DSpark travels along
    pro = layer_pattern(VARIANTS["Pro"].spec)
    main, draft = pro.split("/")
    assert len(main) == 2 * 61 and draft == "WE"


@pytest.mark.parametrize("variant", V4)
def test_settings_go_both_ways(variant: str) -> None:
    spec = VARIANTS[variant].spec
    gpt, hybrid = (megatron_model(spec, naming) for naming in NAMINGS)
    assert naming_of_settings(gpt) == "gpt" and naming_of_settings(hybrid) == "hybrid"
    assert renamed_settings(hybrid, "gpt", "here") == gpt and list(renamed_settings(hybrid, "gpt", "here")) == list(gpt)
    assert hybrid["num_layers"] == 2 * gpt["num_layers"] == len(hybrid["hybrid_layer_pattern"])
    assert hybrid["csa_compress_ratios"][::2] == gpt["csa_compress_ratios"]
    assert not any(hybrid["csa_compress_ratios"][1::2])
    assert len(hybrid["csa_compress_ratios"]) == 2 * len(gpt["csa_compress_ratios"])
    old = {"enable_hyper_connections", "num_residual_streams", "o_groups", "o_lora_rank", "actual_vocab_size"}
    assert old | {"moe_n_hash_layers"} <= gpt.keys() and not old & hybrid.keys()
    assert hybrid["output_projection_groups"] == spec.o_groups and hybrid["mhc_num_residual_streams"] == spec.hc_mult
    assert hybrid["hash_moe_vocab_size"] == spec.vocab_size and hybrid["moe_num_hash_layers"] == spec.num_hash_layers
    assert hybrid["enable_mhc_connections"] is True


@pytest.mark.parametrize(
    ("found", "naming", "match"),
    [
        ({"num_layers": 2}, "hybrid", "csa_compress_ratios"),
        ({"num_layers": 2, "csa_compress_ratios": [0]}, "hybrid", "csa_compress_ratios"),
        ({"num_layers": 1, "csa_compress_ratios": [3]}, "hybrid", "expected 0, 4 or 128"),
        ({"num_layers": True, "csa_compress_ratios": [0]}, "hybrid", "num_layers"),
        ({"num_layers": 1, "csa_compress_ratios": [0, 0, 4], "mtp_num_layers": 2}, "hybrid", "one pattern"),
        ({"hybrid_layer_pattern": "WEM"}, "gpt", "pattern of layers"),
        ({"hybrid_layer_pattern": ["W"]}, "gpt", "pattern of layers"),
        ({"hybrid_layer_pattern": "WE/CEX", "mtp_num_layers": 1}, "gpt", "pattern of layers"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(found: dict[str, object], naming: str, match: str) -> None:
    with pytest.raises(BridgeError, match=match):
        renamed_settings(found, naming, "reading here")  # pyright: ignore[reportArgumentType]


def test_stages_in_the_pattern_and_kernels_are_understood() -> None:
    found = {"hybrid_layer_pattern": "WE|CE|HE/WE", "mtp_num_layers": 1, "dsa_kernel_backend": "cudnn"}
    assert renamed_settings(found, "gpt", "here") == {
        "mtp_num_layers": 1,
        "apply_dsa_kernel_fusion": True,
        "num_layers": 3,
        "csa_compress_ratios": [0, 4, 128, 0],
    }
