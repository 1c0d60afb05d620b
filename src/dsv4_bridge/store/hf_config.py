"""The only reader and writer of config.json, in both dialects; that of V4.1 is in `config_v41`.

*released*: what DeepSeek ships (`compress_ratios`, `num_hash_layers`, `rope_scaling`).
*transformers*: what transformers writes (`layer_types`, `compress_rates`, `mlp_layer_types`,
nested `rope_parameters`). Both read into one `ModelSpec`; a missing field is an error that names
it, never a default.
"""

import stat
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import BridgeError, short
from ..spec.spec import MAX_COUNT, DSparkSpec, ModelSpec, validated
from ..spec.spec_v41 import V41Spec
from ..strict_json import parse_json, too_deep
from .config_fields import mapping, number, take, typed
from .config_v41 import dialect_of_v41, released_config_v41, spec_v41

LAYER_TYPES = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
_TYPE_OF_RATIO = {ratio: name for name, ratio in LAYER_TYPES.items()}


_MAX_BYTES = 1 << 22  # released ones have 2,000

_MARKS = ("bos_token_id", "eos_token_id")
# Read from the same key in both dialects, with their types.
_SAME: dict[str, type] = {
    f.name: f.type  # type: ignore[misc]
    for f in fields(ModelSpec)
    if f.name not in {"compress_ratios", "dspark", "num_hash_layers", "qk_rope_head_dim", *_MARKS}
    and not f.name.startswith(("rope_", "compress_"))
}
# Keys that transformers drops or renames when it saves; taken as fixed by the architecture there.
_FIXED_IN_TRANSFORMERS = {
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "num_nextn_predict_layers": 0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
}
ROPE_SCALING = {
    "factor": "rope_factor",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
}


VISION_EXP = (
    "It is not read: no list of its tensors is known that a table could be held against, and what is not known whole "
    "is not converted in part. Read are the text models of DeepSeek-V4, and DeepSeek-V4.1 with its vision tower"
)


def dialect_of(config: Mapping[str, Any]) -> str:
    """`released` or `transformers`, of V4.1 also `inference`, from the keys present."""
    if kind := dialect_of_v41(config):
        return kind
    return "transformers" if "layer_types" in config or "rope_parameters" in config else "released"


