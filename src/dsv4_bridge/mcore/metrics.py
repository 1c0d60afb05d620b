"""What a training step says about itself besides its loss: auxiliary losses and the load of experts.

Modules add to a `Tally` of their own as they compute, without waiting for the device; `collect` reads
them over all ranks and starts them anew.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Means over everything that was counted, by the attribute's key.
MEANS = ("balance_loss", "indexer_loss", "mtp_loss")


class Tally:
    """A weighted sum since it was last read, on the device of what is added."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count: Tensor | float = 0.0

    def add(self, value: Tensor, count: Tensor | float = 1.0) -> None:
        """Add a value (any shape, the same every time), and how many it stands for."""
        value = value.detach().float()
        self.total = value.clone() if self.total is None else self.total + value
        self.count += count

    def take(self) -> tuple[Tensor | None, Tensor | float]:
        """The sum and the count; both start anew."""
        found = self.total, self.count
        self.total, self.count = None, 0.0
        return found


def collect(model: torch.nn.Module | Sequence[torch.nn.Module]) -> dict[str, float]:
    """Read what was counted since the last call. Every rank calls it, for it sums over all of them.

    Args:
        model: the model, or this rank's chunks; wrapped or not.

    Returns:
        Those of the following that were counted, each without its coefficient:

        - `balance_loss`: mean over routed layers and micro-batches; an even load has about 1.
        - `indexer_loss`: mean over indexers and micro-batches of the mean over queries, in nats.
        - `mtp_loss`: mean over the learned tokens of all MTP depths, in nats.
        - `expert_load_max`, `expert_load_min`: tokens of the fullest and the emptiest expert of any routed
          layer, over the layer's mean.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    parts = [module for chunk in chunks for module in chunk.modules()]
    tallies = [tally for part in parts if (tally := getattr(part, "tally", None)) is not None]
    device = next((p.device for chunk in chunks for p in chunk.parameters()), torch.device("cpu"))
    sums = torch.zeros((len(MEANS), 2), dtype=torch.float64, device=device)
    for name, tally in tallies:
        total, count = tally.take()
        if total is not None:
            row = sums[MEANS.index(name)]
            row += torch.stack([total.double().sum(), torch.as_tensor(count, dtype=torch.float64, device=device)])
    dist.all_reduce(sums)
    found = {name: float(total / count) for name, (total, count) in zip(MEANS, sums.cpu(), strict=True) if count}
    return found | _loads(parts, device)


def _loads(parts: Sequence[torch.nn.Module], device: torch.device) -> dict[str, float]:
    """Extremes of every routed layer's load over its mean; a rank that has no such layer takes part all the same."""
    from megatron.core import parallel_state

    # [layers, experts]: every rank of the group holds the same layers, and has seen some of the tokens.
    held = [load for part in parts if (load := getattr(part, "load", None)) is not None]
    seen = [total for total, _ in (load.take() for load in held) if total is not None]
    extremes = torch.full((2,), -torch.inf, dtype=torch.float64, device=device)  # largest, minus smallest
    if seen:
        loads = torch.stack(seen).double()
        group: Any = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(loads, group=group)
        loads = loads / loads.mean(-1, keepdim=True)
        extremes = torch.stack([loads.max(), -loads.min()])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes.tolist()
    return {"expert_load_max": largest, "expert_load_min": -smallest} if largest >= 0 else {}
