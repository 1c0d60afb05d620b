"""What makes an architecture, as data: its rows, the places they are expanded for, its numbers, its shards."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .spec import ModelSpec
from .table import Row


@dataclass(frozen=True, slots=True)
class Block:
    """A place that rows are expanded for: the model itself, a decoder layer, a draft block.

    Attributes:
        kind: `model`, `layer`, `mtp` or `dspark`; of V4.1 also `vision` and `vision_layer`.
        index: layer or draft block number (0 for the model).
        ratio: compress ratio of its attention.
        hashed: routes by token id.
        prefix: of its released names.
        scopes: of the rows that it may have.
        traits: of the rows that it has, of these: what `when` of a row asks for.
        experts: routed ones.
    """

    kind: str
    index: int
    ratio: int
    hashed: bool
    prefix: str
    scopes: frozenset[str]
    traits: frozenset[str]
    experts: int


def plain_sizes(spec: ModelSpec) -> dict[str, int]:
    """Values of the dimensions' names that every architecture has: a spec's own numbers, and what follows from them."""
    sizes = {name: value for name, value in vars(spec).items() if isinstance(value, int)}
    sizes["hc_mix"] = spec.hc_mult * (spec.hc_mult + 2)
    if spec.dspark:
        rank = spec.dspark.markov_rank
        sizes |= {
            "dspark_stages": spec.dspark.stages,
            "markov_rank": rank,
            "confidence_width": spec.hidden_size + rank,
        }
    return sizes


@dataclass(frozen=True)
class Architecture:
    """One kind of model.

    Attributes:
        name: as people call it.
        rows: every kind of tensor that it has.
        blocks: of a spec, and whether the first MTP block has its own head: the places, in checkpoint order.
        symbols: of a spec and a block: the value of every dimension's name.
        kinds: of a spec: how many layers there are of each kind, for people.
        shard: of a row, a block and a spec: the number of the released shard, from 1.
        shards: of a spec: how many there are.
        namings: how Megatron names its tensors; the first is meant where nothing is said.
        schemes: how its tensors may be named in a Hugging Face folder.
        unsorted: what `when` of rows asks for whose shards hold them in the order of the rows; all others are sorted
            by type and name, as the safetensors library does.
        why_not: why no such model is computed here; empty where one is.
    """

    name: str
    rows: tuple[Row, ...]
    blocks: Callable[[Any, bool], tuple[Block, ...]]
    symbols: Callable[[Any, Block], Mapping[str, int]]
    kinds: Callable[[Any], dict[str, int]]
    shard: Callable[[Row, Block, Any], int]
    shards: Callable[[Any], int]
    namings: tuple[str, ...]
    schemes: tuple[str, ...]
    unsorted: frozenset[str] = frozenset()
    why_not: str = ""
