"""The values of adapters: how they begin, what they add to a weight, and whether they fit a model."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BridgeError
from ..spec.lora import MERGEABLE, Lora, Target, targets
from ..spec.spec import ModelSpec


class Adapter(NamedTuple):
    """The whole tensors of one adapter: A [rank, in], B [out, rank], with DoRA a magnitude [out]."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Adapters:
    """All adapters of a model.

    Attributes:
        lora: their settings.
        values: name of the target -> adapter.
        own: name -> rank and alpha of those that have others than `lora`.
        whole: name of a weight -> [out, in], what stands in its place altogether (peft's modules_to_save).
    """

    lora: Lora
    values: Mapping[str, Adapter]
    own: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    def rank(self, name: str) -> int:
        """Inner width of one adapter."""
        return self.own[name][0] if name in self.own else self.lora.rank

    def alpha(self, name: str) -> float:
        """Of one adapter; rsLoRA's is alpha * sqrt(rank)."""
        return self.own[name][1] if name in self.own else self.lora.alpha

    def scale(self, name: str) -> float:
        """The factor s of one adapter."""
        return self.alpha(name) / self.rank(name)


def initial_a(name: str, rank: int, columns: int, seed: int) -> Tensor:
    """A [rank, columns] float32 as peft begins it: Kaiming-uniform with a = sqrt(5), so +-1/sqrt(columns).

    It depends on seed and name alone, not on the layout of the ranks.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    bound = columns**-0.5
    return torch.rand((rank, columns), generator=generator).mul_(2 * bound).sub_(bound)


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Squared norms of the rows of W + s B A, float32 [out], without making it.

    W [out, in], A [rank, in] and B [out, rank] may be columns of the whole: squares of parts add up.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    square = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
    a, b = a.to(wide), b.to(wide)
    cross = (weight @ a.T.to(weight.dtype)).to(wide)  # [out, rank]
    return square + ((2 * scale * cross + scale * scale * (b @ (a @ a.T))) * b).sum(1)


def updated(weight: Tensor, adapter: Adapter, rows: slice, scale: float) -> Tensor:
    """Rows `rows` of W', float32; `weight` are those rows of W, float32 [rows, in]."""
    new = torch.addmm(weight, adapter.b[rows].float(), adapter.a.float(), alpha=scale)
    if adapter.magnitude is None:
        return new
    gain = adapter.magnitude[rows].float() / torch.linalg.vector_norm(new, dim=1)
    return new * gain[:, None]


def check_shapes(adapters: Adapters, spec: ModelSpec, what: str) -> dict[str, Target]:
    """Name -> target of every adapter.

    Raises:
        BridgeError: an adapter of no target, or of another shape.
    """
    known = {t.name: t for t in targets(spec, MERGEABLE)}
    if unknown := [name for name in adapters.values if name not in known]:
        raise BridgeError(f"{what}: {len(unknown)} adapters are of no tensor of this model ({unknown[0]} …)")
    for name, adapter in adapters.values.items():
        rank, (out, into) = adapters.rank(name), known[name].shape
        wanted: Sequence[tuple[str, Tensor | None, tuple[int, ...] | None]] = (
            ("A", adapter.a, (rank, into)),
            ("B", adapter.b, (out, rank)),
            ("magnitude", adapter.magnitude, (out,) if adapters.lora.dora else None),
        )
        for part, tensor, shape in wanted:
            came = None if tensor is None else tuple(tensor.shape)
            if came != shape:
                raise BridgeError(f"{what}: {part} of {name} is {_shown(came)}, expected {_shown(shape)}")
    return {name: known[name] for name in adapters.values}


def check_fit(adapters: Adapters, lora: Lora, spec: ModelSpec, what: str) -> None:
    """Refuse adapters that a model with the adapters `lora` could not take.

    They may be of some layers only; the model's others then begin as new ones, which add nothing.

    Raises:
        BridgeError: other targets, rank or shapes, ranks of their own, whole weights.
    """
    known = check_shapes(adapters, spec, what)
    if adapters.whole:
        raise BridgeError(f"{what}: {min(adapters.whole)} is a whole weight (modules_to_save); {_MERGE}")
    if adapters.own:
        name = min(adapters.own)
        rank, alpha = adapters.own[name]
        raise BridgeError(
            f"{what}: {len(adapters.own)} have a rank or alpha of their own ({name}: rank {rank}, alpha {alpha:g}; the "
            f"others {adapters.lora.rank} and {adapters.lora.alpha:g}), and training has one of each; {_MERGE}"
        )
    for name in ("rank", "alpha", "dora"):
        if getattr(lora, name) != getattr(adapters.lora, name):
            raise BridgeError(
                f"{what}: theirs have {name} {getattr(adapters.lora, name)}, the model's {getattr(lora, name)}; the "
                f"model's must be the same (lora.{name} of a recipe)"
            )
    wanted = {target.name: target for target in targets(spec, lora.keys)}
    rows = {target.items[0].row.key for target in known.values()}
    for which, names in (
        ("the model has, and they lack", {n for n, t in wanted.items() if t.items[0].row.key not in rows}),
        ("they have, and the model lacks", set(known) - set(wanted)),
    ):
        if names:
            raise BridgeError(
                f"{what}: {len(names)} that {which} ({min(names)} …); theirs are of "
                f"lora.targets='{' '.join(sorted(rows))}'"
            )


_MERGE = "`dsv4 merge` puts them into the base, and training may start from that"


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
