"""Megatron's names and shapes of the model's tensors: the one place that knows them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .plan import Item, Plan
from .spec import ModelSpec


class Region(NamedTuple):
    """Where (part of) an item lies in a Megatron checkpoint: a box of a global tensor."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def megatron_dtype(item: Item) -> str:
    """Safetensors dtype that the Megatron side holds: BF16, F32 or I32."""
    return {"f32": "F32", "int": "I32"}.get(item.row.encoding, "BF16")


# Top-level keys of a training checkpoint that are not the model's.
_NOT_MODEL = (
    "optimizer",
    "chained_",
    "rng_state",
    "rerun_state",
    "common_state",
    "opt_param_scheduler",
    "param_groups",
)
_EXPERTS = "mlp.experts."  # on disk, all experts of a layer are one tensor of `experts` in it


def of_model(key: str) -> bool:
    """Whether a checkpoint's key is the model's: not a training state, nor an extra state, whatever its form."""
    return not key.startswith(_NOT_MODEL) and "_extra_state" not in key.split("/", maxsplit=1)[0].split(".")


def strange(key: str) -> str:
    """Why a key of the model is none of ours."""
    if key.endswith(("_w", "_v")):
        return "split gate/up keys (singleton_local_shards=True); save with False"
    if key.startswith("decoder.layers.") and not key.split(".")[2].isdigit():
        return "pipeline-stacked layers (hetereogenous_dist_checkpoint=False)"
    if ".mtp_model_layer." in key:
        return "hybrid-model naming of MTP (mtp_model_layer on disk)"
    return "no tensor of this model"


def megatron_prefix(item: Item, first_layer: int = 0, body: str = "transformer_layer") -> str:
    """Prefix of an item's Megatron names.

    Args:
        item: the item.
        first_layer: that has number 0.
        body: what an MTP layer's own decoder layer is called: this on disk, `mtp_model_layer` in a live model.
    """
    kind, index = item.block.kind, item.block.index
    if kind == "model":
        return ""
    if kind == "layer":
        return f"decoder.layers.{index - first_layer}."
    return f"mtp.layers.{index}." + (f"{body}." if item.row.scope == "block" else "")


def live_names(item: Item, first_layer: int = 0, expert: int | None = None, grouped: bool = False) -> tuple[str, ...]:
    """Names of an item's parameters in a live model, in the order of its `regions`.

    Args:
        item: the item; not a passenger.
        first_layer: of the pipeline chunk, which has number 0 there.
        expert: number of a routed expert on its rank.
        grouped: whether a rank's experts are one module.
    """
    prefix, names = megatron_prefix(item, first_layer, "mtp_model_layer"), item.row.megatron
    assert names is not None
    several = (names,) if isinstance(names, str) else names
    if item.expert is None:
        return tuple(prefix + name for name in several)
    inner = [name.removeprefix(f"{_EXPERTS}experts.") for name in several]
    if grouped:
        return tuple(f"{prefix}{_EXPERTS}{name}{expert}" for name in inner)
    return tuple(f"{prefix}{_EXPERTS}local_experts.{expert}.{name}" for name in inner)


