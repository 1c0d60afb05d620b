"""A decoder layer with hyper-connections, and the stack of them."""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_pg_rank, make_viewless_tensor
from torch import Tensor

from ..config import DeepSeekV4Config
from .attention import HybridAttention
from .basics import RMSNorm
from .cache import Cache
from .floats import KeepsFloat32
from .hyper_connection import HEAD_NAMES, HyperConnection, collapse_by_head, new_head
from .moe import HashableMoELayer, moe_builder
from .observe import observe
from .rope import Rotary


class HyperConnectedLayer(TransformerLayer):
    """Attention and experts, each between the two halves of a hyper-connection."""

    config: DeepSeekV4Config
    input_layernorm: RMSNorm
    pre_mlp_layernorm: RMSNorm
    mlp: HashableMoELayer

    def __init__(self, config: DeepSeekV4Config, submodules: TransformerLayerSubmodules, block: str, **kwargs: Any):
        super().__init__(config, submodules, **kwargs)
        self.block = block
        self.self_attention_hyper_connection = HyperConnection(config)
        self.mlp_hyper_connection = HyperConnection(config)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        rotary: Rotary,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """One layer on the streams.

        Args:
            hidden_states: [s, b, n*h].
            rotary: turns of the positions.
            input_ids: [b, s], for a hash layer.
            cache: memory of decoding, or None.
            padding_mask: [b, s], True for tokens that balance and the indexer's loss do not count.

        Returns:
            [s, b, n*h].
        """
        streams, block = hidden_states, self.block
        x, post, mix = self.self_attention_hyper_connection(streams)
        x = observe("attn.mix", block, x)
        out = self.self_attention(self.input_layernorm(x), rotary, cache, padding_mask)
        out = observe("attn", block, out)
        streams = self.self_attention_hyper_connection.expand(out, streams, post, mix)
        x, post, mix = self.mlp_hyper_connection(streams)
        x = observe("ffn.mix", block, x)
        out = observe("ffn", block, self.mlp(self.pre_mlp_layernorm(x), input_ids, padding_mask)[0])
        streams = self.mlp_hyper_connection.expand(out, streams, post, mix)
        return observe("streams", block, streams)


def layer_spec(config: DeepSeekV4Config, number: int, mtp: bool = False) -> ModuleSpec:
    """The spec of one layer; each has its own, for ratios and routers differ.

    Args:
        config: the model's.
        number: decoder layer or MTP depth, from 0.
        mtp: whether it is the body of an MTP depth.
    """
    ratio = config.csa_compress_ratios[config.num_layers + number if mtp else number]
    block = f"mtp.{number}" if mtp else f"layers.{number}"
    attention = ModuleSpec(module=HybridAttention, params={"compress_ratio": ratio, "block": block})
    attention.params["attn_mask_type"] = _causal()
    submodules = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=attention,
        pre_mlp_layernorm=RMSNorm,
        mlp=moe_builder(not mtp and number < config.moe_n_hash_layers, block),
    )
    return ModuleSpec(module=HyperConnectedLayer, submodules=submodules, params={"block": block})


def _causal() -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    return AttnMaskType.causal


class HyperConnectedBlock(KeepsFloat32, TransformerBlock):
    """The decoder: embeddings become streams, layers run, the learned head makes one stream of them.

    `hc_head_fn`, `hc_head_base`, `hc_head_scale` live where the final norm does.
    """

    float32_names = HEAD_NAMES
    config: DeepSeekV4Config
    final_layernorm: RMSNorm | None
    hc_head_fn: Tensor
    hc_head_base: Tensor
    hc_head_scale: Tensor

    def __init__(self, config: DeepSeekV4Config, **kwargs: Any):
        offset = get_transformer_layer_offset(config, kwargs.get("vp_stage"), get_pg_rank(kwargs["pg_collection"].pp))
        from megatron.core.transformer.transformer_block import get_num_layers_to_build

        count = get_num_layers_to_build(config, kwargs.get("vp_stage"), get_pg_rank(kwargs["pg_collection"].pp))
        specs = [layer_spec(config, offset + i) for i in range(count)]
        super().__init__(config, TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm), **kwargs)
        if self.final_layernorm is not None:
            new_head(self, config)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor | None,
        rotary: Rotary,
        input_ids: Tensor | None = None,
        cache: Cache | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Run this stage's layers.

        Args:
            hidden_states: embeddings [s, b, h] on the first stage; later stages read what
                `set_input_tensor` was given, [s, b, n*h].
            rotary: turns of the positions.
            input_ids: [b, s].
            cache: memory of decoding, or None.
            padding_mask: [b, s].

        Returns:
            Normed hidden states [s, b, h] (None on stages without the final norm), and the streams
            [s, b, n*h] in front of the head.
        """
        if self.pre_process:
            assert hidden_states is not None
            streams: Tensor = hidden_states.repeat(1, 1, self.config.num_residual_streams)
        else:
            assert self.input_tensor is not None
            streams = self.input_tensor
        streams = make_viewless_tensor(inp=streams, requires_grad=True, keep_graph=True)
        training = self.training and torch.is_grad_enabled()
        if training and self.config.recompute_granularity and not streams.requires_grad:
            # Under a frozen embedding, recomputation from an input without gradient would give its layer none.
            streams = streams.detach().requires_grad_()
        recompute = self.config.recompute_granularity == "full" and training
        for layer in self.layers:
            if recompute:
                # Ids are captured by value of this call, so each micro-batch recomputes with its own.
                def run(x: Tensor, layer: torch.nn.Module = layer) -> Tensor:
                    return layer(x, rotary, input_ids, None, padding_mask)

                streams = tensor_parallel.checkpoint(run, bool(self.config.distribute_saved_activations), streams)
            else:
                streams = layer(streams, rotary, input_ids, cache, padding_mask)
        if self.final_layernorm is None:
            return None, streams
        return make_viewless_tensor(inp=self.head(streams), requires_grad=True, keep_graph=True), streams

    def head(self, streams: Tensor) -> Tensor:
        """Streams behind the last layer, [s, b, n*h] -> normed hidden states [s, b, h]; on the last stage."""
        assert self.final_layernorm is not None
        one = collapse_by_head(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.config)
        return observe("head", "model", self.final_layernorm(one))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As megatron's, which would leave the head's bare parameters out."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata or {})
        return found | sharded_head(self, prefix, metadata, self.tp_group)


def sharded_head(module: torch.nn.Module, prefix: str, metadata: dict | None, tp_group: Any) -> dict[str, Any]:
    """Checkpoint entries of a module's learned head, empty where it has none."""
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    bare = {name: module._parameters[name] for name in HEAD_NAMES if name in module._parameters}
    groups = ensure_metadata_has_dp_cp_group(metadata)
    return make_sharded_tensors_for_checkpoint(bare, prefix, tp_group=tp_group, dp_cp_group=groups["dp_cp_group"])
