"""What a toy's tensors hold: functions of an item, a seed and rows, so that any thread may make any part.

Gaussian values are drawn in two ways. A tiny toy takes numpy's normals. At full width (6.4 G values a layer) those
cost six times the encoding that follows; there every value is one of the 65,536 quantiles of the normal distribution,
each as likely, independently for each value: 16 bits of a counter-based generator look it up as bf16. Means, spreads
and tails up to 4.3 deviations are those of normals, and no tensor is a copy of another.
"""

import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from statistics import NormalDist

import numpy as np

from ..codec import CODECS
from ..codec._kernels import kernel
from ..codec.bf16 import to_bf16
from ..spec.dtypes import DTYPES
from ..spec.encodings import ENCODINGS, TILE
from ..spec.plan import Item
from ..spec.spec import ModelSpec
from ..store.values import cuts

PAYLOADS = ("natural", "random", "extreme")
_ROWS = 1024  # rows of one generator; a multiple of 128
_SPREAD = 0.05  # of matrices

u64 = np.uint64
Halves = tuple[np.ndarray, np.ndarray]
Piece = Callable[[], np.ndarray]


def coded(item: Item, encoding: str, seed: int, payload: str, *, wide: bool) -> list[Halves]:
    """Codes and scales of one tensor, as they lie on disk, a stripe of rows each.

    Args:
        item: a matrix.
        encoding: a quantised one.
        seed: of the toy.
        payload: of `PAYLOADS`.
        wide: Gaussian values by quantiles.
    """
    natural = _natural_wide if wide else _natural
    make = {"natural": natural, "random": _random, "extreme": _extreme}[payload]
    return [
        make(encoding, (last - first, item.shape[1]), _generator(seed, item, first))
        for first, last in cuts(0, item.shape[0], _ROWS)
    ]


def plain(item: Item, encoding: str, seed: int, spec: ModelSpec, *, wide: bool) -> Iterator[Piece]:
    """What makes the values of a tensor that is not quantised, as they lie on disk, front to back."""
    if not wide or encoding == "f32" or len(item.shape) == 1:
        yield lambda: _plain(item, encoding, item.shape, _generator(seed, item), spec)
        return
    for first, last in cuts(0, item.shape[0], _ROWS):
        shape, rng = (last - first, item.shape[1]), partial(_generator, seed, item, first)
        if item.row.role == "ids":
            yield lambda shape=shape, rng=rng: _plain(item, encoding, shape, rng(), spec)
        else:
            yield lambda shape=shape, rng=rng: _quantiles(shape, rng())


def _generator(seed: int, item: Item, *more: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(item.name.encode()), *more])


def _plain(item: Item, encoding: str, shape: tuple[int, ...], rng: np.random.Generator, spec: ModelSpec) -> np.ndarray:
    if item.row.role == "ids":
        # Distinct experts for every token, as the released tables have.
        order = rng.random((shape[0], spec.n_routed_experts), dtype=np.float32).argsort(axis=1)
        return np.ascontiguousarray(order[:, : shape[1]]).astype("<i8")
    values = rng.standard_normal(shape, dtype=np.float32)
    values = 1 + 0.2 * values if item.row.role == "norm" else values * np.float32(0.5 if len(shape) == 1 else _SPREAD)
    return values.astype("<f4") if encoding == "f32" else to_bf16(values)


def _natural(encoding: str, shape: tuple[int, int], rng: np.random.Generator) -> Halves:
    codes, scale = _empty(encoding, shape)
    values = to_bf16(rng.standard_normal(shape, dtype=np.float32) * np.float32(_SPREAD))
    CODECS[encoding].encode(values, None, codes, scale)
    return codes, scale


def _natural_wide(encoding: str, shape: tuple[int, int], rng: np.random.Generator) -> Halves:
    codes, scale = _empty(encoding, shape)
    for first, last in cuts(0, shape[0], TILE):  # values that stay in a core's cache
        low, high = ENCODINGS[encoding].scale_rows(first, last)
        values = _quantiles((last - first, shape[1]), rng)
        CODECS[encoding].encode(values, None, codes[first:last], scale[low:high])
    return codes, scale


def _quantiles(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Gaussian values of deviation `_SPREAD` as bf16 bit patterns, see above."""
    values = np.empty(shape, np.uint16)
    _draw(u64(rng.bit_generator.random_raw()), _table(), values.reshape(-1))
    return values


@cache
def _table() -> np.ndarray:
    """The quantiles, bf16 bit patterns [65536]."""
    half = [NormalDist(0, _SPREAD).inv_cdf((i + 0.5) / (1 << 16)) for i in range(1 << 15)]
    lower = np.array(half, np.float32)
    return to_bf16(np.concatenate([lower, -lower[::-1]])).astype(np.uint16)


@kernel()
def _draw(key, table, out):
    """Fill flat `out` from `table` [65536]: SplitMix64 of a counter from `key` on, 16 bits an index."""
    whole = u64(out.size // 4)
    for i in range(whole + u64(1)):
        z = u64(u64(key) + (i + u64(1)) * u64(0x9E3779B97F4A7C15))
        z = u64((z ^ (z >> u64(30))) * u64(0xBF58476D1CE4E5B9))
        z = u64((z ^ (z >> u64(27))) * u64(0x94D049BB133111EB))
        z = u64(z ^ (z >> u64(31)))
        at = i * u64(4)
        if i < whole:
            out[at] = table[z & u64(0xFFFF)]
            out[at + u64(1)] = table[(z >> u64(16)) & u64(0xFFFF)]
            out[at + u64(2)] = table[(z >> u64(32)) & u64(0xFFFF)]
            out[at + u64(3)] = table[z >> u64(48)]
        else:
            for k in range(at, u64(out.size)):
                out[k] = table[z & u64(0xFFFF)]
                z = z >> u64(16)


def _random(encoding: str, shape: tuple[int, int], rng: np.random.Generator) -> Halves:
    codes, scale = _empty(encoding, shape)
    codes[...] = np.frombuffer(rng.bytes(codes.size), np.uint8).reshape(codes.shape)
    low, high = (112, 124) if encoding == "mxfp4" else (110, 122)
    exponents = rng.integers(low, high, scale.shape, dtype=np.uint8)
    scale[...] = np.exp2(exponents - 127.0) if encoding == "fp8_f32" else exponents
    if encoding != "mxfp4":
        codes[(codes & 0x7F) == 0x7F] ^= 0x55
    return codes, scale


def _extreme(encoding: str, shape: tuple[int, int], rng: np.random.Generator) -> Halves:
    codes, scale = _random(encoding, shape, rng)
    low, high = (0, 253) if encoding == "mxfp4" else (3, 247)
    exponents = rng.integers(low, high, scale.shape, dtype=np.uint8)
    if encoding == "fp8_f32":
        mantissas = 1 + rng.random(scale.shape, dtype=np.float32)
        scale[...] = np.ldexp(mantissas, exponents.clip(20, 240).astype(np.int32) - 127)
    else:
        scale[...] = exponents
    # Every fourth row holds only small codes or zeros of either sign, where a fresh scale would differ.
    if encoding == "mxfp4":
        codes[::4] &= 0x99
        codes[1::8] &= 0x88
    else:
        codes[::4] &= 0x87
        codes[1::8] &= 0x80
    return codes, scale


def _empty(encoding: str, shape: tuple[int, int]) -> Halves:
    how = ENCODINGS[encoding]
    scale = np.empty(how.scale_shape(shape), DTYPES[how.scale_dtype or "U8"].numpy)
    return np.empty(how.weight_shape(shape), np.uint8), scale
