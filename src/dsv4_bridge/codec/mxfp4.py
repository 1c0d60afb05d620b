"""MXFP4: E2M1 codes, two a byte, with one E8M0 scale for 32 values of a row.

Shapes: packed uint8 [R, K/2] (low nibble = even column), scale uint8 [R, K/32], values uint16
[R, K] (bf16 bit patterns). Decoding is exact for scale bytes 0..252 (OCP MX v1.0 formats; the
limit 252 is where 6 * 2^(E-127) still fits bf16).

Why bit arithmetic: for a scale byte E >= 2 every nonzero value is a normal bf16, and its magnitude
bits are `((E-1) << 7) + (code << 6)` for codes 2..7 and `(E-1) << 7` for code 1, so that sixteen-bit
integer lanes decode and encode without a multiplication. Casts to u16 after every operation keep
numba from widening to 64 bits, which would cost the vectoriser three quarters of its lanes.
"""

import numpy as np

from ._arrays import given, output, rows_columns
from ._kernels import kernel
from .report import CodecError, EncodeStats, Problem, first_bad_value

GROUP = 32
MAX_SCALE = 252
# Of the codes 0..7; 8..15 are the same negated (OCP Microscaling Formats 1.0, 5.3.3).
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])

u8, u16, u32, u64, f32 = np.uint8, np.uint16, np.uint32, np.uint64, np.float32
# Sums that only feed a report may be reordered, so that they vectorise.
_SUMS = {"reassoc", "contract", "nsz"}
# What the kernels do with a group of the row at hand.
SKIP, FIT, ROUND = 0, 1, 2


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """bf16 magnitude bits of the eight codes, and of the borders between them, for each E 0..252.

    Returns VALUES uint16 [253, 8] and BORDERS uint16 [253, 7]: a magnitude `a` rounds to the code
    that counts how many borders it reaches. A border is the midpoint of two neighbours, plus one
    bit where the tie belongs to the lower (even) code. All of them are exact in bf16.
    """
    exponent = np.arange(MAX_SCALE + 1)[:, None] - 127
    values = np.ldexp(MAGNITUDES, exponent).astype(f32).view(u32) >> 16
    borders = np.ldexp((MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2, exponent).astype(f32).view(u32) >> 16
    return values.astype(u16), (borders + (np.arange(7) % 2 == 0)).astype(u16)


VALUES, BORDERS = _tables()


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scale of a weight [rows, columns]; columns is a multiple of 32."""
    if columns % GROUP:
        raise ValueError(f"MXFP4 needs a multiple of {GROUP} columns, not {columns}")
    return rows, columns // GROUP


def first_problem(packed: np.ndarray, scale: np.ndarray) -> Problem | None:
    """The first scale byte above 252, if any. Every packed byte is legal."""
    rows, half = rows_columns("packed", packed)
    given("scale", scale, u8, scale_shape(rows, 2 * half))
    if scale.size == 0 or scale.max() <= MAX_SCALE:
        return None
    row, group = divmod(int(np.argmax(scale > MAX_SCALE)), scale.shape[1])
    seen = int(scale[row, group])
    return Problem(row, group * GROUP, f"MXFP4 scale byte is {seen}; legal are 0..{MAX_SCALE}")


def decode(packed: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """Decode into bf16, exactly.

    Args:
        packed: uint8 [R, K/2].
        scale: uint8 [R, K/32].
        out: uint16 [R, K], overwritten.

    Raises:
        CodecError: A scale byte above 252.
    """
    rows, half = rows_columns("packed", packed)
    packed = given("packed", packed, u8, (rows, half))
    scale = given("scale", scale, u8, scale_shape(rows, 2 * half))
    output("out", out, u16, (rows, 2 * half))
    if (problem := first_problem(packed, scale)) is not None:
        raise CodecError(problem)
    _decode(packed, scale, VALUES, out.view(u32), out)


def encode(values: np.ndarray, like_scale: np.ndarray | None, out: np.ndarray, out_scale: np.ndarray) -> EncodeStats:
    """Encode bf16; keep a group's source scale where it reproduces all 32 values bit for bit.

    Elsewhere the scale is the smallest power of two with amax <= 6 * 2^k (E = 127 for a group of
    zeros) and values round to the nearest code, ties to even, saturating at 6.

    Args:
        values: uint16 [R, K] bf16 bit patterns.
        like_scale: uint8 [R, K/32] the source's scale, or None for fresh scales everywhere.
        out: uint8 [R, K/2], overwritten.
        out_scale: uint8 [R, K/32], overwritten.

    Raises:
        CodecError: A NaN or infinite value, or a source scale byte above 252.
    """
    rows, columns = rows_columns("values", values)
    values = given("values", values, u16, (rows, columns))
    output("out", out, u8, (rows, columns // 2))
    output("out_scale", out_scale, u8, scale_shape(rows, columns))
    if like_scale is not None:
        if (problem := first_problem(out, like_scale)) is not None:
            raise CodecError(problem)
        np.copyto(out_scale, like_scale)
    totals = np.zeros(6)
    if not _encode(values, like_scale is not None, VALUES, BORDERS, out, out_scale, totals):
        problem = first_bad_value(values)
        assert problem is not None
        raise CodecError(problem)
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


@kernel()
def _decode(packed, scale, values, out32, out):
    # Two loops over a row that stays in cache: spread the nibbles to sixteen-bit lanes in place,
    # then turn the lanes into bf16 group by group.
    for r in range(u64(packed.shape[0])):
        for j in range(u64(packed.shape[1])):
            byte = u32(packed[r, j])
            out32[r, j] = u32((byte & u32(0x0F)) | ((byte & u32(0xF0)) << u32(12)))
        for g in range(u64(scale.shape[1])):
            e = u64(scale[r, g])
            k = g * u64(32)
            if e >= u64(2):
                base = u16((u16(e) - u16(1)) << u16(7))
                for j in range(u64(32)):
                    x = u16(out[r, k + j])
                    code = u16(x & u16(7))
                    bits = u16(u16(code << u16(6)) + base)
                    bits = base if code == u16(1) else bits
                    bits = u16(0) if code == u16(0) else bits
                    out[r, k + j] = u16(bits | u16(u16(x & u16(8)) << u16(12)))
            else:  # bf16 subnormals among the values
                for j in range(u64(32)):
                    x = u16(out[r, k + j])
                    out[r, k + j] = u16(values[e, x & u16(7)] | u16(u16(x & u16(8)) << u16(12)))


@kernel()
def _fit_row(values, r, scale, todo, misfit, codes):
    """Codes of row r in the groups to FIT (scale byte >= 2); sets misfit where a value is off the grid."""
    for g in range(u64(len(todo))):
        if todo[g] != FIT:
            continue
        base = u16((u16(scale[r, g]) - u16(1)) << u16(7))
        missed = u16(0)
        for k in range(g * u64(32), g * u64(32) + u64(32)):
            x = u16(values[r, k])
            a = u16(x & u16(0x7FFF))
            above = u16(a - base)  # 0 is code 1; 64 (0.75) is no code; n * 64 is code n for n = 2..7
            code = u16(above >> u16(6))
            off = u16(u16(above & u16(63)) | u16(code & u16(0xFFF8)))
            off = u16(1) if code == u16(1) else off
            code = u16(1) if above == u16(0) else code
            off = u16(0) if a == u16(0) else off
            code = u16(0) if a == u16(0) else code
            codes[k] = u16(code | u16(u16(x >> u16(12)) & u16(8)))
            missed |= off
        misfit[g] |= missed


@kernel()
def _round_row(values, r, scale, grid, borders, todo, misfit, codes, rounded):
    """Nearest codes of row r in the groups to ROUND, and their bf16 magnitudes in `rounded`.

    Sets misfit where a value does not decode to itself.
    """
    for g in range(u64(len(todo))):
        if todo[g] != ROUND:
            continue
        e = u64(scale[r, g])
        b0, b1, b2, b3 = borders[e, 0], borders[e, 1], borders[e, 2], borders[e, 3]
        b4, b5, b6 = borders[e, 4], borders[e, 5], borders[e, 6]
        v1, v2, v3, v4 = grid[e, 1], grid[e, 2], grid[e, 3], grid[e, 4]
        v5, v6, v7 = grid[e, 5], grid[e, 6], grid[e, 7]
        missed = u16(0)
        for k in range(g * u64(32), g * u64(32) + u64(32)):
            x = u16(values[r, k])
            a = u16(x & u16(0x7FFF))
            code, y = u16(0), u16(0)
            code, y = (u16(1), v1) if a >= b0 else (code, y)
            code, y = (u16(2), v2) if a >= b1 else (code, y)
            code, y = (u16(3), v3) if a >= b2 else (code, y)
            code, y = (u16(4), v4) if a >= b3 else (code, y)
            code, y = (u16(5), v5) if a >= b4 else (code, y)
            code, y = (u16(6), v6) if a >= b5 else (code, y)
            code, y = (u16(7), v7) if a >= b6 else (code, y)
            codes[k] = u16(code | u16(u16(x >> u16(12)) & u16(8)))
            rounded[k] = y
            missed |= u16(y ^ a)
        misfit[g] |= missed


@kernel()
def _fresh_scale_row(values, r, todo, scale):
    """The released scale of row r's groups to ROUND; False on a NaN or infinite value."""
    columns = u64(values.shape[1])
    for g in range(u64(len(todo))):
        if todo[g] != ROUND:
            continue
        top = u16(0)
        # With a constant length LLVM would unroll this loop before it gets to vectorise it.
        for k in range(g * u64(32), min(g * u64(32) + u64(32), columns)):
            top = max(top, u16(values[r, k] & u16(0x7FFF)))
        amax = np.int64(top)
        if amax >= 0x7F80:
            return False
        # Smallest power of two with amax <= 6 * 2^k, on the bits of amax.
        scale[r, g] = min(max(((amax + 0x3F) >> 7) - 2, 0), 252) if amax else 127
    return True


@kernel(fastmath=_SUMS)
def _sum_sq_row(values, r):
    total = 0.0
    for k in range(u64(values.shape[1])):
        v = np.float64(np.uint32(u32(values[r, k]) << u32(16)).view(f32))
        total += v * v
    return total


@kernel(fastmath=_SUMS)
def _add_errors_row(values, r, misfit, rounded, totals):
    """Errors of the groups of row r that misfit."""
    for g in range(u64(len(misfit))):
        if misfit[g] == u16(0):
            continue
        count, largest, total = u32(0), u32(0), 0.0
        for k in range(g * u64(32), g * u64(32) + u64(32)):
            a = u16(values[r, k] & u16(0x7FFF))
            v = np.uint32(u32(a) << u32(16)).view(f32)
            q = np.uint32(u32(rounded[k]) << u32(16)).view(f32)
            error = np.float32(abs(np.float32(v - q)))  # exact, as q is next to v
            count = u32(count + u32(1)) if a != rounded[k] else count
            largest = max(largest, error.view(u32))  # as integers: maxima of floats do not vectorise
            total += np.float64(error) * np.float64(error)
        totals[2] += count
        totals[3] = max(totals[3], np.float64(np.uint32(largest).view(f32)))
        totals[4] += total


@kernel()
def _encode(values, like, grid, borders, out, scale, totals):
    """Encode; `scale` holds the source's scales if `like`. False on a NaN or infinite value.

    totals: kept, fresh_exact, rounded values, largest error, sum of squared errors, of squares.
    """
    groups = scale.shape[1]
    codes, rounded = np.empty(values.shape[1], u16), np.empty(values.shape[1], u16)
    pairs = codes.view(u32)
    todo, misfit = np.empty(groups, u8), np.empty(groups, u16)
    for r in range(u64(values.shape[0])):
        misfit[:] = u16(0) if like else u16(1)
        if like:
            for g in range(u64(groups)):
                todo[g] = u8(FIT) if u8(scale[r, g]) >= u8(2) else u8(ROUND)
            _fit_row(values, r, scale, todo, misfit, codes)
            _round_row(values, r, scale, grid, borders, todo, misfit, codes, rounded)
        if not misfit.any():
            totals[0] += groups
        else:
            totals[5] += _sum_sq_row(values, r)
            for g in range(groups):
                todo[g] = ROUND if misfit[g] else SKIP
                totals[0] += misfit[g] == 0
            if not _fresh_scale_row(values, r, todo, scale):
                return False
            misfit[:] = u16(0)
            _round_row(values, r, scale, grid, borders, todo, misfit, codes, rounded)
            _add_errors_row(values, r, misfit, rounded, totals)
            for g in range(groups):
                totals[1] += todo[g] == ROUND and misfit[g] == 0
        for j in range(u64(out.shape[1])):
            pair = pairs[j]
            out[r, j] = u8(pair | (pair >> u32(12)))
    return True
