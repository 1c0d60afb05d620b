"""FP8: E4M3 codes with one scale for a block, E8M0 or float32; of 128 x 128 where nothing else is said.

Shapes: codes uint8 [R, K], scale uint8 or float32 [ceil(R/128), ceil(K/128)] (blocks at the edges may be smaller;
`Blocks` has the same for others), values uint16 [R, K] (bf16 bit patterns). With an E8M0 scale decoding is exact for
scale bytes 3..246. With a float32 scale it is defined as the product in float32, rounded to nearest even to bf16;
encoding such values with the same scale still returns the same codes, because the relative error of 2^-8 is far below
half the spacing of E4M3.

Both kinds of scale share the kernels: an E8M0 scale is the float32 power of two. Everything is
plain float32 and integer arithmetic without branches, which vectorises; torch's own conversion of
E4M3 is several times slower, and placing the code's bits in a bf16 fails for E > 134 and NaN.
"""

from dataclasses import dataclass

import numpy as np

from ._arrays import given, output, rows_columns
from ._kernels import kernel
from .report import CodecError, EncodeStats, Problem, first_bad_value

BLOCK = 128
MIN_SCALE, MAX_SCALE = 3, 246
_FIELD, _MANTISSA = np.divmod(np.arange(127), 8)
# Of the codes 0..126; 127 is NaN, and the other half the same negated (OCP 8-bit Floating Point 1.0, 5.1).
MAGNITUDES = np.ldexp(_MANTISSA / 8 + (_FIELD > 0), np.maximum(_FIELD, 1) - 7)

u8, u16, u32, u64, i32, f32 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.float32
# Sums that only feed a report may be reordered, so that they vectorise.
_SUMS = {"reassoc", "contract", "nsz"}
# What the kernels do with a block of the band at hand.
SKIP, FIT, ROUND = 0, 1, 2


