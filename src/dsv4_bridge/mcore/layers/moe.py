"""Mixture of experts: routed by token id in the first layers, by score and bias in the others.

Scores are sqrt(softplus(logits)) in float32. A biased router adds `expert_bias` for the choice only;
weights are the plain scores of the chosen experts, over their sum, times the scaling factor.
SwiGLU is clamped in routed and shared experts, and the weight multiplies the activation in front of
the second matrix.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from ...errors import BridgeError
from ..config import ON_DEMAND, DeepSeekV4Config
from ..kernels.grouped import clamped_swiglu
from ..metrics import Tally
from .basics import ColumnLinear, RowLinear
from .experts import GroupedExperts
from .floats import KeepsFloat32
from .observe import observe

_LINEARS = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)


class BiasRouter(KeepsFloat32, TopKRouter):
    """Chooses by score plus `expert_bias` (float32 buffer, balanced without an auxiliary loss)."""

    float32_names = ("expert_bias", "local_tokens_per_expert")
    block = ""
    expert_bias: Tensor
    local_tokens_per_expert: Tensor
    layer_number: int

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, is_mtp_layer: bool = False):
        super().__init__(config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.tally: tuple[str, Tally] | None = ("balance_loss", Tally())
        self.load: Tally | None = Tally()  # megatron zeroes its own counts before anyone can read them

    def forward(  # type: ignore[override]
        self, input: Tensor, padding_mask: Tensor | None = None, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Route tokens.

        Args:
            input: [s, b, hidden].
            padding_mask: [s, b], True for tokens that balance does not count.
            input_ids: [b, s]; a hash router reads them.

        Returns:
            Weights and map, both [s*b, experts].
        """
        self._maintain_float32_expert_bias()
        logits = self.gating(self.apply_input_jitter(input))
        length, batch = logits.shape[:2]
        flat = logits.flatten(0, 1)  # [s*b, experts]
        padding = None if padding_mask is None else padding_mask.reshape(-1)
        flat = self.apply_z_loss(flat, padding_mask=padding)
        weights, routing_map = self._weighed(flat, input_ids)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            weights = self._balanced(weights, flat, length, batch, padding)
        self._apply_expert_bias(routing_map, padding_mask=None if padding is None else padding.unsqueeze(-1))
        return weights, routing_map

    def picked(self, input: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route tokens where there are no gradients: weights and numbers of the chosen, [s*b, top-k] both.

        Args:
            input: [s, b, hidden].
            input_ids: [b, s]; a hash router reads them.
        """
        self._maintain_float32_expert_bias()
        logits = self.gating(self.apply_input_jitter(input))
        return self._weighed(logits.flatten(0, 1), input_ids, True)

    def _weighed(self, logits: Tensor, input_ids: Tensor | None, dense: bool = False) -> tuple[Tensor, Tensor]:
        chosen = observe("ffn.router", self.block, self.choose(logits, input_ids))
        weights, routed = topk_routing_with_score_function(
            logits,
            self.topk,
            score_function=self.score_function,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            precomputed_indices=chosen,
            dense_output=dense,
        )
        return self._over_its_sum(weights) if self.topk == 1 else weights, routed

    def _over_its_sum(self, weights: Tensor) -> Tensor:
        """A single score over the sum of the chosen: megatron-core 0.19 leaves that out for one expert a token."""
        scale = self.config.moe_router_topk_scaling_factor or 1.0
        return weights / (weights.sum(dim=-1, keepdim=True) / scale + 1e-20)

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """The balance of each row by its own number of tokens; megatron-core takes the mean number for all rows.

        loss = E * sum_i f_i * P_i over a row of T tokens, f_i = tokens of expert i / (T * k), P_i the mean score of
        expert i; then the mean over the rows that have tokens.
        """
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if not with_padding_mask or coefficient == 0:
            return super()._apply_seq_aux_loss(
                probs, scores_for_aux_loss, routing_map, seq_length, bsz, with_padding_mask
            )
        experts = scores_for_aux_loss.shape[-1]
        shape = (seq_length, bsz, experts)
        here = routing_map.reshape(shape).sum(dim=0).float()  # [b, experts], of this rank's part of the rows
        tokens = reduce_from_tensor_model_parallel_region(here, self.tp_cp_group)
        length = tokens.sum(dim=-1, keepdim=True) / self.topk  # [b, 1]
        sums = scores_for_aux_loss.reshape(shape).sum(dim=0)
        rows = (sums * tokens / length.clamp(min=1).square()).sum(dim=-1) * (experts / self.topk)
        aux_loss = coefficient * rows.sum() / (length > 0).sum().clamp(min=1)
        return self.attach_and_log_load_balancing_loss(
            probs,
            coefficient,
            aux_loss,
            "seq_load_balancing_loss",
            self.tp_cp_group,
            valid_token_count=here.sum() / self.topk,
        )

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of every expert for the balance, as megatron does, without compiling it."""
        if torch.is_grad_enabled():
            counted = routing_map if padding_mask is None else routing_map & ~padding_mask
            tokens = counted.sum(dim=0)
            self.local_tokens_per_expert += tokens
            if self.training and self.load is not None:
                self.load.add(tokens)

    def choose(self, logits: Tensor, input_ids: Tensor | None) -> Tensor:
        """Experts of every token: [tokens, experts] -> [tokens, top-k] int64."""
        scores = torch.nn.functional.softplus(logits.detach().float()).sqrt()
        return torch.topk(scores + self.expert_bias, self.topk, dim=-1).indices

    def _balanced(self, weights: Tensor, logits: Tensor, length: int, batch: int, padding: Tensor | None) -> Tensor:
        routing_map, scores = compute_routing_scores_for_aux_loss(
            logits, self.topk, self.score_function, padding_mask=padding
        )
        masked = {"with_padding_mask": padding is not None}
        weights = self._apply_aux_loss(weights, scores, routing_map, **masked)
        weights = self._apply_seq_aux_loss(weights, scores, routing_map, length, batch, **masked)
        return self._apply_global_aux_loss(weights, scores, routing_map, **masked)

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, aux_loss_name: str, *args: Any, **more: Any
    ) -> Tensor:
        """As megatron's; `metrics.collect` sees it too. Each rank has a part of the loss, for its part of a row."""
        if self.tally is not None:
            self.tally[1].add(aux_loss / aux_loss_coeff * self.tp_cp_group.size())
        layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        known = get_moe_metrics_tracker().metrics
        # megatron keeps one table a process, as long as the first model is deep.
        if aux_loss_name in known and len(known[aux_loss_name].values) != layers:
            del known[aux_loss_name]
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, aux_loss_name, *args, **more
        )


