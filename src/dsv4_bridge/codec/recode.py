"""From one encoding to another, with a certificate of what it did.

MXFP4 -> FP8 (128 x 128, E8M0), straight from the nibbles. The scale of a block is the smallest
power of two S with amax <= 448 * S. The step is lossless iff every nonzero value is a multiple of
2^-9 * S, the smallest E4M3 magnitude: E2M1 values have two significant bits and E4M3 has four, so
nothing else can go wrong. With any codes this holds for scale spreads (largest minus smallest
scale byte in the block) up to 14 and may fail beyond; groups of zeros do not count.

FP8 in smaller blocks -> FP8 in blocks of 128 x 128: the same rule, and values of four significant bits already, so
that it is lossless only where the smaller blocks' scales are alike or their codes have low bits of zero.
"""

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from . import fp8, mxfp4
from ._arrays import given, output, rows_columns
from ._kernels import kernel
from .report import CodecError

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64

# Scale byte of a group minus scale byte of its block: 6 * 2^-13 already rounds to zero, and a block
# whose largest value is 0.5 * 2^k has the scale 2^(k-9). Beyond are only groups of zeros.
_MIN_SHIFT, _MAX_SHIFT = -13, 9


def _tables() -> tuple[np.ndarray, ...]:
    """Constants of the kernel.

    Returns:
        content: uint32 [256], of a packed byte: a bit for each magnitude code 1..7 that occurs in
            it, and above bit 8 the sum of (2 * value)^2.
        top: uint8 [256], of such a set of codes: the largest.
        unit: int64 [256], of such a set: exponent of the largest power of two that divides all values.
        pairs: uint16 [23, 256], of a shift and a packed byte: its two E4M3 codes.
        e4m3: float64 [127], values of the E4M3 codes.
        magnitudes: float64 [8], values of the E2M1 codes.
        bits: mxfp4.VALUES.
    """
    magnitudes, e4m3 = mxfp4.MAGNITUDES, fp8.MAGNITUDES
    byte = np.arange(256)
    low, high = byte & 7, (byte >> 4) & 7
    squares = (4 * magnitudes**2).astype(u32)
    content = ((1 << low | 1 << high) & 0xFE).astype(u32) | (squares[low] + squares[high]) << 8
    top = np.array([int(b).bit_length() - 1 if b else 0 for b in byte], u8)
    divisor = np.array([99, -1, 0, -1, 1, 0, 2, 1])  # 0.5 = 2^-1, 1 = 2^0, 1.5 = 3 * 2^-1, ...
    unit = np.array([min(divisor[c] for c in range(8) if b >> c & 1 or c == 0) for b in byte])

    wanted = np.ldexp(magnitudes, np.arange(_MIN_SHIFT, _MAX_SHIFT + 1)[:, None])
    borders = (e4m3[1:] + e4m3[:-1]) / 2
    below, above = np.searchsorted(borders, wanted), np.searchsorted(borders, wanted, side="right")
    codes = np.where(below % 2 == 0, below, above)
    codes = np.concatenate([codes, codes | 0x80], axis=1)
    pairs = (codes[:, byte & 15] | codes[:, byte >> 4] << 8).astype(u16)
    return content, top, unit.astype(np.int64), pairs, e4m3, magnitudes, mxfp4.VALUES


_TABLES = _tables()
_NO_SPREADS = (0,) * 16


