"""Where the bytes of an output file go: a file written past the page cache, or a counter.

Buffered writes of hundreds of gigabytes fill the page cache and stall on it; direct writes from
three reused, page-aligned buffers run at the speed of the disk while the next buffer is filled
(see docs/reference/benchmarks.md).
"""

import errno
import mmap
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from ..threads import ended
from .checksum import Bytes, Checksum, as_bytes

_ALIGN = 4096
_BUFFER = 8 << 20
_LOOK = 5.0  # seconds between two looks at whether the thread that writes still lives


class Stream(Protocol):
    """A sink for one output file, written front to back."""

    def write(self, data: Bytes) -> None:
        """Append bytes."""
        ...

    def patch(self, offset: int, old: bytes, new: bytes) -> None:
        """Replace `old`, written `offset` from the start of the file, by `new`, as many bytes, once."""
        ...

    def close(self) -> None:
        """Make everything durable."""
        ...

    def abort(self) -> None:
        """Give up; what was written is left for the caller to remove."""
        ...


class Buffers:
    """The reused aligned buffers of one worker; one stream at a time uses them."""

    def __init__(self, count: int = 3, size: int = _BUFFER):
        self.free: queue.Queue[np.ndarray] = queue.Queue()
        self.size = size
        for _ in range(count):
            # numpy copies without the interpreter lock; the mapping gives page alignment
            self.free.put(np.frombuffer(mmap.mmap(-1, size), np.uint8))


class FileStream:
    """Writes a file through direct I/O where the file system allows it, else buffered.

    Whatever ends the thread that writes, `progress` included, is raised by the next `write` or by `close`; and
    `close` returns only where every byte that was accepted was handed to the kernel.
    """

    def __init__(self, path: Path, buffers: Buffers, progress: Callable[[int], None] = lambda n: None):
        self._path, self._buffers, self._progress = path, buffers, progress
        self._fd, self._open, self._joined = _open_direct(path), True, False
        self._full: queue.Queue[tuple[np.ndarray, int] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._flushed = 0  # bytes handed to the kernel
        self._size = 0  # bytes accepted
        self._patches: list[tuple[int, bytes]] = []
        self._checksum = Checksum()
        self._buffer, self._used = buffers.free.get(), 0
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"write {path.name}")
        try:
            self._thread.start()
        except BaseException:
            buffers.free.put(self._buffer)
            os.close(self._fd)
            raise

    def write(self, data: Bytes) -> None:
        rest = as_bytes(data)
        self._size += rest.size
        while rest.size:
            room = min(rest.size, self._buffers.size - self._used)
            self._buffer[self._used : self._used + room] = rest[:room]
            self._used += room
            rest = rest[room:]
            if self._used == self._buffers.size:
                self._hand_over()

    def patch(self, offset: int, old: bytes, new: bytes) -> None:
        self._checksum.replace(offset, old, new)
        self._patches.append((offset, new))
        if len(self._patches) >= 64:
            self._apply_patches(self._flushed // _ALIGN * _ALIGN)

    @property
    def crc32c(self) -> int:
        """Of the whole file, once it is closed."""
        return self._checksum.value()

    def close(self) -> None:
        self._hand_over()
        self._finish()
        self._raise()
        if self._flushed != self._size:
            raise OSError(errno.EIO, f"{self._flushed} of {self._size} bytes were written", str(self._path))
        os.ftruncate(self._fd, self._size)
        self._apply_patches(self._size)
        os.fsync(self._fd)
        self._shut()

    def abort(self) -> None:
        self._finish()
        self._shut()

    def _finish(self) -> None:
        if not self._joined:
            self._joined = True
            self._full.put(None)
            ended(self._thread)
            self._buffers.free.put(self._buffer)

    def _shut(self) -> None:
        if self._open:
            self._open = False
            os.close(self._fd)

    def _hand_over(self) -> None:
        self._raise()
        self._checksum.add(self._buffer[: self._used])
        self._full.put((self._buffer, self._used))
        while True:
            try:
                self._buffer, self._used = self._buffers.free.get(timeout=_LOOK), 0
                return
            except queue.Empty:
                if not self._thread.is_alive():
                    raise OSError(errno.EIO, "the thread that writes it died", str(self._path)) from None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        at = 0
        while (entry := self._full.get()) is not None:
            buffer, used = entry
            try:
                if self._error is None:
                    padded = -(-used // _ALIGN) * _ALIGN
                    _write_all(self._fd, memoryview(buffer[:padded]), at)
                    at += used
                    self._flushed = at
                    self._progress(used)
            except BaseException as error:
                self._error = error
            finally:
                self._buffers.free.put(buffer)

    def _apply_patches(self, upto: int) -> None:
        # Through the page cache, and only where no direct write will come any more.
        ready = [p for p in self._patches if -(-(p[0] + len(p[1])) // _ALIGN) * _ALIGN <= upto or upto == self._size]
        if not ready:
            return
        self._patches = [p for p in self._patches if p not in ready]
        fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for offset, data in ready:
                _write_all(fd, memoryview(data), offset)
            os.fsync(fd)
        finally:
            os.close(fd)


class CountingStream:
    """Counts and discards: the converter without a disk."""

    def __init__(self, progress: Callable[[int], None] = lambda n: None):
        self.size = 0
        self._progress = progress

    def write(self, data: Bytes) -> None:
        size = as_bytes(data).size
        self.size += size
        self._progress(size)

    def patch(self, offset: int, old: bytes, new: bytes) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


def _open_direct(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        return os.open(path, flags, 0o666)


def direct_io(path: Path) -> bool:
    """Whether the file system of `path` takes direct writes."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
        return False
    return True


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.pwrite(fd, view[done:], offset + done)
        if done + count < len(view) and count % _ALIGN and len(view) % _ALIGN == 0:
            count -= count % _ALIGN  # a direct write goes on at a block's start
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif count == 0:
            raise OSError(errno.EIO, "nothing was written")
        done += count
