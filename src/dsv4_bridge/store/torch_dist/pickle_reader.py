"""A reader of pickles that cannot run code: a small machine that builds plain data and nothing else.

Python's own unpickler calls what the file names, allocates what the file declares and recurses as deep
as the file nests; a checkpoint from elsewhere may use each of these. This machine executes only the
opcodes that torch and torch.distributed.checkpoint write. A global is looked up in a table handed in by
the caller and stands for a function of this package; no module is ever imported, no class of the file is
ever instantiated. Memory is bounded by a constant times the size of the file: lengths are checked against
the bytes that are there before anything is allocated, and nothing copies a container of any size.

Sources: CPython Lib/pickletools.py (opcodes), torch/serialization.py and torch/_utils.py (tensor items),
torch/distributed/checkpoint/{metadata,planner,filesystem}.py (``.metadata``).
"""

import struct
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ...errors import BridgeError
from ...spec.dtypes import BY_TORCH

MAX_DIMS: Final = 32


class Record:
    """What a class instance of the file becomes: the name of its class and its state, not interpreted."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.state: Any = None

    def field(self, name: str) -> Any:
        """The value of one attribute, None where the file has none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


@dataclass(frozen=True, slots=True)
class Global:
    """What one global of a pickle stands for: ``call`` for REDUCE, ``kind`` for NEWOBJ + BUILD.

    ``keep`` False drops the state of instances: they are accepted, and never looked at.
    """

    name: str
    call: Callable[[tuple], Any] | None = None
    kind: str | None = None
    keep: bool = True


def show(value: object) -> str:
    """``value`` for a message: short, and never a walk through a structure from the file."""
    if isinstance(value, str):
        return repr(value if len(value) <= 120 else value[:117] + "...")
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, tuple) and len(value) <= 8 and all(isinstance(v, int) for v in value):
        return "(" + ", ".join(show(v) for v in value) + ("," if len(value) == 1 else "") + ")"
    return f"a {value.kind}" if isinstance(value, Record) else f"a {type(value).__name__}"


class _Machine:
    """The state of one run. Handlers raise IndexError, KeyError, … on damage; :func:`decode` says where."""

    __slots__ = ("data", "marks", "memo", "persistent", "pos", "stack", "table", "what")

    def __init__(self, data: bytes, table: Mapping, persistent: Callable | None, what: str) -> None:
        self.data = data
        self.pos = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.table = table
        self.persistent = persistent
        self.what = what

    def take(self, n: int) -> bytes:
        start, end = self.pos, self.pos + n
        if end > len(self.data):
            raise ValueError(f"{n} bytes announced, {len(self.data) - start} left")
        self.pos = end
        return self.data[start:end]

    def line(self) -> str:
        end = self.data.index(b"\n", self.pos, self.pos + 1024)
        text = self.data[self.pos : end].decode("utf-8")
        self.pos = end + 1
        return text

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    # Opcodes, each named as in pickletools.

    def proto(self) -> None:
        if (version := self.take(1)[0]) > 5:
            raise ValueError(f"pickle protocol {version}")

    def frame(self) -> None:
        self.take(8)  # a hint for buffered reading; every length is checked where it is used

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def tuple_(self) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def tuple1(self) -> None:
        self.stack[-1] = (self.stack[-1],)

    def tuple2(self) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def tuple3(self) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def append(self) -> None:
        value = self.stack.pop()
        exact(self.stack[-1], list).append(value)

    def appends(self) -> None:
        items = self.pop_mark()
        exact(self.stack[-1], list).extend(items)

    def setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        exact(self.stack[-1], dict)[dict_key(key)] = value

    def setitems(self) -> None:
        items = self.pop_mark()
        if len(items) % 2:
            raise ValueError("a key without a value")
        target = exact(self.stack[-1], dict)
        for key, value in zip(items[::2], items[1::2]):
            target[key if type(key) is str else dict_key(key)] = value

    def unicode(self, n: int) -> None:
        self.stack.append(self.take(n).decode("utf-8"))

    def long1(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.take(1)[0]), "little", signed=True))

    def global_(self) -> None:
        module = self.line()
        self.find(module, self.line())

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.find(exact(module, str), exact(name, str))

    def find(self, module: str, name: str) -> None:
        try:
            self.stack.append(self.table[module, name])
        except KeyError:
            raise BridgeError(
                f"{self.what}: the pickle names {show(module + '.' + name)}, which no such file needs; "
                "refusing to run code. Use a checkpoint from a source you trust, or save it again "
                "with plain tensors, numbers, strings, lists and dicts only"
            ) from None

    def reduce(self) -> None:
        args = exact(self.stack.pop(), tuple)
        target = self.stack[-1]
        if type(target) is not Global or target.call is None:
            raise ValueError(f"{show(target)} is called")
        self.stack[-1] = target.call(args)

    def newobj(self) -> None:
        args = exact(self.stack.pop(), tuple)
        target = self.stack[-1]
        if type(target) is not Global or target.kind is None or args:
            raise ValueError(f"an instance of {show(target)} is made")
        self.stack[-1] = Record(target.kind) if target.keep else Record("")

    def build(self) -> None:
        state = self.stack.pop()
        record = exact(self.stack[-1], Record)
        if record.kind:
            record.state = state

    def binpersid(self) -> None:
        if self.persistent is None:
            raise ValueError("a persistent id")
        self.stack[-1] = self.persistent(self.stack[-1])

    def run(self) -> Any:
        data, memo, handlers = self.data, self.memo, _HANDLERS
        pos, stack = self.pos, self.stack
        while True:
            op = data[pos]
            pos += 1
            # The opcodes that make up three quarters of a .metadata, without a call. A Pro checkpoint
            # saved in training has 13 million of them.
            if op == 0x6A:  # LONG_BINGET
                stack.append(memo[data[pos] | data[pos + 1] << 8 | data[pos + 2] << 16 | data[pos + 3] << 24])
                pos += 4
            elif op == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif op == 0x68:  # BINGET
                stack.append(memo[data[pos]])
                pos += 1
            elif op == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif op == 0x28:  # MARK
                self.marks.append(stack)
                self.stack = stack = []
            elif op == 0x7D:  # EMPTY_DICT
                stack.append({})
            elif op == 0x4D:  # BININT2
                stack.append(data[pos] | data[pos + 1] << 8)
                pos += 2
            elif op == 0x4E:  # NONE
                stack.append(None)
            elif op == 0x2E:  # STOP
                if self.marks or len(stack) != 1:
                    raise ValueError("values left over at its end")
                return stack[0]
            else:
                self.pos = pos
                handlers[op](self)
                pos, stack = self.pos, self.stack


