"""Routed experts of a rank computed together, by plain torch: no Transformer Engine needed.

The parameters are those of megatron-core's TEGroupedMLP, `linear_fc1.weight{j}` and `linear_fc2.weight{j}`
for local expert j; checkpoints have the keys of its sequential experts, so the two read each other's.

Shapes: T tokens of this rank's experts, sorted by expert; n local experts; h hidden; f width of an expert
on this rank (its whole width over the expert-tensor-parallel ranks).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from ..config import DeepSeekV4Config
from ..kernels.grouped import Counts, clamped_swiglu, grouped_linear

Adapt = Callable[[Tensor, Tensor, Counts], Tensor]


class Matrices(torch.nn.Module):
    """`weight0` … `weight{n-1}`, in one block of memory.

    They are registered from the last to the first: megatron's distributed optimizer moves parameters to a
    buffer of its own in reverse order, and there they are one block in this order again.

    Args:
        count: n.
        linear: makes one of megatron's linears, whose weight is taken: with its initial values, and the
            marks that optimizer and gradient reduction go by.
    """

    def __init__(self, count: int, linear: Callable[[], torch.nn.Module]):
        super().__init__()
        self.count = count
        self.adapt: Adapt | None = None  # adapters: output [T, out], input [T, in] and counts -> output
        made: list[torch.nn.Parameter] = []
        block = torch.empty(0)
        for j in range(count):
            weight = linear().weight
            assert isinstance(weight, torch.nn.Parameter)
            if j == 0:
                block = weight.data.new_empty(count, *weight.shape)
            block[j] = weight.data
            weight.data = block[j]
            made.append(weight)
        for j in reversed(range(count)):
            self.register_parameter(f"weight{j}", made[j])
        # Checkpoints hold one state a linear; a model has nowhere to put it, and nothing is in it.
        self.register_load_state_dict_pre_hook(_drop_states)

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """In the order of the experts."""
        return [getattr(self, f"weight{j}") for j in range(self.count)]

    def multiply(self, x: Tensor, counts: Counts) -> Tensor:
        """[T, in], `counts` rows of each expert -> [T, out]."""
        y = grouped_linear(x, counts, self.weights)
        return y if self.adapt is None else self.adapt(y, x, counts)


def _drop_states(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for j in range(getattr(module, "count", 0)):
        state_dict.pop(f"{prefix}_extra_state{j}", None)


class GroupedExperts(MegatronModule):
    """The experts of a rank; takes the place of megatron's SequentialMLP.

    Expert-tensor parallelism cuts the rows of gate and of up, and the columns of the second matrix. What a
    rank returns is then a part of the sum: both dispatchers gather the tokens in front and add the parts up.

    Args:
        num_local_experts: n.
        config: the model's.
        pg_collection: `ep`, `expt_tp` and `expt_dp` are read.
        name: not read.
    """

    config: DeepSeekV4Config

    def __init__(
        self,
        num_local_experts: int,
        config: DeepSeekV4Config,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ):
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        width, hidden = config.moe_ffn_hidden_size, config.hidden_size
        assert width is not None
        common: dict[str, Any] = {
            "config": config,
            "bias": False,
            "skip_bias_add": True,
            "is_expert": True,
            "tp_group": self.tp_group,
        }
        wide = common | {"init_method": config.init_method, "gather_output": False, "stride": 2}
        back = common | {"init_method": config.output_layer_init_method, "input_is_parallel": True}
        # [2f, h] each, gate then up; and [h, f]
        self.linear_fc1 = Matrices(num_local_experts, partial(ColumnParallelLinear, hidden, 2 * width, **wide))
        self.linear_fc2 = Matrices(num_local_experts, partial(RowParallelLinear, width, hidden, **back))

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """[T, h], tokens of each expert [n] and their routing weights [T] -> [T, h], and no bias."""
        # The dispatchers that megatron has for any machine brought them to the host; its flex ones may leave them.
        counts = tokens_per_expert if tokens_per_expert.is_cuda else tokens_per_expert.tolist()
        gate_up = self.linear_fc1.multiply(permuted_local_hidden_states, counts)  # [T, 2f]
        limit, by = self.config.activation_func_clamp_value, self.config.kernel_choice
        active = clamped_swiglu(gate_up, permuted_probs, limit, by)  # [T, f]
        return self.linear_fc2.multiply(active, counts), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Live names -> what a checkpoint holds of them, under the keys of megatron's sequential experts."""
        singly = (metadata or {}).get("singleton_local_shards", False)
        axis, total = len(sharded_offsets), self.ep_group.size() * self.num_local_experts
        found: dict[str, Any] = {}
        for name, matrices, cut in (("linear_fc1", self.linear_fc1, 0), ("linear_fc2", self.linear_fc2, 1)):
            for j, weight in enumerate(matrices.weights):
                expert = self.ep_group.rank() * self.num_local_experts + j
                offsets = sharded_offsets if singly else (*sharded_offsets, (axis, expert, total))
                where = f"{prefix}experts.{expert}.{name}." if singly else f"{prefix}experts.{name}."
                held = make_sharded_tensors_for_checkpoint(
                    {"weight": weight, "_extra_state": None},
                    where,
                    {"weight": cut},
                    offsets,
                    tp_group=self.tp_group,
                    dp_cp_group=self.dp_group,
                )
                if name == "linear_fc1":
                    held[f"{where}weight"] = apply_swiglu_sharded_factory(
                        held[f"{where}weight"], offsets, singly, tp_group=self.tp_group, dp_group=self.dp_group
                    )
                found[f"{prefix}{name}.weight{j}"] = held[f"{where}weight"]
                found[f"{prefix}{name}._extra_state{j}"] = held[f"{where}_extra_state"]
        return found
