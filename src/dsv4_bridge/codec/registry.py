"""Encodings and the ways between them, by name."""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from . import fp8, mxfp4
from .recode import Certificate, Regrouped, mxfp4_to_fp8
from .report import EncodeStats


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
