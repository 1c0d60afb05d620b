"""The model's numbers under Megatron's configuration names, of either naming."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import BridgeError, short
from .megatron import Naming
from .spec import ModelSpec


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


# What main's HybridModel calls otherwise (Megatron-LM main, transformer_config.py; Megatron-Bridge 6008 and 5860).
_MAIN = {
    "enable_hyper_connections": "enable_mhc_connections",
    "num_residual_streams": "mhc_num_residual_streams",
    "o_groups": "output_projection_groups",
    "o_lora_rank": "output_projection_lora_rank",
    "actual_vocab_size": "hash_moe_vocab_size",
    "moe_n_hash_layers": "moe_num_hash_layers",
    "apply_dsa_kernel_fusion": "dsa_kernel_backend",
}
_DEV = {main: dev for dev, main in _MAIN.items()}
_SYMBOLS = {0: "W", 4: "C", 128: "H"}  # attention's layers by ratio; each is followed by MoE's
_RATIOS = {symbol: ratio for ratio, symbol in _SYMBOLS.items()}
_MOE, _MTP, _STAGE = "E", "/", "|"
_PATTERN, _DRAFT_PATTERN = "hybrid_layer_pattern", "mtp_hybrid_override_pattern"


def megatron_model(spec: ModelSpec, naming: Naming = "gpt") -> dict[str, Any]:
    """The `MODEL` of these numbers, under the names of a naming's configuration."""
    values = {key: value(spec) if callable(value) else value for key, value in MODEL.items()}
    plain = {key: getattr(spec, value.field) if isinstance(value, Same) else value for key, value in values.items()}
    return plain if naming == "gpt" else renamed_settings(plain, naming, "the model's numbers")


def layer_pattern(spec: ModelSpec) -> str:
    """The layers of a HybridModel as a word: W, C, H for attention of ratio 0, 4, 128, E for MoE, `/` before MTP.

    Empty where attention has other ratios: what Megatron writes for those of V4.1 is not known.
    """
    count, ratios = spec.num_hidden_layers, spec.compress_ratios
    if not set(ratios) <= set(_SYMBOLS):
        return ""
    return _MTP.join((_symbols(ratios[:count]), *(_symbols([r]) for r in ratios[count : count + spec.mtp_layers])))


def _symbols(ratios: Sequence[int]) -> str:
    return "".join(_SYMBOLS[ratio] + _MOE for ratio in ratios)


def naming_of_settings(found: Mapping[str, Any]) -> Naming:
    """Of which naming a model's configuration is: a HybridModel has a pattern of layers."""
    return "hybrid" if found.get(_PATTERN) else "gpt"


def renamed_settings(found: Mapping[str, Any], naming: Naming, where: str) -> dict[str, Any]:
    """A model's configuration, or arguments of a run, in another naming; keys that both have stay as they are.

    Args:
        found: in either naming.
        naming: the one that is wanted.
        where: they are, for messages.

    Raises:
        BridgeError: the numbers that the other naming's follow from are missing or make no sense.
    """
    if naming_of_settings(found) == naming:
        return dict(found)
    names = _MAIN if naming == "hybrid" else _DEV
    out = {names.get(key, key): value for key, value in found.items()}
    if "pipeline_model_parallel_layout" in out:  # the pattern says it there, by `|`
        out["pipeline_model_parallel_layout"] = None
    frequency = out.get("moe_layer_freq")
    if isinstance(frequency, list) and frequency == [1] * len(frequency):  # a list is as long as the layers were many
        out["moe_layer_freq"] = 1
    return _to_hybrid(out, where) if naming == "hybrid" else _to_gpt(out, where)


def _to_hybrid(out: dict[str, Any], where: str) -> dict[str, Any]:
    count, drafts = _count(out, "num_layers", where), _count(out, "mtp_num_layers", where)
    ratios = out.get("csa_compress_ratios")
    if not isinstance(ratios, list | tuple) or len(ratios) < count + drafts or not count:
        raise BridgeError(
            f"{where}: csa_compress_ratios is {short(ratios)}; expected a list of {count + drafts}, one a layer"
        )
    if strange := [r for r in ratios[: count + drafts] if type(r) is not int or r not in _SYMBOLS]:
        raise BridgeError(f"{where}: csa_compress_ratios has {short(strange[0])}; expected 0, 4 or 128")
    main, draft = list(ratios[:count]), list(ratios[count : count + drafts])
    if len(set(draft)) > 1:
        raise BridgeError(f"{where}: MTP layers of several ratios, {draft}; a HybridModel has one pattern for all")
    backend = {"dsa_kernel_backend": "cudnn" if out.get("dsa_kernel_backend") else "none"}
    return (
        out
        | (backend if "dsa_kernel_backend" in out else {})
        | {
            "num_layers": 2 * count,
            "csa_compress_ratios": [r for ratio in (*main, *draft) for r in (ratio, 0)],
            _PATTERN: _symbols(main),
            _DRAFT_PATTERN: _symbols(draft[:1]) or None,
        }
    )


def _to_gpt(out: dict[str, Any], where: str) -> dict[str, Any]:
    pattern, drafts = out.pop(_PATTERN), _count(out, "mtp_num_layers", where)
    parts = pattern.replace(_STAGE, "").split(_MTP) if isinstance(pattern, str) else [""]
    draft = out.pop(_DRAFT_PATTERN, None) or (parts[1] if len(parts) > 1 else "")
    main = _ratios(parts[0], where)
    backend = {"apply_dsa_kernel_fusion": out.get("apply_dsa_kernel_fusion") not in (None, "none")}
    return (
        out
        | (backend if "apply_dsa_kernel_fusion" in out else {})
        | {
            "num_layers": len(main),
            "csa_compress_ratios": [*main, *(_ratios(draft, where) * drafts if drafts else [])],
        }
    )


def _ratios(pattern: object, where: str) -> list[int]:
    pairs = [pattern[i : i + 2] for i in range(0, len(pattern), 2)] if isinstance(pattern, str) else []
    if not pairs or any(pair[1:] != _MOE or pair[0] not in _RATIOS for pair in pairs):
        raise BridgeError(
            f"{where}: the pattern of layers {short(pattern)}; expected pairs of W, C or H (attention) and E (MoE)"
        )
    return [_RATIOS[pair[0]] for pair in pairs]


def _count(out: Mapping[str, Any], key: str, where: str) -> int:
    value = out.get(key) or 0
    if type(value) is not int or not 0 <= value < 1 << 16:
        raise BridgeError(f"{where}: {key} is {short(value)}; expected a number of layers")
    return value
