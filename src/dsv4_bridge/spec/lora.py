"""Adapters as data: which tensors may carry one, their names and sizes. No torch: `lora.adapters` has the values.

An adapter belongs to one tensor W [out, in] of the transformers model and has two factors, A [rank, in] and
B [out, rank]:

    W' = W + s B A,  s = alpha / rank                    (LoRA, arXiv:2106.09685)
    W' = m / ||W + s B A|| * (W + s B A), row by row     (DoRA, arXiv:2402.09353; peft's lora/dora.py)

DoRA's magnitude m [out] begins as the row norms of W, and the norm in the denominator takes no gradient
(section 4.3 there).

What may carry adapters is the `lora` column of the table. Where peft wraps a module, the adapter may have
dropout and magnitudes; a bare parameter (the grouped output projection, the stacked routed experts) it
adapts as a tensor, without either. Gate and up of a routed expert are one parameter there, and so one adapter.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import NamedTuple

from ..errors import BridgeError
from .plan import Item, expand
from .spec import ModelSpec
from .table import ROWS, Row

ADAPTERS = "adapters"  # first word of their keys in Megatron checkpoints
ALPHA = "adapters.alpha"
PARTS = ("lora_A", "lora_B", "magnitude")
DTYPES = ("float32", "bfloat16")


def is_parameter(row: Row) -> bool:
    """Whether peft adapts it as a bare parameter (`target_parameters`), not as a module."""
    return row.per_expert or row.role == "groups"


CARRIERS: tuple[str, ...] = tuple(r.key for r in ROWS if r.lora)
# What a merge takes besides: linear maps that peft reaches, and that training has no place for adapters on.
_ALSO = ("head", *(f"attn.compressor.{w}" for w in ("wkv", "wgate")), "attn.indexer.wq_b", "attn.indexer.weights_proj")
_ALSO += tuple(f"attn.indexer.compressor.{w}" for w in ("wkv", "wgate"))
MERGEABLE: tuple[str, ...] = tuple(r.key for r in ROWS if r.lora or r.key in _ALSO)
DEFAULT_TARGETS: tuple[str, ...] = tuple(r.key for r in ROWS if r.lora == "attention" and not is_parameter(r))


@dataclass(frozen=True)
class Lora:
    """What is adapted, and how.

    Attributes:
        rank: inner width r of every adapter.
        alpha: the update is scaled by alpha / rank.
        dropout: of the low-rank path's input, in training.
        targets: row keys of the table, or what several begin with (`attn`, `ffn.experts`); empty: the
            attention projections that are modules in transformers (`DEFAULT_TARGETS`).
        dora: with magnitudes.
        seed: of the initial A.
        dtype: `float32`, `bfloat16`; empty: the model's.
    """

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    dora: bool = False
    seed: int = 1234
    dtype: str = ""

    @property
    def scale(self) -> float:
        """The factor s."""
        return self.alpha / self.rank

    @property
    def keys(self) -> tuple[str, ...]:
        """Row keys of the targets, in the table's order.

        Raises:
            BridgeError: a target that is no row, or a combination that peft cannot hold.
        """
        return _keys(self)


@cache
def _keys(lora: Lora) -> tuple[str, ...]:
    wanted: set[str] = set()
    for target in lora.targets or DEFAULT_TARGETS:
        found = [key for key in CARRIERS if key == target or key.startswith(target + ".")]
        if not found:
            raise BridgeError(f"adapters: no target {target!r}; may carry one: {', '.join(CARRIERS)}")
        wanted |= set(found)
    rows = [r for r in ROWS if r.key in wanted]
    together = [r for r in ROWS if r.per_expert and r.part[1] > 1 and r.lora]
    if 0 < len(joint := [r.key for r in together if r.key in wanted]) < len(together):
        names = " and ".join(r.key for r in together)
        raise BridgeError(f"adapters on {joint[0]} alone: {names} are one tensor in transformers; name all or none")
    bare = [r.key for r in rows if is_parameter(r)]
    if lora.dora and bare:
        raise BridgeError(
            f"DoRA on {', '.join(bare)}: peft adapts them as bare parameters, which have no magnitudes there; "
            f"take LoRA, or only of {', '.join(k for k in CARRIERS if k not in bare)}"
        )
    if lora.rank < 1:
        raise BridgeError(f"adapters of rank {lora.rank}: expected 1 or more")
    if not (math.isfinite(lora.alpha) and lora.alpha > 0 and 0 <= lora.dropout < 1):
        raise BridgeError(
            f"adapters: alpha {lora.alpha} and dropout {lora.dropout}; expected above 0, and from 0 to below 1"
        )
    if lora.dtype not in ("", *DTYPES):
        raise BridgeError(f"adapters of {lora.dtype}: expected {' or '.join(DTYPES)}, or nothing for the model's")
    return tuple(r.key for r in rows)


class Target(NamedTuple):
    """One tensor of the transformers model that carries an adapter (for routed experts, of one expert).

    Attributes:
        name: `layers.3.attn.wq_a`; for a routed expert's gate and up, of the gate.
        items: what it is made of in a released checkpoint, one above the other.
        module: in transformers: of a module, or of a parameter.
        parameter: which of the two.
    """

    name: str
    items: tuple[Item, ...]
    module: str
    parameter: bool

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return sum(item.shape[0] for item in self.items), self.items[0].shape[1]


def targets(spec: ModelSpec, keys: Iterable[str]) -> tuple[Target, ...]:
    """The targets of the rows `keys`, in the order of the plan: decoder layers and the head, no draft block."""
    return targets_of(expand(spec.without_draft()).items, keys)


def targets_of(items: Iterable[Item], keys: Iterable[str]) -> tuple[Target, ...]:
    """The targets among items of a plan."""
    chosen = set(keys)
    wanted = [i for i in items if i.row.key in chosen and i.block.kind in ("model", "layer")]
    found = []
    for (_, _, _, name), group in groupby(
        wanted, key=lambda i: (i.block.kind, i.block.index, i.expert, i.row.transformers)
    ):
        held = tuple(group)
        parameter = is_parameter(held[0].row)
        module = str(name) if held[0].block.kind == "model" else f"model.{held[0].block.prefix}{name}"
        if not held[0].row.per_expert:
            module = module if parameter else module.removesuffix(".weight")
        found.append(Target(held[0].name.removesuffix(".weight"), held, module, parameter))
    return tuple(found)


def checkpoint_name(item: Item) -> str:
    """Name of an item's adapter in Megatron checkpoints: `layers.3.ffn.experts.w1` for every expert."""
    return item.block.prefix + item.row.released.replace("{expert}.", "").removesuffix(".weight")


def adapter_size(lora: Lora, out: int, into: int) -> int:
    """Values of the adapter of one matrix [out, into]."""
    return lora.rank * (out + into) + (out if lora.dora else 0)
