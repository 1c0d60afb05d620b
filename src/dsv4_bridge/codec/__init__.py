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

All but the errors is loaded on first use: compiled code takes half a second to get ready, and who looks at headers
needs none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .report import CodecError, EncodeStats, Problem

if TYPE_CHECKING:
    from . import fp8, mxfp4, recode
    from .recode import Certificate, Regrouped, mxfp4_to_fp8
    from .registry import CODECS, RECODERS, Codec

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

_PLACES = {
    **dict.fromkeys(("CODECS", "RECODERS", "Codec"), "registry"),
    **dict.fromkeys(("Certificate", "Regrouped", "mxfp4_to_fp8"), "recode"),
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f".{_PLACES[name]}", __name__), name)
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