def exact[T](value: Any, kind: type[T]) -> T:
    """``value`` if it is of exactly this type; ValueError otherwise."""
    if type(value) is not kind:
        raise ValueError(f"{show(value)} instead of a {kind.__name__}")
    return value


def dict_key(key: Any) -> Hashable:
    """``key`` as something cheap to hash: MetadataIndex becomes (fqn, offset), its own equality."""
    if type(key) is str or type(key) is int:
        return key
    if type(key) is Record and key.kind == "MetadataIndex":
        fqn, offset = key.field("fqn"), key.field("offset")
        if type(fqn) is str and (offset is None or type(offset) is Dims):
            return fqn, offset
    raise ValueError(f"{show(key)} as a key")


class Dims(tuple[int, ...]):
    """A torch.Size: checked to be a short tuple of non-negative integers."""

    __slots__ = ()


def size(args: tuple) -> Dims:
    """What ``torch.Size(...)`` stands for."""
    (dims,) = args
    return Dims(int_tuple(dims))


def int_tuple(value: Any) -> tuple[int, ...]:
    """``value``, checked to be a short tuple of integers in 0 … 2^63-1; ValueError otherwise."""
    if type(value) not in (tuple, Dims) or len(value) > MAX_DIMS:
        raise ValueError(f"{show(value)} as a size")
    for v in value:
        if type(v) is not int or v >> 63:  # -1 for a negative number
            raise ValueError(f"{show(v)} in a size")
    return value


def _pusher(value: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(value())


def _unpack(code: str) -> Callable[[_Machine], None]:
    s = struct.Struct(code)
    return lambda m: m.stack.append(s.unpack(m.take(s.size))[0])


def _sized(code: str) -> Callable[[_Machine], None]:
    s = struct.Struct(code)
    return lambda m: m.unicode(s.unpack(m.take(s.size))[0])


def _put(code: str) -> Callable[[_Machine], None]:
    s = struct.Struct(code)
    return lambda m: m.memo.__setitem__(s.unpack(m.take(s.size))[0], m.stack[-1])


def _refuse(machine: _Machine) -> None:
    op = machine.data[machine.pos - 1]
    raise ValueError(f"opcode 0x{op:02x}, which torch does not write")


_M = _Machine
_OPCODES: Final[dict[bytes, Callable[[_Machine], Any]]] = {
    b"\x80": _M.proto, b"\x95": _M.frame, b"0": _M.pop, b"1": _M.pop_mark,
    b"\x88": _pusher(lambda: True), b"\x89": _pusher(lambda: False),
    b"J": _unpack("<i"), b"K": _unpack("<B"), b"G": _unpack(">d"), b"\x8a": _M.long1,
    b"X": _sized("<I"), b"\x8c": _sized("<B"), b"\x8d": _sized("<Q"),
    b"t": _M.tuple_, b"\x85": _M.tuple1, b"\x86": _M.tuple2, b"\x87": _M.tuple3,
    b"]": _pusher(list), b"a": _M.append, b"e": _M.appends,
    b"s": _M.setitem, b"u": _M.setitems,
    b"q": _put("<B"), b"r": _put("<I"),
    b"c": _M.global_, b"\x93": _M.stack_global, b"R": _M.reduce, b"\x81": _M.newobj, b"b": _M.build,
    b"Q": _M.binpersid,
}  # fmt: skip
_HANDLERS: Final = tuple(_OPCODES.get(bytes([op]), _refuse) for op in range(256))


def decode(
    data: bytes,
    table: Mapping[tuple[str, str], Any],
    what: str,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of a pickle, built from ``table``'s globals and plain types only.

    Args:
        data: the pickle, protocol 2 to 5.
        table: (module, name) -> a :class:`Global`, or a value that the global stands for.
        what: the file, for messages.
        persistent: what a persistent id stands for.

    Raises:
        BridgeError: a global outside the table, or bytes that are no such pickle. Nothing else, and
            nothing of the file is executed.
    """
    machine = _Machine(data, table, persistent, what)
    try:
        return machine.run()
    except BridgeError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise BridgeError(
            f"{what}: damaged pickle at byte {machine.pos} of {len(data)} ({error}). Copy or save the checkpoint again"
        ) from None


def torch_dtypes() -> dict[tuple[str, str], str]:
    """Globals of dtypes: the safetensors name, or torch.NAME where this package has none."""
    others = ("uint16", "uint32", "uint64", "complex32", "complex64", "complex128", "float8_e4m3fnuz")
    names = {n: d.name for n, d in BY_TORCH.items()} | {n: f"torch.{n}" for n in (*others, "float8_e5m2fnuz")}
    return {("torch", n): name for n, name in names.items()}


def empty_dict(args: tuple) -> dict:
    """What ``OrderedDict()`` stands for."""
    if args:
        raise ValueError("an OrderedDict with arguments")
    return {}
