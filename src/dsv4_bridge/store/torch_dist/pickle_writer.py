"""Pickles composed by hand: opcodes as bytes, without the classes that they name.

A pickle names classes and attributes as text, so one that unpickles to objects of torch can be written
without torch. Each function returns the code of one value, which leaves that value on the stack of the
unpickler; the code of a larger value is made of the codes of its parts. Only opcodes of protocol 2 are
used, which torch's ``weights_only`` unpickler and :mod:`.pickles` know, and equal values give equal bytes.

Sources: CPython Lib/pickle.py (``_Pickler``) and Lib/pickletools.py (opcodes).
"""

import pickle
import struct
from collections.abc import Callable, Iterable
from typing import Any, Final

from ...errors import BridgeError
from .pickle_reader import show

NONE: Final = pickle.NONE
FALSE: Final = pickle.NEWFALSE
TRUE: Final = pickle.NEWTRUE
EMPTY_LIST: Final = pickle.EMPTY_LIST

_MAX_DEPTH: Final = 64  # of plain data, as the reader has it
_MAX_INT_BYTES: Final = 255  # of a LONG1


def dumps(code: bytes, definitions: bytes = b"") -> bytes:
    """The pickle of one value. ``definitions`` are those of the :class:`Memo` that the code refers to."""
    return pickle.PROTO + b"\2" + definitions + code + pickle.STOP


def integer(value: int) -> bytes:
    """An int in the shortest opcode that holds it."""
    if 0 <= value < 1 << 8:
        return pickle.BININT1 + value.to_bytes(1)
    if 0 <= value < 1 << 16:
        return pickle.BININT2 + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return pickle.BININT + value.to_bytes(4, "little", signed=True)
    size = value.bit_length() // 8 + 1
    if size > _MAX_INT_BYTES:
        raise BridgeError(f"writing a pickle: {show(value)}; expected at most {_MAX_INT_BYTES} bytes")
    return pickle.LONG1 + size.to_bytes(1) + value.to_bytes(size, "little", signed=True)


def text(value: str) -> bytes:
    """A str.

    Raises:
        BridgeError: lone surrogates, which UTF-8 does not have.
    """
    try:
        raw = value.encode()
    except UnicodeEncodeError:
        raise BridgeError(f"writing a pickle: {show(value)} has characters that are not Unicode") from None
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def tuple_of(codes: Iterable[bytes | bytearray]) -> bytes:
    """A tuple of the values of ``codes``."""
    inner = b"".join(codes)
    return pickle.MARK + inner + pickle.TUPLE if inner else pickle.EMPTY_TUPLE


def list_of(codes: Iterable[bytes | bytearray]) -> bytes:
    """A list of the values of ``codes``."""
    return pickle.EMPTY_LIST + _filled(codes, pickle.APPENDS)


def dict_of(codes: Iterable[bytes | bytearray]) -> bytes:
    """A dict; ``codes`` are of keys and values in turn, or of both at once."""
    return pickle.EMPTY_DICT + _filled(codes, pickle.SETITEMS)


def _filled(codes: Iterable[bytes | bytearray], opcode: bytes) -> bytes:
    inner = b"".join(codes)
    return pickle.MARK + inner + opcode if inner else b""


def integers(values: tuple[int, ...]) -> bytes:
    """A tuple of ints."""
    return tuple_of(map(integer, values))


def name(module: str, attribute: str) -> bytes:
    """A global: a class, a function, a dtype."""
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def call(function: bytes, *args: bytes) -> bytes:
    """What ``function(*args)`` returns."""
    return function + tuple_of(args) + pickle.REDUCE


def persistent(pid: bytes) -> bytes:
    """What the loader makes of a persistent id."""
    return pid + pickle.BINPERSID


def instance(cls: bytes, state: bytes = b"") -> bytes:
    """An instance made without ``__init__``; ``state`` goes to its __setstate__, or a dict to its __dict__."""
    return cls + pickle.EMPTY_TUPLE + pickle.NEWOBJ + (state + pickle.BUILD if state else b"")


def instances(cls: bytes, *attributes: bytes) -> Callable[..., bytes]:
    """A function from codes of values, one for each of ``attributes``, to an :func:`instance` with these.

    It is for classes with many instances: all but the values is put together once.
    """
    first, *others = attributes
    first = instance(cls) + pickle.EMPTY_DICT + pickle.MARK + first
    last = pickle.SETITEMS + pickle.BUILD

    def make(value: bytes, *values: bytes) -> bytes:
        out = first + value
        for attribute, code in zip(others, values, strict=True):
            out += attribute + code
        return out + last

    return make


class Memo:
    """Values that a pickle names often: each is defined once, before everything else, and has a number."""

    def __init__(self) -> None:
        self.definitions = bytearray()
        self._count = 0

    def share(self, code: bytes) -> bytes:
        """Define the value of ``code``; what comes back is the short code of that one object."""
        if self._count < 1 << 8:
            number = self._count.to_bytes(1)
            put, get = pickle.BINPUT + number, pickle.BINGET + number
        else:
            number = self._count.to_bytes(4, "little")
            put, get = pickle.LONG_BINPUT + number, pickle.LONG_BINGET + number
        self._count += 1
        self.definitions += code + put + pickle.POP
        return get


def plain(value: Any, where: str = "object", depth: int = 0) -> bytes:
    """None, bool, int, float, str, and lists, tuples and dicts of them.

    Args:
        value: dicts have string or integer keys. An object that occurs twice is written twice, so that
            the bytes depend on values alone.
        where: what ``value`` is, for messages.
        depth: of ``value`` in the whole.

    Raises:
        BridgeError: anything else, subclasses included; nesting too deep for a reader, or endless.
    """
    if depth > _MAX_DEPTH:
        raise BridgeError(f"writing a pickle: plain data nested more than {_MAX_DEPTH} deep")
    kind = type(value)
    if value is None or kind is bool:
        return NONE if value is None else TRUE if value else FALSE
    if kind is int:
        return integer(value)
    if kind is float:
        return pickle.BINFLOAT + struct.pack(">d", value)
    if kind is str:
        return text(value)
    if kind is list or kind is tuple:
        codes = (plain(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value))
        return list_of(codes) if kind is list else tuple_of(codes)
    if kind is dict and all(type(k) in (str, int) for k in value):
        return dict_of(plain(k, where) + plain(v, f"{where}[{show(k)}]", depth + 1) for k, v in value.items())
    raise BridgeError(
        f"writing a pickle: {where} is a {kind.__name__}; expected numbers, strings, lists, tuples and dicts "
        "with string or integer keys"
    )
