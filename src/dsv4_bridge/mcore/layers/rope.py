"""Rotary position embedding: partial, interleaved, invertible, with two bases.

Window layers (ratio 0) rotate by `rotary_base`; layers with compression by
`csa_compress_rotary_base` with YaRN, for queries, window and compressed keys and the indexer alike.
YaRN here scales frequencies only: no attention factor (arXiv 2309.00071 section 3.2).
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..config import DeepSeekV4Config
from .context import Share
from .documents import Documents


@cache
def plain_frequencies(width: int, base: float) -> Tensor:
    """base^(-2i/width) for i < width/2: [width/2] float32, radians a position."""
    return 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))


@cache
def yarn_frequencies(
    width: int, base: float, factor: float, beta_fast: float, beta_slow: float, original_length: int
) -> Tensor:
    """Frequencies stretched by `factor` where a period exceeds the original length: [width/2] float32.

    Pairs that turn more than `beta_fast` times within `original_length` tokens keep their frequency,
    those that turn less than `beta_slow` times are divided by `factor`, with a linear ramp between.
    """

    def pair_of(turns: float) -> float:
        return width * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_of(beta_fast)), 0)
    high = min(math.ceil(pair_of(beta_slow)), width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    plain = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    return 1.0 / (factor * (1.0 / plain)) * stretched + plain * (1 - stretched)


def layer_frequencies(config: DeepSeekV4Config, ratio: int) -> Tensor:
    """Frequencies of a layer with compress ratio `ratio`: [qk_pos_emb_head_dim/2] float32."""
    if ratio == 0:
        return plain_frequencies(config.qk_pos_emb_head_dim, config.rotary_base)
    return yarn_frequencies(
        config.qk_pos_emb_head_dim,
        config.csa_compress_rotary_base,
        config.rotary_scaling_factor,
        config.beta_fast,
        config.beta_slow,
        config.original_max_position_embeddings,
    )


@dataclass(frozen=True)
class Rotary:
    """Turns of every position, for both kinds of layer, and where positions restart.

    Attributes:
        window: [positions…, width/2] complex64, for window layers.
        compressed: the same for layers with compression.
        documents: slices of a packed row that attend each to itself; None: whole rows.
        share: what this rank has of rows that are cut over ranks, and of their documents; None: it has all.
    """

    window: Tensor
    compressed: Tensor
    documents: Documents | None = None
    share: Share | None = None

    def of(self, ratio: int) -> Tensor:
        """The turns of a layer with compress ratio `ratio`."""
        return self.compressed if ratio else self.window


def make_rotary(
    config: DeepSeekV4Config, positions: Tensor, documents: Documents | None = None, share: Share | None = None
) -> Rotary:
    """Turns at `positions` (any shape, int64; in each of the `documents` they count from 0)."""
    return Rotary(turns(config, 0, positions), turns(config, 4, positions), documents, share)


def turns(config: DeepSeekV4Config, ratio: int, positions: Tensor) -> Tensor:
    """Cos + i sin of position times frequency: [positions…, width/2] complex64."""
    frequencies = layer_frequencies(config, ratio).to(positions.device, non_blocking=True)
    angles = positions[..., None].float() * frequencies
    return torch.complex(angles.cos(), angles.sin())
