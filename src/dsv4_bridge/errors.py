"""The one exception a user meets: input that cannot be used, said in one message."""

import contextlib
import reprlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any


class BridgeError(Exception):
    """Input or environment that cannot be used (exit code 2 on the command line).

    The message says what was being done, to which tensor or file, what came, what was
    expected, and what to do.
    """


@contextlib.contextmanager
def files_named(doing: str) -> Iterator[None]:
    """Errors of the operating system become messages with the file; for a block, or as a decorator."""
    try:
        yield
    except OSError as error:
        raise BridgeError(f"{doing}: {os_error(error)}") from None


def os_error(error: OSError) -> str:
    """The file and what the operating system says of it."""
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([" and ".join(files)] * bool(files) + [error.strerror or str(error) or type(error).__name__])


def let_go(error: BaseException | None) -> None:
    """Free what the frames that an error came through hold, in quiet: finalizers of half-made objects fail, too."""
    import traceback  # 10 ms that only this wants

    told, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__context__
    finally:
        sys.unraisablehook = told


def printable(text: str) -> str:
    """Text in which no name from a file can move the cursor, set colours or reorder what is read; lines stay."""
    if text.isprintable():
        return text
    # Of whole lines that are printable no character is looked at: a listing has millions.
    return "\n".join(line if line.isprintable() else _escaped(line) for line in text.split("\n"))


def _escaped(line: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def short(value: Any) -> str:
    """A value for a message: its repr, cut to a line."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def counted(count: int, noun: str) -> str:
    """A number of things: `1 file`, `2,000 files`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def size(nbytes: float) -> str:
    """Bytes for people, powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


class _Short(reprlib.Repr):
    """A repr in bounded time, whatever the value nests or repeats."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 1 << 64 else "a huge integer"


_SHORT = _Short(maxlevel=3, maxlist=12, maxtuple=12, maxdict=4, maxstring=80, maxother=80)


def some(names: Iterable[str]) -> str:
    """The first names of many, for a message; a name with odd characters is quoted."""
    names = list(names)
    return ", ".join(n if n.isprintable() and len(n) < 80 else short(n) for n in names[:3]) + (
        " …" if len(names) > 3 else ""
    )
