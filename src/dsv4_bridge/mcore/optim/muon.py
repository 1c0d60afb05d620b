"""Muon as DeepSeek-V4's technical report has it, under megatron-core's mixed precision and clipping.

Megatron-core's own Muon needs a package that the index does not have, runs one kind of Newton-Schulz
iteration, and takes a stacked parameter (gate and up, output groups, grouped experts) for one matrix. Here every
released matrix is orthogonalised by itself, whole, whatever cuts it over ranks.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..model import DeepSeekV4Model
from ..weights.places import places

# Technical report, arXiv 2606.19348: eight iterations that converge fast, then two that settle at 1.
FAST, SETTLING = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)


@dataclass(frozen=True)
class Matrix:
    """Where one matrix lies in a parameter.

    Attributes:
        start: its first row.
        stop: the row behind its last.
        axis: along which its parts on other ranks continue it; None: it is whole here.
        group: those ranks.
    """

    start: int
    stop: int
    axis: int | None = None
    group: Any = None


def newton_schulz(matrix: Tensor, steps: Sequence[int] = (8, 2)) -> Tensor:
    """The nearest orthogonal matrix, roughly: U V^T of the singular value decomposition.

    Args:
        matrix: [m, n].
        steps: iterations with the fast coefficients and with the settling ones.

    Returns:
        [m, n]; singular values are near 1.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.float()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-20)
    for (a, b, c), count in zip((FAST, SETTLING), steps, strict=True):
        for _ in range(count):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised matrix by matrix, scaled to one RMS whatever the shape.

    W <- (1 - lr * weight_decay) W - lr * rms * sqrt(max(m, n)) * NS(momentum * M + G), M = momentum * M + G
    (technical report, arXiv 2606.19348, Muon).

    Args:
        groups: param groups.
        matrices: group by group, parameter by parameter, where the matrices are.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: of the gradients.
        nesterov: whether the update looks a step ahead; otherwise it is NS(M).
        rms: root mean square of an update's entries at lr 1.
        steps: iterations of `newton_schulz`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        matrices: Sequence[Sequence[Sequence[Matrix]]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        rms: float = 0.18,
        steps: Sequence[int] = (8, 2),
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(groups, defaults)
        # Not in the groups: these are copied into checkpoints, and process groups cannot be.
        self.matrices = matrices
        self.momentum, self.nesterov, self.rms, self.iterations = momentum, nesterov, rms, tuple(steps)

    def begin(self) -> None:
        """Give every parameter its momentum of 0."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter with a gradient."""
        self.begin()
        for group, held in zip(self.param_groups, self.matrices, strict=True):
            for parameter, matrices in zip(group["params"], held, strict=True):
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter]["momentum_buffer"]
                momentum.mul_(self.momentum).add_(parameter.grad)
                ahead = parameter.grad + self.momentum * momentum if self.nesterov else momentum
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                flat, rows = ahead.reshape(-1, ahead.shape[-1]), parameter.view(-1, parameter.shape[-1])
                for matrix in matrices:
                    update = self._orthogonal(flat[matrix.start : matrix.stop], matrix)
                    rows[matrix.start : matrix.stop].add_(update, alpha=-group["lr"])

    def _orthogonal(self, part: Tensor, matrix: Matrix) -> Tensor:
        """This rank's part of the update of a whole matrix."""
        whole = part
        if matrix.axis is not None:
            parts = [torch.empty_like(part) for _ in range(matrix.group.size())]
            dist.all_gather(parts, part.contiguous(), group=matrix.group)
            whole = torch.cat(parts, matrix.axis)
        update = newton_schulz(whole, self.iterations) * (self.rms * max(whole.shape) ** 0.5)
        if matrix.axis is not None:
            update = update.chunk(matrix.group.size(), matrix.axis)[matrix.group.rank()]
        return update.to(part.dtype)


def matrices_of(chunk: DeepSeekV4Model) -> dict[str, tuple[Matrix, ...]]:
    """Parameter name -> the matrices in it, of those that Muon moves."""
    groups = chunk.pg_collection
    plan, here = places(chunk)
    items = {item.name: item for item in plan.items}
    found: dict[str, tuple[Matrix, ...]] = {}
    for name, held in here.items():
        row = items[name].row
        if not row.matrix:
            continue
        group = groups.expt_tp if row.per_expert else groups.tp
        # The groups of the output projection lie one behind another, and no rank holds a part of one.
        grouped = row.role == "groups"
        axis = {"columns": 0, "rows": 1}.get(row.cut) if group.size() > 1 and not grouped else None
        count = chunk.config.o_groups // group.size() if grouped else 1
        for place in held:
            rows = (place.stop - place.start) // count
            found[place.name] = found.get(place.name, ()) + tuple(
                Matrix(place.row + k * rows, place.row + (k + 1) * rows, axis, group if axis is not None else None)
                for k in range(count)
            )
    return found
