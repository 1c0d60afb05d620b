"""config.json of DeepSeek-V4.1, in both of its dialects.

*released*: `text_config`, `vision_config` and `quantization_config` within one file. *inference*: the flat keys of
DeepSeek's own `inference/config.json`. `dtype` is a type to compute with in the first (`bfloat16`) and says how
weights are stored in the second (`fp8`); neither is taken for the other. A missing field is an error that names it;
only what the flat dialect never says is taken as released.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import BridgeError, short
from ..spec.spec import MAX_COUNT, DSparkSpec, ModelSpec, validated
from ..spec.spec_v41 import EngramSpec, V41Spec, VisionSpec
from ..spec.variants import VARIANTS
from .config_fields import integers, mapping, number, take, typed

MODEL, TEXT, VISION = "deepseek_v41", "deepseek_v41_text", "deepseek_v41_vision"
_RATIOS = (0, 1, 2)
_ROPE = {
    "factor": "rope_factor",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
}
_OUTSIDE = ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id")  # of text_config
_LISTS = ("kv_source_layer_ids", "index_source_layer_ids", "engram_layer_ids", "engram_num_embeddings")
_NESTED = ("engram", "vision", "dspark", "compress_ratios", *_LISTS, *_OUTSIDE)
# Read from the same key of text_config, with their types.
_PLAIN: dict[str, type] = {
    f.name: f.type  # type: ignore[misc]
    for kind in (ModelSpec, V41Spec)
    for f in fields(kind)
    if f.name not in (*_NESTED, "num_hash_layers") and not f.name.startswith("rope_")
} | {"rope_theta": float}
# The flat dialect's name of a key of text_config, where it is another, and of vision_config.
_FLAT = {
    "hidden_size": "dim",
    "moe_intermediate_size": "moe_inter_dim",
    "num_hidden_layers": "n_layers",
    "num_nextn_predict_layers": "n_mtp_layers",
    "dspark_num_experts_per_tok": "dspark_n_activated_experts",
    "num_attention_heads": "n_heads",
    "num_experts_per_tok": "n_activated_experts",
    "scoring_func": "score_func",
    "routed_scaling_factor": "route_scale",
    "qk_rope_head_dim": "rope_head_dim",
    "rms_norm_eps": "norm_eps",
    "sliding_window": "window_size",
    "kv_source_layer_ids": "kv_source_layers",
    "index_source_layer_ids": "index_source_layers",
    "candidate_source_layer_id": "candidate_source_layer",
    "engram_pad_token_id": "engram_pad_id",
}
_FLAT_ROPE = {"original_max_position_embeddings": "original_seq_len", "factor": "rope_factor"}
_FLAT_VISION = {
    "num_hidden_layers": "vision_n_layers",
    "hidden_size": "vision_dim",
    "num_attention_heads": "vision_n_heads",
    "intermediate_size": "vision_inter_dim",
    "max_image_tokens": "vision_max_n_token",
}
# What the flat dialect does not say, and every release has.
_UNSAID = (
    "num_key_value_heads",
    "topk_method",
    "norm_topk_prob",
    "hidden_act",
    "attention_bias",
    "attention_dropout",
    "tie_word_embeddings",
    "initializer_range",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def dialect_of_v41(config: Mapping[str, Any]) -> str:
    """`released`, `inference`, or empty: no DeepSeek-V4.1."""
    if config.get("model_type") in (MODEL, TEXT) or "text_config" in config:
        return "released"
    return "inference" if "dim" in config and any(str(k).startswith("engram_") for k in config) else ""


def spec_v41(config: Mapping[str, Any], where: str) -> V41Spec:
    """The numbers of a V4.1 config in either dialect.

    Raises:
        BridgeError: a field missing, or a value of the wrong type or range.
    """
    if dialect_of_v41(config) == "inference":
        config = _nested(config, where)
    for key in ("text_config", "vision_config"):
        if key not in config:
            raise BridgeError(f"{where}: the field {key!r} is missing (an object expected)")
    text = mapping(config["text_config"], "text_config", where)
    vision = mapping(config["vision_config"], "vision_config", where)
    inside, seen = f"{where}: text_config", f"{where}: vision_config"
    for part, kind, at in ((config, MODEL, where), (text, TEXT, inside), (vision, VISION, seen)):
        if part.get("model_type") != kind:
            raise BridgeError(f"{at}: model_type is {short(part.get('model_type'))}, expected {kind!r}")
    values: dict[str, Any] = {name: take(text, name, kind, inside) for name, kind in _PLAIN.items()}
    values |= {name: take(config, name, int, where) for name in _OUTSIDE}
    lists = {name: integers(text, name, inside) for name in _LISTS}
    values |= {name: lists[name] for name in ("kv_source_layer_ids", "index_source_layer_ids")}
    values |= _rope(text, inside)
    values["num_hash_layers"] = 0
    # Without stages only where they were left out on purpose.
    values["dspark"] = None
    if values["num_nextn_predict_layers"] or "dspark_block_size" in text:
        values["dspark"] = DSparkSpec(
            block_size=take(text, "dspark_block_size", int, inside),
            noise_token_id=take(text, "dspark_noise_token_id", int, inside),
            target_layer_ids=integers(text, "dspark_target_layer_ids", inside),
            markov_rank=take(text, "dspark_markov_rank", int, inside),
        )
    values["compress_ratios"] = _ratios(text, inside, values)
    values["engram"] = EngramSpec(
        lists["engram_layer_ids"],
        lists["engram_num_embeddings"],
        *(take(text, f"engram_{f.name}", int, inside) for f in fields(EngramSpec)[2:]),
    )
    values["vision"] = _vision(vision, seen)
    return validated(V41Spec(**values), where)  # type: ignore[return-value]


def _rope(text: Mapping[str, Any], where: str) -> dict[str, Any]:
    yarn = mapping(text.get("rope_scaling"), "rope_scaling", where)
    if yarn.get("rope_type", yarn.get("type")) != "yarn":
        raise BridgeError(f"{where}: rope_scaling has type {short(yarn.get('rope_type'))}, expected 'yarn'")
    types = {key: int if key.endswith("embeddings") else float for key in _ROPE}
    return {name: take(yarn, key, types[key], f"{where}: rope_scaling") for key, name in _ROPE.items()}


def _ratios(text: Mapping[str, Any], where: str, values: Mapping[str, Any]) -> tuple[int, ...]:
    dspark: DSparkSpec | None = values["dspark"]
    layers, stages = values["num_hidden_layers"], dspark.stages if dspark else 0
    if not 0 < layers <= MAX_COUNT["num_hidden_layers"] or not bool(dspark) <= stages <= 64:
        raise BridgeError(
            f"{where}: num_hidden_layers is {short(layers)} and dspark_target_layer_ids has {stages}, expected 1 to "
            f"{MAX_COUNT['num_hidden_layers']} and 1 to 64"
        )
    if values["num_nextn_predict_layers"] != stages:
        raise BridgeError(
            f"{where}: num_nextn_predict_layers is {short(values['num_nextn_predict_layers'])}, expected the "
            f"{stages} stages that dspark_target_layer_ids names"
        )
    ratios = integers(text, "compress_ratios", where)
    if bad := sorted({r for r in ratios if r not in _RATIOS}):
        raise BridgeError(f"{where}: compress_ratios holds {bad[:4]}; DeepSeek-V4.1 knows 0, 1 and 2")
    if len(ratios) != layers + stages or any(ratios[layers:]):
        raise BridgeError(
            f"{where}: compress_ratios has {len(ratios)} entries, expected {layers} layers and a 0 for each of "
            f"{stages} stages"
        )
    return ratios


def _vision(vision: Mapping[str, Any], where: str) -> VisionSpec:
    whole = [f.name for f in fields(VisionSpec) if f.type in (int, "int")]
    most = vision.get("max_wh_ratio")
    if "max_wh_ratio" not in vision:
        raise BridgeError(f"{where}: the field 'max_wh_ratio' is missing (a number or null expected)")
    return VisionSpec(
        **{name: take(vision, name, int, where) for name in whole},
        rope_theta=take(vision, "rope_theta", float, where),
        max_wh_ratio=None if most is None else typed(most, "max_wh_ratio", float, where),
    )


def _nested(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A flat config with the keys of the nested one; what is missing stays missing, under its flat name."""
    known = released_config_v41(VARIANTS["V4.1-Flash"].spec, None)  # type: ignore[arg-type]
    text: dict[str, Any] = {"model_type": TEXT}
    outside: dict[str, Any] = {"model_type": MODEL}

    def told(key: str, name: str | None) -> Any:
        if name is None or name not in flat:
            raise BridgeError(f"{where}: the field {name or key!r} is missing")
        return flat[name]

    for key, released in known["text_config"].items():
        if key in _UNSAID:
            text[key] = flat.get(key, released)
        elif key == "rope_scaling":
            text[key] = {"rope_type": "yarn"} | {k: told(k, _FLAT_ROPE.get(k, k)) for k in _ROPE}
        elif key not in ("model_type", "use_cache"):
            text[key] = told(key, _FLAT.get(key, key))
    for key in _OUTSIDE:
        outside[key] = flat.get(key, known[key]) if key in _UNSAID else told(key, key)
    vision = {f.name: told(f.name, _FLAT_VISION.get(f.name, f"vision_{f.name}")) for f in fields(VisionSpec)}
    if flat.get("dtype") not in ("fp8", "bf16"):
        raise BridgeError(
            f"{where}: dtype is {short(flat.get('dtype'))}; in this flat dialect it says how weights are stored, "
            "expected 'fp8' or 'bf16'"
        )
    return outside | {"text_config": text, "vision_config": {"model_type": VISION} | vision}


