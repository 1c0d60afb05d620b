"""The codecs on torch tensors, for a GPU: what `fp8` and `mxfp4` compute, byte for byte, in few passes over memory.

Everything lies on the tensors' device. Shapes and rules are those of `fp8` and `mxfp4`; E8M0 scales are uint8. Only
types are used that CUDA computes with: int16 and int32 for bits, bfloat16 for products, float8_e4m3fn to convert.

Bytes that pass through memory a value, beside scales, and the least (inputs read and outputs written once):

| operation | passes | bytes | least |
|---|---|---|---|
| decode FP8 | convert, multiply | 7 | 3 |
| decode MXFP4 | widen, look up, multiply | 10.5 | 2.5 |
| `illegal`, FP8 | mask, compare, any | 5 | 1 |
| encode FP8, scales kept | multiply, clamp, convert; decode, compare, any | 24 | 3 |
| encode MXFP4, scales kept | multiply, magnitude, search, narrow, sign, join, pack; decode, compare, any | 40 | 2.5 |

A GPU's memory moves 2 to 5 TB/s, the bus to the host 0.02 to 0.06, over which a value takes 0.5 to 1 byte: each of
these takes a fraction of the time of the copy that it serves, so none has a kernel of its own.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import fp8, mxfp4
from .report import EncodeStats

_TILE, _GROUP = 128, 32
_LARGEST = 448.0  # of E4M3
_OVERFLOW = float.fromhex("0x1.ffp127")  # rounds to infinity in bf16
_NOT_FINITE = 0x7F80  # bf16 magnitudes from here on
# The two values of every packed byte at scale 1, as the 32 bits of two bf16; and the borders of `mxfp4` at scale 1.
_CODES = np.concatenate([mxfp4.VALUES[127], mxfp4.VALUES[127] | 0x8000]).astype(np.uint32)
_PAIRS = (_CODES[np.arange(256) & 15] | _CODES[np.arange(256) >> 4] << 16).view(np.int32)
_BORDERS = (mxfp4.BORDERS[127].astype(np.uint32) << 16).view(np.float32)


def as_tensor(stripe: np.ndarray) -> Tensor:
    """Values as torch sees them, over the same memory; uint16 are bf16 bit patterns."""
    tensor = torch.from_numpy(stripe)
    return tensor.view(torch.bfloat16) if stripe.dtype == np.uint16 else tensor


def illegal(encoding: str, codes: Tensor, scale: Tensor) -> Tensor:
    """Whether anything is illegal, a 0-d bool on the device: what `first_problem` of the codec would find.

    Args:
        encoding: as in `CODECS`.
        codes: uint8 [R, K], or [R, K/2] of MXFP4.
        scale: uint8 or float32.
    """
    if encoding == "mxfp4":
        return (scale > mxfp4.MAX_SCALE).any()
    if scale.dtype == torch.float32:
        legal = (scale * 2.0**-9 >= 2.0**-126) & (scale * _LARGEST < _OVERFLOW)
    else:
        legal = (scale >= fp8.MIN_SCALE) & (scale <= fp8.MAX_SCALE)
    return ~legal.all() | ((codes & 0x7F) == 0x7F).any()


def decode(encoding: str, codes: Tensor, scale: Tensor) -> Tensor:
    """Legal codes and scales to bf16 [R, K], without waiting for the device; arguments as of `illegal`."""
    if encoding == "mxfp4":
        table = torch.tensor(_PAIRS).to(codes.device, non_blocking=True)
        pairs = table.index_select(0, codes.flatten().to(torch.int32))
        values = pairs.view(torch.bfloat16).view(*scale.shape, _GROUP)
        # A product of bf16 and float32 is one of float32, rounded once where it is stored.
        return values.mul_(as_float32(scale).unsqueeze(-1)).view(len(codes), -1)
    return _by_tile(codes.view(torch.float8_e4m3fn).to(torch.bfloat16), as_float32(scale))


def encode(
    encoding: str, values: Tensor, like_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, EncodeStats] | None:
    """Encode bf16, keeping a block's source scale where it reproduces every value; see `fp8.encode`, `mxfp4.encode`.

    Waits for the device once, and a second time where blocks get fresh scales.

    Args:
        encoding: as in `CODECS`; scales of `fp8_f32` are float32.
        values: bf16 [R, K].
        like_scale: the source's scale, or None for fresh scales everywhere.

    Returns:
        Codes, scale, and what it did to the values (its sums added up in another order than the codec's); None where
        a value is not finite or a source scale illegal, as the codec would say.
    """
    kept = None
    if like_scale is not None:
        codes = nearest(encoding, values, like_scale)
        kept = ~per_block(encoding, differing(encoding, values, codes, like_scale))
        blocks = kept.numel()
        refused, count = torch.stack([illegal(encoding, codes[:0], like_scale).long(), kept.sum()]).tolist()
        if refused:
            return None
        if count == blocks:
            return codes, like_scale, EncodeStats(blocks=blocks, kept=blocks)
    fresh, finite = fresh_scale(encoding, values)
    scale = fresh if kept is None or like_scale is None else torch.where(kept, like_scale, fresh)
    codes = nearest(encoding, values, scale)
    found = _statistics(encoding, values, codes, scale, kept)
    exact, rounded, number, *errors = torch.stack([*found, (~finite).double()]).tolist()
    if errors.pop():
        return None
    blocks = scale.numel()
    stats = EncodeStats(blocks, int(number), blocks - int(number), int(exact), int(rounded), *errors)
    return codes, scale, stats


def nearest(encoding: str, values: Tensor, scale: Tensor) -> Tensor:
    """The nearest codes, ties to even, saturating: bf16 [R, K] -> uint8 [R, K], or [R, K/2] of MXFP4.

    With a float32 scale that is no power of two they are right where they decode to the values, and may be
    off by one step elsewhere.
    """
    inverse = as_float32(scale).reciprocal()
    if encoding != "mxfp4":
        return _by_tile(values.clone(), inverse).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    scaled = (values.view(*scale.shape, _GROUP) * inverse.unsqueeze(-1)).to(torch.bfloat16).abs_()
    borders = torch.tensor(_BORDERS, dtype=torch.bfloat16).to(values.device, non_blocking=True)
    codes = torch.bucketize(scaled, borders, out_int32=True, right=True).to(torch.uint8).view(values.shape)
    codes |= (values.view(torch.int16) < 0).to(torch.uint8) << 3
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def differing(encoding: str, values: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Values that their codes do not give back, bit for bit: bool [R, K]."""
    return decode(encoding, codes, scale).view(torch.int16) != values.view(torch.int16)


def fresh_scale(encoding: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of every block by the released rule, and whether all values are finite (0-d bool)."""
    top = per_block(encoding, values.view(torch.int16) & 0x7FFF).to(torch.int32)
    if encoding == "mxfp4":
        least, most, carry, shift = 0, mxfp4.MAX_SCALE, 0x3F, 2
    else:
        least, most, carry, shift = fp8.MIN_SCALE, fp8.MAX_SCALE, 0x1F, 8
    byte = (((top + carry) >> 7) - shift).clamp_(least, most).masked_fill_(top == 0, 127).to(torch.uint8)
    return as_float32(byte) if encoding == "fp8_f32" else byte, (top < _NOT_FINITE).all()


def per_block(encoding: str, values: Tensor) -> Tensor:
    """The largest of every block, or whether any of it is true: [R, K] -> the shape of the scale."""
    reduce = torch.any if values.dtype == torch.bool else torch.amax
    if encoding == "mxfp4":
        return reduce(values.unflatten(1, (-1, _GROUP)), dim=2)
    rows, columns = values.shape
    if rows % _TILE or columns % _TILE:  # tiles at the edges are smaller
        values = F.pad(values, (0, -columns % _TILE, 0, -rows % _TILE))
    return reduce(values.unflatten(1, (-1, _TILE)).unflatten(0, (-1, _TILE)), dim=(1, 3))


def as_float32(scale: Tensor) -> Tensor:
    """E8M0 bytes as the powers of two that they stand for, from the bits; float32 as it is."""
    if scale.dtype == torch.float32:
        return scale
    bits = scale.to(torch.int32)
    return torch.where(bits == 0, 0x00400000, bits << 23).view(torch.float32)


def _by_tile(values: Tensor, factors: Tensor) -> Tensor:
    """Multiply bf16 [R, K] in place by a float32 factor a tile."""
    rows, columns = values.shape
    wide = factors.unsqueeze(-1).expand(-1, -1, _TILE).flatten(1)[:, :columns]  # [ceil(R/128), K]
    whole = rows // _TILE
    values[: whole * _TILE].view(whole, _TILE, columns).mul_(wide[:whole].unsqueeze(1))
    values[whole * _TILE :].mul_(wide[whole:])
    return values


def _statistics(encoding: str, values: Tensor, codes: Tensor, scale: Tensor, kept: Tensor | None) -> list[Tensor]:
    """Of `EncodeStats`, float64: fresh_exact, rounded_values, kept, max_abs_error, sum_sq_error, sum_sq."""
    wrong = differing(encoding, values, codes, scale)
    exact = ~per_block(encoding, wrong)
    fresh = torch.ones_like(exact) if kept is None else ~kept
    error = (decode(encoding, codes, scale).float() - values.float()).abs_()  # exact: neighbours
    squares = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64).square()  # [R]
    rows = fresh.any(1)
    if encoding != "mxfp4":
        rows = rows.unsqueeze(1).expand(-1, _TILE).flatten()[: len(values)]
    return [
        *((exact & fresh).sum().double(), wrong.sum().double(), (~fresh).sum().double(), error.amax().double()),
        torch.linalg.vector_norm(error, dtype=torch.float64).square(),
        squares.masked_fill(~rows, 0).sum(),
    ]