@dataclass(frozen=True)
class Certificate:
    """What recoding to FP8 did, block by block of 128 x 128; add stripes up with `+`.

    Attributes:
        blocks: All blocks.
        exact: Blocks in which every value is reproduced.
        spread: Largest difference of scale bytes within a block, groups of zeros not counted.
        spreads: Blocks by that difference: 0, 1, ... 14, and 15 or more.
        first_failing_block: (block row, block column) of the first block that is not exact.
        rounded_values: Values that changed.
        max_abs_error: Largest |new - old|.
        sum_sq_error: Sum of (new - old)^2.
        sum_sq: Sum of old^2.
    """

    blocks: int = 0
    exact: int = 0
    spread: int = 0
    spreads: tuple[int, ...] = _NO_SPREADS
    first_failing_block: tuple[int, int] | None = None
    rounded_values: int = 0
    max_abs_error: float = 0.0
    sum_sq_error: float = 0.0
    sum_sq: float = 0.0

    @property
    def lossless(self) -> bool:
        """Every block is exact."""
        return self.exact == self.blocks

    @property
    def relative_rms_error(self) -> float:
        """sqrt(sum_sq_error / sum_sq); 0 where nothing changed."""
        return sqrt(self.sum_sq_error / self.sum_sq) if self.sum_sq_error else 0.0

    def shifted(self, rows: int) -> "Certificate":
        """The same for a tensor in which the stripe starts at row `rows`, a multiple of 128."""
        if self.first_failing_block is None:
            return self
        row, column = self.first_failing_block
        return replace(self, first_failing_block=(row + rows // fp8.BLOCK, column))

    def __add__(self, other: "Certificate") -> "Certificate":
        return Certificate(
            blocks=self.blocks + other.blocks,
            exact=self.exact + other.exact,
            spread=max(self.spread, other.spread),
            spreads=tuple(a + b for a, b in zip(self.spreads, other.spreads, strict=True)),
            first_failing_block=self.first_failing_block or other.first_failing_block,
            rounded_values=self.rounded_values + other.rounded_values,
            max_abs_error=max(self.max_abs_error, other.max_abs_error),
            sum_sq_error=self.sum_sq_error + other.sum_sq_error,
            sum_sq=self.sum_sq + other.sum_sq,
        )


def mxfp4_to_fp8(
    packed: np.ndarray,
    scale: np.ndarray,
    out_codes: np.ndarray,
    out_scale: np.ndarray,
    allow_lossy: bool = False,
) -> Certificate:
    """Recode MXFP4 as FP8 with E8M0 scales of 128 x 128 blocks.

    A block that is not exact is rounded to the nearest codes if `allow_lossy`; otherwise it is
    filled with NaN codes (0x7F), so that output whose certificate was ignored cannot pass for
    weights. The certificate is the same either way.

    Args:
        packed: uint8 [R, K/2].
        scale: uint8 [R, K/32].
        out_codes: uint8 [R, K], overwritten.
        out_scale: uint8 [ceil(R/128), ceil(K/128)], overwritten.
        allow_lossy: Round blocks that are not exact.

    Raises:
        CodecError: A scale byte above 252.
    """
    rows, half = rows_columns("packed", packed)
    packed = given("packed", packed, u8, (rows, half))
    scale = given("scale", scale, u8, mxfp4.scale_shape(rows, 2 * half))
    output("out_codes", out_codes, u8, (rows, 2 * half))
    output("out_scale", out_scale, u8, fp8.scale_shape(rows, 2 * half))
    if (problem := mxfp4.first_problem(packed, scale)) is not None:
        raise CodecError(problem)
    counts, spreads, errors = np.zeros(4, np.int64), np.zeros(256, np.int64), np.zeros(3)
    counts[1:3] = -1
    _recode(packed, scale, allow_lossy, _TABLES, out_codes.view(u16), out_scale, counts, spreads, errors)
    exact, failing_row, failing_column, rounded = counts.tolist()
    largest, sum_sq_error, sum_sq = errors.tolist()
    return Certificate(
        blocks=out_scale.size,
        exact=exact,
        spread=int(np.flatnonzero(spreads).max(initial=0)),
        spreads=tuple(np.append(spreads[:15], spreads[15:].sum()).tolist()),
        first_failing_block=None if failing_row < 0 else (failing_row, failing_column),
        rounded_values=rounded,
        max_abs_error=largest,
        sum_sq_error=sum_sq_error,
        sum_sq=sum_sq,
    )


@dataclass(frozen=True)
class Regrouped:
    """The way from FP8 in small blocks, with E8M0 scales, to FP8 in blocks of 128 x 128.

    Attributes:
        blocks: the small ones; 128 is a multiple of both sides.
    """

    blocks: fp8.Blocks

    def __call__(
        self,
        codes: np.ndarray,
        scale: np.ndarray,
        out_codes: np.ndarray,
        out_scale: np.ndarray,
        allow_lossy: bool = False,
    ) -> Certificate:
        """Recode a tensor or a stripe of it; blocks that are not exact are treated as by `mxfp4_to_fp8`.

        Args:
            codes: uint8 [R, K].
            scale: uint8 [ceil(R/high), ceil(K/wide)].
            out_codes: uint8 [R, K], overwritten.
            out_scale: uint8 [ceil(R/128), ceil(K/128)], overwritten.
            allow_lossy: Round blocks that are not exact.

        Raises:
            CodecError: An illegal scale or a NaN code.
        """
        rows, columns = rows_columns("codes", codes)
        values = np.empty((rows, columns), u16)
        self.blocks.decode(codes, scale, values)
        stats = fp8.encode(values, None, out_codes, out_scale)
        spreads = self._spreads(codes, scale)
        failing = None
        if stats.rounded_values:
            back = np.empty_like(values)
            fp8.decode(out_codes, out_scale, back)
            wrong = _largest(back != values, fp8.BLOCK, fp8.BLOCK)
            first = np.argwhere(wrong)[0]
            failing = int(first[0]), int(first[1])
            if not allow_lossy:
                out_codes[wrong.repeat(fp8.BLOCK, 0)[:rows].repeat(fp8.BLOCK, 1)[:, :columns]] = 0x7F
        return Certificate(
            blocks=stats.blocks,
            exact=stats.fresh_exact,
            spread=int(spreads.max(initial=0)),
            spreads=tuple(np.bincount(np.minimum(spreads.reshape(-1), 15), minlength=16).tolist()),
            first_failing_block=failing,
            rounded_values=stats.rounded_values,
            max_abs_error=stats.max_abs_error,
            sum_sq_error=stats.sum_sq_error,
            sum_sq=stats.sum_sq,
        )

    def _spreads(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Of every block of 128 x 128: largest minus smallest scale byte of the small blocks that hold a value."""
        high, wide = self.blocks.high, self.blocks.wide
        held = _largest((codes & 0x7F) != 0, high, wide)
        across = fp8.BLOCK // high, fp8.BLOCK // wide
        most = _largest(np.where(held, scale, 0), *across).astype(np.int64)
        least = 255 - _largest(np.where(held, 255 - scale, 0), *across).astype(np.int64)
        return np.maximum(most - least, 0)


def _largest(values: np.ndarray, high: int, wide: int) -> np.ndarray:
    """The largest of every block of a matrix, smaller at the edges."""
    rows, columns = values.shape
    down = np.maximum.reduceat(values, np.arange(0, rows, high), axis=0) if high > 1 else values
    return np.maximum.reduceat(down, np.arange(0, columns, wide), axis=1)


@kernel()
def _recode(packed, scale, allow_lossy, tables, out, out_scale, counts, spreads, errors):
    """See `mxfp4_to_fp8`; `out` is uint16 [R, K/2], two codes at a time.

    counts: exact blocks, row and column of the first that is not, rounded values.
    spreads: blocks by spread. errors: largest, sum of squares, sum of squared values.
    """
    content, top_code, unit_of, pairs, _, _, bits = tables
    rows, groups = packed.shape[0], scale.shape[1]
    present = np.empty((128, groups), u8)
    for band in range(out_scale.shape[0]):
        first, last = band * 128, min(band * 128 + 128, rows)
        for r in range(first, last):
            for g in range(groups):
                codes, squares = u32(0), u32(0)
                for j in range(u64(16)):
                    seen = content[packed[u64(r), u64(g) * u64(16) + j]]
                    codes |= seen & u32(0xFF)
                    squares += seen >> u32(8)
                present[r - first, g] = codes
                errors[2] += np.ldexp(np.float64(squares), 2 * (np.int64(scale[r, g]) - 127) - 2)
        for b in range(out_scale.shape[1]):
            g0, g1 = b * 4, min(b * 4 + 4, groups)
            amax, low, high, unit = 0, 255, 0, 1 << 20
            for r in range(first, last):
                for g in range(g0, g1):
                    codes = present[r - first, g]
                    if codes:
                        e = np.int64(scale[r, g])
                        amax = max(amax, np.int64(bits[e, top_code[codes]]))
                        low, high = min(low, e), max(high, e)
                        unit = min(unit, e + unit_of[codes])
            # Smallest power of two with amax <= 448 * 2^k, on the bits of amax (246 at most).
            block_scale = max(((amax + 0x1F) >> 7) - 8, 3) if amax else 127
            exact = unit >= block_scale - 9
            out_scale[band, b] = block_scale
            spreads[max(high - low, 0)] += 1
            if exact:
                counts[0] += 1
            elif counts[1] < 0:
                counts[1], counts[2] = band, b
            for r in range(first, last):
                for g in range(g0, g1):
                    shift = min(max(np.int64(scale[r, g]) - block_scale, _MIN_SHIFT), _MAX_SHIFT) - _MIN_SHIFT
                    for j in range(u64(16)):
                        k = u64(g) * u64(16) + j
                        out[u64(r), k] = pairs[u64(shift), packed[u64(r), k]]
            if not exact:
                _add_errors(packed, scale, out, first, last, g0, g1, block_scale, tables, counts, errors)
                if not allow_lossy:
                    out[first:last, g0 * 16 : g1 * 16] = u16(0x7F7F)


@kernel()
def _add_errors(packed, scale, out, first, last, g0, g1, block_scale, tables, counts, errors):
    """Compare one rounded block with its source, value by value, in units of the group's scale."""
    e4m3, magnitudes = tables[4], tables[5]
    for r in range(first, last):
        for g in range(g0, g1):
            e = np.int64(scale[r, g])
            ratio = np.ldexp(1.0, block_scale - e)
            for j in range(g * 16, g * 16 + 16):
                for half in range(2):
                    old = magnitudes[(packed[r, j] >> (4 * half)) & 7]
                    new = e4m3[(out[r, j] >> (8 * half)) & 0x7F] * ratio
                    if old != new:
                        error = np.ldexp(abs(new - old), e - 127)
                        counts[3] += 1
                        errors[0] = max(errors[0], error)
                        errors[1] += error * error
