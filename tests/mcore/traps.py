"""Mistakes that ports of DeepSeek-V4 were seen to make: a check for each, and ways to make it again.

A check passes on the model as it is, and raises AssertionError where one of the bugs is in. Numbers
are those of the project's list of known traps.
"""

import bugs
import checks
import torch
from bugs import Bug, Trap, put
from checks import TINY
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from pytest import MonkeyPatch
from reference import pair
from traps_attention import ATTENTION, HYPER_CONNECTIONS, cast_like_all, same, unrefused

from dsv4_bridge.mcore import config
from dsv4_bridge.mcore.layers import block, moe, mtp
from dsv4_bridge.mcore.layers.moe import BiasRouter, HashRouter
from dsv4_bridge.mcore.layers.mtp import MTPLayer
from dsv4_bridge.mcore.weights import load as weights

route = "topk_routing_with_score_function"


def routed(make: bugs.Make) -> Bug:
    """A bug in the forward pass of the routed experts, of whatever class they are."""

    def bug(patch: MonkeyPatch) -> None:
        put(type(pair(TINY).ours.decoder.layers[0].mlp.experts), "forward", make)(patch)

    return bug


EXPERTS = [
    Trap(
        24,
        "weights are scores without bias, times the model's factor",
        same,
        {
            "with bias": bugs.weights_from_biased_scores,
            "sigmoid": put(moe, route, lambda f: lambda *a, **k: f(*a, **k | {"score_function": "sigmoid"})),
            "Pro's factor": put(moe, route, lambda f: lambda *a, **k: f(*a, **k | {"scaling_factor": 2.5})),
            "bias not in the choice": put(
                BiasRouter, "choose", lambda _: lambda self, x, ids: x.topk(self.topk).indices
            ),
        },
    ),
    Trap(
        25,
        "tables of ids arrive whole",
        checks.tables_of_ids_arrive_whole,
        {
            "through bf16": put(weights, "_store", bugs.stored_through_bf16),
            "not at all": put(weights, "_store", bugs.no_integers_stored),
        },
    ),
    Trap(
        26,
        "ids are turned to the order of the tokens",
        same,
        {
            "batch first": put(HashRouter, "choose", lambda _: lambda self, x, ids: self.tid2eid[ids.flatten()].long()),
        },
    ),
    Trap(
        26,
        "given embeddings, ids route still",
        checks.each_row_has_its_own_ids,
        {
            "ids are dropped": put(
                HashRouter, "choose", lambda f: lambda self, x, ids: f(self, x, torch.zeros_like(ids))
            ),
            "batch first": put(HashRouter, "choose", lambda _: lambda self, x, ids: self.tid2eid[ids.flatten()].long()),
        },
    ),
    Trap(
        26,
        "each micro-batch is recomputed with its own ids",
        checks.recomputed_with_its_own_ids,
        {
            "kept on a module": bugs.ids_kept_on_a_module,
        },
    ),
    Trap(
        28,
        "routed and shared experts clamp in front of silu",
        same,
        {
            "not the shared": put(SharedExpertMLP, "forward", bugs.clamp_off),
            "not the routed": routed(bugs.clamp_off),
            "shared behind it": put(SharedExpertMLP, "forward", bugs.clamp_behind),
            "routed behind it": routed(bugs.clamp_behind),
        },
    ),
    Trap(
        28,
        "paths without the clamp are refused",
        checks.refuses(
            bias_activation_fusion=True,
            moe_shared_expert_overlap=True,
            use_te_activation_func=True,
            use_transformer_engine_op_fuser=True,
        ),
        unrefused,
    ),
    Trap(
        29,
        "the experts' bias is not rounded by the wrapper",
        checks.bias_survives_float16_module,
        {
            "rounded": lambda patch: patch.setattr(BiasRouter, "float32_names", ()),
        },
    ),
    Trap(
        30,
        "the weight multiplies in front of the second matrix",
        checks.weight_multiplies_before_the_second_matrix,
        {
            "behind it": routed(bugs.weight_behind),
        },
    ),
    Trap(30, "the weight on the input is refused", checks.refuses(moe_apply_probs_on_input=True), unrefused),
    Trap(
        31,
        "hash layers have tables, the others biases",
        checks.hash_layers_have_tables_and_others_biases,
        {
            "all routed": put(block, "moe_builder", lambda f: lambda hashed, name: f(False, name)),
            "all hashed": put(block, "moe_builder", lambda f: lambda hashed, name: f(True, name)),
        },
    ),
    Trap(
        32,
        "experts are one tensor on disk",
        checks.checkpoint_has_every_tensor,
        {
            "one each": put(SequentialMLP, "sharded_state_dict", bugs.an_entry_an_expert),
        },
    ),
]

PREDICTION_AND_RUN_TIME = [
    Trap(
        48,
        "loading fills multi-token prediction",
        checks.mtp_is_loaded,
        {
            "skipped": put(weights, "places", bugs.mtp_not_loaded),
        },
    ),
    Trap(
        50,
        "its body is called transformer_layer on disk",
        checks.checkpoint_has_every_tensor,
        {
            "mtp_model_layer": put(mtp, "apply_prefix_mapping", lambda _: lambda *args: None),
        },
    ),
    Trap(
        50,
        "it starts from all streams and has a head of its own",
        checks.mtp_is_its_formula,
        {
            "one stream": put(MTPLayer, "forward", bugs.contracted_streams),
            "mean instead of the head": put(mtp, "collapse_by_head", lambda _: bugs.mean_of_streams),
        },
    ),
    Trap(
        51,
        "a list of ratios of another length is refused",
        checks.refuses(csa_compress_ratios=(0, 4, 128, 4)),
        unrefused,
    ),
    Trap(
        51,
        "ratios, base and factor are those of every release",
        checks.ratios_are_those_of_every_release,
        {
            "transformers' default ratios": put(config, "DeepSeekV4Config", bugs.default_ratios),
            "base 40000": put(
                config, "DeepSeekV4Config", lambda f: lambda **k: f(**k | {"csa_compress_rotary_base": 40000.0})
            ),
        },
    ),
    Trap(
        56,
        "gradients reach the projections of the streams",
        checks.mtp_has_gradients,
        {
            "four dimensions": put(MTPLayer, "forward", bugs.streams_in_four_dimensions),
        },
    ),
    Trap(57, "float32 parameters survive Float16Module", checks.float32_survives_float16_module, cast_like_all),
    Trap(
        58,
        "a stage before the last hands on all streams",
        checks.an_inner_stage_hands_on_all_streams,
        {
            "contracted": put(block.HyperConnectedBlock, "forward", bugs.streams_contracted_between_stages),
        },
    ),
]

TRAPS = HYPER_CONNECTIONS + ATTENTION + EXPERTS + PREDICTION_AND_RUN_TIME
