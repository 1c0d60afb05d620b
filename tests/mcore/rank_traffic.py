"""What a rank sends over the context-parallel group in a forward and a backward: run inside rank_worker.py."""

from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings

from dsv4_bridge.mcore import load_weights
from dsv4_bridge.mcore.schedule import Batch


class Sends:
    """Bytes sent by what is being done, counted around torch.distributed's calls."""

    def __init__(self) -> None:
        self.doing, self.sent = "", Counter[str]()
        self.calls = dist.batch_isend_irecv, mappings.dist_all_gather_func, mappings.dist_reduce_scatter_func

    def messages(self, calls: list[Any]) -> Any:
        self.sent[self.doing] += sum(c.tensor.nbytes for c in calls if c.op is dist.isend)
        return self.calls[0](calls)

    def gather(self, output: torch.Tensor, own: torch.Tensor, group: Any) -> Any:
        self.sent[self.doing] += own.nbytes * (group.size() - 1)
        return self.calls[1](output, own, group=group)

    def scatter(self, output: torch.Tensor, everything: torch.Tensor, group: Any) -> Any:
        self.sent[self.doing] += output.nbytes * (group.size() - 1)
        return self.calls[2](output, everything, group=group)

    def watched(self) -> ExitStack:
        """While it is open, calls are counted; without tensor parallelism they are all context parallelism's."""
        stack = ExitStack()
        stack.enter_context(patch.object(dist, "batch_isend_irecv", self.messages))
        stack.enter_context(patch.object(mappings, "dist_all_gather_func", self.gather))
        stack.enter_context(patch.object(mappings, "dist_reduce_scatter_func", self.scatter))
        return stack


def traffic(told: dict[str, Any]) -> dict[str, int]:
    """Bytes of every layer's forward, and of the whole backward."""
    from rank_worker import build_only, share

    assert parallel_state.get_tensor_model_parallel_world_size() == 1
    (chunk,) = build_only(told)
    load_weights(chunk, told["weights"])
    sends = Sends()
    for number, layer in enumerate(chunk.decoder.layers):

        def begins(*_: Any, name: str = f"layer {number}") -> None:
            sends.doing = name

        layer.register_forward_pre_hook(begins)
    ids = torch.randint(0, chunk.spec.vocab_size, (told["batch"], told["length"]))
    with sends.watched():
        logits = chunk.train()(share(Batch(ids, ids)).input_ids)
        sends.doing = "backward"
        logits.float().mean().backward()
    return dict(sends.sent)
