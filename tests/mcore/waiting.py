"""Where Python asks a tensor for its values: on a GPU each such place makes the host wait for the device."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What Python calls on a tensor; `to` only where it names the CPU.
_ASKED = {"tolist", "item", "cpu", "numpy", "nonzero", "argwhere", "__bool__", "__int__", "__float__", "__index__"}
# Operations whose result has a shape that depends on values, or that read one inside.
_READING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "bincount", "equal"}
_ROOTS = ("dsv4_bridge", "megatron")


@contextmanager
def recording_waits() -> Iterator[Counter[tuple[str, str]]]:
    """(what, `package/…/file:function` of ours or megatron's) -> how often, in the body and its backward."""
    found: Counter[tuple[str, str]] = Counter()

    class Asked(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "")
            if name in _ASKED:
                found[name.strip("_"), _place()] += 1
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    class Reading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            by_mask = name in ("index", "index_put", "index_put_") and any(
                i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
            )
            if name in _READING or by_mask:
                found["by mask" if by_mask else name, _place()] += 1
            return func(*args, **(kwargs or {}))

    with Reading(), Asked():
        yield found


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        for root in _ROOTS:
            if root in parts and parts[-1] != "mends.py":
                where = "/".join(parts[len(parts) - parts[::-1].index(root) - 1 :])
                return f"{where}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
