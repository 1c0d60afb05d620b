"""DeepSeek-V4's hybrid attention as a megatron module.

Low-rank queries, one key head that is also the value, rotation of the last channels and its inverse
on the output, a window plus compressed blocks (none, all of ratio 128, or chosen ones of ratio 4), a
learned sink, and an output projection by groups of heads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup

from ..config import DeepSeekV4Config
from ..kernels.attention import Reach, attend, attend_one
from ..kernels.index import IndexTerms
from ..kernels.rotary import norm_rotate, rotate
from ..metrics import Tally
from .basics import ColumnLinear, Linear, RMSNorm, RowLinear, new_parameter
from .cache import Cache, LayerCache, Positions
from .compressor import Compressor
from .context import Share, over_ranks
from .documents import Documents
from .floats import KeepsFloat32
from .indexer import Indexer
from .indexer_loss import indexer_loss
from .observe import observe
from .rope import Rotary


class CoreAttention(KeepsFloat32, MegatronModule):
    """What queries meet: the sink, and the compressor and indexer where the layer has them."""

    float32_names = ("attn_sink",)

    def __init__(self, config: DeepSeekV4Config, ratio: int, block: str, tp_group: ProcessGroup):
        super().__init__(config)
        self.config: DeepSeekV4Config = config
        self.ratio, self.block, self.tp_group = ratio, block, tp_group
        self.attn_sink = new_parameter((config.num_attention_heads // tp_group.size(),), config, torch.float32)
        torch.nn.init.zeros_(self.attn_sink)
        set_tensor_model_parallel_attributes(self.attn_sink, tp_group.size() > 1, 0, 1)
        self.compressor = Compressor(config, ratio, config.v_head_dim) if ratio else None
        self.indexer = Indexer(config) if ratio == 4 else None

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        x: Tensor,
        qr: Tensor,
        turn: Tensor,
        counted: Tensor | None = None,
        cache: LayerCache | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of whole sequences.

        Args:
            q: [b, s, heads, d], rotated.
            kv: [b, s, d], rotated.
            x: [s, b, hidden], the layer's input.
            qr: [s, b, q_lora_rank].
            turn: [s, pairs].
            counted: [b, s] bool, queries that the indexer is trained on; None: all.
            cache: memory to fill, or None.
            lengths: [b], tokens that are no padding; with a cache.

        Returns:
            [b, s, heads, d], and the indexer's loss where it is trained, summed over queries.
        """
        reach = Reach(self.config.csa_window_size, self.ratio, self.config.attention_chunk)
        by = self.config.kernel_choice
        blocks = chosen = None
        if cache is not None and lengths is not None:
            cache.window.fill(kv, lengths)
        if self.compressor is not None:
            blocks = self.compressor(x, cache and cache.compressor, lengths)
            blocks = observe("attn.compressor", self.block, blocks)
            # Every rank has all blocks and only its heads: their gradients are summed over the ranks.
            blocks = copy_to_tensor_model_parallel_region(blocks, self.tp_group)
        terms = None
        if self.trains_indexer and self.indexer is not None:
            terms = self.indexer.terms(x.detach(), qr.detach(), turn)
        if self.indexer is not None and not self.config.csa_dense_attention:
            if terms is None:
                chosen = self.indexer(x.detach(), qr.detach(), turn, cache and cache.indexer, lengths)
            else:
                chosen = self.indexer.choose(terms)
            chosen = observe("attn.index", self.block, chosen)
        out = attend(q, kv, blocks, chosen, self.attn_sink, reach, by)
        if terms is None or blocks is None:
            return out, None
        return out, self._loss(terms, q, kv, blocks, chosen, reach, counted)

    def of_share(
        self, q: Tensor, kv: Tensor, x: Tensor, qr: Tensor, turn: Tensor, counted: Tensor | None, share: Share
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of what this rank has of rows that are cut over ranks; arguments as in `forward`, s the rank's."""
        config, starts = self.config, [segment.start for segment in share.segments]
        count = len(starts)
        blocks: Sequence[Tensor | None] = [None] * count
        terms: Sequence[IndexTerms | None] = [None] * count
        chosen: Sequence[Tensor | None] = [None] * count
        if self.compressor is not None:
            entries = observe("attn.compressor", self.block, self.compressor.of_share(x, share))
            entries = copy_to_tensor_model_parallel_region(entries, self.tp_group)
            blocks = list(entries.split(share.blocks[self.ratio].counts, 1))
        if self.indexer is not None:
            given = x.detach(), qr.detach()
            if not config.csa_dense_attention:
                chosen = self.indexer.choose_of_share(*given, share)
            if self.trains_indexer:  # what the objective compares is made here, wherever it was scored to choose
                terms = self.indexer.of_share(*given, turn, share)
            chosen = [c if c is None else observe("attn.index", self.block, c) for c in chosen]
        queries, keys = q.split(share.sizes(), 1), share.with_window(kv, config.csa_window_size)
        learned = [None] * count if counted is None else counted.split(share.sizes(), 1)
        outs, losses = [], []
        for number, start in enumerate(starts):
            reach = Reach(config.csa_window_size, self.ratio, config.attention_chunk, start)
            given = queries[number], keys[number], blocks[number], chosen[number]
            outs.append(attend(*given, self.attn_sink, reach, config.kernel_choice))
            if self.trains_indexer and (of := terms[number]) is not None:
                losses.append(self._loss(of, *given, reach, learned[number]))
        return torch.cat(outs, 1), torch.stack(losses).sum() if losses else None

    def _loss(
        self,
        terms: IndexTerms,
        q: Tensor,
        kv: Tensor,
        blocks: Tensor | None,
        chosen: Tensor | None,
        reach: Reach,
        counted: Tensor | None,
    ) -> Tensor:
        """The indexer's, summed over queries."""
        assert blocks is not None
        compared = chosen if self.config.dsa_indexer_use_sparse_loss else None
        q, kv, blocks, sink = (t.detach() for t in (q, kv, blocks, self.attn_sink))
        by = self.config.kernel_choice
        return indexer_loss(terms, q, kv, blocks, compared, sink, reach, counted, self.tp_group, by)

    @property
    def trains_indexer(self) -> bool:
        """Whether this pass trains an indexer: in recomputation, the one with gradients."""
        wanted = bool(self.config.dsa_indexer_loss_coeff)
        return wanted and self.indexer is not None and self.training and torch.is_grad_enabled()

    def step(
        self, q: Tensor, kv: Tensor, x: Tensor, qr: Tensor, turn: Tensor, cache: LayerCache, positions: Positions
    ) -> Tensor:
        """Attention of one token a row: q [b, heads, d], kv [b, d], x [b, hidden], qr, turn [b, …]."""
        keys, seen = cache.window.put(kv, positions), positions.seen(cache.window.slots)
        if self.compressor is not None and cache.compressor is not None:
            entries = self.compressor.step(x, cache.compressor, positions)
            sparse = not self.config.csa_dense_attention
            if self.indexer is not None and cache.indexer is not None and sparse:
                chosen = self.indexer.step(x, qr, turn, cache.indexer, positions)
                chosen = observe("attn.index", self.block, chosen.unsqueeze(1)).squeeze(1)
                at = chosen.clamp(min=0).unsqueeze(-1).expand(-1, -1, entries.shape[-1])
                entries, visible = entries.gather(1, at), chosen >= 0
            else:
                count = (positions.here + 1) // self.ratio
                entries = entries[:, : max(1, (max(positions.known) + 1) // self.ratio)]
                visible = torch.arange(entries.shape[1], device=q.device) < count[:, None]
            keys, seen = torch.cat([keys, entries], 1), torch.cat([seen, visible], 1)
        return attend_one(q, keys, seen, self.attn_sink)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As megatron's, with the sink cut by heads."""
        return super().sharded_state_dict(prefix, sharded_offsets, metadata) | sharded_rows(
            self, "attn_sink", prefix, sharded_offsets, metadata
        )


def sharded_rows(module: Any, name: str, prefix: str, offsets: tuple, metadata: dict | None) -> dict[str, Any]:
    """Checkpoint entry of a bare parameter that tensor parallelism cuts along its first axis."""
    groups = ensure_metadata_has_dp_cp_group(metadata)
    return make_sharded_tensors_for_checkpoint(
        {name: getattr(module, name)},
        prefix,
        {name: 0},
        offsets,
        tp_group=module.tp_group,
        dp_cp_group=groups["dp_cp_group"],
    )


class HybridAttention(MegatronModule):
    """One attention sub-layer.

    Under tensor parallelism each rank has some heads and their output groups. The single key head, the
    compressor and the indexer are computed by every rank on whole sequences; what flows back into them
    is summed over the ranks once, so their weights have complete gradients everywhere.

    Args:
        config: the model's.
        layer_number: global, from 1.
        attn_mask_type: causal; megatron's MTP layer asks for it.
        compress_ratio: 0, 4 or 128.
        block: name of the block for `observe`.
        pg_collection: process groups.
    """

    def __init__(
        self,
        config: DeepSeekV4Config,
        layer_number: int,
        compress_ratio: int,
        block: str,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ):
        super().__init__(config)
        assert pg_collection is not None
        self.config: DeepSeekV4Config = config
        self.layer_number, self.attn_mask_type, self.block = layer_number, attn_mask_type, block
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        ranks = self.tp_group.size()
        self.heads, self.groups = config.num_attention_heads // ranks, config.o_groups // ranks
        self.width = config.v_head_dim
        hidden, low = config.hidden_size, config.q_lora_rank
        grouped = config.o_groups * config.o_lora_rank
        parallel = {
            "config": config,
            "init_method": config.init_method,
            "bias": False,
            "skip_bias_add": False,
            "tp_group": self.tp_group,
        }
        self.linear_q_down_proj = Linear(hidden, low, config)
        self.q_layernorm = RMSNorm(config, low, config.layernorm_epsilon, whole=True)
        heads = config.num_attention_heads * self.width
        self.linear_q_up_proj = ColumnLinear(low, heads, gather_output=False, **parallel)
        # Its input is whole already: nothing to gather, and its gradient is summed as without sequence parallelism.
        self.linear_q_up_proj.sequence_parallel = False
        self.linear_q_up_proj.allreduce_dgrad = ranks > 1
        self.linear_kv_proj = Linear(hidden, self.width, config)
        self.kv_layernorm = RMSNorm(config, self.width, config.layernorm_epsilon, whole=True)
        self.core_attention = CoreAttention(config, compress_ratio, block, self.tp_group)
        self.linear_o_group_proj = new_parameter(
            (grouped // ranks, heads // config.o_groups), config, config.params_dtype
        )
        set_tensor_model_parallel_attributes(self.linear_o_group_proj, ranks > 1, 0, 1)
        if config.perform_initialization and config.init_method is not None:
            config.init_method(self.linear_o_group_proj)
        # Adapters: output and input of the groups -> output; no module of its own runs this product.
        self.adapt_groups: Callable[[Tensor, Tensor], Tensor] | None = None
        # Where the weight is not here: input of the groups [t, g, heads*d/g] -> [t, g, r].
        self.multiply_groups: Callable[[Tensor], Tensor] | None = None
        self.linear_proj = RowLinear(grouped, hidden, input_is_parallel=True, **parallel)
        self.tally = ("indexer_loss", Tally())

    def forward(
        self, x: Tensor, rotary: Rotary, cache: Cache | None = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        """[s, b, hidden] -> [s, b, hidden]; a rank's part of s, in and out, under sequence parallelism.

        Args:
            x: normed input of the sub-layer.
            rotary: turns of the positions: [s, pairs], or [b, pairs] for a step with a filled cache.
            cache: None; one to fill with whole prompts; or a filled one, and then s is 1.
            padding_mask: [b, s], True for tokens that the indexer is not trained on.
        """
        ratio = self.core_attention.ratio
        turn = rotary.of(ratio)
        stepping = cache is not None and cache.filled
        # One token a row in a step: positions run along the batch instead of the sequence.
        across = turn.unsqueeze(0) if stepping else turn.unsqueeze(1)
        if self.config.sequence_parallel:
            # What comes back is complete on every rank, so each takes its part of it and no sum is made.
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.tp_group)
        qr = self.q_layernorm(self.linear_q_down_proj(x))
        q = self.linear_q_up_proj(qr)[0].unflatten(-1, (self.heads, self.width))  # [s, b, heads, d]
        by = self.config.kernel_choice
        q = norm_rotate(q, across.unsqueeze(2), self.config.layernorm_epsilon, by)
        kv = rotate(self.kv_layernorm(self.linear_kv_proj(x)), across, by=by)  # [s, b, d]
        if self.tp_group.size() > 1:
            kv = copy_to_tensor_model_parallel_region(kv, self.tp_group)
        layer = None if cache is None else cache.layers[self.layer_number - 1]
        if stepping and cache is not None and layer is not None:
            out = self.core_attention.step(q[0], kv[0], x[0], qr[0], turn, layer, cache.positions).unsqueeze(0)
        else:
            q, kv = q.transpose(0, 1).contiguous(), kv.transpose(0, 1).contiguous()
            counted = None if padding_mask is None else ~padding_mask.bool()
            if rotary.share is not None:
                out, loss = self.core_attention.of_share(q, kv, x, qr, turn, counted, rotary.share)
            elif rotary.documents is None:
                lengths = None if cache is None else cache.lengths
                out, loss = self.core_attention(q, kv, x, qr, turn, counted, layer, lengths)
            else:
                out, loss = self._by_document(rotary.documents, q, kv, x, qr, turn, counted)
            out = self._with_indexer_loss(out, loss, counted).transpose(0, 1)
        out = rotate(out, across.unsqueeze(2), inverse=True, by=by)  # [s, b, heads, d]
        return self.linear_proj(self._by_group(out))[0]

    def _by_document(self, documents: Documents, *inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attention of a packed row, inputs as `CoreAttention` takes them: each document on its own."""
        # Split, not indexed: the gradient of an index is as long as the row, for every document.
        sizes = [part.stop - part.start for part in documents]
        axes = (1, 1, 0, 0, 0, 1)
        cut = [[None] * len(sizes) if t is None else t.split(sizes, axis) for t, axis in zip(inputs, axes, strict=True)]
        outs, losses = zip(*(self.core_attention(*part) for part in zip(*cut, strict=True)), strict=True)
        found = [loss for loss in losses if loss is not None]
        return torch.cat(outs, 1), torch.stack(found).sum() if found else None

    def _with_indexer_loss(self, out: Tensor, loss: Tensor | None, counted: Tensor | None) -> Tensor:
        """`out` [b, s, heads, d] as it is; its backward starts that of the indexer's loss, by megatron's device."""
        if loss is None:
            return out
        # Each of the ranks that rows are cut over has a part of the queries, of their loss and of its gradient.
        ranks = self.cp_group.size()
        if counted is None:
            mean = loss / (out.shape[0] * out.shape[1] * ranks)
        else:
            mean = loss / over_ranks(counted.sum(), self.cp_group).clamp(min=1)
        self.tally[1].add(mean * ranks)
        # A loss a token is divided by the count of tokens at the end of the step.
        summed = loss if self.config.calculate_per_token_loss else mean
        result = DSAIndexerLossAutoScaler.apply(out, summed * (self.config.dsa_indexer_loss_coeff or 0.0))
        assert isinstance(result, Tensor)
        return result

    def _by_group(self, out: Tensor) -> Tensor:
        """[s, b, heads, d] -> [s, b, groups * o_lora_rank]: each group of heads by its own matrix."""
        tokens = out.flatten(2).unflatten(-1, (self.groups, -1)).flatten(0, 1)  # [s*b, g, heads*d/g]
        if self.multiply_groups is not None:
            mixed = self.multiply_groups(tokens)
        else:
            weight = self.linear_o_group_proj.unflatten(0, (self.groups, -1))  # [g, r, heads*d/g]
            mixed = torch.bmm(tokens.transpose(0, 1), weight.mT).transpose(0, 1)  # [s*b, g, r]
        if self.adapt_groups is not None:
            mixed = self.adapt_groups(mixed, tokens)
        return mixed.flatten(1).unflatten(0, out.shape[:2])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As megatron's, with the grouped projection cut by groups."""
        return super().sharded_state_dict(prefix, sharded_offsets, metadata) | sharded_rows(
            self, "linear_o_group_proj", prefix, sharded_offsets, metadata
        )