@dataclass(frozen=True)
class Blocks:
    """FP8 with one scale for a block of `high` rows and `wide` columns, both powers of two.

    Its functions are those of an encoding's module; stripes start at multiples of `high` rows.
    """

    high: int = BLOCK
    wide: int = BLOCK

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scale of a weight [rows, columns]."""
        return -(-rows // self.high), -(-columns // self.wide)

    def first_problem(self, codes: np.ndarray, scale: np.ndarray) -> Problem | None:
        """The first illegal scale or else the first NaN code (0x7F, 0xFF), if any.

        A float32 scale s is legal if the smallest code, 2^-9 * s, is a normal bf16 and the largest,
        448 * s, a finite one.
        """
        rows, columns = rows_columns("codes", codes)
        problem = self.scale_problem(self._given_scale(scale, rows, columns))
        if problem is not None:
            return problem
        bad = np.flatnonzero((codes & 0x7F) == 0x7F)
        if bad.size == 0:
            return None
        row, column = divmod(int(bad[0]), columns)
        seen = int(codes[row, column])
        return Problem(row, column, f"FP8 code is 0x{seen:02X} (NaN); only finite codes are legal")

    def decode(self, codes: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
        """Decode into bf16; exact with E8M0 scales, one rounding with float32 scales.

        Args:
            codes: uint8 [R, K].
            scale: uint8 or float32 [ceil(R/high), ceil(K/wide)].
            out: uint16 [R, K], overwritten (also where the codes turn out to be illegal).

        Raises:
            CodecError: An illegal scale or a NaN code.
        """
        rows, columns = rows_columns("codes", codes)
        codes = given("codes", codes, u8, (rows, columns))
        scale = self._given_scale(scale, rows, columns)
        output("out", out, u16, (rows, columns))
        problem = self.scale_problem(scale)
        if problem is None and _decode(codes, as_float32(scale), out, u64(self.high), u64(self.wide)) == 0x7F:
            problem = self.first_problem(codes, scale)
        if problem is not None:
            raise CodecError(problem)

    def encode(
        self, values: np.ndarray, like_scale: np.ndarray | None, out: np.ndarray, out_scale: np.ndarray
    ) -> EncodeStats:
        """Encode bf16; keep a block's source scale where it reproduces every value bit for bit.

        Elsewhere the scale is the smallest power of two with amax <= 448 * 2^k, within 3..246 as an
        E8M0 byte (127 for a block of zeros), and values round to the nearest code, ties to even,
        saturating at 448.

        Args:
            values: uint16 [R, K] bf16 bit patterns.
            like_scale: The source's scale, of the type of out_scale, or None for fresh scales everywhere.
            out: uint8 [R, K], overwritten.
            out_scale: uint8 (E8M0) or float32 [ceil(R/high), ceil(K/wide)], overwritten.

        Raises:
            CodecError: A NaN or infinite value, or an illegal source scale.
        """
        rows, columns = rows_columns("values", values)
        values = given("values", values, u16, (rows, columns))
        output("out", out, u8, (rows, columns))
        output("out_scale", out_scale, out_scale.dtype.type, self.scale_shape(rows, columns))
        chosen = np.zeros(out_scale.shape, f32)
        if like_scale is not None:
            like_scale = given("like_scale", like_scale, out_scale.dtype.type, out_scale.shape)
            if (problem := self.scale_problem(self._given_scale(like_scale, rows, columns))) is not None:
                raise CodecError(problem)
            np.copyto(chosen, as_float32(like_scale))
        totals = np.zeros(6)
        if not _encode(values, like_scale is not None, out, chosen, totals, self.high, u64(self.wide)):
            problem = first_bad_value(values)
            assert problem is not None
            raise CodecError(problem)
        np.copyto(out_scale, chosen if out_scale.dtype == f32 else (chosen.view(u32) >> 23).astype(u8))
        kept, fresh_exact, rounded, max_error, sum_sq_error, sum_sq = totals.tolist()
        return EncodeStats(
            blocks=out_scale.size,
            kept=int(kept),
            fresh=out_scale.size - int(kept),
            fresh_exact=int(fresh_exact),
            rounded_values=int(rounded),
            max_abs_error=max_error,
            sum_sq_error=sum_sq_error,
            sum_sq=sum_sq,
        )

    def scale_problem(self, scale: np.ndarray) -> Problem | None:
        """The first illegal scale, if any; see `first_problem`."""
        if scale.dtype == f32:
            with np.errstate(all="ignore"):
                # 0x7F7F8000 is where rounding to bf16 reaches infinity; NaN compares false throughout.
                largest = f32(448) * scale
                legal = (f32(2.0**-9) * scale >= f32(2.0**-126)) & (largest < u32(0x7F7F8000).view(f32))
            rule = "legal are finite s > 0 with 2^-9 * s a normal bf16 and 448 * s a finite one"
        else:
            legal = (scale >= MIN_SCALE) & (scale <= MAX_SCALE)
            rule = f"legal are {MIN_SCALE}..{MAX_SCALE}"
        if legal.all():
            return None
        row, column = divmod(int(np.argmin(legal)), scale.shape[1])
        kind = "scale" if scale.dtype == f32 else "scale byte"
        return Problem(row * self.high, column * self.wide, f"FP8 {kind} is {scale[row, column]}; {rule}")

    def _given_scale(self, scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
        dtype = f32 if scale.dtype == f32 else u8
        return given("scale", scale, dtype, self.scale_shape(rows, columns))


def as_float32(scale: np.ndarray) -> np.ndarray:
    """Legal scales as float32: an E8M0 byte is a float32 exponent field."""
    return scale if scale.dtype == f32 else (scale.astype(u32) << 23).view(f32)


_TILES = Blocks()
scale_shape, scale_problem, first_problem = _TILES.scale_shape, _TILES.scale_problem, _TILES.first_problem
decode, encode = _TILES.decode, _TILES.encode


@kernel()
def _decode(codes, scale, out, high, wide):
    """Decode; returns the largest magnitude code met (0x7F: a NaN)."""
    columns = u64(codes.shape[1])
    largest = u8(0)
    for r in range(u64(codes.shape[0])):
        band = r // high
        for b in range(u64(scale.shape[1])):
            s = scale[band, b]
            for k in range(b * wide, min((b + u64(1)) * wide, columns)):
                code = u8(codes[r, k])
                m = i32(code & u8(0x7F))
                largest = max(largest, u8(m))
                # Normal codes: the code's bits placed in a float32. Subnormal ones: m * 2^-9.
                placed = np.int32(i32(m << i32(20)) + i32(120 << 23)).view(f32)
                v = f32(m) * f32(2.0**-9) if m < i32(8) else placed
                p = np.float32(v * s).view(u32)
                rounded = u32(u32(p + u32(0x7FFF) + ((p >> u32(16)) & u32(1))) >> u32(16))
                out[r, k] = u16(u16(rounded) | u16(u16(code & u8(0x80)) << u16(8)))
    return largest


@kernel()
def _fit_row(values, r, scale, todo, misfit, out, wide):
    """Codes of row r in the blocks to FIT, whose scale is a power of two from 2^-117 on.

    Sets misfit where a value is off the grid. Integers only: `normal` counts bf16 steps from where
    exponent field 0 of the codes would begin, `small` from the smallest code; the seven subnormal
    codes lie at 0, 128, 192, 256, 288, 320, 352.
    """
    columns = u64(values.shape[1])
    for b in range(u64(len(scale))):
        if todo[b] != FIT:
            continue
        e = u16(np.float32(scale[b]).view(u32) >> u32(23))
        start, smallest = u16((e - u16(7)) << u16(7)), u16((e - u16(9)) << u16(7))
        missed = u16(0)
        for k in range(b * wide, min((b + u64(1)) * wide, columns)):
            x = u16(values[r, k])
            a = u16(x & u16(0x7FFF))
            normal = u16(a - start)
            code = u16(normal >> u16(4))
            off = u16(1) if code > u16(0x7E) else u16(normal & u16(15))
            small = u16(a - smallest)
            below4 = small < u16(256)
            subnormal = u16(small >> u16(6)) if below4 else u16(u16(small >> u16(5)) - u16(4))
            rest = u16(small & u16(63)) if below4 else u16(small & u16(31))
            rest = u16(1) if subnormal == u16(1) else rest
            subnormal = u16(1) if small == u16(0) else subnormal
            tiny = small < u16(384)
            code = subnormal if tiny else code
            off = rest if tiny else off
            code = u16(0) if a == u16(0) else code
            off = u16(0) if a == u16(0) else off
            missed |= off
            out[r, k] = u8(code | u16(u16(x >> u16(8)) & u16(0x80)))
        misfit[b] |= missed


@kernel()
def _round_row(values, r, scale, todo, misfit, out, wide):
    """Nearest codes of row r in the blocks to ROUND; sets misfit where one does not decode to itself."""
    columns = u64(values.shape[1])
    for b in range(u64(len(scale))):
        if todo[b] != ROUND:
            continue
        s = scale[b]
        inverse = f32(1) / s
        missed = u32(0)
        for k in range(b * wide, min((b + u64(1)) * wide, columns)):
            x = u16(values[r, k])
            v = np.uint32(u32(x & u16(0x7FFF)) << u32(16))
            y = np.float32(v.view(f32) * inverse)
            bits = y.view(u32)
            # Normal codes: keep three mantissa bits, ties to even; 448 is 0x43E00000.
            near = u32(u32(bits + u32(0x7FFFF) + ((bits >> u32(20)) & u32(1))) >> u32(20))
            near = min(near, u32(0x43E))
            # Subnormal codes, below 2^-6: adding 2^14 rounds to a multiple of 2^-9, in the low bits.
            lifted = np.float32(y + f32(16384))
            tiny = near < u32(0x3C8)
            code = lifted.view(u32) if tiny else u32(near - u32(120 << 3))
            q = np.float32(lifted - f32(16384)) if tiny else np.uint32(near << u32(20)).view(f32)
            # q * s rounds to v iff it is within half a bf16 step, for odd v strictly.
            apart = u32(u32(np.float32(q * s).view(u32) - v) + u32(0x8000))
            odd = u32(x & u16(1))
            missed |= u32(1) if u32(apart - odd) > u32(u32(0x10000) - odd - odd) else u32(0)
            out[r, k] = u8(u16(code) | u16(u16(x >> u16(8)) & u16(0x80)))
        misfit[b] |= missed


@kernel()
def _largest_row(values, r, todo, top, wide):
    """Raise top[b] to the largest magnitude bits of row r in the blocks to ROUND."""
    columns = u64(values.shape[1])
    for b in range(u64(len(todo))):
        if todo[b] == ROUND:
            largest = top[b]
            for k in range(b * wide, min((b + u64(1)) * wide, columns)):
                largest = max(largest, u16(values[r, k] & u16(0x7FFF)))
            top[b] = largest


@kernel(fastmath=_SUMS)
def _sum_sq_row(values, r):
    total = 0.0
    for k in range(u64(values.shape[1])):
        v = np.float64(np.uint32(u32(values[r, k]) << u32(16)).view(f32))
        total += v * v
    return total


@kernel(fastmath=_SUMS)
def _add_errors_row(values, r, scale, misfit, codes, totals, wide):
    """Errors of row r in the blocks that misfit under a power of two, whose decoding is exact."""
    columns = u64(values.shape[1])
    for b in range(u64(len(scale))):
        if misfit[b] == u32(0):
            continue
        s = scale[b]
        count, largest, total = u32(0), u32(0), 0.0
        for k in range(b * wide, min((b + u64(1)) * wide, columns)):
            v = np.uint32(u32(values[r, k] & u16(0x7FFF)) << u32(16)).view(f32)
            m = i32(codes[r, k] & u8(0x7F))
            placed = np.int32(i32(m << i32(20)) + i32(120 << 23)).view(f32)
            q = (f32(m) * f32(2.0**-9) if m < i32(8) else placed) * s
            error = np.float32(abs(np.float32(v - q)))  # exact, as q is next to v
            count = u32(count + u32(1)) if error > f32(0) else count
            largest = max(largest, error.view(u32))  # as integers: maxima of floats do not vectorise
            total += np.float64(error) * np.float64(error)
        totals[2] += count
        totals[3] = max(totals[3], np.float64(np.uint32(largest).view(f32)))
        totals[4] += total


@kernel()
def _encode(values, like, out, scales, totals, high, wide):
    """Encode; `scales` holds the source's scales if `like`. False on a NaN or infinite value.

    Row by row across all blocks of a band of `high` rows: going block by block would jump by a whole
    row between short pieces and miss the cache. A block is left alone once it has misfitted.
    totals: kept, fresh_exact, rounded values, largest error, sum of squared errors, of squares.
    """
    blocks = scales.shape[1]
    todo, misfit, top = np.empty(blocks, u8), np.empty(blocks, u32), np.empty(blocks, u16)
    for band in range(scales.shape[0]):
        scale = scales[band]
        first, last = band * high, min(band * high + high, values.shape[0])
        misfit[:] = u32(0) if like else u32(1)
        if like:
            for b in range(blocks):
                bits = np.float32(scale[b]).view(u32)
                power = bits & u32(0x7FFFFF) == u32(0) and bits >= u32(10 << 23)
                todo[b] = FIT if power else ROUND
        for r in range(u64(first), u64(last)):
            if like:
                _fit_row(values, r, scale, todo, misfit, out, wide)
                _round_row(values, r, scale, todo, misfit, out, wide)
                for b in range(blocks):
                    if misfit[b]:
                        todo[b] = SKIP
        kept = (misfit == 0).sum()
        totals[0] += kept
        if kept == blocks:
            continue

        # Fresh scales for the others.
        for b in range(blocks):
            todo[b] = ROUND if misfit[b] else SKIP
        top[:] = u16(0)
        for r in range(u64(first), u64(last)):
            _largest_row(values, r, todo, top, wide)
        for b in range(blocks):
            if todo[b] == ROUND:
                amax = np.int64(top[b])
                if amax >= 0x7F80:
                    return False
                # Smallest power of two with amax <= 448 * 2^k, on the bits of amax.
                e = min(max(((amax + 0x1F) >> 7) - 8, 3), 246) if amax else 127
                scale[b] = np.uint32(u32(e) << u32(23)).view(f32)
        misfit[:] = u32(0)
        for r in range(u64(first), u64(last)):
            _round_row(values, r, scale, todo, misfit, out, wide)
            _add_errors_row(values, r, scale, misfit, out, totals, wide)
            totals[5] += _sum_sq_row(values, r)
        totals[1] += ((todo == ROUND) & (misfit == 0)).sum()
    return True
