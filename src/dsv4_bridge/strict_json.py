"""JSON from elsewhere, read strictly: an object, no name twice, text that can be printed."""

import json
import stat
from pathlib import Path
from typing import Any

from .errors import BridgeError, short

LFS = b"version https://git-lfs.github.com/"
LFS_POINTER = "a Git LFS pointer in place of the file; run `git lfs pull` in the folder"


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        raw: UTF-8.
        where: what it is, for messages.

    Raises:
        BridgeError: not valid, not an object, a name given twice, or text with half a character.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise BridgeError(f"reading {where}: the name {short(twice)} is given twice")
        return found

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique)
        if b"\\u" in raw:  # only an escape can make half a character, which nothing can print or write
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BridgeError(f"reading {where}: it holds half of a surrogate pair, which is no text") from None
    except RecursionError:
        raise BridgeError(f"reading {where}: not usable JSON (nested too deep)") from None
    except UnicodeDecodeError as error:
        raise BridgeError(f"reading {where}: not valid JSON (byte {error.start} is not UTF-8)") from None
    except ValueError as error:
        if raw.startswith(LFS):
            raise BridgeError(f"reading {where}: {LFS_POINTER}") from None
        raise BridgeError(f"reading {where}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BridgeError(f"reading {where}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json(path: Path, most_bytes: int, hint: str = "") -> dict[str, Any]:
    """Read a small JSON file, see `parse_json`.

    Args:
        path: the file.
        most_bytes: a larger one is refused unread.
        hint: what to do if it is not to be had.

    Raises:
        BridgeError: no regular file, too large, or as there.
    """
    return parse_json(read_small(path, most_bytes, hint), str(path))


def read_small(path: Path, most_bytes: int, hint: str = "") -> bytes:
    """The bytes of a small file.

    Raises:
        BridgeError: unreadable, no regular file (a pipe would be waited for), or too large.
    """
    more = f"; {hint}" if hint else ""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "not a regular file"
            raise BridgeError(f"reading {path}: {kind}{more}")
        with path.open("rb") as file:
            raw = file.read(most_bytes + 1)
    except OSError as error:
        raise BridgeError(f"reading {path}: {error.strerror or error}{more}") from None
    except ValueError as error:  # a name with a zero byte
        raise BridgeError(f"reading {short(str(path))}: {error}") from None
    if len(raw) > most_bytes:
        raise BridgeError(f"reading {path}: {max(facts.st_size, len(raw)):,} bytes, more than the {most_bytes:,} taken")
    return raw


def too_deep(value: Any, levels: int = 64, nodes: int = 1 << 20) -> bool:
    """Whether plain data nests more than `levels` or, shared parts counted each time, has more than `nodes`."""
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack:
        node, depth = stack.pop()
        nodes -= 1
        if depth > levels or nodes < 0:
            return True
        if isinstance(node, dict | list | tuple | set):
            inner = (*node, *node.values()) if isinstance(node, dict) else node
            nodes -= len(inner)
            stack.extend((n, depth + 1) for n in inner if isinstance(n, dict | list | tuple | set))
    return False
