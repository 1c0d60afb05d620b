"""Counts of codes: one pass over stored bytes, from which means, zeros and NaNs of a tensor follow.

Shapes: counts are int64, one a code; blocks lie as `spec.encodings` has them.
"""

import numpy as np

from . import fp8, mxfp4
from ._kernels import kernel

# The largest code of a byte, whose order is that of the magnitudes: of two nibbles, or of an E4M3 code.
LARGEST = {
    "mxfp4": np.array([max(b & 7, b >> 4 & 7) for b in range(256)], np.uint8),
    "fp8": np.array([b & 0x7F for b in range(256)], np.uint8),
}
# The released scale is the smallest power of two with amax <= 6 x scale (448 x scale): a block's largest value is
# above half of that, which rounds to a code of at least 3.0 (224).
LEAST = {"mxfp4": 5, "fp8": 0x76}


def nibbles(counts: np.ndarray) -> np.ndarray:
    """Counts of 256 bytes -> counts of the 16 codes in their halves."""
    table = counts.reshape(16, 16)
    return table.sum(0) + table.sum(1)


def e2m1_values() -> np.ndarray:
    """Values of the 16 codes, float64."""
    return np.concatenate([mxfp4.MAGNITUDES, -mxfp4.MAGNITUDES])


def e4m3_values() -> np.ndarray:
    """Values of the 256 codes, float64; NaN at 0x7F and 0xFF."""
    values = np.append(fp8.MAGNITUDES, np.nan)
    return np.concatenate([values, -values])


def bf16_values() -> np.ndarray:
    """Values of the 65,536 patterns, float64."""
    with np.errstate(invalid="ignore"):  # signalling NaNs among them
        return (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)


@kernel()
def count_bytes(data: np.ndarray, counts: np.ndarray) -> None:
    """Add the bytes of a flat uint8 array to `counts` [256]."""
    # Four tables: a run of one code would wait for its own last addition.
    apart = np.zeros((4, 256), np.int64)
    whole = data.size // 4 * 4
    for i in range(0, whole, 4):
        apart[0, data[i]] += 1
        apart[1, data[i + 1]] += 1
        apart[2, data[i + 2]] += 1
        apart[3, data[i + 3]] += 1
    for i in range(whole, data.size):
        apart[0, data[i]] += 1
    for code in range(256):
        counts[code] += apart[0, code] + apart[1, code] + apart[2, code] + apart[3, code]


@kernel()
def count_words(data: np.ndarray, counts: np.ndarray) -> None:
    """Add the patterns of a flat uint16 array to `counts` [65536]."""
    for i in range(data.size):
        counts[data[i]] += 1


@kernel()
def weak_blocks(codes: np.ndarray, largest: np.ndarray, least: int, high: int, wide: int) -> tuple[int, int]:
    """Blocks of `high` x `wide` bytes of uint8 codes [R, C] that hold a value, and those whose largest code is small.

    Args:
        codes: rows of a tensor, from the first row of a block on.
        largest: [256], the magnitude that a byte stands for.
        least: what the largest magnitude of a block should reach.
        high: rows of a block.
        wide: bytes of a row of a block.
    """
    rows, columns = codes.shape
    across = -(-columns // wide)
    tops = np.zeros(across, np.uint8)
    held = weak = 0
    for start in range(0, rows, high):
        tops[:] = 0
        for row in range(start, min(rows, start + high)):
            for block in range(across):
                top = tops[block]
                for column in range(block * wide, min(columns, (block + 1) * wide)):
                    top = max(top, largest[codes[row, column]])
                tops[block] = top
        for block in range(across):
            if tops[block] > 0:
                held += 1
                weak += tops[block] < least
    return held, weak
