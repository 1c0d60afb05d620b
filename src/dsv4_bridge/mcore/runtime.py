"""Process groups: one process on its own, or the ranks that torchrun started."""

import os
from dataclasses import replace

import torch
import torch.distributed as dist

from ..errors import BridgeError
from ..free_memory import free_memory as free_main_memory
from ..parallel.topology import Sizes
from .cpu import install
from .meeting import meet
from .mends import mend_megatron


def initialize(parallel: Sizes | None = None, seed: int = 1234) -> None:
    """Make megatron-core's process groups, once; later calls with the same sizes do nothing.

    Under torchrun the ranks meet through the environment; otherwise this process is the only one.

    Raises:
        BridgeError: the groups exist with other sizes, or the world does not divide into them.
    """
    on_cpu = install()
    mend_megatron()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    sizes = parallel or Sizes()
    if parallel_state.model_parallel_is_initialized():
        there = Sizes(
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_world_size() or 1,
            parallel_state.get_context_parallel_world_size(),
        )
        if parallel is not None and there != replace(sizes, vp=1):  # a group is not cut into chunks
            raise BridgeError(f"making process groups of {sizes}: this process has groups of {there} already")
        return
    if not dist.is_initialized():
        _meet(on_cpu)
    _check_sizes(sizes, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        context_parallel_size=sizes.cp,
        expert_model_parallel_size=sizes.ep,
        expert_tensor_parallel_size=sizes.etp,
        create_gloo_process_groups=True,
    )
    model_parallel_cuda_manual_seed(seed)


def free_memory() -> tuple[int, str]:
    """Bytes that are free where models are built, and what they are of, in words."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], "GPU memory"
    return free_main_memory(), "memory"


def _meet(on_cpu: bool) -> None:
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    meet("gloo" if on_cpu else "cpu:gloo,cuda:nccl")


def _check_sizes(sizes: Sizes, world: int) -> None:
    for name, need in (("tp*pp*cp", sizes.tp * sizes.pp * sizes.cp), ("etp*ep*pp", sizes.etp * sizes.ep * sizes.pp)):
        if world % need:
            raise BridgeError(f"making process groups: {name} is {need}, which does not divide the {world} ranks")
