"""Dot products of encoded rows with float32 vectors: machine code in which no decoded weight is ever stored.

`stripe` is the kernel: it goes down some rows of a matrix, a few at a time, and across them in blocks of 128 columns.
What happens to a block is written in LLVM's own vectors of 16 lanes, because no loop that numba could vectorise
gets there: the weights of 32 columns come from few instructions (below), stay in registers, and meet every token's
x while they are there. LLVM's vectors fit any machine: 512-bit registers take one, AVX2 halves it, NEON quarters it.

| kind | how 32 columns become two vectors |
|---|---|
| mxfp4, with AVX-512 | a byte is two indices into a vector of the sixteen values times the scale |
| mxfp4, otherwise | codes placed in half-precision numbers, whose subnormal ones widen without delay |
| fp8 | codes placed in half-precision numbers, which are then 2^8 too small |
| fp8_rounded | the same, rounded to bf16 as decoding does, for scales that are no power of two |
| bf16, f32 | bits shifted; as they are |

Letters: R rows that are computed at once, T tokens, K columns. All sums are float32, in an order that depends on K
alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from ._kernels import kernel
from .mxfp4 import MAGNITUDES, MAX_SCALE

LANES = 16
BLOCK = 128
u8, u32, u64, f32 = np.uint8, np.uint32, np.uint64, np.float32

_STEPS = 4  # of 32 columns, in a block
_BYTE, _WORD, _INT, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(_INT, LANES)
_SEEN = ir.VectorType(_BYTE, 64)
_CODES = [*MAGNITUDES.tolist(), *(-MAGNITUDES).tolist()]


@cache
def _features() -> str:
    """What numba compiles for, as +avx512f,+f16c and so on."""
    if config.CPU_NAME or config.CPU_FEATURES:  # type: ignore[attr-defined]
        return config.CPU_FEATURES or ""  # type: ignore[attr-defined]
    return llvm.get_host_cpu_features().flatten()


def side_by_side() -> Mapping[int, int]:
    """Vectors that are multiplied at once -> rows, so that all sums stay in registers: 32 of 16 lanes, or 16 of 8."""
    return {1: 4, 2: 4, 4: 4, 8: 2} if "+avx512f" in _features() else {1: 4, 2: 2, 4: 1}


def _all(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _load(b: Any, pointer: Any, kind: Any, alignment: int) -> Any:
    value = b.load(b.bitcast(pointer, kind.as_pointer()))
    value.align = alignment
    return value


def _lanes(b: Any, vector: Any, first: int, count: int = LANES) -> Any:
    picked = ir.Constant(ir.VectorType(_INT, count), list(range(first, first + count)))
    return b.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), picked)


def _spread(b: Any, value: Any) -> Any:
    one = b.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(_INT, 0))
    return b.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), _all(_INTS, 0))


def _pick(b: Any, table: Any, index: Any) -> Any:
    """The values of a table at the low four bits of 16 indices (AVX-512)."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _INTS])
    return b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.avx512.permvar.sf.512"), [table, index])


def _values_at_scale(b: Any) -> Any:
    """Where the sixteen values of MXFP4 lie for every E8M0 byte, float32 [256, 16]; zeros for illegal ones."""
    scale = np.ldexp(1.0, np.arange(256) - 127)[:, None] * (np.arange(256) <= MAX_SCALE)[:, None]
    values = (np.array(_CODES) * scale).astype(f32).reshape(-1).tolist()
    table = cgutils.global_constant(b, "mxfp4_values", ir.Constant(ir.ArrayType(ir.FloatType(), len(values)), values))
    table.align = 64  # type: ignore[assignment]
    return b.bitcast(table, _BYTE.as_pointer())


