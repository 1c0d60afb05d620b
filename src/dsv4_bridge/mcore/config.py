"""The model's configuration on megatron-core 0.19: ModelSpec -> DeepSeekV4Config, and what is refused.

Field names that megatron-core 0.19 lacks are those of the Megatron-LM dev branch, so that a recipe
written for either reads the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.transformer_config import MLATransformerConfig

from ..errors import BridgeError
from ..parallel.topology import Topology
from ..planning.activations import LOSS_CHUNK
from ..planning.index_queries import MODES
from ..spec.megatron_config import megatron_model
from ..spec.plan import check_computed
from ..spec.spec import ModelSpec
from .kernels.choice import KERNELS, Choice

# Of the checkpoint's numbers under dev's names, what only dev's model reads.
_OF_DEV_ALONE = ("experimental_attention_variant", "enable_hyper_connections", "pipeline_model_parallel_layout")
EXPERT_LAYOUTS = ("sequential", "grouped", "transformer_engine")
ON_DEMAND = "on_demand"  # made by weights.on_demand alone: a checkpoint lies behind it


@dataclass
class DeepSeekV4Config(MLATransformerConfig):
    """Megatron's configuration with the numbers of DeepSeek-V4; made by `model_config`.

    Attributes:
        o_groups: groups of the output projection.
        o_lora_rank: width of each group's output.
        csa_compress_rotary_base: rotary base of layers with compression (window layers: rotary_base).
        csa_window_size: tokens of the sliding window, the query's own among them.
        csa_compress_ratios: 0, 4 or 128, one a decoder layer and one an MTP layer.
        num_residual_streams: hyper-connection streams.
        mhc_sinkhorn_iterations: iterations of the mixing matrix's normalisation.
        mhc_eps: added to the mixing weights and their sums (`hc_eps` of config.json).
        moe_n_hash_layers: first layers, which route by token id.
        actual_vocab_size: rows of a hash layer's table.
        attention_chunk: queries that attention computes at a time at most; it changes memory, not values.
        loss_chunk: tokens whose logits a rank holds at a time while losses are computed, at most; 0: all of a
            micro-batch. The backward makes a chunk's logits again.
        expert_layout: how a rank holds and computes its routed experts: `sequential`, a module each; `grouped`,
            all in one launch (`GroupedExperts`); `transformer_engine`, megatron's TEGroupedMLP. Checkpoints
            are the same.
        kernels: what computes attention, the indexer, mixing, norms and activations: `torch`, the definitions;
            `triton`, fused kernels; `auto`, fused ones on a CUDA device, and on a CPU a compiled loop where few
            tokens are mixed. With `deterministic_mode` (megatron's field) the fused ones add gradients up in a
            fixed order.
        index_queries: where context-parallel ranks score an indexer's queries: `home`, on the rank that has the token;
            `spread`, on ranks with less to score; `auto`, spread where by estimate that saves more time than sending
            takes. A trained indexer's stay at home.
        csa_dense_attention: layers with an indexer attend to all visible blocks, whatever it would choose:
            the first phase of pretraining, and the indexer's warm-up.
        dsa_indexer_loss_coeff: weight of the indexer's own loss (megatron's field); None or 0: it is not trained.
        dsa_indexer_use_sparse_loss: it is trained on the blocks it chose, not on all visible (megatron's field).
    """

    o_groups: int = 8
    o_lora_rank: int = 1024
    csa_compress_rotary_base: float = 160000.0
    csa_window_size: int = 128
    csa_compress_ratios: Sequence[int] = ()
    num_residual_streams: int = 4
    mhc_sinkhorn_iterations: int = 20
    mhc_eps: float = 1e-6
    moe_n_hash_layers: int = 0
    actual_vocab_size: int = 0
    attention_chunk: int = 128
    loss_chunk: int = LOSS_CHUNK
    expert_layout: str = "sequential"
    kernels: str = "auto"
    index_queries: str = "auto"
    csa_dense_attention: bool = False

    @property
    def kernel_choice(self) -> Choice:
        """`kernels` and `deterministic_mode`, as the kernels take them."""
        return Choice(self.kernels, self.deterministic_mode)

    def __post_init__(self) -> None:
        refuse_unsound(self)  # first, for megatron's own checks say less
        # Where megatron's schedules say how the main loss is scaled, for the indexer's to be scaled alike.
        self.experimental_attention_variant_loss_scale_func = DSAIndexerLossAutoScaler.set_loss_scale
        super().__post_init__()
        refuse_unsound(self)  # and again, with the defaults that megatron filled in


def refuse_unsound(config: DeepSeekV4Config) -> None:
    """Raise where a setting would change the numbers without a word, or cannot work.

    Raises:
        BridgeError: every such setting, with its reason.
    """
    kinds, weights = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    balancing = [kinds] if isinstance(kinds, str) else list(kinds)
    coefficients = list(weights) if isinstance(weights, list | tuple) else [weights]
    rules = (
        (config.bias_activation_fusion, "bias_activation_fusion", "megatron's fused SwiGLU drops the clamp"),
        (
            config.moe_shared_expert_overlap,
            "moe_shared_expert_overlap",
            "the overlapped shared expert drops the clamp",
        ),
        (
            config.use_te_activation_func,
            "use_te_activation_func",
            "Transformer Engine's SwiGLU has no clamp",
        ),
        (
            config.use_transformer_engine_op_fuser,
            "use_transformer_engine_op_fuser",
            "its fused SwiGLU has no clamp",
        ),
        (
            config.rotary_percent != 1.0,
            "rotary_percent",
            "qk_pos_emb_head_dim is already the rotated width; another factor would rotate less of it",
        ),
        (config.apply_rope_fusion, "apply_rope_fusion", "the fused kernel has neither inverse nor partial rotation"),
        (config.mscale not in (0.0, 1.0), "mscale", "DeepSeek-V4's YaRN has no attention factor"),
        (config.moe_router_fusion, "moe_router_fusion", "the fused router takes no precomputed choice of experts"),
        (config.moe_router_pre_softmax, "moe_router_pre_softmax", "scores are sqrt(softplus), not a softmax"),
        (
            config.moe_router_score_function != "sqrtsoftplus",
            "moe_router_score_function",
            "scores are sqrt(softplus)",
        ),
        (
            config.moe_expert_capacity_factor is not None,
            "moe_expert_capacity_factor",
            "DeepSeek-V4 drops no token; a capacity would",
        ),
        (config.moe_apply_probs_on_input, "moe_apply_probs_on_input", "routing weights belong behind the activation"),
        (
            not config.moe_router_enable_expert_bias,
            "moe_router_enable_expert_bias",
            "experts are chosen by score and bias; moe_router_bias_update_rate=0 leaves the bias as it is",
        ),
        (
            bool(set(balancing) - {"none", "seq_aux_loss", "aux_loss", "global_aux_loss"}),
            "moe_router_load_balancing_type",
            "experts are chosen by score and bias, whose balance losses are seq_aux_loss (the report's), aux_loss and "
            "global_aux_loss",
        ),
        (
            "none" in balancing and any(coefficients),
            "moe_aux_loss_coeff",
            "nothing reads it without a balance loss; say moe_router_load_balancing_type='seq_aux_loss'",
        ),
        (
            (config.dsa_indexer_loss_coeff or 0) < 0,
            "dsa_indexer_loss_coeff",
            "the indexer would learn to avoid what attention looks at",
        ),
        (
            config.csa_dense_attention and config.dsa_indexer_use_sparse_loss,
            "dsa_indexer_use_sparse_loss",
            "attention is dense and nothing is chosen; the warm-up compares all blocks",
        ),
        (config.mtp_num_layers == 0, "mtp_num_layers", "0 is not None to megatron; a model without MTP has None"),
        (config.mtp_use_repeated_layer, "mtp_use_repeated_layer", "each MTP depth has weights of its own"),
        (config.fp8 is not None, "fp8", "the reference computes in the parameters' type"),
        (config.fp4 is not None, "fp4", "the reference computes in the parameters' type"),
        (config.fp16, "fp16", "activations of DeepSeek-V4 leave float16's range; take bf16"),
        (config.fp32_residual_connection, "fp32_residual_connection", "streams have the parameters' type"),
        (config.hidden_dropout != 0, "hidden_dropout", "hyper-connections have no dropout"),
        (config.attention_dropout != 0, "attention_dropout", "the attention has no dropout"),
        (
            config.expert_layout not in (*EXPERT_LAYOUTS, ON_DEMAND),
            "expert_layout",
            f"expected one of {', '.join(EXPERT_LAYOUTS)}",
        ),
        (config.loss_chunk < 0, "loss_chunk", "expected a number of tokens, or 0 for all of a micro-batch"),
        (config.kernels not in KERNELS, "kernels", f"expected one of {', '.join(KERNELS)}"),
        (config.index_queries not in MODES, "index_queries", f"expected one of {', '.join(MODES)}"),
        (
            config.expert_layout == "transformer_engine" and not HAVE_TE,
            "expert_layout",
            "Transformer Engine is not installed; 'grouped' does the same without it",
        ),
        (
            config.moe_grouped_gemm and config.expert_layout == "sequential",
            "moe_grouped_gemm",
            "nothing reads it here; say expert_layout='grouped'",
        ),
        (config.cuda_graph_impl != "none", "cuda_graph_impl", "attention's loops depend on the sequence length"),
        (config.use_mup, "use_mup", "DeepSeek-V4 has no such scaling"),
        (
            config.recompute_granularity == "selective"
            and bool(set(config.recompute_modules or ()) - {"moe", "shared_experts"}),
            "recompute_modules",
            "attention and mixing recompute by themselves; moe and shared_experts may be chosen",
        ),
    )
    found = [f"  {name}={getattr(config, name)!r}: {why}" for bad, name, why in rules if bad]
    draft = config.mtp_num_layers or 0
    if len(config.csa_compress_ratios) != config.num_layers + draft:
        found.append(
            f"  csa_compress_ratios has {len(config.csa_compress_ratios)} entries, expected one for each of "
            f"{config.num_layers} layers and {draft} MTP layers"
        )
    if unknown := sorted(set(config.csa_compress_ratios) - {0, 4, 128}):
        found.append(f"  csa_compress_ratios holds {unknown}: DeepSeek-V4 knows 0, 4 and 128")
    if found:
        raise BridgeError(
            "configuring the model: these settings would change its numbers or do not work:\n" + "\n".join(found)
        )


def model_config(
    spec: ModelSpec, topology: Topology | None = None, *, dtype: torch.dtype = torch.float32, **settings: Any
) -> DeepSeekV4Config:
    """The configuration of `spec`.

    Args:
        spec: the model's numbers; a DSpark drafter is left out (it is no part of Megatron's model).
        topology: how it is cut over ranks; None: one rank.
        dtype: type of the parameters, float32 or bfloat16; what released checkpoints keep in float32
            stays float32.
        **settings: further fields of DeepSeekV4Config or TransformerConfig (recompute, loss weights …).

    Raises:
        BridgeError: a setting that is unknown, or refused (`refuse_unsound`).
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise BridgeError(f"configuring the model: parameters of {dtype}, expected torch.float32 or torch.bfloat16")
    check_computed(spec, "configuring the model")
    cut, asked = 1 if topology is None else topology.cp, settings.get("context_parallel_size")
    if asked not in (None, cut):
        raise BridgeError(
            f"configuring the model: context_parallel_size={asked}, and the process groups cut rows over {cut}; make "
            "them with Parallel(cp=…), and the size follows"
        )
    on_gpu = torch.cuda.is_available()
    numbers = {name: value for name, value in megatron_model(spec).items() if name not in _OF_DEV_ALONE}
    fields: dict[str, Any] = numbers | {
        "ffn_hidden_size": spec.moe_intermediate_size,
        "mscale_all_dim": 1.0,
        "mhc_eps": spec.hc_eps,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall" if on_gpu else "allgather",
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        # The attention has these norms in any case; megatron would sum the gradient of one of them over
        # the tensor-parallel ranks, where it is complete already.
        "qk_layernorm": False,
        "normalization": "RMSNorm",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": spec.initializer_range or 0.02,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "pipeline_dtype": dtype,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        # Megatron warns about its own default, "full".
        "cuda_graph_modules": [],
        "persist_layer_norm": False,
        "use_cpu_initialization": not on_gpu,
    }
    if topology is not None:
        fields |= {
            "tensor_model_parallel_size": topology.tp,
            "sequence_parallel": topology.tp > 1,
            "expert_model_parallel_size": topology.ep,
            "expert_tensor_parallel_size": topology.etp,
            "pipeline_model_parallel_size": topology.pp,
            "context_parallel_size": topology.cp,
        }
        if topology.pp > 1:
            fields["pipeline_model_parallel_layout"] = str(topology.layout)
        if topology.pp > 1 and topology.layout.vp > 1:
            # Batched, the messages of two ranks that are each other's next and previous would be mixed up.
            fields |= {"virtual_pipeline_model_parallel_size": topology.layout.vp, "batch_p2p_comm": False}
    try:
        return DeepSeekV4Config(**fields | settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise BridgeError(f"configuring the model: {error}") from None
