"""The released configurations, and what transformers writes of them."""

from typing import Any

from conftest import config_path
from dsv4_bridge.store.hf_config import read_config

RELEASED = ("Flash", "Flash-Base", "Flash-0731", "Pro", "Pro-Base", "Pro-0813")
# Keys of a released config that say nothing about the model's numbers.
NOT_NUMBERS = {
    "architectures",
    "expert_dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
LAYER_NAMES = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


def config(name: str = "Flash") -> dict[str, Any]:
    return read_config(config_path(name))


def transformers_dialect(released: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5.23 writes, by hand: only the keys that carry the model's numbers."""
    out = dict(released)
    layers, hashed = out["num_hidden_layers"], out.pop("num_hash_layers")
    out["layer_types"] = [LAYER_NAMES[r] for r in out.pop("compress_ratios")[:layers]]
    out["mlp_layer_types"] = ["hash_moe"] * hashed + ["moe"] * (layers - hashed)
    out["compress_rates"] = {LAYER_NAMES[4]: 4, LAYER_NAMES[128]: 128}
    yarn = {k: v for k, v in out.pop("rope_scaling").items() if k != "type"}
    factor = out.pop("qk_rope_head_dim") / out["head_dim"]
    out["partial_rotary_factor"] = factor
    out["rope_parameters"] = {
        "main": {"rope_type": "default", "rope_theta": out.pop("rope_theta"), "partial_rotary_factor": factor},
        "compress": yarn | {"rope_type": "yarn", "rope_theta": out.pop("compress_rope_theta")},
    }
    return out
