"""Multi-token prediction: one more layer that predicts the token after the next.

Stream j of depth k's input is e_proj(enorm(embedding of token t + k + 1)) + h_proj(hnorm(stream j of
the depth before)); the streams enter in front of the learned head. Each depth has its own
head and norm and shares the output layer (technical report 2.1; released inference/model.py).
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import roll_tensor
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from ..config import DeepSeekV4Config
from .basics import RMSNorm
from .block import layer_spec, sharded_head
from .context import ahead
from .documents import roll_boundaries
from .floats import KeepsFloat32
from .hyper_connection import HEAD_NAMES, collapse_by_head, new_head
from .rope import Rotary


def moved_ahead(x: Tensor, rotary: Rotary) -> Tensor:
    """[b, s] of tokens one place ahead; 0 beyond the end of a document, as megatron has it."""
    if rotary.share is not None:
        return ahead(x, rotary.share.ends, rotary.share.group)
    moved = roll_tensor(x, shifts=-1, dims=-1, packed_seq_params=roll_boundaries(rotary.documents))[0]
    assert moved is not None
    return moved


class MTPLayer(KeepsFloat32, MegatronModule):
    """One depth."""

    float32_names = HEAD_NAMES
    hc_head_fn: Tensor
    hc_head_base: Tensor
    hc_head_scale: Tensor
    e_proj: ColumnParallelLinear
    h_proj: ColumnParallelLinear

    def __init__(self, config: DeepSeekV4Config, depth: int, pg_collection: ProcessGroupCollection):
        super().__init__(config)
        self.config: DeepSeekV4Config = config
        self.depth, self.tp_group = depth, pg_collection.tp
        hidden, eps = config.hidden_size, config.layernorm_epsilon
        assert config.init_method is not None
        self.enorm = RMSNorm(config, hidden, eps)
        self.hnorm = RMSNorm(config, hidden, eps)
        for name in ("e_proj", "h_proj"):
            linear = ColumnParallelLinear(
                hidden,
                hidden,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_bias_add=False,
                tp_group=self.tp_group,
            )
            setattr(self, name, linear)
        self.mtp_model_layer = build_module(
            layer_spec(config, depth, mtp=True),
            config=config,
            layer_number=depth + 1,
            is_mtp_layer=True,
            pg_collection=pg_collection,
        )
        self.final_layernorm = RMSNorm(config, hidden, eps)
        new_head(self, config)

    def forward(
        self, streams: Tensor, embedded: Tensor, rotary: Rotary, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One depth on the streams of the depth before.

        Args:
            streams: [s, b, n*h].
            embedded: [s, b, h], embeddings of the tokens this depth looks ahead to.
            rotary: turns of the positions.
            padding_mask: [b, s].

        Returns:
            Normed hidden states [s, b, h], and this depth's streams [s, b, n*h].
        """
        n = self.config.num_residual_streams
        # 3-D, for megatron's linear flattens no more than that in its backward.
        parts = self.hnorm(streams.unflatten(-1, (n, -1))).flatten(1, 2)  # [s, b*n, h]
        mixed = self._whole(self.h_proj, parts).unflatten(1, (-1, n))
        mixed = mixed + self._whole(self.e_proj, self.enorm(embedded)).unsqueeze(2)
        mixed = mixed.flatten(2)  # [s, b, n*h]
        if self.config.recompute_granularity == "full" and self.training and torch.is_grad_enabled():

            def run(x: Tensor) -> Tensor:
                return self.mtp_model_layer(x, rotary, None, None, padding_mask)

            streams = tensor_parallel.checkpoint(run, False, mixed)
        else:
            streams = self.mtp_model_layer(mixed, rotary, None, None, padding_mask)
        one = collapse_by_head(streams, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.config)
        return self.final_layernorm(one), streams

    def _whole(self, linear: ColumnParallelLinear, x: Tensor) -> Tensor:
        """[s, m, h] -> [s, m, h]: the columns that the ranks computed, put together, for this rank's part of s."""
        whole = gather_from_tensor_model_parallel_region(linear(x)[0], group=self.tp_group)
        return scatter_to_sequence_parallel_region(whole, self.tp_group) if self.config.sequence_parallel else whole

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Checkpoint entries; the body is called `transformer_layer` on disk, as megatron's own is."""
        found: dict[str, Any] = {}
        for name, module in self.named_children():
            found |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        apply_prefix_mapping(found, {f"{prefix}mtp_model_layer.": f"{prefix}transformer_layer."})
        return found | sharded_head(self, prefix, metadata, self.tp_group)


class MTPBlock(MegatronModule):
    """All depths."""

    def __init__(self, config: DeepSeekV4Config, pg_collection: ProcessGroupCollection):
        super().__init__(config)
        self.tp_group = pg_collection.tp
        depths = range(config.mtp_num_layers or 0)
        self.layers = torch.nn.ModuleList(MTPLayer(config, k, pg_collection) for k in depths)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Checkpoint entries of every depth."""
        found: dict[str, Any] = {}
        for depth, layer in enumerate(self.layers):
            assert isinstance(layer, MTPLayer)
            found |= layer.sharded_state_dict(f"{prefix}layers.{depth}.", sharded_offsets, metadata)
        return found
