"""What of megatron-core is replaced while it runs, and why."""

import queue
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .device import device

_mended = False


def mend_megatron() -> None:
    """Five places where megatron-core 0.19 goes wrong, on any device; once a process.

    It hands every attribute of TensorProperties to torch.empty, and torch 2.15 added one that this does
    not take. Loading the distributed optimizer it looks for torch Adam's `step` among the tensors of a
    parameter, where it has left it out a line before. Saving that optimizer it takes out the padding between
    buckets and then looks parameters up by where they are with it: every one behind a padded bucket would be
    saved from its neighbour's values (a pipeline's shared embedding, or any model of several buckets). And it
    numbers parameters as they come, where its own groups have the float32 ones of a bf16 model in front.
    What its writers did it hears from a process of its own (see `background`); writers are threads here, and a
    queue will do.
    """
    global _mended
    if _mended:
        return
    _mended = True
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from torch.distributed.checkpoint.metadata import TensorProperties

    set_state, set_tensors = TensorProperties.__setstate__, DistributedOptimizer._set_main_param_and_optimizer_states

    def without_strides(self: TensorProperties, state: object) -> None:
        set_state(self, state)
        self.__dict__.pop("strides", None)

    def with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_tensors(self, model_param, {"step": None} | tensors)

    shard_state = DistributedOptimizer.sharded_param_state_fully_reshardable

    def with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.get_parameter_state_dp_zero = partial(_gathered, self)
        try:
            return shard_state(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    begin = DistributedOptimizer.__init__

    def with_numbers(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        for group, (wide, narrow) in enumerate(zip(self.model_fp32_groups, self.model_float16_groups, strict=True)):
            for place, parameter in enumerate((*wide, *narrow)):
                self.model_param_group_index_map[parameter] = (group, place)

    filesystem_async.get_write_results_queue = lambda mp_mode="spawn": queue.Queue()  # type: ignore[assignment]
    DistributedOptimizer.__init__ = with_numbers
    TensorProperties.__setstate__ = without_strides
    DistributedOptimizer._set_main_param_and_optimizer_states = with_step
    DistributedOptimizer.sharded_param_state_fully_reshardable = with_padding


class _Pieces:
    """Pieces of a flat tensor that is nowhere in one piece: each is asked for where it was put."""

    def __init__(self) -> None:
        self._at: dict[tuple[int, int], torch.Tensor] = {}

    def __setitem__(self, where: slice, piece: torch.Tensor) -> None:
        self._at[where.start, where.stop] = piece

    def __getitem__(self, where: slice) -> torch.Tensor:
        return self._at[where.start, where.stop]


def _gathered(
    optimizer: Any, empty_data: bool = False, return_on_all_ranks: bool = False, use_gloo_comm: bool = True
) -> dict[Any, Any] | None:
    """State of whole buffers, each bucket where the buffer has it.

    Megatron holds it by shard, by rank and by buffer; here it is held once, and where a rank has all, not again.
    """
    group = optimizer.data_parallel_group
    ranks, rank = group.size(), group.rank()
    found: dict[Any, Any] = {"buckets_coalesced": True}
    for number, (buffer, by_dtype) in enumerate(zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True)):
        ((dtype, parts),) = by_dtype.items()
        names = ("param", *optimizer.optimizer_state_keys)
        states: dict[str, Any] = {
            name: _Pieces() if ranks == 1 and not empty_data else torch.zeros(buffer.numel, device="cpu")
            for name in names
        }
        for bucket, part in [] if empty_data else zip(buffer.buckets, parts, strict=True):
            each = bucket.grad_data.numel() // ranks
            mine = bucket.offset + rank * each
            for parameter, places in part["param_map"].items():
                tensors, place = optimizer._get_main_param_and_optimizer_states(parameter), places["gbuf_local"]
                for name, state in states.items():
                    state[mine + place.start : mine + place.end] = tensors[name].detach()
            for state in states.values() if ranks > 1 else ():
                all_of_it = torch.empty(each * ranks, dtype=state.dtype, device=device())
                dist.all_gather_into_tensor(all_of_it, state[mine : mine + each].to(device()), group=group)
                state[bucket.offset : bucket.offset + each * ranks] = all_of_it
        found[number] = {dtype: states | {"numel_unpadded": buffer.numel_unpadded}}
    return found if rank == 0 or return_on_all_ranks else None
