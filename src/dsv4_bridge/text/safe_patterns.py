"""Whether a regular expression from a file is one that a backtracking engine finishes.

Only what splits text into words is let through: classes, groups, alternatives, look-ahead, and repetitions that do
not repeat each other. `(a+)+` needs time exponential in the text; `a*a*a*a*` a power of its length.
"""

import re
from typing import NamedTuple

_MOST = 2000  # characters
_UNBOUNDED = 3  # of one way through the pattern, side by side
_TIMES = 64  # of a bounded repetition
_DEEP = 16
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d{0,6})(,?)(\d{0,6})\})[?+]?")
_ESCAPE = re.compile(r"\\(?:[pP]\{\^?\w{1,40}\}|x\{[0-9a-fA-F]{1,8}\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^\w]|[a-zA-Z])")
_BARRED = set("gkGKRXyYNOK")  # calls, back references, and what stands for whole patterns
_GROUP = re.compile(r"\(\?(?::|=|!|>|[imx]{1,3}(?:-[imx]{1,3})?:)|\(\?<?[=!]|\((?!\?)")


class _Unsafe(Exception):
    pass


def why_unsafe(pattern: str) -> str:
    """Why a pattern is not let through; empty if it is."""
    try:
        if len(pattern) > _MOST:
            return f"has {len(pattern):,} characters, more than {_MOST:,}"
        if _alternatives(pattern, 0, 0).end != len(pattern):
            return "has a bracket too many"
    except _Unsafe as unsafe:
        return str(unsafe)
    return ""


class _Part(NamedTuple):
    """A stretch of a pattern.

    Attributes:
        end: where it ends.
        unbounded: most unbounded repetitions on one way through it.
        times: product of the bounded ones.
        varies: whether what it matches may have several lengths.
    """

    end: int
    unbounded: int = 0
    times: int = 1
    varies: bool = False


def _alternatives(pattern: str, at: int, depth: int) -> _Part:
    """From `at` to the bracket that closes the group."""
    if depth > _DEEP:
        raise _Unsafe("nests too deep")
    worst, many, varies = 0, 1, False
    unbounded, times = 0, 1  # of the alternative
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            at += 1
            worst, many, unbounded, times, varies = max(worst, unbounded), max(many, times), 0, 1, True
            continue
        part = _atom(pattern, at, depth)
        if found := _QUANTIFIER.match(pattern, part.end):
            part = _repeated(part, *_bounds(found))._replace(end=found.end())
            if _QUANTIFIER.match(pattern, part.end):
                raise _Unsafe("repeats a repetition")
        at, varies = part.end, varies or part.varies
        unbounded, times = unbounded + part.unbounded, times * part.times
        if unbounded > _UNBOUNDED or times > _TIMES:
            raise _Unsafe("has too many repetitions side by side")
    return _Part(at, max(worst, unbounded), max(many, times), varies)


def _repeated(part: _Part, least: int, most: int | None) -> _Part:
    if part.varies and (most is None or most > 1):
        raise _Unsafe("repeats what has several lengths")
    if most is None:
        return part._replace(unbounded=1, times=1, varies=True)
    return part._replace(times=part.times * max(1, most), varies=part.varies or least != most)


def _bounds(found: re.Match[str]) -> tuple[int, int | None]:
    text = found[0]
    if text[0] in "*+":
        return int(text[0] == "+"), None
    if text[0] == "?":
        return 0, 1
    least = int(found[1] or 0)
    most = least if not found[2] else int(found[3]) if found[3] else None
    if max(least, most or 0) > _TIMES:
        raise _Unsafe(f"repeats more than {_TIMES} times")
    return least, most


def _atom(pattern: str, at: int, depth: int) -> _Part:
    """One character, class or group."""
    here = pattern[at]
    if here == "[":
        return _Part(_set(pattern, at, 0))
    if here == "\\":
        return _Part(_escape(pattern, at))
    if here != "(":
        if here in "*+?":
            raise _Unsafe("repeats nothing")
        return _Part(at + 1)
    opened = _GROUP.match(pattern, at)
    if not opened:
        raise _Unsafe("has a group of a kind that words need not")
    inside = _alternatives(pattern, opened.end(), depth + 1)
    if inside.end >= len(pattern):
        raise _Unsafe("has a bracket too few")
    return inside._replace(end=inside.end + 1)


def _escape(pattern: str, at: int) -> int:
    found = _ESCAPE.match(pattern, at)
    if not found or found[0][1] in _BARRED:
        raise _Unsafe(f"has {pattern[at : at + 3]!r}")
    return found.end()


def _set(pattern: str, at: int, depth: int) -> int:
    """The end of the class that begins at `at`."""
    start = at
    at += 1
    at += pattern[at : at + 1] == "^"
    first = at
    while at < len(pattern):
        if pattern[at] == "]" and at > first:
            return at + 1
        if pattern[at] == "\\":
            at = _escape(pattern, at)
        elif pattern[at] == "[":
            posix = re.compile(r"\[:\^?[a-z]{1,12}:\]").match(pattern, at)
            if not posix and depth > 3:
                raise _Unsafe("nests classes too deep")
            at = posix.end() if posix else _set(pattern, at, depth + 1)
        else:
            at += 1
    raise _Unsafe(f"has a class that does not end, {pattern[start : start + 20]!r}")
