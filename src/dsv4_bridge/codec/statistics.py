"""Counts of codes: one pass over stored bytes, from which means, zeros and NaNs of a tensor follow.

Shapes: counts are int64, one a code; blocks lie as `spec.encodings` has them.
"""

import numpy as np

from . import fp8, mxfp4
from ._kernels import kernel

u8, u64 = np.uint8, np.uint64

# The released scale is the smallest power of two with amax <= 6 x scale (448 x scale): a block's largest value is
# above half of that, which rounds to a code of at least 3.0 (224).
LEAST = {"mxfp4": 5, "fp8": 0x76}
_PLANE = 0x1111111111111111  # the lowest bit of sixteen nibbles


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


def count_nibbles(data: np.ndarray, counts: np.ndarray) -> None:
    """Add the 4-bit halves of a flat uint8 array, contiguous, to `counts` [16]."""
    whole = data.size // 32 * 32
    _count_nibbles(data[:whole].view(u64), counts)
    last = np.bincount(data[whole:], minlength=256).reshape(16, 16)
    counts += last.sum(0) + last.sum(1)


@kernel()
def _count_nibbles(words, counts):
    """Of groups of four words, by counting bits.

    Bit i of all 64 nibbles makes plane i; how many have all the bits of a set is the count of ones in an AND of planes.
    """
    ones, twos, fours, eights = u64(_PLANE), u64(_PLANE << 1), u64(_PLANE << 2), u64(_PLANE << 3)
    s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = s9 = s10 = s11 = s12 = s13 = s14 = s15 = np.int64(0)
    for group in range(words.size // 4):
        a, b, c, d = words[4 * group], words[4 * group + 1], words[4 * group + 2], words[4 * group + 3]
        p0 = (a & ones) | ((b & ones) << u64(1)) | ((c & ones) << u64(2)) | ((d & ones) << u64(3))
        p1 = ((a & twos) >> u64(1)) | (b & twos) | ((c & twos) << u64(1)) | ((d & twos) << u64(2))
        p2 = ((a & fours) >> u64(2)) | ((b & fours) >> u64(1)) | (c & fours) | ((d & fours) << u64(1))
        p3 = ((a & eights) >> u64(3)) | ((b & eights) >> u64(2)) | ((c & eights) >> u64(1)) | (d & eights)
        p01, p02, p12 = p0 & p1, p0 & p2, p1 & p2
        p012 = p01 & p2
        s1 += _ones(p0)
        s2 += _ones(p1)
        s3 += _ones(p01)
        s4 += _ones(p2)
        s5 += _ones(p02)
        s6 += _ones(p12)
        s7 += _ones(p012)
        s8 += _ones(p3)
        s9 += _ones(p0 & p3)
        s10 += _ones(p1 & p3)
        s11 += _ones(p01 & p3)
        s12 += _ones(p2 & p3)
        s13 += _ones(p02 & p3)
        s14 += _ones(p12 & p3)
        s15 += _ones(p012 & p3)
    # [s]: nibbles that have the bits of s, and maybe others; held apart until here, in registers.
    sets = np.array([words.size // 4 * 64, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15])
    # Those that have a bit more are taken off, one bit after another.
    for bit in (1, 2, 4, 8):
        for code in range(16):
            if not code & bit:
                sets[code] -= sets[code | bit]
    for code in range(16):
        counts[code] += sets[code]


@kernel()
def _ones(word):
    """How many bits of a word are set; the compiler knows the pattern."""
    word = word - ((word >> u64(1)) & u64(0x5555555555555555))
    word = (word & u64(0x3333333333333333)) + ((word >> u64(2)) & u64(0x3333333333333333))
    word = (word + (word >> u64(4))) & u64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * u64(0x0101010101010101)) >> u64(56))


@kernel()
def count_words(data: np.ndarray, counts: np.ndarray) -> None:
    """Add the patterns of a flat uint16 array to `counts` [65536]."""
    for i in range(data.size):
        counts[data[i]] += 1


def weak_blocks(encoding: str, codes: np.ndarray, block: tuple[int, int] = (128, 128)) -> tuple[int, int]:
    """Blocks that hold a value, and those of them whose largest code is smaller than the released rule makes it.

    Args:
        encoding: `mxfp4`, or `fp8` with scales of any kind.
        codes: rows of a tensor, contiguous, from the first row of a block on: uint8 [R, K/2] of MXFP4, else [R, K].
        block: rows and columns of one scale of FP8.
    """
    if encoding == "mxfp4":
        return _weak_groups(codes.reshape(-1).view(u64), u64(8 - LEAST[encoding]))
    return _weak_tiles(codes, LEAST[encoding], *block)


@kernel()
def _weak_groups(words, lift):
    """Of groups of 32 nibbles in two words; `lift` carries a magnitude into the sign's bit where it is large enough."""
    held = weak = u64(0)
    magnitudes, one, sign = u64(0x7777777777777777), u64(0x1111111111111111), u64(0x8888888888888888)
    for group in range(u64(words.size // 2)):
        low, high = u64(words[u64(2) * group] & magnitudes), u64(words[u64(2) * group + u64(1)] & magnitudes)
        large = u64((u64(low + lift * one) | u64(high + lift * one)) & sign)
        holds = u64(1) if (low | high) != u64(0) else u64(0)
        held += holds
        weak += holds if large == u64(0) else u64(0)
    return np.int64(held), np.int64(weak)


@kernel()
def _weak_tiles(codes, least, high, wide):
    """Of tiles of codes, smaller at the edges."""
    rows, columns = codes.shape
    across = -(-columns // wide)
    tops = np.zeros(across, u8)
    held = weak = 0
    for start in range(0, rows, high):
        tops[:] = 0
        for row in range(start, min(rows, start + high)):
            for tile in range(across):
                top = u8(0)
                for column in range(u64(tile * wide), min(u64(columns), u64(tile * wide + wide))):
                    top = max(top, u8(codes[row, column] & u8(0x7F)))
                tops[tile] = max(tops[tile], top)
        for tile in range(across):
            if tops[tile] > 0:
                held += 1
                weak += tops[tile] < least
    return held, weak
