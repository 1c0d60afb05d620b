"""Fields of a configuration, each of its type or an error that names it."""

from collections.abc import Mapping
from typing import Any

from ..errors import BridgeError, short


def take(config: Mapping[str, Any], name: str, kind: Any, where: str) -> Any:
    """A field of a type; an integer is a float too.

    Raises:
        BridgeError: it is missing, or of another type.
    """
    if name not in config:
        raise BridgeError(f"{where}: the field {name!r} is missing ({_kind_name(kind)} expected)")
    return typed(config[name], name, kind, where)


def typed(value: Any, name: str, kind: Any, where: str) -> Any:
    """A value of a type: int, float, bool or str.

    Raises:
        BridgeError: it is of another.
    """
    good = {
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool),
        bool: isinstance(value, bool),
        str: isinstance(value, str),
    }[kind]
    if not good:
        raise BridgeError(f"{where}: {name!r} is {short(value)}, expected {_kind_name(kind)}")
    if kind is float:
        try:
            return float(value)
        except OverflowError:
            raise BridgeError(f"{where}: {name!r} is out of range") from None
    return value


def mapping(value: Any, name: str, where: str) -> Mapping[str, Any]:
    """An object.

    Raises:
        BridgeError: it is none.
    """
    if not isinstance(value, Mapping):
        raise BridgeError(f"{where}: {name!r} is {short(value)}, expected an object")
    return value


def integers(config: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    """A list of integers.

    Raises:
        BridgeError: it is missing, no list, far too long, or holds something else.
    """
    if name not in config:
        raise BridgeError(f"{where}: the field {name!r} is missing (a list of integers expected)")
    value = config[name]
    if not isinstance(value, list) or len(value) > 4096:
        raise BridgeError(f"{where}: {name!r} is {short(value)}, expected a list of integers")
    return tuple(typed(entry, name, int, where) for entry in value)


def number(value: float) -> int | float:
    """As JSON has it in the releases: whole numbers without a point."""
    return int(value) if value == int(value) else value


def _kind_name(kind: Any) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[kind]
