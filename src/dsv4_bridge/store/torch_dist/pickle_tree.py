"""Pickles as trees: read without running anything, changed, and written again.

What a pickle calls and builds stays a node that names it; no module is imported and no class is made. So the
arguments that a run stored can be changed without the code that stored them.

Sources: CPython Lib/pickletools.py and Lib/pickle.py (opcodes).
"""

import pickle
import pickletools
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from ...errors import BridgeError, short
from . import pickle_writer as code

_MAX_DEPTH: Final = 200
_MAX_NODES: Final = 1 << 21
_ATOMS: Final = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
_FIXED: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: Final = {"EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set"}
_CODES: Final = {
    "list": pickle.EMPTY_LIST, "dict": pickle.EMPTY_DICT, "set": pickle.EMPTY_SET,
    "reduce": pickle.REDUCE, "newobj": pickle.NEWOBJ, "newobj_ex": pickle.NEWOBJ_EX, "persid": pickle.BINPERSID,
}  # fmt: skip


@dataclass(eq=False, slots=True)
class Node:
    """A value that is no plain number, string, bytes, bool or None.

    Attributes:
        kind: `tuple`, `list`, `dict`, `set`, `frozenset`, `global`, `reduce`, `newobj`, `newobj_ex` or `persid`.
        parts: a tuple's or frozenset's elements; module and name of a global; function and arguments of a call.
        items: what is appended to it, or added.
        pairs: what is set in it, by key.
        states: what it is built with.
    """

    kind: str
    parts: list[Any] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)

    def named(self, module: str, name: str) -> bool:
        """Whether it is an instance of this class, or a call of this function."""
        first = self.parts[0] if self.parts and self.kind in ("reduce", "newobj", "newobj_ex") else None
        return isinstance(first, Node) and first.kind == "global" and first.parts == [module, name]

    def get(self, key: str) -> Any:
        """What is set in it by that key, or None."""
        return next((v for k, v in self.pairs if k == key), None)


def read_tree(data: bytes, where: str) -> tuple[Any, int]:
    """The value of a pickle, and its protocol.

    Raises:
        BridgeError: no pickle of protocol 2 to 5, or one that does what no saved state does.
    """
    try:
        return _read(data)
    except (ValueError, IndexError, KeyError, AttributeError, UnicodeError, struct.error) as error:
        raise BridgeError(f"{where}: damaged pickle ({error}). Copy or save the checkpoint again") from None


def _read(data: bytes) -> tuple[Any, int]:
    stack, marks, memo = list[Any](), list[int](), dict[int, Any]()
    protocol: int = 2

    def above_mark() -> list[Any]:
        at = marks.pop()
        found = stack[at:]
        del stack[at:]
        return found

    def last() -> Node:
        if type(stack[-1]) is not Node:
            raise ValueError(f"{short(stack[-1])} is changed")
        return stack[-1]

    def pop(count: int) -> list[Any]:
        if len(stack) - (marks[-1] if marks else 0) < count:
            raise ValueError("a value is missing")
        found = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return found

    arg: Any
    for number, (opcode, arg, _) in enumerate(pickletools.genops(data)):
        if number > _MAX_NODES:
            raise ValueError("far too large for a stored state")
        name: str = opcode.name
        if name in _ATOMS:
            stack.append(arg)
        elif name in _FIXED:
            stack.append(_FIXED[name])
        elif name in _EMPTY:
            stack.append(Node(_EMPTY[name]))
        elif name == "PROTO":
            protocol = arg
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "EMPTY_TUPLE":
            stack.append(Node("tuple"))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(Node("tuple", pop(int(name[-1]))))
        elif name in ("TUPLE", "FROZENSET"):
            stack.append(Node(name.lower(), above_mark()))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            names = arg.split(" ", 1) if name == "GLOBAL" else pop(2)
            if not all(type(n) is str and n.replace(".", "_").isidentifier() for n in names):
                raise ValueError(f"the name of a class or function is {short(names)}")
            stack.append(Node("global", names))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(Node(name.lower(), pop(2)))
        elif name == "NEWOBJ_EX":
            stack.append(Node("newobj_ex", pop(3)))
        elif name == "BINPERSID":
            stack.append(Node("persid", pop(1)))
        elif name == "BUILD":
            (state,) = pop(1)
            last().states.append(state)
        elif name == "APPEND":
            (value,) = pop(1)
            last().items.append(value)
        elif name in ("APPENDS", "ADDITEMS"):
            values = above_mark()
            last().items += values
        elif name == "SETITEM":
            key, value = pop(2)
            last().pairs.append((key, value))
        elif name == "SETITEMS":
            values = above_mark()
            last().pairs += zip(values[::2], values[1::2], strict=True)
        elif name not in ("FRAME", "STOP"):
            raise ValueError(f"opcode {name}, which no saved state has")
    if marks or len(stack) != 1 or not 2 <= protocol <= 5:
        raise ValueError(f"{len(stack)} values at its end, protocol {protocol}; expected one, protocol 2 to 5")
    return stack[0], protocol