def released_config_v41(spec: V41Spec, expert_dtype: str | None, tile: tuple[int, int] | None = None) -> dict[str, Any]:
    """config.json in the released dialect, its keys in the order of the release.

    Args:
        spec: the model.
        expert_dtype: `fp4`, `fp8`, or None: no word of it.
        tile: of the FP8 linear maps; None: nothing is quantised.
    """
    engram, dspark = spec.engram, spec.dspark
    quantised = {"quantization_config": QUANTIZATION_V41 | {"weight_block_size": list(tile or (32, 32))}}
    if expert_dtype:
        quantised["quantization_config"]["expert_dtype"] = expert_dtype
    names = [
        *("vocab_size", "hidden_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "qk_rope_head_dim", "q_lora_rank", "o_lora_rank", "o_groups"),
        *("hidden_act", "swiglu_limit", "rms_norm_eps", "attention_bias", "attention_dropout", "initializer_range"),
        *("use_cache", "tie_word_embeddings", "max_position_embeddings", "rope_theta", "rope_scaling"),
        *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "scoring_func", "topk_method"),
        *("norm_topk_prob", "routed_scaling_factor", "sliding_window", "compress_ratios", "compress_rope_theta"),
        *("kv_source_layer_ids", "index_source_layer_ids", "index_n_heads", "index_head_dim", "index_topk"),
        *("candidate_source_layer_id", "candidate_topk_blocks", "candidate_block_size"),
        *("hc_mult", "hc_sinkhorn_iters", "hc_eps"),
    ]
    given: dict[str, Any] = {
        "use_cache": True,
        "rope_theta": number(spec.rope_theta),
        "compress_rope_theta": number(spec.compress_rope_theta),
        "rope_scaling": {"rope_type": "yarn"} | {key: number(getattr(spec, name)) for key, name in _ROPE.items()},
    }
    text = {name: _listed(given[name] if name in given else getattr(spec, name)) for name in names}
    text |= {f"engram_{f.name}": _listed(getattr(engram, f.name)) for f in fields(EngramSpec)}
    text |= {
        "num_nextn_predict_layers": spec.num_nextn_predict_layers,
        **({f"dspark_{f.name}": _listed(getattr(dspark, f.name)) for f in fields(DSparkSpec)} if dspark else {}),
        "dspark_n_routed_experts": spec.dspark_n_routed_experts,
        "dspark_num_experts_per_tok": spec.dspark_num_experts_per_tok,
    }
    vision = vars(spec.vision) | {"rope_theta": number(spec.vision.rope_theta)}
    return (
        {"architectures": ["DeepseekV41ForCausalLM"], "model_type": MODEL, "dtype": "bfloat16"}
        | {"transformers_version": "5.6.0"}
        | {name: getattr(spec, name) for name in _OUTSIDE}
        | (quantised if tile else {})
        | {"text_config": {"model_type": TEXT} | text, "vision_config": {"model_type": VISION} | vision}
    )


QUANTIZATION_V41 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 32],
    "scale_fmt": "ue8m0",
}


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