def _from_half(b: Any, words: Any) -> Any:
    """Bits of 16 half-precision numbers below 4 in magnitude, widened."""
    if llvm.get_process_triple().startswith("x86") and "+f16c" not in _features():
        wide = b.zext(words, _INTS)
        magnitude = b.shl(b.and_(wide, _all(_INTS, 0x7FFF)), _all(_INTS, 13))
        value = b.fmul(b.bitcast(magnitude, _FLOATS), _all(_FLOATS, 2.0**112))
        sign = b.shl(b.and_(wide, _all(_INTS, 0x8000)), _all(_INTS, 16))
        return b.bitcast(b.or_(b.bitcast(value, _INTS), sign), _FLOATS)
    return b.fpext(b.bitcast(words, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)


def _mxfp4(b: Any, pointer: Any, values: Any) -> list[Any]:
    codes = _load(b, pointer, ir.VectorType(_BYTE, LANES), 1)
    if "+avx512f" in _features():
        wide = b.zext(codes, _INTS)
        return [_pick(b, values, wide), _pick(b, values, b.lshr(wide, _all(_INTS, 4)))]
    words = ir.VectorType(_WORD, LANES)
    wide = b.zext(codes, words)
    scale = _spread(b, b.extract_element(values, ir.Constant(_INT, 2)))  # the code of 1

    def placed(magnitude: int, sign: int) -> Any:
        bits = b.and_(b.shl(wide, _all(words, magnitude)), _all(words, 0x0E00))
        bits = b.or_(bits, b.and_(b.shl(wide, _all(words, sign)), _all(words, 0x8000)))
        return b.fmul(b.fmul(_from_half(b, bits), _all(_FLOATS, 2.0**14)), scale)

    return [placed(9, 12), placed(5, 8)]


def _fp8(b: Any, pointer: Any, scale: Any) -> list[Any]:
    words = ir.VectorType(_WORD, 2 * LANES)
    wide = b.sext(_load(b, pointer, ir.VectorType(_BYTE, 2 * LANES), 1), words)
    bits = b.and_(b.shl(wide, _all(words, 7)), _all(words, 0xBFFF))
    return [b.fmul(_from_half(b, _lanes(b, bits, first)), scale) for first in (0, LANES)]


def _fp8_rounded(b: Any, pointer: Any, scale: Any) -> list[Any]:
    found = []
    for value in _fp8(b, pointer, scale):
        bits = b.bitcast(value, _INTS)
        odd = b.and_(b.lshr(bits, _all(_INTS, 16)), _all(_INTS, 1))
        up = b.add(b.add(bits, odd), _all(_INTS, 0x7FFF))
        found.append(b.bitcast(b.and_(up, _all(_INTS, 0xFFFF0000)), _FLOATS))
    return found


def _bf16(b: Any, pointer: Any, scale: Any) -> list[Any]:
    wide = b.zext(_load(b, pointer, ir.VectorType(_WORD, 2 * LANES), 1), ir.VectorType(_INT, 2 * LANES))
    bits = b.shl(wide, _all(wide.type, 16))
    return [b.bitcast(_lanes(b, bits, first), _FLOATS) for first in (0, LANES)]


def _f32(b: Any, pointer: Any, scale: Any) -> list[Any]:
    return [_load(b, b.gep(pointer, [ir.Constant(_LONG, at)]), _FLOATS, 1) for at in (0, 4 * LANES)]


@dataclass(frozen=True)
class Way:
    """How a kind of codes is multiplied.

    Attributes:
        step_bytes: that 32 columns take.
        decode: emits two vectors of 16 weights, from builder, pointer and the scale in all lanes; or, where a row has
            its own scales, all sixteen values at the scale.
        scales: in a block of 128 columns.
        own_scales: a row has its own; otherwise 128 rows share them.
        checked: whether the largest magnitude code is looked for.
        pairs: the vectors hold the even and the odd columns, not the former and the latter.
    """

    step_bytes: int
    decode: Callable[[Any, Any, Any], list[Any]]
    scales: int = 0
    own_scales: bool = False
    checked: bool = False
    pairs: bool = False


WAYS = {
    "mxfp4": Way(16, _mxfp4, scales=_STEPS, own_scales=True, pairs=True),
    "fp8": Way(32, _fp8, scales=1, checked=True),
    "fp8_rounded": Way(32, _fp8_rounded, scales=1, checked=True),
    "bf16": Way(64, _bf16),
    "f32": Way(128, _f32),
}


@intrinsic(prefer_literal=True)
def _dot(typing, kind, rows, tokens, codes, ends, end, row, blocks, x, step, scales, scale, sums, seen):
    """Add to `sums` [R * T, 16] what R rows of `codes` from `row` on give with the vectors of x, over some blocks.

    Rows beyond the last are the last again. If `end` is 1 rather than 0, `ends` [R, bytes of a block] is taken for
    codes. x and scales begin at elements `step` * T * 16 and `scale`. `seen` [64] gets the largest magnitudes of
    checked codes.
    """
    way, R, T = WAYS[kind.literal_value], rows.literal_value, tokens.literal_value
    signature = types.void(kind, rows, tokens, codes, ends, end, row, blocks, x, step, scales, scale, sums, seen)

    def emit(context, b, signature, arguments):
        end, row, blocks, step, scale = (arguments[number] for number in (5, 6, 7, 9, 11))

        def array(number: int) -> Any:
            return context.make_array(signature.args[number])(context, b, arguments[number])

        codes, ends, x, scales, sums, seen = (array(number) for number in (3, 4, 8, 10, 12, 13))

        def start(held: Any) -> Any:
            return b.bitcast(held.data, _BYTE.as_pointer())

        def long(value: int) -> ir.Constant:
            return ir.Constant(_LONG, value)

        def behind(pointer: Any, *offsets: Any) -> Any:
            for offset in offsets:
                pointer = b.gep(pointer, [offset])
            return pointer

        at_end = b.icmp_unsigned("==", end, long(1))
        height, stride = (
            b.select(at_end, one, other)
            for one, other in zip(
                cgutils.unpack_tuple(b, ends.shape, 2), cgutils.unpack_tuple(b, codes.shape, 2), strict=True
            )
        )
        first_code = b.select(at_end, start(ends), start(codes))

        def row_start(number: int) -> Any:
            wanted, last = b.add(row, long(number)), b.sub(height, long(1))
            return behind(first_code, b.mul(b.select(b.icmp_unsigned("<", wanted, last), wanted, last), stride))

        starts = [row_start(r) for r in range(R)]
        coming = [row_start(R + r) for r in range(R)]
        x_start = behind(start(x), b.mul(step, long(4 * LANES * T)))
        wide = cgutils.unpack_tuple(b, scales.shape, 2)[1]
        scale_starts = [
            behind(start(scales), b.mul(b.add(scale, b.mul(wide, long(r))), long(1 if way.own_scales else 4)))
            for r in range(R if way.own_scales else 1)
        ]
        sum_starts = [[behind(start(sums), long(4 * LANES * (r * T + t))) for t in range(T)] for r in range(R)]
        kept = [[cgutils.alloca_once_value(b, _load(b, at, _FLOATS, 4)) for at in line] for line in sum_starts]
        largest = cgutils.alloca_once_value(b, _load(b, start(seen), _SEEN, 1))
        multiply_add = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fmuladd.v{LANES}f32"
        )
        prefetch = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT]), "llvm.prefetch.p0"
        )
        values_at_scale = _values_at_scale(b) if way.own_scales else None
        read, keep, data = (ir.Constant(_INT, value) for value in (0, 3, 1))

        with cgutils.for_range(b, blocks) as loop:
            at = b.mul(loop.index, long(_STEPS * way.step_bytes))
            x_at = behind(x_start, b.mul(loop.index, long(4 * BLOCK * T)))
            for r in range(R):
                for line in range(0, _STEPS * way.step_bytes, 64):
                    # A row's end is the end of what the processor fetches ahead by itself.
                    b.call(prefetch, [behind(coming[r], at, long(line)), read, keep, data])
                    if way.checked:
                        magnitudes = b.and_(_load(b, behind(starts[r], at, long(line)), _SEEN, 1), _all(_SEEN, 0x7F))
                        old = b.load(largest)
                        b.store(b.select(b.icmp_unsigned(">", magnitudes, old), magnitudes, old), largest)
            for s in range(_STEPS):
                weights = []
                for r in range(R):
                    factor = None
                    if way.scales:
                        number = b.add(b.mul(loop.index, long(way.scales)), long(s * way.scales // _STEPS))
                        if way.own_scales:
                            byte = b.zext(b.load(behind(scale_starts[r], number)), _LONG)
                            factor = _load(b, behind(values_at_scale, b.mul(byte, long(4 * LANES))), _FLOATS, 64)
                        else:
                            factor = _spread(
                                b, _load(b, behind(scale_starts[0], b.mul(number, long(4))), ir.FloatType(), 4)
                            )
                    weights.append(way.decode(b, behind(starts[r], at, long(s * way.step_bytes)), factor))
                for half in range(2):
                    for t in range(T):
                        values = _load(b, behind(x_at, long(4 * LANES * ((2 * s + half) * T + t))), _FLOATS, 64)
                        for r in range(R):
                            b.store(b.call(multiply_add, [weights[r][half], values, b.load(kept[r][t])]), kept[r][t])

        for r in range(R):
            for t in range(T):
                pointer = b.bitcast(sum_starts[r][t], _FLOATS.as_pointer())
                b.store(b.load(kept[r][t]), pointer).align = 4
        b.store(b.load(largest), b.bitcast(start(seen), _SEEN.as_pointer())).align = 1
        return context.get_dummy_value()

    return signature, emit


@kernel()
def _copy(scale, row, out):
    """A row of E8M0 bytes into `out`; returns the largest."""
    largest = u8(0)
    for g in range(u64(scale.shape[1])):
        byte = u8(scale[row, g])
        largest = max(largest, byte)
        out[g] = byte
    return largest


@kernel()
def _total(sums):
    """Lane sums by halves."""
    for j in range(8):
        sums[j] += sums[j + 8]
    for j in range(4):
        sums[j] += sums[j + 4]
    return (sums[0] + sums[2]) + (sums[1] + sums[3])


@kernel()
def pack(x, first, count, pairs, out):
    """`count` vectors of x [t, K] from `first` on, for `stripe`: into out [ceil(K/128) * 8, T, 16] of zeros."""
    columns = u64(x.shape[1])
    for t in range(u64(count)):
        row = x[u64(first) + t]
        for s in range(columns >> u64(5)):
            for j in range(u64(16)):
                one, other = (u64(2) * j, u64(2) * j + u64(1)) if pairs else (j, j + u64(16))
                out[u64(2) * s, t, j] = row[u64(32) * s + one]
                out[u64(2) * s + u64(1), t, j] = row[u64(32) * s + other]
        for k in range(columns >> u64(5) << u64(5), columns):  # pairs come in multiples of 32
            out[k >> u64(4), t, k & u64(15)] = row[k]


@cache
def stripe(kind: str, tokens: int) -> Callable[..., int]:
    """The kernel for a kind of codes and so many tokens at once as `side_by_side` has.

    It takes codes uint8 [o, bytes of a row], the scale (uint8 [o, K/32] of mxfp4; float32 [ceil(o/128), ceil(K/128)]
    of fp8, times 2^8; any of the others), x as of `pack` at an address that is a multiple of 64, out float32 [t, o],
    the first of its rows to fill, their number, and the rows of codes from … to, the former a multiple of 4. It
    returns the largest E8M0 byte of mxfp4, magnitude code of fp8, otherwise 0.
    """
    way = WAYS[kind]
    rows, block = side_by_side()[tokens], _STEPS * way.step_bytes
    own, shared, per = way.own_scales, way.scales > 0 and not way.own_scales, way.scales
    held = u8 if own else f32

    @kernel()
    def rows_of(codes, scale, x, out, token, count, first, last):
        width = u64(codes.shape[1])
        whole = width // u64(block)
        rest = width - whole * u64(block)
        scales = np.zeros((rows, (whole + u64(1)) * u64(per)), held)
        sums, seen = np.empty((rows * tokens, 16), f32), np.zeros(64, u8)
        ends = np.zeros((rows, block), u8)
        worst = u8(0)
        for row in range(u64(first), u64(last), u64(rows)):
            if own:
                for r in range(u64(rows)):
                    worst = max(worst, _copy(scale, min(row + r, u64(last) - u64(1)), scales[r]))
            if shared:
                for b in range(u64(scale.shape[1])):
                    scales[0, b] = scale[row >> u64(7), b]
            sums[:] = f32(0)
            for r in range(u64(rows)):
                for j in range(rest):
                    ends[r, j] = codes[min(row + r, u64(last) - u64(1)), whole * u64(block) + j]
            for end in range(u64(2) if rest else u64(1)):  # written once, for it takes long to compile
                at, blocks = end * whole, u64(1) if end else whole
                scale_at, step = at * u64(per), at * u64(8)
                start = u64(0) if end else row
                _dot(kind, rows, tokens, codes, ends, end, start, blocks, x, step, scales, scale_at, sums, seen)  # type: ignore[call-arg]
            for r in range(min(u64(rows), u64(last) - row)):
                for t in range(u64(count)):
                    out[u64(token) + t, row + r] = _total(sums[r * u64(tokens) + t])
        return max(worst, seen.max())

    return rows_of