def read_config(path: Path) -> dict[str, Any]:
    """Parse a config.json into a dict; BridgeError if it is not a JSON object."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise BridgeError(f"reading {path}: not a regular file")
        if facts.st_size > _MAX_BYTES:
            raise BridgeError(f"reading {path}: it has {facts.st_size} bytes, far too many for a config")
        config = parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise BridgeError(f"reading {path}: no such file; {_what_it_is(path.parent)}") from None
    except OSError as error:
        raise BridgeError(f"reading {path}: {error.strerror}") from None
    if too_deep(config):
        raise BridgeError(f"reading {path}: not a usable config (nested too deep)")
    return config


def _what_it_is(folder: Path) -> str:
    """What a folder without config.json may be, and what to do with it."""
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if "latest_checkpointed_iteration.txt" in names or ".metadata" in names:
        return f"{folder} is a Megatron checkpoint, and a Hugging Face folder is wanted; `dsv4 export` makes one of it"
    if (folder / "weights" / ".metadata").is_file():
        return f"{folder} is a checkpoint of NeMo 2 (weights/ and context/), which has no DeepSeek-V4"
    if any(name.startswith("iter_") for name in names):
        return (
            f"{folder} looks like a Megatron checkpoint without latest_checkpointed_iteration.txt; write the number of "
            "an iteration into it, or name the iteration's folder"
        )
    if "snapshots" in names:
        return f"{folder} is a repository in the Hub's cache; name the folder below {folder / 'snapshots'}"
    if "adapter_config.json" in names:
        return f"{folder} holds adapters, and a whole model is wanted; `dsv4 merge HF {folder} OUT` puts them into one"
    if "chat_data.json" in names:
        return f"{folder} is training data that `dsv4 data` made, and a model is wanted"
    if any(name.endswith(".gguf") for name in names):
        return "GGUF files are not read; take the released safetensors"
    return "a checkpoint folder needs a config.json"


def spec_from_config(config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """The ModelSpec of a config in either dialect.

    Args:
        config: the parsed config.json.
        where: how to name it in messages.

    Raises:
        BridgeError: another model (named), a field missing, or a value of the wrong type or range.
    """
    refuse_other_models(config, where)
    _refuse_other_encodings(config, where)
    if dialect_of_v41(config):
        return spec_v41(config, where)
    hf = dialect_of(config) == "transformers"
    values: dict[str, Any] = {}
    for name, kind in _SAME.items():
        if hf and name not in config and name in _FIXED_IN_TRANSFORMERS:
            values[name] = _FIXED_IN_TRANSFORMERS[name]
        else:
            values[name] = take(config, name, kind, where)
    values |= _rope_fields(config, where, hf)
    values |= _marks(config, where)
    values["num_hash_layers"] = _hash_layers(config, where, values["num_hidden_layers"])
    values["qk_rope_head_dim"] = _rope_width(config, where, values["head_dim"])
    values["dspark"] = _dspark(config, where)
    draft = values["dspark"].stages if values["dspark"] else values["num_nextn_predict_layers"]
    values["compress_ratios"] = _ratios(config, where, values["num_hidden_layers"], draft)
    return validated(ModelSpec(**values), where)


def refuse_other_models(config: Mapping[str, Any], where: str) -> None:
    """Raise for models that look like DeepSeek-V4 and are not, naming the keys that tell.

    Raises:
        BridgeError: the Vision experiment, or any other model type.
    """
    if dialect_of_v41(config):
        return
    kind = config.get("model_type")
    if strange := [k for k in ("engram_layer_ids", "engram_vocab_size") if k in config]:
        raise BridgeError(
            f"{where}: it has keys of DeepSeek-V4.1 ({', '.join(strange)}), and model_type {short(kind)}; take the "
            "config.json of the release"
        )
    vision = sorted(k for k in config if isinstance(k, str) and k.startswith("vision"))
    if vision:
        raise BridgeError(
            f"{where}: this is DeepSeek-V4-Flash-Vision-Exp ({', '.join(k[:40] for k in vision[:4])}), which adds a "
            f"vision tower, image routing biases (gate.bias_vl) and rms_norm_eps 1e-20. {VISION_EXP}"
        )
    if kind != "deepseek_v4":
        raise BridgeError(
            f"{where}: model_type is {short(kind)}, expected 'deepseek_v4' or 'deepseek_v41'; this tool knows only "
            "DeepSeek-V4 and V4.1"
        )


def _refuse_other_encodings(config: Mapping[str, Any], where: str) -> None:
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
    if method is not None and method != "fp8":
        raise BridgeError(
            f"{where}: quantization_config.quant_method is {short(method)}; read are the released encodings (FP8 and "
            "MXFP4, quant_method 'fp8') and plain BF16. Take the release that this was made from"
        )


def _marks(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Begin and end of a text: transformers allows no beginning, and several ends, of which the first counts here."""
    ends = config.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    for other in ends if isinstance(ends, list) else ():
        typed(other, "eos_token_id", int, where)
    begins = "bos_token_id" in config and config["bos_token_id"] is None
    return {
        "bos_token_id": None if begins else take(config, "bos_token_id", int, where),
        "eos_token_id": take({"eos_token_id": end} if "eos_token_id" in config else {}, "eos_token_id", int, where),
    }


def _rope_fields(config: Mapping[str, Any], where: str, hf: bool) -> dict[str, Any]:
    nested = config.get("rope_parameters")
    if hf and isinstance(nested, Mapping) and "main" in nested:
        main = mapping(nested["main"], "rope_parameters.main", where)
        yarn = mapping(nested.get("compress"), "rope_parameters.compress", where)
        inside, kind = "rope_parameters.compress", yarn.get("rope_type")
        found = {
            "rope_theta": take(main, "rope_theta", float, f"{where}: rope_parameters.main"),
            "compress_rope_theta": take(yarn, "rope_theta", float, f"{where}: {inside}"),
        }
    else:
        yarn = mapping(config.get("rope_scaling"), "rope_scaling", where)
        inside, kind = "rope_scaling", yarn.get("type", yarn.get("rope_type"))
        found = {
            "rope_theta": take(config, "rope_theta", float, where),
            "compress_rope_theta": take(config, "compress_rope_theta", float, where),
        }
    if kind != "yarn":
        raise BridgeError(f"{where}: {inside} has type {short(kind)}, expected 'yarn'")
    for key, name in ROPE_SCALING.items():
        wanted = int if name.endswith("embeddings") else float
        found[name] = take(yarn, key, wanted, f"{where}: {inside}")
    return found


