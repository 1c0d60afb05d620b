"""The definition of every encoding, written to be read: torch, any device, no tricks.

The fast codecs are tested equal to this. bf16 tensors are torch.bfloat16, codes and E8M0 scales
torch.uint8, float32 scales torch.float32. Shapes as in the package's table. Nothing is checked
here: legal scales and finite values are the caller's business.
"""

import torch
from torch import Tensor

MXFP4_BLOCK = (1, 32)
FP8_BLOCK = (128, 128)


def e2m1_magnitudes(device: torch.device | str = "cpu") -> Tensor:
    """Values of the E2M1 codes 0..7 (OCP MX v1.0, section 5.3.3), float64 [8]."""
    return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device=device)


def e4m3_magnitudes(device: torch.device | str = "cpu") -> Tensor:
    """Values of the E4M3 codes 0..126 (OCP OFP8 v1.0), float64 [127].

    Exponent field e and mantissa m: m/8 * 2^-6 if e is 0, else (1 + m/8) * 2^(e-7).
    """
    code = torch.arange(127, dtype=torch.int64, device=device)
    field, mantissa = code >> 3, (code & 7).double() / 8
    power = _power_of_two(field.clamp(min=1) - 7 + 127).double()
    return torch.where(field == 0, mantissa, 1 + mantissa) * power


def decode_mxfp4(packed: Tensor, scale: Tensor) -> Tensor:
    """Packed uint8 [R, K/2] and E8M0 uint8 [R, K/32] -> bf16 [R, K]."""
    codes = torch.stack([packed & 0x0F, packed >> 4], dim=-1).reshape(packed.shape[0], -1)
    return _decode(codes & 7, codes >= 8, e2m1_magnitudes(packed.device), scale, MXFP4_BLOCK)


def decode_fp8(codes: Tensor, scale: Tensor, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """E4M3 uint8 [R, K] and uint8 or float32 [ceil(R/high), ceil(K/wide)] -> bf16 [R, K]."""
    return _decode(codes & 0x7F, codes >= 0x80, e4m3_magnitudes(codes.device), scale, block)


def encode_mxfp4(values: Tensor, like_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """bf16 [R, K] -> packed uint8 [R, K/2], E8M0 uint8 [R, K/32]; see `_encode`."""
    magnitudes = e2m1_magnitudes(values.device)
    fresh = fresh_exponent(block_amax(values, MXFP4_BLOCK), 6.0, 0, 252)
    codes, negative, scale = _encode(values, magnitudes, like_scale, fresh, MXFP4_BLOCK)
    codes = codes | (negative.to(torch.uint8) << 3)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scale


def encode_fp8(
    values: Tensor,
    like_scale: Tensor | None = None,
    scale_dtype: str = "F8_E8M0",
    block: tuple[int, int] = FP8_BLOCK,
) -> tuple[Tensor, Tensor]:
    """bf16 [R, K] -> E4M3 uint8 [R, K], scale of `scale_dtype` ("F8_E8M0" or "F32"); see `_encode`."""
    magnitudes = e4m3_magnitudes(values.device)
    fresh = fresh_exponent(block_amax(values, block), 448.0, 3, 246)
    if scale_dtype == "F32":
        fresh = _power_of_two(fresh)
    codes, negative, scale = _encode(values, magnitudes, like_scale, fresh, block)
    return codes | (negative.to(torch.uint8) << 7), scale


def block_amax(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude of each block, float64; blocks at the edges may be smaller."""
    rows, columns = -(-values.shape[0] // block[0]), -(-values.shape[1] // block[1])
    padded = values.new_zeros(rows * block[0], columns * block[1])
    padded[: values.shape[0], : values.shape[1]] = values.abs()
    return padded.reshape(rows, block[0], columns, block[1]).amax(dim=(1, 3)).double()


def fresh_exponent(amax: Tensor, largest: float, lowest: int, highest: int) -> Tensor:
    """E8M0 byte of the smallest power of two with amax <= largest * 2^k, within lowest..highest.

    127 where amax is 0. frexp writes amax / largest as f * 2^k with f in [0.5, 1); only f = 0.5
    exactly, a power of two, may use k - 1.
    """
    fraction, exponent = torch.frexp(amax / largest)
    # amax has 8 significant bits, so that the float64 quotient is a power of two only if it truly is.
    exponent = exponent - (fraction == 0.5).to(exponent.dtype)
    byte = (exponent + 127).clamp(lowest, highest)
    return torch.where(amax == 0, torch.full_like(byte, 127), byte).to(torch.uint8)


def _decode(codes: Tensor, negative: Tensor, magnitudes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """(magnitude * scale) in float32, with sign, rounded once to bf16."""
    table = torch.zeros(128, dtype=torch.float32, device=codes.device)
    table[: len(magnitudes)] = magnitudes.float()
    product = table[codes.long()] * _spread(_as_float32(scale), codes.shape, block)
    return torch.where(negative, -product, product).to(torch.bfloat16)


def _encode(
    values: Tensor, magnitudes: Tensor, like_scale: Tensor | None, fresh: Tensor, block: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the magnitudes (uint8), sign bits (bool) and the scale of each block.

    A block keeps its source scale iff every value decodes to itself under it, bit for bit;
    otherwise it takes the fresh scale. Values round to the nearest code, ties to the even code,
    saturating; the sign is the sign bit, also of zero.
    """
    scale = fresh
    if like_scale is not None:
        codes, negative = _nearest(values, magnitudes, like_scale, block)
        back = _decode(codes, negative, magnitudes, like_scale, block)
        wrong = (back.view(torch.int16) != values.view(torch.int16)).to(torch.bfloat16)
        scale = torch.where(block_amax(wrong, block) == 0, like_scale, fresh)
    return *_nearest(values, magnitudes, scale, block), scale


def _nearest(values: Tensor, magnitudes: Tensor, scale: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Nearest codes: a value on the border between codes n and n+1 belongs to the even one."""
    wanted = values.double().abs() / _spread(_as_float32(scale), values.shape, block).double()
    borders = (magnitudes[1:] + magnitudes[:-1]) / 2
    below = torch.searchsorted(borders, wanted, right=False)
    above = torch.searchsorted(borders, wanted, right=True)
    codes = torch.where(below % 2 == 0, below, above)
    return codes.to(torch.uint8), values.view(torch.int16) < 0


def _as_float32(scale: Tensor) -> Tensor:
    return scale if scale.dtype == torch.float32 else _power_of_two(scale)


def _power_of_two(byte: Tensor) -> Tensor:
    """2^(E-127) as float32, from the bits: exp2 need not be exact. E = 0 is a subnormal float32."""
    byte = byte.to(torch.int32)
    return torch.where(byte == 0, 0x00400000, byte << 23).view(torch.float32)


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Repeat each scale over its block."""
    wide = scale.repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
    return wide[: shape[0], : shape[1]]
