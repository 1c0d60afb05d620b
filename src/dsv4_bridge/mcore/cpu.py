"""Run megatron-core where there is no CUDA. What is wrong on any device is mended in `mends`.

megatron-core 0.19 computes with plain torch operations, but asks CUDA for its device, streams and
random states on the way. `install` answers those questions for a CPU. Nothing is patched where a
CUDA device is present, and `install` must run before megatron is imported.

| what is asked | answer here |
|---|---|
| current device, streams, events, synchronise, graph capture | the CPU; objects that do nothing |
| CUDA random states and seeds | the CPU generator's |
| `torch.zeros(…, device="cuda")` and its like, `.to("cuda")`, `.cuda()` | stay on the CPU |
| `Tensor.type()` of float tensors | the CUDA name, which megatron's buffers are grouped by |
| `torch.compile` of what it fuses | not done: nothing here calls it, and to load the compiler takes 2.6 s of 6.9 |
| split sizes of the all-to-all dispatcher | moved to lists although they are on the CPU already |
| gradients and parameters of a data-parallel group of one | stay where they are; gloo would copy them |
| large tensors on the CPU | in large pages (`THP_MEM_ALLOC_ENABLE=0` in the environment: not so) |
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch.utils._device import _device_constructors

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_installed = False


class _Idle:
    """Stands for a CUDA stream or event: accepts every call, and gives an idle event back."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str) -> Callable[..., "_Idle"]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self

    def __enter__(self) -> "_Idle":
        return self

    def __exit__(self, *error: object) -> None:
        return None


def install() -> bool:
    """Patch torch for megatron-core on a CPU; False (and nothing done) where there is a CUDA device."""
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    _installed = True
    # Of torch's allocator, read at the first: large tensors in large pages. Decoding reads every weight for a token,
    # and is up to a tenth quicker so where no cache holds them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logger.info("no CUDA device: megatron-core runs on the CPU (dsv4_bridge.mcore.cpu)")
    idle = _Idle()
    answers: dict[str, Callable[..., Any]] = {
        "current_device": lambda: _CPU,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: idle,
        "default_stream": lambda device=None: idle,
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device=None: (0, 0),
        # Not torch.manual_seed: that one calls these.
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name in ("Stream", "Event"):
        setattr(torch.cuda, name, _Idle)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *args, **kwargs: None)
    # `with torch.device(…)` looks constructors up in a table made at its first use: it must list torch's
    # own. Else transformers' from_pretrained, which builds under "meta", leaves its buffers unset.
    _device_constructors()
    for name in ("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn"):
        setattr(torch, name, _kept_on_cpu(getattr(torch, name)))
    torch.Tensor.to = _moved_nowhere(torch.Tensor.to)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.type = _named_as_cuda(torch.Tensor.type)
    _patch_megatron()
    return True


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _kept_on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(make)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return make(*args, **kwargs)

    return wrapped


def _moved_nowhere(to: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(to)
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) == 1 and args[0] is self.dtype and not kwargs:
            return self  # as torch would, sooner
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return to(self, *args, **kwargs)

    return wrapped


def _named_as_cuda(kind: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(kind)
    def wrapped(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return kind(self, *args, **kwargs)
        return kind(self).replace("torch.", "torch.cuda.", 1)

    return wrapped


def _among_others(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's reduce-scatter or all-gather, whose output is a part of its input or the reverse."""

    @wraps(collective)
    def wrapped(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        alone = kwargs["group"].size() == 1 and not kwargs.get("async_op") and output.data_ptr() == source.data_ptr()
        return None if alone else collective(output, source, *args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """While megatron is imported: it keeps what it then finds as `torch.compile`."""
    compiler, name = torch.compile, "compile"
    setattr(torch, name, lambda function=None, **options: function or (lambda later: later))
    try:
        yield
    finally:
        setattr(torch, name, compiler)


def _patch_megatron() -> None:
    with _nothing_compiled():
        from megatron.core.distributed import param_and_grad_buffer
        from megatron.core.tensor_parallel import random as megatron_random
        from megatron.core.transformer.moe import token_dispatcher

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    token_dispatcher.maybe_move_tensor_to_cpu = to_host
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(param_and_grad_buffer, name, _among_others(getattr(param_and_grad_buffer, name)))
