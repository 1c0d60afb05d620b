"""Reading past the page cache, for weights whose own memory is the cache: every byte from the disk once, held once."""

import contextlib
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from ..errors import BridgeError
from .reading import drop_behind
from .safetensors import TensorInfo

_BLOCK: Final = 4096  # what direct reads begin and end at
_GAP: Final = 64 << 10  # a gap that is read along rather than left out


class DirectReader:
    """Tensors of a folder of shards, read into page-aligned memory.

    Where a file system refuses direct reads, ordinary ones are made and their pages given back.

    Args:
        folder: of the shards.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, tuple[int, bool]] = {}
        self._lock = threading.Lock()

    def size(self, infos: Sequence[TensorInfo]) -> int:
        """Bytes of memory that `read` takes for these."""
        return sum(stop - start for _, start, stop, _ in _runs(infos))

    def read(self, infos: Sequence[TensorInfo], into: np.ndarray) -> list[np.ndarray]:
        """Read tensors; neighbours in a file at once.

        Args:
            infos: what.
            into: page-aligned uint8 of `size` bytes or more.

        Returns:
            The bytes of each, views of `into`.

        Raises:
            BridgeError: a file that cannot be read or ends early.
        """
        found: list[np.ndarray] = [into[:0]] * len(infos)
        at = 0
        for file, start, stop, members in _runs(infos):
            buffer = into[at : at + stop - start]
            last = max(infos[n].start + infos[n].nbytes for n in members)
            self._fill(file, start, buffer, last - start)
            for n in members:
                first = infos[n].start - start
                found[n] = buffer[first : first + infos[n].nbytes]
            at += stop - start
        return found

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for fd, _ in self._files.values():
                os.close(fd)
            self._files.clear()

    def _fill(self, file: str, start: int, buffer: np.ndarray, wanted: int) -> None:
        fd, direct = self._open(file)
        done = 0
        try:
            while done < wanted:
                # A short count in the middle would leave the next read unaligned.
                done = done // _BLOCK * _BLOCK
                count = os.preadv(fd, [memoryview(buffer)[done:]], start + done)  # type: ignore[reportArgumentType]
                if count <= 0 or (done + count < wanted and count < _BLOCK):
                    raise BridgeError(f"reading {self.folder / file}: it ends at byte {start + done + count}")
                done += count
        except OSError as error:
            raise BridgeError(f"reading {self.folder / file}: {error.strerror or error}") from None
        if not direct:
            drop_behind(fd, start, len(buffer))

    def _open(self, file: str) -> tuple[int, bool]:
        with self._lock:
            if file not in self._files:
                path = self.folder / file
                try:
                    self._files[file] = _open_direct(path)
                except OSError as error:
                    raise BridgeError(f"reading {path}: {error.strerror or error}") from None
            return self._files[file]


def _open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it reads past the page cache."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        fd = os.open(path, flags | os.O_DIRECT)
        try:  # some file systems open so, and refuse to read
            os.preadv(fd, [mmap.mmap(-1, _BLOCK)], 0)
            return fd, True
        except OSError:
            os.close(fd)
    return os.open(path, flags), False


def _runs(infos: Sequence[TensorInfo]) -> list[tuple[str, int, int, list[int]]]:
    """Stretches of files that hold tensors: file, first and last byte at blocks, numbers of the tensors."""
    runs: list[tuple[str, int, int, list[int]]] = []
    for n in sorted(range(len(infos)), key=lambda n: (infos[n].file, infos[n].start)):
        info = infos[n]
        stop = -(-(info.start + info.nbytes) // _BLOCK) * _BLOCK
        if runs and runs[-1][0] == info.file and info.start <= runs[-1][2] + _GAP:
            file, start, before, members = runs[-1]
            runs[-1] = (file, start, max(stop, before), [*members, n])
        else:
            runs.append((info.file, info.start // _BLOCK * _BLOCK, stop, [n]))
    return runs


def aligned_memory(size: int) -> np.ndarray:
    """Page-aligned uint8."""
    return np.frombuffer(mmap.mmap(-1, max(_BLOCK, -(-size // _BLOCK) * _BLOCK)), np.uint8)
