"""What is written stays, also where the power fails."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Bring the bytes of a file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def put(path: Path, data: bytes, part: Path | None = None) -> None:
    """Write a file so that it is there whole or, if it was there, as before.

    Args:
        path: the file.
        data: its content.
        part: where it is written first, on the same disk; by default beside it.
    """
    part = part or path.with_name(path.name + ".part")
    part.write_bytes(data)
    sync(part)
    part.replace(path)
    sync(path.parent)