def _rope_width(config: Mapping[str, Any], where: str, head_dim: int) -> int:
    # partial_rotary_factor applies to head_dim, never on top of an already narrow width.
    if "qk_rope_head_dim" in config:
        return take(config, "qk_rope_head_dim", int, where)
    factor = config.get("partial_rotary_factor")
    if factor is None:
        nested = config.get("rope_parameters")
        main = nested.get("main") if isinstance(nested, Mapping) else None
        factor = main.get("partial_rotary_factor") if isinstance(main, Mapping) else None
    if factor is None:
        raise BridgeError(f"{where}: the field 'qk_rope_head_dim' is missing (an integer expected)")
    width = typed(factor, "partial_rotary_factor", float, where) * head_dim
    if not 0 < width <= head_dim or width != int(width):
        raise BridgeError(f"{where}: partial_rotary_factor {short(factor)} of head_dim {head_dim} is no whole width")
    return int(width)


def _hash_layers(config: Mapping[str, Any], where: str, layers: int) -> int:
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return take(config, "num_hash_layers", int, where)
    if not isinstance(kinds, list) or len(kinds) != layers or any(k not in ("hash_moe", "moe") for k in kinds):
        raise BridgeError(
            f"{where}: mlp_layer_types is {short(kinds)}, expected {layers} entries of 'hash_moe' or 'moe'"
        )
    count = kinds.count("hash_moe")
    if kinds != ["hash_moe"] * count + ["moe"] * (layers - count):
        raise BridgeError(f"{where}: mlp_layer_types has hash layers that are not the first {count} layers")
    if "num_hash_layers" in config and config["num_hash_layers"] != count:
        raise BridgeError(
            f"{where}: num_hash_layers is {short(config['num_hash_layers'])} but mlp_layer_types has {count}"
        )
    return count


def _dspark(config: Mapping[str, Any], where: str) -> DSparkSpec | None:
    if not any(isinstance(k, str) and k.startswith("dspark_") for k in config):
        return None
    targets = config.get("dspark_target_layer_ids")
    if not isinstance(targets, list) or not 0 < len(targets) <= 64:
        raise BridgeError(f"{where}: dspark_target_layer_ids is {short(targets)}, expected a list of layer ids")
    return DSparkSpec(
        block_size=take(config, "dspark_block_size", int, where),
        noise_token_id=take(config, "dspark_noise_token_id", int, where),
        target_layer_ids=tuple(typed(t, "dspark_target_layer_ids", int, where) for t in targets),
        markov_rank=take(config, "dspark_markov_rank", int, where),
    )


def _ratios(config: Mapping[str, Any], where: str, layers: int, draft: int) -> tuple[int, ...]:
    if not 0 < layers <= MAX_COUNT["num_hidden_layers"] or not 0 <= draft <= 64:
        raise BridgeError(
            f"{where}: num_hidden_layers is {short(layers)} and num_nextn_predict_layers {short(draft)}, "
            f"expected 1 to {MAX_COUNT['num_hidden_layers']} and 0 to 64"
        )
    types, ratios = config.get("layer_types"), config.get("compress_ratios")
    if types is not None:
        if not isinstance(types, list) or any(not isinstance(t, str) or t not in LAYER_TYPES for t in types):
            raise BridgeError(f"{where}: layer_types has an entry other than {', '.join(LAYER_TYPES)}")
        rates = _compress_rates(config, where)
        named = [rates[t] for t in types]
        if isinstance(ratios, list) and ratios[:layers] != named[:layers]:
            raise BridgeError(f"{where}: layer_types and compress_ratios disagree")
        ratios = named
    if ratios is None:
        raise BridgeError(f"{where}: the field 'compress_ratios' (or 'layer_types') is missing")
    if not isinstance(ratios, list) or len(ratios) > 4096:
        raise BridgeError(f"{where}: compress_ratios is {short(ratios)}, expected a list")
    ratios = [typed(r, "compress_ratios", int, where) for r in ratios]
    if bad := sorted({r for r in ratios if r not in _TYPE_OF_RATIO}):
        raise BridgeError(f"{where}: compress_ratios holds {bad[:4]}; DeepSeek-V4 knows 0, 4 and 128")
    if len(ratios) < layers:
        raise BridgeError(f"{where}: compress_ratios has {len(ratios)} entries for {layers} layers")
    # The entries behind the decoder layers belong to the draft blocks; other tools cut or keep them.
    extra = ratios[layers:]
    if len(extra) not in (0, draft) and any(extra):
        raise BridgeError(
            f"{where}: compress_ratios has {len(ratios)} entries, expected {layers} layers + {draft} draft blocks"
        )
    return tuple(ratios[:layers] + (extra + [0] * draft)[:draft])


