"""Mistakes at the cuts of context parallelism, to be put into a rank for the length of a case."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from dsv4_bridge.mcore import schedule
from dsv4_bridge.mcore.layers import attention, context, mtp

_passed, _ahead, _gather = context._passed, context.ahead, context.gather_from_sequence_parallel_region


def _own_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return grad[:, ctx.count :], None, None


def _nothing_before(x: torch.Tensor, step: int, group: Any) -> torch.Tensor:
    return torch.zeros_like(x) if step == 1 else _passed(x, step, group)


def _nothing_behind(x: torch.Tensor, ends: torch.Tensor, group: Any) -> torch.Tensor:
    return _ahead(x, ends[group.rank() * x.shape[1] :], None)


def _in_vain(*args: Any, **kwargs: Any) -> torch.Tensor:
    return _gather(*args, **kwargs).detach()


def _own(x: torch.Tensor, group: Any) -> torch.Tensor:
    return x


BUGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no gradient goes to the rank before": lambda: patch.object(
        context._WithTail, "backward", staticmethod(_own_gradient)
    ),
    "the rank before has no keys": lambda: patch.object(context, "_passed", _nothing_before),
    "no token comes from the rank behind": lambda: patch.object(mtp, "ahead", _nothing_behind),
    "no gradient goes to others' entries": lambda: patch.object(
        context, "gather_from_sequence_parallel_region", _in_vain
    ),
    "positions begin anew": lambda: patch.object(context.Share, "positions", lambda self: torch.arange(self.size)),
    "a rank's mean is of its own labels": lambda: patch.object(schedule, "over_ranks", _own),
    "the indexer's mean is of its own queries": lambda: patch.object(attention, "over_ranks", _own),
}


def put(name: str | None) -> AbstractContextManager[Any]:
    """A mistake by its name, or none."""
    return BUGS[name]() if name else nullcontext()
