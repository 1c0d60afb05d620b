"""What attention's Triton kernels share: sizes of tiles, and loads of rows, window and choices.

Rows are (query, head) pairs, `query * heads + head`; a tile's rows meet a tile's keys in one product.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .tiles import shared_memory

# Compressed blocks: none, all that are visible, or each query's choice.
NONE, ALL, CHOSEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
# Rows of a tile, and what a product takes at least.
_ROWS, _LEAST = 64, 16
# Indices that are looked at together for the last choice of a query.
_SCAN = tl.constexpr(512)
# Kept free of tiles: probabilities on their way between products, sums along rows.
_SPARE = 16 * 1024


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut.

    Attributes:
        rows: (query, head) pairs at a time.
        keys: keys at a time.
        warps: of a program.
        stages: tiles of the inner loop that are in shared memory at a time.
    """

    rows: int
    keys: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments of a launch."""
        return {"ROWS": self.rows, "KEYS": self.keys, "num_warps": self.warps, "num_stages": self.stages}


def tiles(rows: int, keys: int, held: tuple[int, int], moving: tuple[int, int], width: int, x: torch.Tensor) -> Tiles:
    """Halve a kernel's tiles until they fit into the shared memory of a block.

    They rest on counting, not on measuring. 64 rows are what a warp group multiplies at a time, and 64 rows of 512
    float32 sums are half of a multiprocessor's registers, so more do not fit. float32 is multiplied without tensor
    cores, which hold their operands in registers: 16 rows and keys.

    Args:
        rows: at most.
        keys: at most.
        held: tiles of rows and of keys that stay.
        moving: tiles of rows and of keys that a step of the inner loop loads.
        width: channels, a power of two.
        x: the queries: their type, and the device.
    """
    room = shared_memory(x.device) - _SPARE
    size = x.element_size()
    stages = 2
    if size == 4 and width > 128:
        rows, keys = min(rows, _LEAST), min(keys, _LEAST)

    def taken() -> int:
        of_rows, of_keys = (held[i] + stages * moving[i] for i in (0, 1))
        return (of_rows * rows + of_keys * keys) * width * size

    while taken() > room and max(rows, keys) > _LEAST:
        rows, keys = (rows // 2, keys) if rows > keys else (rows, keys // 2)
    if taken() > room:
        stages = 1
    return Tiles(rows, keys, 8 if width > 128 else 4, stages)


def constants(**values: Any) -> dict[str, Any]:
    """Arguments of a launch that a kernel is compiled for; annotations in kernels are Triton's, not types."""
    return values


def kind_of(blocks: torch.Tensor | None, chosen: torch.Tensor | None) -> int:
    """NONE, ALL or CHOSEN."""
    return (NONE if blocks is None else ALL if chosen is None else CHOSEN).value


def most_rows(kind: int, heads: int) -> int:
    """Rows of a tile at most: one query's where it chooses for itself."""
    return min(_ROWS, max(_LEAST, triton.next_power_of_2(heads))) if kind == CHOSEN.value else _ROWS


def row_programs(kind: int, length: int, heads: int, rows: int) -> int:
    """Programs that all rows of a sequence take, as `rows_of` deals them out."""
    return length * triton.cdiv(heads, rows) if kind == CHOSEN.value else triton.cdiv(length * heads, rows)


def padded(width: int) -> int:
    """Channels of a tile."""
    return max(_LEAST, triton.next_power_of_2(width))


@triton.jit
def load_rows(start, rows, there, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED] of a matrix of WIDTH columns, 0 where there is nothing; rows are int64."""
    column = tl.arange(0, PADDED)
    at = start + rows[:, None] * WIDTH + column[None, :]
    if WIDTH == PADDED:
        return tl.load(at, mask=there[:, None], other=0.0)
    return tl.load(at, mask=there[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def last_choice(chosen, count):
    """One more than the last place of a query's choices that holds a block: what lies behind is not looked at."""
    last = 0
    for start in range(0, count, _SCAN):
        place = start + tl.arange(0, _SCAN)
        block = tl.load(chosen + place, mask=place < count, other=-1)
        last = tl.maximum(last, tl.max(tl.where(block >= 0, place + 1, 0)))
    return last


@triton.jit
def in_window(query, token, window):
    """Whether queries, along one axis, see tokens, along the other."""
    return (token <= query) & (token > query - window)


@triton.jit
def rows_of(program, length, KIND: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """First row of a program, and the end: heads of one query where it chooses for itself, else just the next."""
    if KIND == CHOSEN:
        parts: tl.constexpr = (HEADS + ROWS - 1) // ROWS
        query = program // parts
        first = query * HEADS + (program % parts) * ROWS
        stop = tl.minimum(first + ROWS, (query + 1) * HEADS)
    else:
        first = program * ROWS
        stop = tl.minimum(first + ROWS, length * HEADS)
    return first, stop
