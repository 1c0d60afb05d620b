"""Fresh weights that do not depend on how the model is cut."""

import hashlib
from collections.abc import Sequence

import torch

from ..mcore.model import DeepSeekV4Model
from ..mcore.weights.places import places
from ..spec.plan import Item


def initialize_weights(chunks: Sequence[DeepSeekV4Model], seed: int, std: float) -> None:
    """Fill this rank's chunks as transformers' `_init_weights` would, and hash tables at random.

    Matrices are normal with `std`; norms and the mixing's scales are 1, biases and sinks 0. Each row of a
    hash layer's table names different experts. Every released tensor has a generator of its own, seeded by
    `seed` and its name: any layout gets the same model.

    Args:
        chunks: as `build_chunks` made them.
        seed: of all.
        std: `initializer_range`.
    """
    for chunk in chunks:
        plan, here = places(chunk)
        items = {item.name: item for item in plan.items}
        with torch.no_grad():
            for name, held in here.items():
                values = _values(items[name], seed, std, chunk.spec.n_routed_experts)
                for place in held:
                    part = values[place.start : place.stop]
                    part = part if part.ndim == 1 else part[:, slice(*place.columns)]
                    place.rows(place.start, place.stop).copy_(part)


def _values(item: Item, seed: int, std: float, experts: int) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed} {item.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    shape, row = item.shape, item.row
    if row.role == "ids":
        return torch.rand(shape[0], experts, generator=generator).topk(shape[1], sorted=False).indices.int()
    if row.matrix or row.role == "table":
        return torch.randn(shape, generator=generator) * std
    return torch.full(shape, float(row.role in ("norm", "scale")))
