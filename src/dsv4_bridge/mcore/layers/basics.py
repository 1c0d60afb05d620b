"""The plain layers: linear maps and RMSNorm.

Ours carry an empty `_extra_state`, as megatron-core's own linears do: loaders ask for that object.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from ..config import DeepSeekV4Config
from ..kernels.norm import rms_norm


class Linear(torch.nn.Module):
    """`y = x W^T`, the same on every tensor-parallel rank. W is [out, in] of the parameters' type."""

    def __init__(self, in_features: int, out_features: int, config: TransformerConfig):
        super().__init__()
        self.weight = new_parameter((out_features, in_features), config, config.params_dtype)
        if config.perform_initialization and config.init_method is not None:
            config.init_method(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] -> […, out]."""
        return F.linear(x, self.weight)

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass


class ColumnLinear(ColumnParallelLinear):
    """megatron's, cut by rows of W. Without gradients, on one rank, it is the product alone."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[…, in] -> […, out], and no bias."""
        own = self.weight
        if weight is None and own is not None and _product_alone(self):
            return F.linear(input_, own), None
        return super().forward(input_, weight, runtime_gather_output)


class RowLinear(RowParallelLinear):
    """megatron's, cut by columns of W. Without gradients, on one rank, it is the product alone."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Any]:
        """[…, in] -> […, out], and no bias."""
        if _product_alone(self):
            return F.linear(input_, self.weight), None
        return super().forward(input_)


def _product_alone(linear: ColumnParallelLinear | RowParallelLinear) -> bool:
    """Nothing is gathered, summed or remembered: in decoding that would take longer than the product."""
    group: Any = linear.tp_group
    return not torch.is_grad_enabled() and linear.bias is None and group.size() == 1


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, computed in float32, eps inside the root (transformers' DeepseekV4RMSNorm).

    Args:
        config: the model's.
        hidden_size: width.
        eps: added to the mean square.
        whole: whether it sees whole sequences under sequence parallelism, instead of a rank's part.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, whole: bool = False):
        super().__init__()
        assert isinstance(config, DeepSeekV4Config)
        self.config, self.eps = config, eps
        self.weight = new_parameter((hidden_size,), config, config.params_dtype)
        torch.nn.init.ones_(self.weight)
        if not whole:
            mark_sequence_parallel(config, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[…, hidden] -> […, hidden], in x's type."""
        return rms_norm(x, self.weight, self.eps, self.config.kernel_choice)

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass


def mark_sequence_parallel(config: TransformerConfig, *parameters: torch.nn.Parameter) -> None:
    """Note parameters that act on a rank's part of the sequence: megatron sums their gradients over the ranks."""
    for parameter in parameters:
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def new_parameter(shape: tuple[int, ...], config: TransformerConfig, dtype: torch.dtype) -> torch.nn.Parameter:
    """An uninitialised parameter on the device that models are built on."""
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
