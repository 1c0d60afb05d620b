"""How files are read: front to back, once, without filling the page cache behind us.

Measured on a virtual machine with a 1.5 GB/s disk (docs/reference/benchmarks.md): a cold file is read at 0.4
GB/s plainly, 0.6 with the sequential hint, 2.1 when pages are given back as soon as they were
copied: getting fresh pages from the kernel costs more than the disk.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Final

from ..threads import ended

_DROP_FROM: Final = 512 << 10  # smaller reads are headers and scales, which are read again
_ASK: Final = 2 << 20
_WINDOW: Final = 16 << 20  # no page of the cache is larger
_APART: Final = 1 << 20  # as a scale between two weights
# Descriptor -> first and last byte of what was read last. What a closed one has left does no harm: it is advice only.
_behind: dict[int, tuple[int, int]] = {}
_kept: ContextVar[bool] = ContextVar("kept", default=False)


@contextlib.contextmanager
def kept_in_cache() -> Iterator[None]:
    """Leave in the page cache what is read meanwhile, for other processes that read the same.

    It also has every byte read from the disk once. Giving pages back at once costs 1.2 to 1.4 reads a byte where
    tensors are not read in the order of the file: the kernel gives back large pages whole, with what it read ahead.
    """
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)


def open_to_read(path: Path) -> int:
    """A descriptor that the kernel reads ahead of."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd


def drop_behind(fd: int, offset: int, nbytes: int) -> None:
    """Give back the cached pages of a stretch that was just read, if it is a large one.

    With it goes what was read right before it: the cache has pages of up to what the kernel reads ahead (megabytes, on
    some machines), one is given back whole or not at all, and most lie across the end of a stretch.
    """
    if nbytes < _DROP_FROM or _kept.get():
        return
    first, last = _behind.get(fd, (offset, offset))
    if not 0 <= offset - last <= _APART:
        first = offset
    end = offset + nbytes
    os.posix_fadvise(fd, first, end - first, os.POSIX_FADV_DONTNEED)
    _behind[fd] = max(first, end - _WINDOW), end


class Readahead:
    """Asks the kernel, from a thread of its own, for stretches of files that will be read soon."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, fd: int, offset: int, nbytes: int) -> None:
        """Start reading `nbytes` at `offset` into the page cache."""
        if nbytes < _DROP_FROM:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="readahead")
            with contextlib.suppress(RuntimeError):  # no thread, no reading ahead
                self._thread.start()
        self._queue.put((fd, offset, nbytes))

    def close(self) -> None:
        """End the thread."""
        if self._thread:
            self._queue.put(None)
            ended(self._thread)
            self._thread = None

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            fd, offset, nbytes = entry
            # Advice only: the file may have been closed meanwhile.
            with contextlib.suppress(OSError):
                for at in range(offset, offset + nbytes, _ASK):
                    os.posix_fadvise(fd, at, min(_ASK, offset + nbytes - at), os.POSIX_FADV_WILLNEED)
