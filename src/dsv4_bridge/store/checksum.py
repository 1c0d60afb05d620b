"""CRC-32C of bytes that come in order, of which some are replaced later.

CRC-32C (Castagnoli; RFC 3720 appendix B.4) is what object stores keep of their objects. It is linear: what a
replaced piece changes of it follows from the piece alone and the number of bytes behind it, so a file need not be
read again.
"""

import numpy as np
from fastcrc import crc32

_POLYNOMIAL = 0x82F63B78  # bits reversed: bit 31 is x^0
_ONE = 1 << 31

Bytes = bytes | memoryview | np.ndarray


def as_bytes(data: Bytes) -> np.ndarray:
    """A flat uint8 view of contiguous data."""
    return data.reshape(-1).view(np.uint8) if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)


class Checksum:
    """The CRC-32C of a file while it is written."""

    def __init__(self) -> None:
        self.size = 0  # bytes so far
        self._value = 0
        self._changes: list[tuple[int, int]] = []  # end of a replaced piece, what it changes

    def add(self, data: Bytes) -> None:
        """Append bytes."""
        raw = as_bytes(data)
        self._value = crc32.iscsi(raw, self._value)
        self.size += raw.size

    def replace(self, offset: int, old: bytes, new: bytes) -> None:
        """Bytes from `offset` on were `old` and are `new`, as many; nothing of them is replaced twice."""
        self._changes.append((offset + len(old), crc32.iscsi(old) ^ crc32.iscsi(new)))

    def value(self) -> int:
        """The CRC-32C of all bytes."""
        value = self._value
        for end, change in self._changes:
            value ^= _product(change, _power(8 * (self.size - end)))
        return value


def of_bytes(data: Bytes) -> int:
    """The CRC-32C of bytes."""
    return crc32.iscsi(as_bytes(data))


def _product(a: int, b: int) -> int:
    """Of two polynomials over GF(2), modulo that of the checksum."""
    total = 0
    while a:
        if a & _ONE:
            total ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return total


def _power(n: int) -> int:
    """x^n."""
    result, square = _ONE, _ONE >> 1
    while n:
        if n & 1:
            result = _product(result, square)
        square, n = _product(square, square), n >> 1
    return result
