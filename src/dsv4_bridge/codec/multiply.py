"""Multiply by encoded weights as they are: y = x @ decode(codes, scale).T, without a decoded copy.

For generating text, where a weight meets one vector or a few: then the time is that of reading the weight, and FP8 is
half of bf16, MXFP4 a quarter. No decoded weight is stored, not even a tile; see `_dot` for how. From eight
vectors on arithmetic takes longer than reading, and from about a hundred on decoding once to multiply with BLAS is
quicker; the results are right for any number.

Exactness: every weight is the very number that the codec's `decode` gives (products with E8M0 scales are exact in
float32; where a float32 scale is no power of two, they are rounded to bf16 as decoding does). Sums are float32. With
K columns, n = 8 * ceil(K / 128) + 5 and u = 2^-24,

    |y - exact| <= n * u / (1 - n * u) * sum |x * w|  +  n * K * 2^-149

as no product passes through more than n roundings; the second term is what products below 2^-126 lose. The order of
the sums depends on K alone: a vector gives the same bits alone or among others, and with any number of threads.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from math import prod
from typing import NoReturn

import numpy as np

from ..errors import BridgeError
from . import CODECS, fp8, mxfp4
from ._arrays import given, output, rows_columns
from ._dot import BLOCK, LANES, WAYS, pack, side_by_side, stripe
from .report import CodecError, Problem

_PLAIN = {"bf16": np.uint16, "f32": np.float32}
_WORTH = 128 << 10  # bytes of codes: some ten microseconds, what waking a thread takes
_NO_SCALE = np.zeros((1, 1), np.float32)


@dataclass(frozen=True, eq=False)
class EncodedMatrix:
    """A weight W [o, i] as it is stored.

    Attributes:
        encoding: "mxfp4", "fp8", "fp8_f32", "fp8_pow2", "bf16" or "f32", as in `spec.encodings`.
        codes: uint8 [o, i] of FP8, uint8 [o, i/2] of MXFP4, uint16 bit patterns or float32 [o, i]; C-contiguous.
        scale: uint8 [o, i/32] of MXFP4; uint8 or float32 [ceil(o/128), ceil(i/128)] of FP8; else None.
        name: of the tensor, for errors.
    """

    encoding: str
    codes: np.ndarray
    scale: np.ndarray | None = None
    name: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of values."""
        rows, width = rows_columns("codes", self.codes)
        return rows, 2 * width if self.encoding == "mxfp4" else width

    @property
    def nbytes(self) -> int:
        """Size of codes and scale."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def multiply(self, x: np.ndarray, out: np.ndarray | None = None, threads: int = 1) -> np.ndarray:
        """X @ W.T, see the module for how exact.

        Args:
            x: float32 [t, i], C-contiguous.
            out: float32 [t, o], overwritten; new by default.
            threads: that share the rows of a weight that is worth it, the calling one among them.

        Returns:
            out.

        Raises:
            BridgeError: An illegal scale or a NaN code, as from `decode` (`CodecError` where the matrix has no name);
                `out` is then without meaning.
            ValueError: Shapes or types that do not fit, an encoding that is none of these.
        """
        tokens, (rows, columns) = rows_columns("x", x)[0], self.shape
        x = given("x", x, np.float32, (tokens, columns))
        out = np.empty((tokens, rows), np.float32) if out is None else out
        output("out", out, np.float32, (tokens, rows))
        if threads < 1:
            raise ValueError(f"{threads} threads, expected one or more")
        kind, raw, factors = self._prepared
        threads = max(1, min(threads, raw.nbytes // _WORTH))
        worst, widths = 0, tuple(side_by_side())
        for first in range(0, tokens, widths[-1]):
            count = min(widths[-1], tokens - first)
            width = next(w for w in widths if w >= count)
            packed = _aligned((-(-columns // BLOCK) * (BLOCK // LANES), width, LANES))
            pack(x, first, count, WAYS[kind].pairs, packed)
            run = partial(stripe(kind, width), raw, factors, packed, out, first, count)
            worst = max([worst, *_shared(run, rows, threads)])
        if self.scale is not None and worst >= (mxfp4.MAX_SCALE + 1 if kind == "mxfp4" else 0x7F):
            problem = (mxfp4 if kind == "mxfp4" else fp8).first_problem(self.codes, self.scale)
            assert problem is not None
            self._refuse(problem)
        return out

    def cut(self, count: int) -> "tuple[EncodedMatrix, ...]":
        """So many matrices of as many rows each, one above another; decoded where a scale belongs to two of them."""
        rows = self.shape[0] // count
        if self.scale is None or self.encoding == "mxfp4":
            scales = [None if self.scale is None else self.scale[n * rows : (n + 1) * rows] for n in range(count)]
        elif rows % fp8.BLOCK == 0 or fp8.BLOCK % rows == 0:
            scales = [self.scale[n * rows // fp8.BLOCK : -(-(n + 1) * rows // fp8.BLOCK)] for n in range(count)]
        else:
            return EncodedMatrix("f32", self.decode(), None, self.name).cut(count)
        parts = (self.codes[n * rows : (n + 1) * rows] for n in range(count))
        return tuple(EncodedMatrix(self.encoding, *part, self.name) for part in zip(parts, scales, strict=True))

    def decode(self) -> np.ndarray:
        """All of W: float32 [o, i]. Errors as of `multiply`."""
        codes = self.codes
        if self.scale is not None:
            bits = np.empty(self.shape, np.uint16)
            try:
                CODECS[self.encoding].decode(codes, self.scale, bits)
            except CodecError as error:
                self._refuse(error.problem)
            codes = bits
        return codes.copy() if codes.dtype == np.float32 else (codes.astype(np.uint32) << 16).view(np.float32)

    def _refuse(self, problem: Problem) -> NoReturn:
        raise BridgeError(f"reading {self.name} ({self.encoding}): {problem}") if self.name else CodecError(problem)

    @cached_property
    def _prepared(self) -> tuple[str, np.ndarray, np.ndarray]:
        """Kind of kernel, codes as bytes, and the scale as the kernel takes it."""
        (rows, columns), encoding = self.shape, self.encoding
        if encoding in _PLAIN:
            if self.scale is not None:
                raise ValueError(f"{encoding} has no scale")
            return encoding, given("codes", self.codes, _PLAIN[encoding], (rows, columns)).view(np.uint8), _NO_SCALE
        if encoding not in CODECS:
            raise ValueError(f"no weight is multiplied in the encoding {encoding!r}")
        if self.scale is None:
            raise ValueError(f"{encoding} needs a scale")
        raw = given("codes", self.codes, np.uint8, self.codes.shape)
        if encoding == "mxfp4":
            return encoding, raw, given("scale", self.scale, np.uint8, mxfp4.scale_shape(rows, columns))
        dtype = np.float32 if self.scale.dtype == np.float32 else np.uint8
        scale = given("scale", self.scale, dtype, fp8.scale_shape(rows, columns))
        if (problem := fp8.scale_problem(scale)) is not None:
            self._refuse(problem)
        factors = fp8.as_float32(scale)
        powers = not (factors.view(np.uint32) & 0x7FFFFF).any()
        return "fp8" if powers else "fp8_rounded", raw, factors * np.float32(256)


def multiply(
    x: np.ndarray,
    encoding: str,
    codes: np.ndarray,
    scale: np.ndarray | None = None,
    out: np.ndarray | None = None,
    threads: int = 1,
) -> np.ndarray:
    """X @ W.T, float32 [t, o]: `EncodedMatrix(encoding, codes, scale).multiply(x, out, threads)`."""
    return EncodedMatrix(encoding, codes, scale).multiply(x, out, threads)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, float32, at an address that is a multiple of 64."""
    size = prod(shape)
    buffer = np.zeros(size + 15, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    return buffer[start : start + size].reshape(shape)


def _shared(part: Callable[[int, int], int], rows: int, threads: int) -> list[int]:
    """What `part` returns for the rows from … to, cut for so many threads at multiples of 4."""
    step = max(4, -(-rows // (4 * threads)) * 4)
    cuts = [(first, min(first + step, rows)) for first in range(0, rows, step)]
    others = [_pool(threads - 1).submit(part, *cut) for cut in cuts[1:]]
    return [part(*cut) for cut in cuts[:1]] + [other.result() for other in others]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "multiply")


# A forked process has none of the threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
