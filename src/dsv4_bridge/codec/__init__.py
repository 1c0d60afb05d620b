"""The encodings of released DeepSeek-V4 weights, to and from bf16, byte for byte.

| encoding | payload                        | scale                                    | bf16 exact for |
|----------|--------------------------------|------------------------------------------|----------------|
| MXFP4    | E2M1, uint8 [R, K/2], 2 a byte | E8M0 uint8 [R, K/32]                     | E 0..252       |
| FP8      | E4M3, uint8 [R, K]             | E8M0 uint8 [ceil(R/128), ceil(K/128)]    | E 3..246       |
| FP8      | E4M3, uint8 [R, K]             | float32 [ceil(R/128), ceil(K/128)]       | one rounding   |
| FP8 (V4.1) | E4M3, uint8 [R, K]           | E8M0 uint8 [ceil(R/32), ceil(K/32)], or [R, ceil(K/32)] | E 3..246 |
| bf16     | uint16 bit patterns [R, K]     | none                                     |                |

E2M1 codes 0..7 are 0, .5, 1, 1.5, 2, 3, 4, 6 and 8..15 the same negated (8 is -0); the low nibble
is the even column. E4M3 goes up to 448 (0x7E); 0x7F and 0xFF are NaN and are refused. E8M0 byte E
is the scale 2^(E-127).

- `CODECS`: encoding (`spec.encodings`) -> the module that decodes and encodes it; `RECODERS`: pairs of encodings
  -> the way from one to the other that does not pass through bf16.
- `mxfp4`, `fp8`: fast `decode` and `encode` between numpy arrays. The caller supplies the output
  buffers (reusing them matters more than the kernel) and the threads (kernels release the GIL).
- `recode`: MXFP4, and FP8 of smaller blocks, to FP8 of 128 x 128, with a certificate of losslessness.
- `multiply`: weights as they are stored, multiplied by without decoding them; for one vector or a few.
- `reference`: the readable definition, in torch, that the fast codecs are held equal to.

Every function takes a whole tensor or a stripe of its rows that starts at a multiple of 128, with
the scale rows of that stripe. What cannot be represented raises `CodecError`, whose `problem` says
where and what; the caller, who knows the tensor's name, adds it.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from . import fp8, mxfp4, recode
from .recode import Certificate, Regrouped, mxfp4_to_fp8
from .report import CodecError, EncodeStats, Problem


class Codec(Protocol):
    """What the module of an encoding has; see `fp8` for shapes and errors."""

    def decode(self, codes: np.ndarray, scale: np.ndarray, out: np.ndarray, /) -> None:
        """Codes and scales to bf16 bit patterns."""

    def encode(
        self, values: np.ndarray, like_scale: np.ndarray | None, out: np.ndarray, out_scale: np.ndarray, /
    ) -> EncodeStats:
        """Values of bf16 to codes and scales, with the given scales where they fit."""
        ...


_SMALL = {"fp8_32x32": fp8.Blocks(32, 32), "fp8_1x32": fp8.Blocks(1, 32)}
CODECS: Mapping[str, Codec] = {"mxfp4": mxfp4, "fp8": fp8, "fp8_f32": fp8, "fp8_pow2": fp8, **_SMALL}
RECODERS: Mapping[tuple[str, str], Callable[..., Certificate]] = {
    ("mxfp4", "fp8"): mxfp4_to_fp8,
    **{(name, "fp8"): Regrouped(blocks) for name, blocks in _SMALL.items()},
}

__all__ = [
    "CODECS",
    "RECODERS",
    "Certificate",
    "Codec",
    "CodecError",
    "EncodeStats",
    "Problem",
    "Regrouped",
    "fp8",
    "mxfp4",
    "mxfp4_to_fp8",
    "recode",
]
