"""The model on weights as they are stored: linear maps multiply by codes, nothing is decoded that is kept."""

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from ...codec.multiply import EncodedMatrix
from ...errors import BridgeError
from ...spec.spec import ModelSpec
from ...store.values import Values
from ..kernels.grouped import clamped_swiglu
from ..layers.attention import HybridAttention
from ..layers.basics import ColumnLinear, Linear, RowLinear
from ..layers.moe import ExpertsOnDemand, HashableMoELayer, Part
from .on_demand import OnDemand
from .shelf import Shelf, threads

_FEW = 96  # tokens; more are multiplied by a decoded copy sooner


def product(matrix: EncodedMatrix, x: Tensor) -> Tensor:
    """[t, in] by a matrix [out, in] -> [t, out], in x's type; sums are float32."""
    if len(x) > _FEW:
        return F.linear(x, torch.from_numpy(matrix.decode()).to(x.dtype))
    host = x.detach().float().cpu().contiguous().numpy()
    return torch.from_numpy(matrix.multiply(host, threads=threads())).to(x.device, x.dtype)


class EncodedLinear(torch.nn.Module):
    """Takes the place of a linear map; matrices of one map lie one above another."""

    def __init__(self, shelf: Shelf, units: tuple[str, ...], alone: bool):
        super().__init__()
        self.shelf, self.units, self.alone = shelf, units, alone

    def forward(self, x: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> Any:
        """[…, in] -> […, out]; in a pair with no bias, as megatron's own maps give it, unless `alone`."""
        flat = x.flatten(0, -2)
        parts: list[Tensor] = []
        for unit in self.units:
            with self.shelf.lent(unit) as matrices:
                parts += [product(matrix, flat) for matrix in matrices]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        whole = whole.unflatten(0, x.shape[:-1])
        return whole if self.alone else (whole, None)


class EncodedModel:
    """A model that makes text from a checkpoint larger than memory; on one rank.

    Args:
        values: of the checkpoint, open as long as the model is used.
        spec: its numbers, without draft blocks.
        dtype: of the activations.
        memory: bytes for weights; see `Shelf`.

    Attributes:
        model: it runs as any other.
        shelf: where its weights are.
        experts: weights of every expert, by the prefix of its block and its number.

    Raises:
        BridgeError: too little memory, or the checkpoint cannot be read.
    """

    def __init__(self, values: Values, spec: ModelSpec, dtype: torch.dtype, memory: int):
        demand = OnDemand(values, spec, dtype, spec.max_position_embeddings)
        self.model, self.shelf, self._held = demand.model, Shelf(values), ExitStack()
        self.experts = demand.experts
        for name, module in list(self.model.named_modules()):
            if isinstance(module, Linear | ColumnLinear | RowLinear) or name == "output_layer":
                if items := demand.take(f"{name}.weight"):
                    owner, _, last = name.rpartition(".")
                    put = EncodedLinear(self.shelf, self.shelf.add(name, items), isinstance(module, Linear))
                    setattr(self.model.get_submodule(owner), last, put)
            elif isinstance(module, HybridAttention):
                unit = f"{name}.linear_o_group_proj"
                self.shelf.add(unit, demand.take(unit), together=True)
                module.multiply_groups = self._groups(unit)
                del module.linear_o_group_proj
            elif isinstance(module, HashableMoELayer) and isinstance(module.experts, ExpertsOnDemand):
                module.experts.run = self._runner(module.block, module.experts)
        small, any_expert = demand.size(""), next(iter(self.experts.values()))
        if memory < (least := small + self.shelf.least(any_expert)):
            raise BridgeError(
                f"generating with {memory:,} bytes for weights: {least:,} bytes are the least (small weights, and room "
                f"to read in); give {(least - memory) / 2**30:,.2f} GiB more --memory"
            )
        self._held.enter_context(demand.held(""))
        self.shelf.fill(memory - small, any_expert, spec.num_hidden_layers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()
        self.shelf.close()

    def _groups(self, unit: str) -> Callable[[Tensor], Tensor]:
        """[t, g, in] -> [t, g, r]: each group's tokens by its own rows."""

        def multiply(tokens: Tensor) -> Tensor:
            with self.shelf.lent(unit) as (matrix,):
                parts = matrix.cut(tokens.shape[1])
                return torch.stack([product(part, tokens[:, g]) for g, part in enumerate(parts)], 1)

        return multiply

    def _runner(self, block: str, experts: ExpertsOnDemand) -> Callable[[list[Part]], list[Tensor]]:
        def run(parts: list[Part]) -> list[Tensor]:
            wanted = [(part.expert, self.experts[f"{block}.", part.expert]) for part in parts]
            tokens, found = {part.expert: part for part in parts}, dict[int, Tensor]()
            for expert, (gate, up, down) in self.shelf.experts(block, wanted):
                found[expert] = _expert(gate, up, down, tokens[expert], experts)
            return [found[part.expert] for part in parts]

        return run


def _expert(
    gate: EncodedMatrix, up: EncodedMatrix, down: EncodedMatrix, part: Part, experts: ExpertsOnDemand
) -> Tensor:
    both = torch.cat([product(gate, part.tokens), product(up, part.tokens)], -1)
    limit, by = experts.config.activation_func_clamp_value, experts.config.kernel_choice
    return product(down, clamped_swiglu(both, part.weights, limit, by))
