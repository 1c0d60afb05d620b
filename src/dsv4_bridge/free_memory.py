"""How much memory this process may still take: the machine's, its container's, its own limit, whichever is least."""

import contextlib
import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path

_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_HOME = Path("/sys/fs/cgroup")


def free_memory(home: Path = _HOME, proc: Path = Path("/proc/self")) -> int:
    """Bytes of main memory that this process can still take.

    Args:
        home: where control groups are mounted.
        proc: what the kernel says of this process.
    """
    import psutil

    return max(0, min([psutil.virtual_memory().available, *_groups(home, proc), *_address_space(proc)]))


def held_memory(proc: Path = Path("/proc/self")) -> int:
    """Bytes of main memory that this process holds now."""
    pages = next(iter(_lines(proc / "statm")), "").split()
    return int(pages[1]) * resource.getpagesize() if len(pages) > 1 and pages[1].isdecimal() else 0


def give_back() -> None:
    """Have the C library give the system what was freed: glibc keeps much of it, by threads, for what may come."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _groups(home: Path, proc: Path) -> Iterator[int]:
    """What each control group around the process leaves; a group's page cache counts as free, as the machine's does."""
    for line in _lines(proc / "cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        names, root = (_V1, home / "memory") if controllers else (_V2, home)
        inner = root / path.lstrip("/")
        # In a container the path is often the host's, and the group itself is mounted at the root.
        for folder in dict.fromkeys((inner, *inner.parents, root)):
            if folder.is_relative_to(root):
                yield from _left(folder, *names)


def _left(folder: Path, most: str, used: str, cache: str) -> Iterator[int]:
    limit, now = _number(folder / most), _number(folder / used)
    if limit is None or now is None or limit >= 1 << 60:  # "max", or version 1's way to say it
        return
    told = (line.split() for line in _lines(folder / "memory.stat"))
    reclaimed = next((int(words[1]) for words in told if words[:1] == [cache] and words[-1].isdecimal()), 0)
    yield limit - max(0, now - reclaimed)


def _address_space(proc: Path) -> Iterator[int]:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = next(iter(_lines(proc / "statm")), "").split()
    if soft != resource.RLIM_INFINITY and pages and pages[0].isdecimal():
        yield soft - int(pages[0]) * resource.getpagesize()


def _number(path: Path) -> int | None:
    text = next(iter(_lines(path)), "")
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, ValueError):
        return []