def write_tree(value: Any, protocol: int = 2) -> bytes:
    """The pickle of a tree, of at least that protocol; what occurs twice in it is one object again.

    Raises:
        BridgeError: nested too deep, or a tuple that contains itself.
    """
    writer = _Writer(value)
    out = writer.value(value, 0)
    return pickle.PROTO + max(protocol, writer.protocol).to_bytes(1) + out + pickle.STOP


def _inside(node: Node) -> Iterator[Any]:
    if node.kind != "global":
        yield from node.parts
    yield from node.items
    for pair in node.pairs:
        yield from pair
    yield from node.states


class _Writer:
    def __init__(self, value: Any) -> None:
        self.protocol = 2
        self._numbers: dict[int, int] = {}
        seen, shared, stack = set[int](), set[int](), [value]
        while stack:
            node = stack.pop()
            if type(node) is Node:
                (shared if id(node) in seen else seen).add(id(node))
                if id(node) not in shared:
                    stack += _inside(node)
        self._shared = shared

    def value(self, value: Any, depth: int) -> bytes:
        """The code of a value."""
        if depth > _MAX_DEPTH:
            raise BridgeError(f"writing a pickle: nested more than {_MAX_DEPTH} deep, or a tuple that contains itself")
        if type(value) is bytes:
            self.protocol = max(self.protocol, 3)
            return pickle.BINBYTES + struct.pack("<I", len(value)) + value
        if type(value) is not Node:
            return code.plain(value)
        if id(value) in self._numbers:
            return pickle.LONG_BINGET + self._numbers[id(value)].to_bytes(4, "little")
        out = self._made(value, depth + 1)
        if id(value) in self._shared:
            self._numbers[id(value)] = len(self._numbers)
            out += pickle.LONG_BINPUT + self._numbers[id(value)].to_bytes(4, "little")
        if value.items:
            which = pickle.ADDITEMS if value.kind == "set" else pickle.APPENDS
            out += pickle.MARK + b"".join(self.value(v, depth + 1) for v in value.items) + which
        if value.pairs:
            pairs = (self.value(v, depth + 1) for pair in value.pairs for v in pair)
            out += pickle.MARK + b"".join(pairs) + pickle.SETITEMS
        return out + b"".join(self.value(s, depth + 1) + pickle.BUILD for s in value.states)

    def _made(self, node: Node, depth: int) -> bytes:
        """The code of a node without what is put in it afterwards."""
        if node.kind in ("set", "frozenset", "newobj_ex"):
            self.protocol = max(self.protocol, 4)
        if node.kind == "global":
            return code.name(*node.parts)
        parts = [self.value(part, depth) for part in node.parts]
        if node.kind == "tuple":
            return code.tuple_of(parts)
        if node.kind == "frozenset":
            return pickle.MARK + b"".join(parts) + pickle.FROZENSET
        return b"".join(parts) + _CODES[node.kind]
