"""How a tensor lies on disk under each encoding: element types and the shape of its scales.

| encoding | weight | scale | scale covers |
|---|---|---|---|
| mxfp4 | I8, two E2M1 codes a byte along the last axis | F8_E8M0 | 32 values of a row |
| fp8 | F8_E4M3 | F8_E8M0 | a tile of 128x128 |
| fp8_f32 | F8_E4M3 | F32 | a tile of 128x128 |
| fp8_pow2 | F8_E4M3 | F32, a power of two as in fp8 | a tile of 128x128 |
| fp8_32x32 | F8_E4M3 | F8_E8M0 | a tile of 32x32 (V4.1) |
| fp8_1x32 | F8_E4M3 | F8_E8M0 | 32 values of a row (Engram tables of V4.1) |
| bf16, f32, i64, i32 | plain | - | - |

Geometry only; codec/ holds the arithmetic by the same names. `fp8_pow2` is a way to write: on disk it is `fp8_f32`,
and so it is read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .dtypes import DTYPES

TILE = 128
GROUP = 32


class Stored(NamedTuple):
    """One tensor on disk: name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Encoding:
    """One way to store a tensor.

    Attributes:
        name: as in the table above.
        dtype: of its elements, safetensors name.
        scale_dtype: of its scale; None: it has none.
        block: rows and columns of values that one scale covers.
        packed: values that an element holds, along the last axis.
        widened: encoding whose E8M0 scale is written as float32, the same power of two.
        expert_dtype: what config.json calls it where experts are stored so.
    """

    name: str
    dtype: str
    scale_dtype: str | None = None
    block: tuple[int, int] = (TILE, TILE)
    packed: int = 1
    widened: str | None = None
    expert_dtype: str | None = None

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape on disk of a tensor of logical `shape`."""
        return (*shape[:-1], shape[-1] // self.packed) if self.packed > 1 else shape

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of logical `shape` `[rows, columns]`."""
        (rows, columns), (high, wide) = shape, self.block
        return -(-rows // high), -(-columns // wide)

    def scale_rows(self, first: int, last: int) -> tuple[int, int]:
        """First row of the scale that covers rows `first` to `last` of a weight, and the row behind its last."""
        return first // self.block[0], -(-last // self.block[0])


ENCODINGS: dict[str, Encoding] = {
    e.name: e
    for e in (
        Encoding("mxfp4", "I8", "F8_E8M0", (1, GROUP), 2, expert_dtype="fp4"),
        Encoding("fp8", "F8_E4M3", "F8_E8M0", expert_dtype="fp8"),
        Encoding("fp8_f32", "F8_E4M3", "F32", expert_dtype="fp8"),
        Encoding("fp8_pow2", "F8_E4M3", "F32", widened="fp8", expert_dtype="fp8"),
        Encoding("fp8_32x32", "F8_E4M3", "F8_E8M0", (GROUP, GROUP)),
        Encoding("fp8_1x32", "F8_E4M3", "F8_E8M0", (1, GROUP)),
        Encoding("bf16", "BF16"),
        Encoding("f32", "F32"),
        Encoding("i64", "I64"),
        Encoding("i32", "I32"),
    )
}
# Encodings in which a class of the table may be found; the first is what Megatron's side holds.
ALLOWED: Mapping[str, tuple[str, ...]] = {
    "linear": ("bf16", "fp8", "fp8_f32", "f32"),
    "expert": ("bf16", "mxfp4", "fp8", "fp8_f32", "f32"),
    "linear32": ("bf16", "fp8_32x32", "fp8", "fp8_f32", "f32"),
    "engram": ("bf16", "fp8_1x32", "fp8", "f32"),
    "plain": ("bf16", "f32"),
    "f32": ("f32", "bf16"),
    "int": ("i32", "i64"),
}
# What a folder can be written as: each tensor as its source stores it, or throughout.
TARGETS = ("source", "fp8", "bf16")
QUANTISED = frozenset(e.name for e in ENCODINGS.values() if e.scale_dtype)


def of_shapes(
    allowed: tuple[str, ...], shape: tuple[int, ...], dtype: str, scale: tuple[str, tuple[int, ...]] | None
) -> str | None:
    """The allowed encoding of a tensor of logical `shape`: of those of its types, the one whose scale fits.

    Args:
        allowed: encodings, see `ALLOWED`.
        shape: of its values.
        dtype: of its elements, as stored.
        scale: type and shape of its scale.

    Returns:
        The first of its types where no scale fits, for that is then what is wrong; None where no type does.
    """
    kinds = [e for e in ENCODINGS.values() if e.name in allowed and e.dtype == dtype]
    kinds = [e for e in kinds if e.scale_dtype is None or (scale and e.scale_dtype == scale[0])]
    fits = (e for e in kinds if e.scale_dtype is None or (scale and e.scale_shape(shape) == scale[1]))
    best = next(fits, kinds[0] if kinds else None)
    return best.name if best else None


def of_dtype(dtype: str, scale_dtype: str | None) -> str | None:
    """Encoding of a weight of `dtype` whose scale has `scale_dtype`; None if there is no such."""
    for encoding in ENCODINGS.values():
        if encoding.dtype == dtype and (encoding.scale_dtype == scale_dtype or encoding.scale_dtype is None):
            return encoding.name
    return None