def regions(item: Item, spec: ModelSpec) -> tuple[Region, ...]:
    """The boxes of global Megatron tensors that hold an item, in order of its rows.

    Experts lie in one tensor `[experts, rows, columns]`; gate and up are stacked by rows, gate
    first; the three-element hyper-connection scale is three tensors of one element.
    """
    row, shape = item.row, item.shape
    if item.passenger or row.megatron is None:
        return ()
    prefix = megatron_prefix(item)
    if isinstance(row.megatron, tuple):
        part = (shape[0] // len(row.megatron), *shape[1:])
        zeros = (0,) * len(part)
        return tuple(Region(prefix + name, part, zeros, part) for name in row.megatron)
    index, count = row.part
    offsets = (index * shape[0], *(0,) * (len(shape) - 1))
    whole = (count * shape[0], *shape[1:])
    if item.expert is not None:
        experts = spec.n_routed_experts
        return (Region(prefix + row.megatron, (experts, *whole), (item.expert, *offsets), (1, *shape)),)
    return (Region(prefix + row.megatron, whole, offsets, shape),)


def extra_state_keys(plan: Plan) -> tuple[str, ...]:
    """Keys of the `_extra_state` objects that a Megatron loader asks for, a superset over backends."""
    keys: dict[str, None] = {}
    for item in plan.items:
        if item.passenger or not item.row.state or item.row.part[0]:
            continue
        module = f"{megatron_prefix(item)}{item.row.megatron}".removesuffix(".weight")
        shard = "0_1" if item.expert is None else f"{item.expert}_{plan.spec.n_routed_experts}"
        keys[f"{module}._extra_state/shard_{shard}"] = None
    return tuple(keys)


class Same(NamedTuple):
    """The value of a field of `ModelSpec`."""

    field: str


# The model's numbers under the configuration names of the Megatron-LM dev branch: a field's value, what follows from
# several, or a constant. rotary_percent stays 1.0, the compressed base is stated (its default there is wrong), and no
# MTP is None, not 0.
MODEL: Mapping[str, Any] = {
    "num_layers": Same("num_hidden_layers"),
    "hidden_size": Same("hidden_size"),
    "num_attention_heads": Same("num_attention_heads"),
    "experimental_attention_variant": "dsv4_hybrid",
    "multi_latent_attention": True,
    "v_head_dim": Same("head_dim"),
    "qk_head_dim": lambda spec: spec.head_dim - spec.qk_rope_head_dim,
    "qk_pos_emb_head_dim": Same("qk_rope_head_dim"),
    "kv_lora_rank": lambda spec: spec.head_dim - spec.qk_rope_head_dim,
    "q_lora_rank": Same("q_lora_rank"),
    "o_groups": Same("o_groups"),
    "o_lora_rank": Same("o_lora_rank"),
    "rotary_percent": 1.0,
    "rotary_base": Same("rope_theta"),
    "csa_compress_rotary_base": Same("compress_rope_theta"),
    "rotary_scaling_factor": Same("rope_factor"),
    "original_max_position_embeddings": Same("rope_original_max_position_embeddings"),
    "beta_fast": Same("rope_beta_fast"),
    "beta_slow": Same("rope_beta_slow"),
    "csa_window_size": Same("sliding_window"),
    "csa_compress_ratios": lambda spec: list(spec.compress_ratios[: spec.num_hidden_layers + spec.mtp_layers]),
    "dsa_indexer_n_heads": Same("index_n_heads"),
    "dsa_indexer_head_dim": Same("index_head_dim"),
    "dsa_indexer_topk": Same("index_topk"),
    "enable_hyper_connections": True,
    "num_residual_streams": Same("hc_mult"),
    "mhc_sinkhorn_iterations": Same("hc_sinkhorn_iters"),
    "num_moe_experts": Same("n_routed_experts"),
    "moe_router_topk": Same("num_experts_per_tok"),
    "moe_ffn_hidden_size": Same("moe_intermediate_size"),
    "moe_shared_expert_intermediate_size": lambda spec: spec.shared_intermediate_size,
    "moe_router_score_function": Same("scoring_func"),
    "moe_router_topk_scaling_factor": Same("routed_scaling_factor"),
    "moe_router_enable_expert_bias": True,
    "moe_n_hash_layers": Same("num_hash_layers"),
    "actual_vocab_size": Same("vocab_size"),
    "activation_func_clamp_value": Same("swiglu_limit"),
    "layernorm_epsilon": Same("rms_norm_eps"),
    "mtp_num_layers": lambda spec: spec.mtp_layers or None,
    "hetereogenous_dist_checkpoint": True,
    "pipeline_model_parallel_layout": None,
}


def megatron_model(spec: ModelSpec) -> dict[str, Any]:
    """The `MODEL` of these numbers."""
    values = {key: value(spec) if callable(value) else value for key, value in MODEL.items()}
    return {key: getattr(spec, value.field) if isinstance(value, Same) else value for key, value in values.items()}
