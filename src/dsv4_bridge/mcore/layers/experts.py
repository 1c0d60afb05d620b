"""Routed experts of a rank computed together, by plain torch: no Transformer Engine needed.

The parameters are those of megatron-core's TEGroupedMLP, `linear_fc1.weight{j}` and `linear_fc2.weight{j}`
for local expert j; checkpoints have the keys of its sequential experts, so the two read each other's.

Shapes: T tokens of this rank's experts, sorted by expert; n local experts; h hidden; f width of an expert
on this rank (its whole width over the expert-tensor-parallel ranks).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..config import DeepSeekV4Config

_KERNEL_BYTES = 16  # rows of the grouped kernel begin at multiples of this


def grouped_linear(x: Tensor, counts: Sequence[int], weights: Sequence[Tensor], kernel: bool | None = None) -> Tensor:
    """Rows times the matrix of their group: `y = x W_j^T` for the `counts[j]` rows of group j.

    Every weight gets a gradient, zero where its group is empty: data parallelism waits for all of them.

    Args:
        x: [T, in], sorted by group.
        counts: rows of each group, T together.
        weights: n matrices [out, in] of x's type.
        kernel: one launch of torch's grouped product, or a product for each group that has rows; by
            default the first where it is fast: bfloat16 on CUDA, with rows that it can address.

    Returns:
        [T, out], of x's type.
    """
    result = _GroupedLinear.apply(x, list(counts), _kernel_fits(x, weights) if kernel is None else kernel, *weights)
    assert isinstance(result, Tensor)
    return result


def _kernel_fits(x: Tensor, weights: Sequence[Tensor]) -> bool:
    return (
        x.is_cuda
        and x.dtype is torch.bfloat16
        and all(size * x.element_size() % _KERNEL_BYTES == 0 for size in weights[0].shape)
    )


class _GroupedLinear(torch.autograd.Function):
    """See `grouped_linear`. Saves the weights as they are: a stack of them lives only during a call."""

    @staticmethod
    def forward(ctx, x: Tensor, counts: list[int], kernel: bool, *weights: Tensor) -> Tensor:  # type: ignore[override]
        ctx.counts, ctx.kernel = counts, kernel and len(x) > 0  # the kernel refuses an empty batch
        ctx.save_for_backward(x, *weights)
        if ctx.kernel:
            return F.grouped_mm(x.contiguous(), stacked(weights).transpose(1, 2), offs=_ends(counts, x.device))
        out = x.new_empty(len(x), len(weights[0]))
        for rows, j in _groups(counts):
            torch.mm(x[rows], weights[j].t(), out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad = grad.contiguous()
        compute = _kernel_gradients if ctx.kernel else _loop_gradients
        to_x, to_weights = compute(grad, x.contiguous(), ctx.counts, weights, wanted[0], any(wanted[3:]))
        kept = (g if want else None for g, want in zip(to_weights, wanted[3:], strict=True))
        return to_x, None, None, *kept


Gradients = tuple[Tensor | None, Sequence[Tensor | None]]


def _kernel_gradients(
    grad: Tensor, x: Tensor, counts: list[int], weights: Sequence[Tensor], for_x: bool, for_weights: bool
) -> Gradients:
    ends = _ends(counts, x.device)
    to_x = F.grouped_mm(grad, stacked(weights), offs=ends) if for_x else None
    if not for_weights:
        return to_x, [None] * len(weights)
    to_weights = F.grouped_mm(grad.t(), x, offs=ends)  # [n, out, in]
    if empty := [j for j, count in enumerate(counts) if count == 0]:
        to_weights[empty] = 0  # not every kernel writes there (pytorch/pytorch#172439)
    return to_x, to_weights.unbind()


def _loop_gradients(
    grad: Tensor, x: Tensor, counts: list[int], weights: Sequence[Tensor], for_x: bool, for_weights: bool
) -> Gradients:
    to_x = torch.empty_like(x) if for_x else None
    found: list[Tensor | None] = [None] * len(weights)
    for rows, j in _groups(counts):
        if to_x is not None:
            torch.mm(grad[rows], weights[j], out=to_x[rows])
        if for_weights:
            found[j] = grad[rows].t() @ x[rows]
    if not for_weights:
        return to_x, found
    return to_x, [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


def _groups(counts: Iterable[int]) -> Iterator[tuple[slice, int]]:
    """Rows and number of every group that has any."""
    start = 0
    for j, count in enumerate(counts):
        if count:
            yield slice(start, start + count), j
        start += count


def _ends(counts: list[int], device: torch.device) -> Tensor:
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """[n, out, in]: a view where the matrices lie one behind the other, as `Matrices` makes them; else a copy."""
    first = weights[0]
    step = first.numel() * first.element_size()
    start, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    if all(
        w.is_contiguous() and w.data_ptr() == start + j * step and w.untyped_storage().data_ptr() == storage
        for j, w in enumerate(weights)
    ):
        return first.detach().as_strided((len(weights), *first.shape), (first.numel(), first.shape[1], 1))
    return torch.stack([w.detach() for w in weights])


def clamped_swiglu(x: Tensor, weights: Tensor, limit: float | None) -> Tensor:
    """`silu(min(gate, limit)) * clamp(up, -limit, limit)` times the routing weight, in x's type (trap 30).

    Args:
        x: [T, 2f], gate then up.
        weights: [T].
        limit: None: no clamp.

    Returns:
        [T, f].
    """
    gate, up = x.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (F.silu(gate) * up * weights.unsqueeze(-1)).to(x.dtype)


Adapt = Callable[[Tensor, Tensor, Sequence[int]], Tensor]


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

    def multiply(self, x: Tensor, counts: Sequence[int]) -> Tensor:
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
        counts = tokens_per_expert.tolist()
        gate_up = self.linear_fc1.multiply(permuted_local_hidden_states, counts)  # [T, 2f]
        active = clamped_swiglu(gate_up, permuted_probs, self.config.activation_func_clamp_value)  # [T, f]
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
