"""Triton's interpreter with less to do: what it computes is the same.

It makes the functions of `triton.language` its own at every call of a device function, thousands of times in a launch
that has done so at its start; and it makes the table of numpy's types anew for every value.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any


def quicken() -> None:
    """Of all launches of this process from now on; nothing where Triton compiles, or is built otherwise."""
    from dsv4_bridge.mcore.kernels.choice import interpreted

    if not interpreted():
        return
    from triton.runtime import interpreter

    if all(hasattr(interpreter, name) for name in ("_patch_lang", "_get_np_dtype", "GridExecutor")):
        _patch_once_a_launch(interpreter)
        _keep_types(interpreter)


def _patch_once_a_launch(interpreter: ModuleType) -> None:
    if hasattr(interpreter._patch_lang, "seen"):
        return
    change, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen: set[int] = set()  # globals of functions, of the launch that runs

    def changed(function: Callable[..., Any]) -> Any:
        place = id(function.__globals__)
        if place in seen:
            return None
        found = change(function)
        seen.add(place)
        return found

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            seen.clear()

    changed.seen = seen  # type: ignore[attr-defined]
    interpreter._patch_lang = changed
    interpreter.GridExecutor.__call__ = launched


def _keep_types(interpreter: ModuleType) -> None:
    if hasattr(interpreter._get_np_dtype, "known"):
        return
    find = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def found(kind: Any) -> Any:
        scalar = getattr(kind, "element_ty", kind) if kind.is_block() else kind
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    found.known = known  # type: ignore[attr-defined]
    interpreter._get_np_dtype = found