def _compress_rates(config: Mapping[str, Any], where: str) -> dict[str, int]:
    rates = {"sliding_attention": 0}
    given = config.get("compress_rates")
    if given is not None:
        given = mapping(given, "compress_rates", where)
    old = {
        "compressed_sparse_attention": "compress_rate_csa",
        "heavily_compressed_attention": "compress_rate_hca",
    }
    for name, scalar in old.items():
        if given is not None and name in given:
            rates[name] = typed(given[name], f"compress_rates.{name}", int, where)
        elif scalar in config:
            rates[name] = take(config, scalar, int, where)
        else:
            raise BridgeError(f"{where}: the field 'compress_rates.{name}' is missing (an integer expected)")
        if rates[name] != LAYER_TYPES[name]:
            raise BridgeError(f"{where}: compress rate of {name} is {rates[name]}, DeepSeek-V4 has {LAYER_TYPES[name]}")
    return rates


# ---------------------------------------------------------------- writing


def released_config(
    spec: ModelSpec, expert_dtype: str | None, quantized: bool, tile: tuple[int, int] | None = None
) -> dict[str, Any]:
    """config.json in the released dialect.

    Args:
        spec: the model.
        expert_dtype: `fp4`, `fp8`, or None to leave the key out (BF16 copies).
        quantized: whether to state the FP8 `quantization_config`; a BF16 copy must not.
        tile: of its FP8 linear maps, by default the released one.
    """
    if isinstance(spec, V41Spec):
        return released_config_v41(spec, expert_dtype, (tile or (32, 32)) if quantized else None)
    config: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
    config |= {name: getattr(spec, name) for name in (*_SAME, *_MARKS)}
    config |= {
        "num_hash_layers": spec.num_hash_layers,
        "qk_rope_head_dim": spec.qk_rope_head_dim,
        "rope_theta": number(spec.rope_theta),
        "compress_rope_theta": number(spec.compress_rope_theta),
        "rope_scaling": {"type": "yarn"} | {k: number(getattr(spec, n)) for k, n in ROPE_SCALING.items()},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
    }
    if quantized:
        config["quantization_config"] = dict(QUANTIZATION_CONFIG)
    if expert_dtype:
        config["expert_dtype"] = expert_dtype
    config["compress_ratios"] = list(spec.compress_ratios)
    if spec.dspark:
        config |= {
            "dspark_block_size": spec.dspark.block_size,
            "dspark_noise_token_id": spec.dspark.noise_token_id,
            "dspark_target_layer_ids": list(spec.dspark.target_layer_ids),
            "dspark_markov_rank": spec.dspark.markov_rank,
        }
    return dict(sorted(config.items()))


def requantised(
    config: Mapping[str, Any], spec: ModelSpec, expert_dtype: str | None, tile: tuple[int, int] | None
) -> dict[str, Any]:
    """A released config.json that says of the encodings what now is so.

    Args:
        config: as released.
        spec: its numbers.
        expert_dtype: what experts are stored as.
        tile: of FP8 linear maps; None: nothing is quantised.
    """
    changed = {key: value for key, value in config.items() if key not in ("quantization_config", "expert_dtype")}
    if tile is None:
        return changed
    new = released_config(spec, expert_dtype, quantized=True, tile=tile)
    if isinstance(spec, V41Spec):
        return {
            k: new[k] if k == "quantization_config" else v for k, v in {"quantization_config": None, **config}.items()
        }
    old = config.get("quantization_config", QUANTIZATION_CONFIG)
    return changed | {"quantization_config": old, "expert_dtype": expert_dtype}


QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
