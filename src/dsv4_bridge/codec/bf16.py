"""bfloat16 in numpy, as uint16 bit patterns."""

import numpy as np


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to bf16 bit patterns, to nearest even (finite values)."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
