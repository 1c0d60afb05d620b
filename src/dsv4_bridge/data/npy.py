"""One-dimensional `.npy` files, read strictly: numpy's own reader opens zips and pickles and evaluates headers.

The format: 6 bytes of magic, version 1.0, the header's length as uint16, the header (a Python literal in the one
spelling that numpy writes, padded with spaces, with a line break at the end), the values.
"""

import os
import re
import stat
import struct
from pathlib import Path

import numpy as np

from ..errors import BridgeError, short

_START = b"\x93NUMPY\x01\x00"
_MOST_HEADER = 1024
_HEADER = re.compile(rb"\{'descr': '([<|][a-z]\d)', 'fortran_order': False, 'shape': \((\d{1,18}),\), \} *\n")
_KINDS = {np.dtype(code).str for code in "bBhHiIqQfd"}
_AGAIN = "make it again"


def read_npy(path: Path, dtype: type[np.generic], length: int, *, mapped: bool, again: str = _AGAIN) -> np.ndarray:
    """The array of a file.

    Args:
        path: the file.
        dtype: of its values.
        length: their number.
        mapped: map the file instead of reading it; an empty one is read all the same.
        again: what to do with a file that is no good.

    Returns:
        [length] of `dtype`; not writable where it is mapped.

    Raises:
        BridgeError: no such file, of another type, shape or size.
    """
    kind = np.dtype(dtype)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a pipe would be waited for
            raise BridgeError(f"reading {path}: not a regular file; {again}")
        with path.open("rb") as file:
            start = file.read(10)
            header = file.read(min(_header_length(start), _MOST_HEADER + 1))
            _check(path, start, header, kind, length, os.fstat(file.fileno()).st_size, again)
            if not mapped or not length:
                return np.fromfile(file, kind, length)
        return np.memmap(path, kind, "r", len(start) + len(header), (length,))
    except (OSError, ValueError) as error:
        what = (isinstance(error, OSError) and error.strerror) or error
        raise BridgeError(f"reading {path}: {what}; {again}") from None


def _header_length(start: bytes) -> int:
    return struct.unpack("<H", start[8:])[0] if len(start) == 10 else 0


def _check(path: Path, start: bytes, header: bytes, kind: np.dtype, length: int, size: int, again: str) -> None:
    if start[:8] != _START:
        raise BridgeError(f"reading {path}: it begins with {start[:8]!r}, expected a .npy file, version 1.0; {again}")
    told = _HEADER.fullmatch(header) if len(header) == _header_length(start) <= _MOST_HEADER else None
    if not told:
        raise BridgeError(
            f"reading {path}: the header {short(header)} is none of an array of {kind.name} with one dimension; {again}"
        )
    if told[1].decode() != kind.str:
        found = np.dtype(told[1].decode()).name if told[1].decode() in _KINDS else told[1].decode()
        raise BridgeError(f"reading {path}: {found} with 1 dimensions, expected one of {kind.name}; {again}")
    if int(told[2]) != length:
        raise BridgeError(f"reading {path}: shape ({int(told[2])},), expected ({length},); {again}")
    whole = len(start) + len(header) + length * kind.itemsize
    if size != whole:
        raise BridgeError(f"reading {path}: {size:,} bytes, its header wants {whole:,}; {again}")