class HashRouter(BiasRouter):
    """Chooses by token id: row `id` of `tid2eid` ([vocabulary, top-k] int32) names the experts.

    A new table sends every token to experts 0 to top-k - 1; a real one comes with a checkpoint.
    """

    tid2eid: Tensor

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, is_mtp_layer: bool = False):
        super().__init__(config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        assert isinstance(config, DeepSeekV4Config)
        device = self.weight.device
        # Megatron's bias update visits every router that has the attribute, even as None.
        del self.expert_bias, self.local_tokens_per_expert
        self.enable_expert_bias = False
        self.tally = self.load = None
        table = torch.arange(self.topk, dtype=torch.int32, device=device).repeat(config.actual_vocab_size, 1)
        self.register_buffer("tid2eid", table)

    def choose(self, logits: Tensor, input_ids: Tensor | None) -> Tensor:
        if input_ids is None:
            raise BridgeError(
                f"routing {self.block} by token id: the stage got no input_ids; a hash layer needs them with its input"
            )
        ids = input_ids.transpose(0, 1)  # [s, b], the order of the tokens in `logits`
        if self.config.sequence_parallel:
            ids = ids.chunk(self.tp_group.size())[self.tp_group.rank()]
        return self.tid2eid[ids.reshape(-1)].long()

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Nothing to balance."""

    def _balanced(self, weights: Tensor, logits: Tensor, length: int, batch: int, padding: Tensor | None) -> Tensor:
        """Nothing to balance: ids choose, and no loss moves them."""
        return weights


class HashableMoELayer(MoELayer):
    """megatron-core's MoE layer, with token ids handed to the router.

    The ids are arguments, never kept on the module: under recompute another micro-batch's would be
    found there.
    """

    router: BiasRouter  # type: ignore[assignment]

    def __init__(self, config: DeepSeekV4Config, submodules: MoESubmodules, block: str, **kwargs: Any):
        super().__init__(config, submodules, **kwargs)
        self.block = block
        self.router.block = block

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, input_ids: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[s, b, hidden] and ids [b, s] -> [s, b, hidden], and no bias."""
        mask = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        if mask is not None and self.config.sequence_parallel:
            group = self.router.tp_group
            mask = mask.chunk(group.size())[group.rank()]  # as the hidden states are cut
        dispatcher = self.token_dispatcher
        assert dispatcher is not None
        # Training keeps to megatron's dispatcher, recomputation's first pass too.
        here = not (self.training or torch.is_grad_enabled()) and dispatcher.ep_size * dispatcher.tp_size == 1

        def run(hidden: Tensor) -> Tensor:
            shared = self.shared_experts_compute(hidden)
            if here:
                routed = self._routed_here(hidden, input_ids)
            else:
                weights, routing_map = self.router(hidden, mask, input_ids)
                tokens, weights = self.preprocess(hidden, weights, routing_map)
                dispatched, weights = self.dispatch(tokens, weights)
                output, _ = self.routed_experts_compute(dispatched, weights)
                routed = dispatcher.combine_postprocess(self.combine(output))
            routed = observe("ffn.experts", self.block, routed)
            return routed if shared is None else routed + shared

        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(run, False, hidden_states), None
        return run(hidden_states), None

    def _routed_here(self, hidden: Tensor, input_ids: Tensor | None) -> Tensor:
        """What the dispatcher comes to, to the bit, where this rank has all tokens and experts: [s, b, hidden]."""
        weights, chosen = self.router.picked(hidden, input_ids)
        order = chosen.flatten().argsort(stable=True)  # by expert, then by token
        rows, tokens = order // chosen.shape[1], hidden.flatten(0, 1)
        assert self.num_local_experts is not None
        counts = chosen.new_zeros(self.num_local_experts).scatter_add_(0, chosen.flatten(), torch.ones_like(order))
        experts: Any = self.experts
        output, _ = experts(tokens.index_select(0, rows), counts, weights.flatten()[order])
        summed = torch.zeros_like(tokens).scatter_add_(0, rows.unsqueeze(1).expand_as(output), output)
        return summed.view_as(hidden)


class Experts(SequentialMLP):
    """megatron's experts. Without gradients those that got no token are left out: in decoding, most of them.

    With gradients they take part, for data parallelism waits for every parameter's.
    """

    config: DeepSeekV4Config

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """[tokens, hidden], tokens of each expert, and their weights [tokens] -> [tokens, hidden], and no bias."""
        hidden, probs = permuted_local_hidden_states, permuted_probs
        if torch.is_grad_enabled() or len(hidden) == 0:
            return super().forward(hidden, tokens_per_expert, probs)
        experts: list[Any] = [*self.local_experts]
        used = [(expert, n) for expert, n in zip(experts, tokens_per_expert.tolist(), strict=True) if n]
        sizes = [n for _, n in used]
        parts = zip(used, hidden.split(sizes), strict=True)
        gate_up = torch.cat([expert.linear_fc1(part)[0] for (expert, _), part in parts])
        limit, by = self.config.activation_func_clamp_value, self.config.kernel_choice
        parts = zip(used, clamped_swiglu(gate_up, probs, limit, by).split(sizes), strict=True)
        return torch.cat([expert.linear_fc2(part)[0] for (expert, _), part in parts]), None


class Part(NamedTuple):
    """What one expert gets: its number, tokens [t, hidden] and their weights [t]."""

    expert: int
    tokens: Tensor
    weights: Tensor


class ExpertsOnDemand(MegatronModule):
    """Experts whose weights are elsewhere; without gradients.

    Attributes:
        run: computes what experts make of their tokens, [t, hidden] each; set by who has the weights.
    """

    config: DeepSeekV4Config
    run: Callable[[list[Part]], list[Tensor]]

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """As `Experts`."""
        hidden, probs, counts = permuted_local_hidden_states, permuted_probs, tokens_per_expert.tolist()
        parts = map(Part, range(len(counts)), hidden.split(counts), probs.split(counts))
        used = [part for part in parts if len(part.tokens)]
        return (torch.cat(self.run(used)) if used else hidden), None

    def of_one(self, part: Part, gate_up: Tensor, down: Tensor) -> Tensor:
        """What an expert with these weights, [2f, hidden] and [hidden, f], makes of its tokens."""
        limit, by = self.config.activation_func_clamp_value, self.config.kernel_choice
        active = clamped_swiglu(F.linear(part.tokens, gate_up), part.weights, limit, by)
        return F.linear(active, down)


def routed_experts(num_local_experts: int, config: Any, **kwargs: Any) -> Any:
    """The experts of a rank, as `config.expert_layout` asks for them."""
    if config.expert_layout == "grouped":
        return GroupedExperts(num_local_experts, config, **kwargs)
    if config.expert_layout == "transformer_engine":
        # Imported here: without Transformer Engine it is not importable.
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider().grouped_mlp_modules(True)(num_local_experts, config, **kwargs)
    if config.expert_layout == ON_DEMAND:
        return ExpertsOnDemand(config)
    return Experts(num_local_experts, config, _LINEARS, **kwargs)


def moe_builder(hashed: bool, block: str) -> Any:
    """What builds the MoE sub-layer of one block."""
    submodules = MoESubmodules(
        experts=routed_experts,
        shared_experts=partial(SharedExpertMLP, submodules=_LINEARS),
        router=HashRouter if hashed else BiasRouter,
    )
    return partial(HashableMoELayer, submodules=submodules, block=block)
