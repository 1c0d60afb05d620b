"""Settings that would change the numbers without a word are refused, with the reason."""

from typing import Any

import pytest
import torch
from reference import small_spec

from dsv4_bridge import BridgeError
from dsv4_bridge.mcore import Parallel, build_model, initialize
from dsv4_bridge.mcore.config import model_config
from dsv4_bridge.mcore.layers.cache import new_cache

pytestmark = pytest.mark.megatron

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "trap_28 fused SwiGLU": ({"bias_activation_fusion": True}, "drops the clamp"),
    "trap_28 overlapped shared expert": (
        {"moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "alltoall"},
        "drops the clamp",
    ),
    "trap_28 TE activation": ({"use_te_activation_func": True}, "no clamp"),
    "trap_9 partial rotary factor": ({"rotary_percent": 0.125}, "already the rotated width"),
    "trap_12 mscale": ({"mscale": 1.277}, "no attention factor"),
    "trap_24 softmax scores": ({"moe_router_score_function": "sigmoid"}, "sqrt"),
    "trap_51 ratios": ({"csa_compress_ratios": (0, 4, 128)}, "expected one for each of 4 layers"),
    "trap_15 unknown ratio": ({"csa_compress_ratios": (0, 4, 64, 4)}, "knows 0, 4 and 128"),
    "no MTP is None": ({"mtp_num_layers": 0}, "0 is not None"),
    "token dropping": ({"moe_expert_capacity_factor": 1.0}, "drops no token"),
    "residuals in float32": ({"fp32_residual_connection": True}, "parameters' type"),
    "dropout": ({"hidden_dropout": 0.1}, "no dropout"),
    "rope fusion": ({"apply_rope_fusion": True}, "inverse"),
    "fp8": ({"fp8": "e4m3"}, "parameters' type"),
    "fp16": ({"fp16": True}, "bf16"),
    "router fusion": ({"moe_router_fusion": True}, "precomputed"),
    "context parallel": ({"context_parallel_size": 2}, "groups cut rows over 1"),
    "recompute of attention": (
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "recompute by themselves",
    ),
    "no such setting": ({"rotary_bass": 10000}, "rotary_bass"),
    "another type": ({"dtype": torch.float16}, "expected torch.float32 or torch.bfloat16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    settings, reason = REFUSED[name]
    with pytest.raises(BridgeError, match=reason) as caught:
        model_config(small_spec(), **settings)
    assert str(caught.value).startswith("configuring the model")


def test_trap_11_the_compressed_base_comes_from_the_checkpoint() -> None:
    assert model_config(small_spec(compress_rope_theta=70000.0)).csa_compress_rotary_base == 70000.0
    assert model_config(small_spec()).csa_compress_rotary_base == 160000.0


def test_every_unsound_setting_is_named_at_once() -> None:
    with pytest.raises(BridgeError) as caught:
        model_config(small_spec(), bias_activation_fusion=True, rotary_percent=0.5)
    assert "bias_activation_fusion=True" in str(caught.value)
    assert "rotary_percent=0.5" in str(caught.value)


def test_groups_of_other_sizes_are_refused() -> None:
    initialize()
    with pytest.raises(BridgeError, match="this process has groups of"):
        initialize(Parallel(ep=2))


def test_calls_the_model_does_not_know_are_refused() -> None:
    spec = small_spec()
    model = build_model(spec).eval()
    ids = torch.randint(0, spec.vocab_size, (2, 5))
    with pytest.raises(BridgeError, match="packed_seq_params is not supported"):
        model(ids, packed_seq_params=object())
    with pytest.raises(BridgeError, match="inference_context is not supported"):
        model(ids, inference_context=object())
    with pytest.raises(BridgeError, match="2 rows with a cache of 3"):
        model(ids, cache=new_cache(model.config, torch.tensor([5, 5, 5]), 10))
    with pytest.raises(BridgeError, match=r"prompts of \[5, 6\] tokens in rows of 5"):
        model(ids, cache=new_cache(model.config, torch.tensor([5, 6]), 10))
    full = new_cache(model.config, torch.tensor([5, 4]), 5)
    with torch.no_grad():
        model(ids, cache=full)
    with pytest.raises(BridgeError, match="2 tokens a row with a filled cache"):
        model(ids[:, :2], cache=full)
    with pytest.raises(BridgeError, match="holds 5 tokens a row"):
        model(ids[:, :1], cache=full)


def test_trap_26_a_hash_layer_without_ids_says_so() -> None:
    spec = small_spec()
    model = build_model(spec)
    router = model.decoder.layers[0].mlp.router
    with pytest.raises(BridgeError, match=r"routing layers.0 by token id: the stage got no input_ids"):
        router(torch.randn(3, 2, spec.hidden_size))
