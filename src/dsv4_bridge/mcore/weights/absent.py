"""Weights that have a shape and a type, and memory only while they are needed."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_SMALL = 1024  # elements: what modules make beside their weights stays as it is


class _WithoutMemory(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "empty":  # `cpu.install` may have put another function in torch's place
            absent = func(*args, **kwargs | {"device": "meta"})
            if absent.numel() > _SMALL:
                return absent
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """In the body large uninitialised tensors, as modules make for their weights, are on the meta device."""
    with _WithoutMemory():
        yield


@contextmanager
def memory_for(module: torch.nn.Module, names: Collection[str], device: torch.device) -> Iterator[None]:
    """Uninitialised memory for those of the named parameters and buffers that have none; it is gone after the body."""
    lent: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for name in names:
            path, _, last = name.rpartition(".")
            holder = module.get_submodule(path)
            home: dict[str, Any] = holder._parameters if last in holder._parameters else holder._buffers
            held = home.get(last)
            if held is not None and held.is_meta:
                lent.append((home, last, held))
                real = torch.empty_like(held, device=device)
                home[last] = torch.nn.Parameter(real, requires_grad=False) if home is holder._parameters else real
        yield
    finally:
        for home, last, held in lent:
            home[last] = held
