"""Lines that a long run says, as wide as the terminal."""

import os
import shutil
import sys

_WIDTH = "DSV4_WIDTH"  # in the environment: columns, whatever is there; COLUMNS may be set where nobody looks
_GAP = "  "  # between the parts of a line


def columns() -> int | None:
    """Of stdout, or as DSV4_WIDTH says; None: nothing is broken or cut, as in a pipe."""
    asked = os.environ.get(_WIDTH, "")
    if asked.isdecimal() and len(asked) < 6:
        return int(asked)
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def folded(line: str, width: int | None) -> str:
    """A line broken between its parts, what follows set in.

    Args:
        line: parts with two spaces between them.
        width: columns; None: as it is.
    """
    first, *parts = line.split(_GAP)
    if width is None or len(line) <= width or not parts or not all(parts):
        return line
    lines = [first]
    for part in parts:
        if len(lines[-1]) + len(_GAP) + len(part) > width:
            lines.append(_GAP)
        lines[-1] += _GAP + part
    return "\n".join(lines)
