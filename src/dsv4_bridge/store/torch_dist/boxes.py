"""Files of a ``torch_dist`` folder: a few kept open, and boxes of dense arrays read from them."""

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from ...errors import BridgeError
from ..reading import drop_behind, open_to_read
from .pickle_reader import show

_WINDOW: Final = 4 << 20  # a bounce buffer
_NEAR: Final = 32 << 10  # rows closer than this are read together: a system call costs more than the gap
_OPEN_FILES: Final = 64


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of an open file. ``where`` is for messages."""

    fd: int
    start: int
    where: str

    def bytes(self, offset: int, size: int) -> bytes:
        """Bytes at ``offset`` from the start; BridgeError where the file ends early."""
        buffer = np.empty(size, np.uint8)
        self.into(offset, buffer)
        return buffer.tobytes()

    def into(self, offset: int, out: np.ndarray) -> None:
        """Fill a C-contiguous array from consecutive bytes."""
        view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
        while done < len(view):
            # Linux moves at most 2 GiB a call.
            count = os.preadv(self.fd, [view[done : done + (1 << 30)]], self.start + offset + done)
            if count == 0:
                raise BridgeError(
                    f"{self.where}: the file ends {len(view) - done} bytes early; it is truncated, "
                    "or changed while being read. Copy it again"
                )
            done += count
        drop_behind(self.fd, self.start + offset, done)


def read_box(extent: Extent, shape: tuple[int, ...], first: tuple[int, ...], out: np.ndarray) -> None:
    """Fill ``out`` from the box of its shape at ``first`` of the dense C-order array at an extent's start.

    Only the rows that are wanted are read, straight into ``out`` where they are contiguous there too;
    otherwise through a buffer of 4 MiB.

    Args:
        extent: where the array is.
        shape: of the array, with the element type of ``out``.
        first: the box's first element.
        out: not empty; any strides.
    """
    steps = [math.prod(shape[a + 1 :]) * out.itemsize for a in range(len(shape))]
    # Below the last axis that is cut, everything is wanted: the pieces are contiguous.
    axis = max((a for a, n in enumerate(shape) if out.shape[a] < n), default=0)
    base = sum(f * s for f, s in zip(first, steps))
    if axis == 0:
        _read_run(extent, base, out)
        return
    # Along axis - 1, a piece every ``pitch`` bytes.
    pitch, piece = steps[axis - 1], math.prod(out.shape[axis:]) * out.itemsize
    dense = 8 * piece >= pitch or pitch <= _NEAR
    together = max(1, _WINDOW // pitch) if dense else 1
    together = min(together, out.shape[axis - 1])
    bounce = np.empty(together * pitch if together > 1 else 0, np.uint8)
    for outer in np.ndindex(*out.shape[: axis - 1]):
        at = base + sum(i * s for i, s in zip(outer, steps))
        rows = out[outer]
        for i in range(0, len(rows), together):
            block = rows[i : i + together]
            if together == 1:
                _read_run(extent, at + i * pitch, block[0])
                continue
            # The last row is read no further than its piece: the file may end there.
            extent.into(at + i * pitch, bounce[: (len(block) - 1) * pitch + piece])
            pieces = bounce[: len(block) * pitch].reshape(len(block), pitch)[:, :piece]
            block[...] = np.ascontiguousarray(pieces).view(out.dtype).reshape(block.shape)


def _read_run(extent: Extent, offset: int, out: np.ndarray) -> None:
    """Fill ``out`` from consecutive bytes: in place where it is contiguous, else in windows."""
    if out.flags.c_contiguous:
        extent.into(offset, out)
        return
    row = out.nbytes // len(out)
    if row > _WINDOW:
        for i in range(len(out)):
            _read_run(extent, offset + i * row, out[i])
        return
    together = _WINDOW // row
    for i in range(0, len(out), together):
        block = out[i : i + together]
        bounce = np.empty(block.shape, out.dtype)
        extent.into(offset + i * row, bounce)
        block[...] = bounce


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file does: inode, size, time of the last write."""
    return found.st_ino, found.st_size, found.st_mtime_ns


class Files:
    """Open files of one folder, the least recently used closed first; never one that is being read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root = folder.resolve()
        self._lock = threading.Lock()
        self._open: OrderedDict[str, list[int]] = OrderedDict()  # name -> [descriptor, readers]
        self._stamps: dict[str, tuple[int, int, int]] = {}

    def path(self, name: str) -> Path:
        """The path of a file that ``.metadata`` names; BridgeError where it leads out of the folder."""
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise BridgeError(
                f"reading {self._folder}: .metadata names the file {show(name)}; expected one of the folder"
            )
        path = self._folder / name
        if not path.resolve().is_relative_to(self._root):
            raise BridgeError(f"reading {path}: a link that leads out of the folder; copy the file instead")
        return path

    def note(self, name: str) -> int:
        """The size of a file, which must stay as it is from now on; OSError where it cannot be looked at."""
        found = self.path(name).stat()
        self._stamps[name] = _stamp(found)
        return found.st_size

    def _check(self, name: str, fd: int) -> None:
        if _stamp(os.fstat(fd)) != self._stamps[name]:
            raise BridgeError(f"reading {self._folder / name}: it changed while being read; repeat when it is at rest")

    @contextmanager
    def borrow(self, name: str) -> Iterator[int]:
        """The descriptor of a file, open for as long as the block runs; the file is the one that was noted."""
        with self._lock:
            entry = self._open.get(name)
            if entry is None:
                path = self.path(name)
                try:
                    fd = open_to_read(path)
                    entry = self._open[name] = [fd, 0]
                except OSError as error:
                    raise BridgeError(f"reading {path}: {error.strerror}") from None
            self._check(name, entry[0])
            entry[1] += 1
            self._open.move_to_end(name)
            self._evict(_OPEN_FILES)
        try:
            yield entry[0]
            self._check(name, entry[0])
        finally:
            with self._lock:
                entry[1] -= 1

    def _evict(self, keep: int) -> None:
        excess = len(self._open) - keep
        if excess > 0:
            for name in [n for n, e in self._open.items() if e[1] == 0][:excess]:
                os.close(self._open.pop(name)[0])

    def close(self) -> None:
        """Close every file that is not being read."""
        with self._lock:
            self._evict(0)
