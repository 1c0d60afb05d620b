"""The one exception a user meets: input that cannot be used, said in one message."""

import contextlib
from collections.abc import Iterator


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


def printable(text: str) -> str:
    """Text in which no name from a file can move the cursor, set colours or reorder what is read; lines stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
