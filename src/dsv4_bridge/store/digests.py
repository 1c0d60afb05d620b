"""Digests of whole files, as the Hub keeps them, and files read once at the speed of the disk."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .reading import drop_behind, open_to_read

_PIECE = 8 << 20


def pieces(path: Path) -> Iterator[np.ndarray]:
    """The bytes of a file front to back, in a buffer that is used again: each piece is gone when the next comes.

    Raises:
        OSError: it cannot be read.
    """
    buffer, at, fd = np.empty(_PIECE, np.uint8), 0, open_to_read(path)
    try:
        while count := os.preadv(fd, [buffer], at):
            drop_behind(fd, at, count)
            at += count
            yield buffer[:count]
    finally:
        os.close(fd)


def file_digest(path: Path, kind: str, told: Callable[[int], None] = lambda n: None) -> str:
    """A digest of a file with its kind before it.

    Args:
        path: the file.
        kind: `sha256`, or `blob`: what Git calls a file of this content (SHA-1).
        told: of the bytes read.

    Raises:
        OSError: it cannot be read.
    """
    total = hashlib.sha256() if kind == "sha256" else hashlib.sha1(usedforsecurity=False)
    if kind == "blob":
        total.update(b"blob %d\0" % path.stat().st_size)
    for piece in pieces(path):
        total.update(piece)
        told(len(piece))
    return f"{kind}:{total.hexdigest()}"
