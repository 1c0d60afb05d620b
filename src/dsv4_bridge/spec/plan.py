"""Rows times spec: the exact tensors of one model. Pure data, no file is touched.

`expand` gives one `Item` a logical tensor (a weight and its scale are one item). From an item
follow its tensors on disk (`stored`) and its place in a Megatron checkpoint (`regions`).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

from ..errors import BridgeError
from .architecture import Architecture, Block
from .encodings import ENCODINGS, Stored
from .spec import ModelSpec
from .spec_v41 import V41Spec
from .table import ROWS, Row
from .v4 import V4
from .v41 import V41


class Item(NamedTuple):
    """One logical tensor: `name` is the released name of its weight, `shape` its logical shape."""

    row: Row
    block: Block
    expert: int | None
    name: str
    shape: tuple[int, ...]

    @property
    def passenger(self) -> bool:
        """Whether Megatron's model has no place for it."""
        return (self.row.megatron or self.row.hybrid) is None or self.block.kind == "dspark"

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """All items of one model, in checkpoint order."""

    spec: ModelSpec
    own_mtp_head: bool
    items: tuple[Item, ...]

    @cached_property
    def by_name(self) -> dict[str, Item]:
        """Released weight name -> item."""
        return {item.name: item for item in self.items}

    def stored(self, encodings: Mapping[str, str]) -> Iterator[Stored]:
        """Every tensor on disk when each encoding class is stored as `encodings` says."""
        for item in self.items:
            yield from stored(item, encodings[item.row.encoding])


def architecture_of(spec: ModelSpec) -> Architecture:
    """The architecture of a model of these numbers."""
    return V41 if isinstance(spec, V41Spec) else V4


def check_computed(spec: ModelSpec, doing: str) -> None:
    """Raise where no such model is computed here.

    Raises:
        BridgeError: it is one whose checkpoints are converted only.
    """
    architecture = architecture_of(spec)
    if architecture.why_not:
        raise BridgeError(f"{doing}: {architecture.name} is not computed here: {architecture.why_not}")


def blocks(spec: ModelSpec, own_mtp_head: bool = False) -> tuple[Block, ...]:
    """Every place of rows in checkpoint order: model, decoder layers, draft blocks."""
    return architecture_of(spec).blocks(spec, own_mtp_head)


def layer_kinds(spec: ModelSpec) -> dict[str, int]:
    """How many decoder layers there are of each kind of attention and of routing, and how many draft blocks."""
    return architecture_of(spec).kinds(spec)


def expand(spec: ModelSpec, own_mtp_head: bool = False) -> Plan:
    """Expand the table for one model.

    Args:
        spec: its numbers.
        own_mtp_head: whether the first MTP block ships its own embedding and head (Base).
    """
    items = [item for block in blocks(spec, own_mtp_head) for item in items_of(spec, block)]
    return Plan(spec, own_mtp_head, tuple(items))


def items_of(spec: ModelSpec, block: Block) -> list[Item]:
    """The items of one block, in checkpoint order."""
    architecture, items = architecture_of(spec), list[Item]()
    sizes = architecture.symbols(spec, block)
    rows = [r for r in architecture.rows if r.scope in block.scopes and r.when in block.traits]
    for per_expert, group in groupby(rows, key=lambda r: r.per_expert):
        facts = [(r, block.prefix + r.released, tuple(_size(d, sizes) for d in r.shape)) for r in group]
        if not per_expert:
            items += [Item(row, block, None, name, shape) for row, name, shape in facts]
            continue
        halves = [(row, *name.split("{expert}"), shape) for row, name, shape in facts]
        for e in range(block.experts):
            items += [Item(row, block, e, f"{a}{e}{b}", shape) for row, a, b, shape in halves]
    return items


def _size(dim: str, sizes: Mapping[str, int]) -> int:
    product, *divisors = dim.split("/")
    value = math.prod(sizes[f] if f in sizes else int(f) for f in product.split("*"))
    return value // math.prod(sizes[d] for d in divisors)


# ---------------------------------------------------------------- on disk, released format


def draft_name(key: str) -> str:
    """Released name in the first draft block of the row `key`; the kind of block is told by these."""
    return "mtp.0." + next(r.released for r in ROWS if r.key == key)


def scale_name(weight: str) -> str:
    """Released name of the scale beside a weight."""
    return weight.removesuffix(".weight") + ".scale"


def stored(item: Item, encoding: str) -> tuple[Stored, ...]:
    """The tensors on disk of one item: its weight, then its scale if the encoding has one."""
    how = ENCODINGS[encoding]
    weight = Stored(item.name, how.dtype, how.weight_shape(item.shape))
    if how.scale_dtype is None:
        return (weight,)
    return (weight, Stored(scale_name(item.name), how.scale_dtype, how.scale_shape(item.shape)))


def shard_of(item: Item, spec: ModelSpec) -> int:
    """Number of the released shard that holds an item, from 1."""
    return architecture_of(spec).shard(item.row, item.block, spec)


def in_row_order(item: Item, spec: ModelSpec) -> bool:
    """Whether a released shard holds an item in the order of the rows, not sorted by type and name."""
    return item.row.when in architecture_of(spec).unsorted


def shard_name(number: int, spec: ModelSpec) -> str:
    """File name of a released shard."""
    return f"model-{number:05d}-of-{architecture_of(spec).shards(spec):05d}.safetensors"


# ---------------------------------------------------------------- in a Megatron checkpoint


def target_encoding(item: Item, target: str, own: str | None) -> str:
    """Encoding of an item in a folder written as `source`, `fp8` or `bf16`.

    Under `fp8` the experts have float32 scales, as the Base releases: that is what servers read where config.json
    says `expert_dtype: fp8`. vLLM 0.33 copies the bytes of E8M0 scales there as if they were numbers.

    Args:
        item: the item.
        target: what was asked for.
        own: its encoding in the released checkpoint, None where that is not known.
    """
    plain = {"plain": "bf16", "f32": "f32", "int": "i64"}
    if item.row.encoding in plain:
        return plain[item.row.encoding]
    if target == "source":
        assert own is not None
        return own if own != "f32" else "bf16"
    if target == "fp8":
        served = "fp8_pow2" if item.row.encoding == "expert" else "fp8"
        return own if own in (served, "fp8_f32") else served
    return "bf16"
