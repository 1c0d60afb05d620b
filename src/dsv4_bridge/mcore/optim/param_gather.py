"""Parameters that data-parallel ranks gather while the forward goes on: who waits for them.

Megatron's wrapper waits in front of each module for the module's own parameters. What reads a parameter of a
module inside it, and does not call that one, has to wait for it too.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..layers.experts import GroupedExperts
from ..layers.hyper_connection import HyperConnection

READ_INNER = (GroupedExperts, HyperConnection)


def wait_for_inner(wrapped: Any) -> None:
    """Let the modules that read others' parameters wait for all that are inside of them.

    Args:
        wrapped: a chunk in megatron's data-parallel wrapper; without `overlap_param_gather`, nothing is done.
    """
    if not wrapped.ddp_config.overlap_param_gather:
        return
    groups = wrapped.param_to_bucket_group

    def wait(module: torch.nn.Module, _: Any) -> None:
        for parameter in module.parameters():
            if parameter in groups:
                groups[parameter].finish_param_sync()

    for module in wrapped.module.modules():
        if isinstance(module, READ_INNER):
            module.register_forward_pre_hook(wait)


def gather_all(wrapped: Sequence[Any]) -> None:
    """Gather what is not yet: a checkpoint, or whoever else looks, sees the step that was made."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
