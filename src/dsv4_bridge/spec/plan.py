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

from .encodings import ENCODINGS, Stored
from .spec import ModelSpec
from .table import ROWS, Row


@dataclass(frozen=True, slots=True)
class Block:
    """A place that rows are expanded for: the model itself, a decoder layer, a draft block.

    Attributes:
        kind: `model`, `layer`, `mtp` or `dspark`.
        index: layer or draft block number (0 for the model).
        ratio: compress ratio of its attention.
        hashed: routes by token id.
    """

    kind: str
    index: int
    ratio: int
    hashed: bool

    @property
    def prefix(self) -> str:
        """Prefix of its released names."""
        return {"model": "", "layer": f"layers.{self.index}."}.get(self.kind, f"mtp.{self.index}.")


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
        return self.row.megatron is None or self.block.kind == "dspark"

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


def blocks(spec: ModelSpec) -> tuple[Block, ...]:
    """Model, decoder layers and draft blocks in checkpoint order."""
    count = spec.num_hidden_layers
    draft = "dspark" if spec.dspark else "mtp"
    return (
        Block("model", 0, 0, False),
        *(Block("layer", i, spec.ratio(i), i < spec.num_hash_layers) for i in range(count)),
        *(Block(draft, k, spec.ratio(count + k), False) for k in range(spec.draft_blocks)),
    )


def layer_kinds(spec: ModelSpec) -> dict[str, int]:
    """How many decoder layers there are of each kind of attention and of routing, and how many draft blocks."""
    layers = [b for b in blocks(spec) if b.kind == "layer"]
    attention = {name: sum(b.ratio == ratio for b in layers) for name, ratio in _ATTENTION.items()}
    hashed = sum(b.hashed for b in layers)
    draft = {"MTP": spec.mtp_layers, "DSpark": spec.dspark.stages if spec.dspark else 0}
    return attention | {"hash": hashed, "routed": len(layers) - hashed} | draft


_ATTENTION = {"window": 0, "CSA": 4, "HCA": 128}


def expand(spec: ModelSpec, own_mtp_head: bool = False) -> Plan:
    """Expand the table for one model.

    Args:
        spec: its numbers.
        own_mtp_head: whether the first MTP block ships its own embedding and head (Base).
    """
    items: list[Item] = []
    for block in blocks(spec):
        sizes = _symbols(spec, block.ratio)
        rows = [r for r in ROWS if _applies(r, block, spec, own_mtp_head)]
        for per_expert, group in groupby(rows, key=lambda r: r.per_expert):
            facts = [(r, block.prefix + r.released, tuple(_size(d, sizes) for d in r.shape)) for r in group]
            if not per_expert:
                items += [Item(row, block, None, name, shape) for row, name, shape in facts]
                continue
            halves = [(row, *name.split("{expert}"), shape) for row, name, shape in facts]
            for e in range(spec.n_routed_experts):
                items += [Item(row, block, e, f"{a}{e}{b}", shape) for row, a, b, shape in halves]
    return Plan(spec, own_mtp_head, tuple(items))


def _applies(row: Row, block: Block, spec: ModelSpec, own_mtp_head: bool) -> bool:
    first, last = block.index == 0, block.index == spec.draft_blocks - 1
    in_scope = {
        "first": block.kind == "model",
        "last": block.kind == "model",
        "block": block.kind != "model",
        "mtp": block.kind == "mtp",
        "mtp_own": block.kind == "mtp" and first and own_mtp_head,
        "dspark_first": block.kind == "dspark" and first,
        "dspark_last": block.kind == "dspark" and last,
    }[row.scope]
    return (
        in_scope
        and {
            "always": True,
            "compressed": block.ratio != 0,
            "csa": block.ratio == 4,
            "hash": block.hashed,
            "routed": not block.hashed,
        }[row.when]
    )


def _symbols(spec: ModelSpec, ratio: int) -> dict[str, int]:
    sizes = {name: value for name, value in vars(spec).items() if isinstance(value, int)}
    sizes |= {
        "ratio": ratio,
        "compress_width": 2 if ratio == 4 else 1,
        "hc_mix": spec.hc_mult * (spec.hc_mult + 2),
    }
    if spec.dspark:
        rank = spec.dspark.markov_rank
        sizes |= {
            "dspark_stages": spec.dspark.stages,
            "markov_rank": rank,
            "confidence_width": spec.hidden_size + rank,
        }
    return sizes


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
    """Number of the released shard that holds an item, from 1: embed, layers, the rest, draft blocks."""
    if item.block.kind == "model":
        return 1 if item.row.scope == "first" else spec.num_hidden_layers + 2
    if item.block.kind == "layer":
        return item.block.index + 2
    return spec.num_hidden_layers + 3 + item.block.index


def shard_name(number: int, spec: ModelSpec) -> str:
    """File name of a released shard."""
    return f"model-{number:05d}-of-{spec.num_hidden_layers + 2 + spec.draft_blocks:05d}.safetensors"


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
