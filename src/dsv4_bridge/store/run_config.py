"""run_config.yaml: the numbers that travel with a Megatron checkpoint, in plain YAML types."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import BridgeError, short
from ..spec.megatron import megatron_model
from ..spec.spec import ModelSpec
from ..spec.variants import VARIANTS
from ..strict_json import too_deep
from ..strict_yaml import parse_yaml
from .hf_config import released_config, spec_from_config

FILE = "run_config.yaml"
_FORMAT = 1
_MAX_BYTES = 1 << 18  # ours have 3,000; PyYAML needs seconds for as many


def run_config(spec: ModelSpec, source: Mapping[str, Any], layout: list[list[str]] | None = None) -> bytes:
    """The file's bytes.

    Args:
        spec: the model.
        source: what was imported: variant, encodings, naming, own_mtp_head, passengers.
        layout: layers of every pipeline chunk that saved it, by megatron's names; None: one stage.
    """
    body = {
        "dsv4_bridge": {"format": _FORMAT, "source": dict(source)},
        "hf_config": released_config(spec, None, False),
        "model": _stated(spec) | _BRIDGE | {"pipeline_model_parallel_layout": layout},
    }
    return yaml.safe_dump(body, sort_keys=False, width=100, default_flow_style=None).encode()


def _named(target: str) -> dict[str, Any]:
    return {"_target_": target, "_call_": False}


# What Megatron-Bridge needs besides to build the model from this file (0.6.2).
_MODULES = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
_BRIDGE = {
    "_target_": "megatron.bridge.models.mla_provider.MLAModelProvider",
    "transformer_layer_spec": _named(f"{_MODULES}.get_transformer_block_with_experimental_attention_variant_spec"),
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": _named("torch.nn.functional.silu"),
    "add_bias_linear": False,
    "bias_activation_fusion": False,
    "share_embeddings_and_output_weights": False,
    "qk_layernorm": True,
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "none",
    "make_vocab_size_divisible_by": 1,
    "bf16": True,
    "params_dtype": _named("torch.bfloat16"),
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
}


# Key of the `model:` section -> field of config.json, where the value is the same.
_SAME = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "v_head_dim": "head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "q_lora_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "rotary_base": "rope_theta",
    "csa_compress_rotary_base": "compress_rope_theta",
    "csa_window_size": "sliding_window",
    "csa_compress_ratios": "compress_ratios",
    "dsa_indexer_n_heads": "index_n_heads",
    "dsa_indexer_head_dim": "index_head_dim",
    "dsa_indexer_topk": "index_topk",
    "num_residual_streams": "hc_mult",
    "mhc_sinkhorn_iterations": "hc_sinkhorn_iters",
    "num_moe_experts": "n_routed_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_score_function": "scoring_func",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "moe_n_hash_layers": "num_hash_layers",
    "activation_func_clamp_value": "swiglu_limit",
    "layernorm_epsilon": "rms_norm_eps",
}
_SCALING = {
    "rotary_scaling_factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}


def read_model_section(path: Path) -> tuple[ModelSpec, str] | None:
    """The model of a run_config.yaml that Megatron-Bridge wrote: its numbers, and its `hf_model_id` or "".

    What no tensor follows from and the section does not say (token ids, `hc_eps`) is as in the releases.

    Returns:
        None where there is no such file, or it is of another kind of model.

    Raises:
        BridgeError: a number is missing or makes no DeepSeek-V4 model.
    """
    body = _body(path)
    model = body.get("model") if body else None
    if not isinstance(model, dict) or model.get("experimental_attention_variant") != "dsv4_hybrid":
        return None
    if too_deep(model, 32, 1 << 16):
        raise BridgeError(f"reading {path}: its `model:` section is nested too deep, or far too large")
    where = f"{path}, section `model:`"
    vocabulary = model.get("actual_vocab_size") or model.get("vocab_size")
    shared, width = model.get("moe_shared_expert_intermediate_size"), model.get("moe_ffn_hidden_size")
    lacking = [k for k in (*_SAME, *_SCALING, "moe_shared_expert_intermediate_size") if model.get(k) is None]
    if lacking or not vocabulary:
        raise BridgeError(f"{where}: {', '.join(lacking or ['vocab_size'])} is missing; name the release with --like")
    if type(shared) is not int or type(width) is not int or width < 1 or shared % width:
        raise BridgeError(
            f"{where}: moe_shared_expert_intermediate_size {short(shared)} is no multiple of moe_ffn_hidden_size "
            f"{short(width)}"
        )
    config = released_config(VARIANTS["Flash"].spec, None, False)
    config |= {theirs: model[ours] for ours, theirs in _SAME.items()}
    config |= {
        "vocab_size": vocabulary,
        "n_shared_experts": shared // width,
        "num_nextn_predict_layers": model.get("mtp_num_layers") or 0,
        "rope_scaling": {"type": "yarn"} | {theirs: model[ours] for ours, theirs in _SCALING.items()},
        "tie_word_embeddings": model.get("share_embeddings_and_output_weights", False),
        "norm_topk_prob": model.get("norm_topk_prob", True),
        "initializer_range": model.get("init_method_std") or config["initializer_range"],
    }
    known = model.get("hf_model_id")
    return spec_from_config(config, where), known if isinstance(known, str) else ""


def _stated(spec: ModelSpec) -> dict[str, Any]:
    return megatron_model(spec) | {"vocab_size": spec.vocab_size}


def contradictions(path: Path, spec: ModelSpec) -> tuple[str, ...]:
    """Where the `model:` section, which Megatron's users read, says otherwise than the numbers of `spec`.

    Returns:
        `key: value against value`, in the order of the section; empty where this tool wrote no such file.
    """
    body = _body(path)
    stated = body.get("model") if body else None
    if not isinstance(stated, dict) or "dsv4_bridge" not in (body or {}):
        return ()
    wanted = _stated(spec)
    layout = {"pipeline_model_parallel_layout"}
    pairs = [(k, stated[k], wanted[k]) for k in wanted if k in stated and k not in layout]
    return tuple(
        f"model.{k}: {short(a)} against {short(b)}"
        for k, a, b in pairs
        if a != b or isinstance(a, bool) != isinstance(b, bool)
    )


def read_run_config(path: Path) -> tuple[ModelSpec, dict[str, Any]] | None:
    """Spec and source facts of a checkpoint's run_config.yaml; None where this tool wrote none.

    Raises:
        BridgeError: the file is there and unusable.
    """
    body = _body(path)
    if body is None or "dsv4_bridge" not in body:
        return None
    ours, config = body["dsv4_bridge"], body.get("hf_config")
    if too_deep([ours, config], 16, 1 << 14):
        raise BridgeError(f"reading {path}: its dsv4_bridge section is nested too deep, or far too large")
    if not isinstance(ours, dict) or ours.get("format") != _FORMAT or not isinstance(config, dict):
        raise BridgeError(f"reading {path}: its dsv4_bridge section is not format {_FORMAT}")
    source = ours.get("source")
    return spec_from_config(config, str(path)), dict(source) if isinstance(source, dict) else {}


def _body(path: Path) -> dict[str, Any] | None:
    """The file as plain YAML; None if it is not there, or holds no keys."""
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BridgeError(f"reading {path}: it has {path.stat().st_size} bytes, far too many for a configuration")
        raw = path.read_bytes()
    except OSError as error:
        raise BridgeError(f"reading {path}: {error.strerror or error}") from None
    body = parse_yaml(raw, f"reading {path}", aliases=True)
    return body if isinstance(body, dict) else None
