"""Blocks off the released rule are counted as a definition in plain numpy counts them."""

import numpy as np
import pytest

from dsv4_bridge.codec.statistics import count_bytes, count_nibbles, weak_blocks


def slowly(encoding: str, codes: np.ndarray) -> tuple[int, int]:
    packed = encoding == "mxfp4"
    sizes = np.stack([codes & 7, codes >> 4 & 7], -1).reshape(len(codes), -1) if packed else codes & 0x7F
    high, wide, least = (1, 32, 5) if packed else (128, 128, 0x76)
    tops = [
        int(sizes[r : r + high, c : c + wide].max())
        for r in range(0, sizes.shape[0], high)
        for c in range(0, sizes.shape[1], wide)
    ]
    return sum(t > 0 for t in tops), sum(0 < t < least for t in tops)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("encoding", "shape"), [("mxfp4", (65, 48)), ("mxfp4", (1, 16)), ("fp8", (300, 200)), ("fp8", (128, 1))]
)
def test_weak_blocks(encoding: str, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    for first in range(0, shape[0], 7):  # rows of every strength, zeros of either sign among them
        masks = (0x00, 0x88, 0x11, 0xBB, 0xCC, 0x80, 0x7F)
        codes[first : first + 7] &= np.array(masks, np.uint8)[rng.permutation(7)][: shape[0] - first, None]
    if encoding == "fp8" and seed % 2:
        codes &= 0xF5
    assert weak_blocks(encoding, codes) == slowly(encoding, codes)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 31, 32, 33, 1027, 4096])
def test_counts(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    counts = np.zeros(256, np.int64)
    count_bytes(data, counts)
    assert np.array_equal(counts, np.bincount(data, minlength=256))
    halves = np.arange(16)  # added to, whatever is there
    count_nibbles(data, halves)
    count_nibbles(data & 0x97, halves)  # some codes not at all
    several = np.concatenate([data & 15, data >> 4, data & 7, data >> 4 & 9])
    assert np.array_equal(halves, np.arange(16) + np.bincount(several, minlength=16))
