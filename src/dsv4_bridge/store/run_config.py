"""run_config.yaml: the numbers that travel with a Megatron checkpoint, in plain YAML types."""

from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ..errors import BridgeError, short
from ..spec.megatron import Naming
from ..spec.megatron_config import MODEL, Same, megatron_model, naming_of_settings, renamed_settings
from ..spec.plan import architecture_of
from ..spec.spec import ModelSpec
from ..spec.variants import VARIANTS
from ..strict_json import too_deep
from ..strict_yaml import parse_yaml
from .hf_config import ROPE_SCALING, released_config, spec_from_config

FILE = "run_config.yaml"
_FORMAT = 1
_MAX_BYTES = 1 << 18  # ours have 3,000; PyYAML needs seconds for as many


def run_config(
    spec: ModelSpec, source: Mapping[str, Any], layout: list[list[str]] | None = None, naming: Naming = "gpt"
) -> bytes:
    """The file's bytes.

    Args:
        spec: the model.
        source: what was imported: variant, encodings, naming, own_mtp_head, passengers.
        layout: layers of every pipeline chunk that saved it, by megatron's names; None: one stage.
        naming: of its tensors, and so of the model that reads them.
    """
    body = {
        "dsv4_bridge": {"format": _FORMAT, "source": dict(source)},
        "hf_config": released_config(spec, None, False),
    }
    # Of V4.1 Megatron's own names of the numbers are not settled: only ours are written.
    if not architecture_of(spec).why_not:
        model = _stated(spec, naming) | _MODELS[naming] | _BRIDGE
        body["model"] = model | {"pipeline_model_parallel_layout": layout}
    return yaml.safe_dump(body, sort_keys=False, width=100, default_flow_style=None).encode()


def _named(target: str) -> dict[str, Any]:
    return {"_target_": target, "_call_": False}


# What Megatron-Bridge needs besides to build the model from this file (0.6.2).
_MODULES = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
_MODELS: Mapping[Naming, dict[str, Any]] = {
    "gpt": {
        "_target_": "megatron.bridge.models.mla_provider.MLAModelProvider",
        "transformer_layer_spec": _named(f"{_MODULES}.get_transformer_block_with_experimental_attention_variant_spec"),
    },
    "hybrid": {
        "_target_": "megatron.bridge.models.deepseek.deepseek_v4_hybrid_provider.DeepSeekV4HybridModelProvider",
        "hybrid_stack_spec": _named("megatron.core.models.hybrid.hybrid_layer_specs.hybrid_dsv4_stack_spec"),
    },
}
_BRIDGE = {
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
    model = renamed_settings(model, "gpt", where)
    if model.get("actual_vocab_size") is None:  # where it is not padded
        model = model | {"actual_vocab_size": model.get("vocab_size")}
    wanted = {value.field: key for key, value in MODEL.items() if isinstance(value, Same)}
    shared, width = model.get("moe_shared_expert_intermediate_size"), model.get("moe_ffn_hidden_size")
    needed = (*wanted.values(), "moe_shared_expert_intermediate_size", "csa_compress_ratios")
    if lacking := [key for key in needed if model.get(key) is None]:
        raise BridgeError(f"{where}: {', '.join(lacking)} is missing; name the release with --like")
    if type(shared) is not int or type(width) is not int or width < 1 or shared % width:
        raise BridgeError(
            f"{where}: moe_shared_expert_intermediate_size {short(shared)} is no multiple of moe_ffn_hidden_size "
            f"{short(width)}"
        )
    config = released_config(VARIANTS["Flash"].spec, None, False)
    config |= {field: model[key] for field, key in wanted.items() if field not in ROPE_SCALING.values()}
    config |= {
        "compress_ratios": model["csa_compress_ratios"],
        "n_shared_experts": shared // width,
        "num_nextn_predict_layers": model.get("mtp_num_layers") or 0,
        "rope_scaling": {"type": "yarn"} | {k: model[wanted[field]] for k, field in ROPE_SCALING.items()},
        "tie_word_embeddings": model.get("share_embeddings_and_output_weights", False),
        "norm_topk_prob": model.get("norm_topk_prob", True),
        "initializer_range": model.get("init_method_std") or config["initializer_range"],
    }
    known = model.get("hf_model_id")
    return spec_from_config(config, where), known if isinstance(known, str) else ""


def _stated(spec: ModelSpec, naming: Naming) -> dict[str, Any]:
    return megatron_model(spec, naming) | {"vocab_size": spec.vocab_size}


def contradictions(path: Path, spec: ModelSpec) -> tuple[str, ...]:
    """Where the `model:` section, which Megatron's users read, says otherwise than the numbers of `spec`.

    Returns:
        `key: value against value`, in the order of the section; empty where this tool wrote no such file.
    """
    body = _body(path)
    stated = body.get("model") if body else None
    if not isinstance(stated, dict) or "dsv4_bridge" not in (body or {}):
        return ()
    wanted = _stated(spec, naming_of_settings(stated))
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


def renamed_run_config(path: Path, naming: Naming) -> bytes | None:
    """The file for the same tensors under the other naming; None where it says nothing of such a model.

    Raises:
        BridgeError: the file is there and unusable.
    """
    if known := read_run_config(path):
        return run_config(*known, naming=naming)
    if read_model_section(path) is None:
        return None
    body = _body(path) or {}
    model = renamed_settings(body["model"], naming, f"{path}, section `model:`")
    for key in {key for kind in _MODELS.values() for key in kind}:
        model.pop(key, None)
    body["model"] = model | _MODELS[naming]
    return yaml.safe_dump(body, sort_keys=False, width=100, default_flow_style=None).encode()


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
    body = _parsed(raw, path)
    return deepcopy(body) if isinstance(body, dict) else None


@lru_cache(maxsize=8)
def _parsed(raw: bytes, path: Path) -> Any:
    """Every opening asks several times, and to parse it takes longer than all else of an opening."""
    return parse_yaml(raw, f"reading {path}", aliases=True)
