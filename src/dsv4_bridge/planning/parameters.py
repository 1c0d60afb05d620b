"""Parameters of a rank, by what a copy of them is: from `pieces` over the plan of the table."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache, lru_cache

from ..parallel.layout import Chunk, Layout
from ..parallel.pieces import pieces
from ..parallel.topology import Coordinate, Sizes, Topology
from ..spec.lora import Lora, adapter_size, targets_of
from ..spec.plan import Item, expand
from ..spec.spec import ModelSpec


@dataclass(frozen=True)
class Count:
    """Values that a rank holds.

    Attributes:
        plain: parameters of the model's type.
        wide: parameters that stay float32.
        buffers: what routers read and no gradient changes: float32 biases, int32 tables.
        matrices: of the parameters, those in linear maps.
    """

    plain: int = 0
    wide: int = 0
    buffers: int = 0
    matrices: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.plain + other.plain,
            self.wide + other.wide,
            self.buffers + other.buffers,
            self.matrices + other.matrices,
        )

    def __mul__(self, times: int) -> "Count":
        return Count(self.plain * times, self.wide * times, self.buffers * times, self.matrices * times)

    @property
    def parameters(self) -> int:
        """What is trained."""
        return self.plain + self.wide


@dataclass(frozen=True)
class Part:
    """Values of a block on one rank, by the group that has copies of them.

    Attributes:
        dense: the same on all data-parallel ranks.
        expert: the same on all expert-data-parallel ranks.
        adapters: of the dense linears, in the model's type.
        expert_adapters: of the routed experts.
    """

    dense: Count = field(default_factory=Count)
    expert: Count = field(default_factory=Count)
    adapters: int = 0
    expert_adapters: int = 0

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.dense + other.dense,
            self.expert + other.expert,
            self.adapters + other.adapters,
            self.expert_adapters + other.expert_adapters,
        )

    def __mul__(self, times: int) -> "Part":
        return Part(self.dense * times, self.expert * times, self.adapters * times, self.expert_adapters * times)


def chunk_part(spec: ModelSpec, layout: Layout, number: int, topology: Topology, lora: Lora | None) -> Part:
    """What a rank holds of one pipeline chunk.

    Args:
        spec: the model.
        layout: the pipeline's.
        number: of the chunk.
        topology: sizes of the groups.
        lora: the adapters that are counted, if any.
    """
    return _chunk_part(spec, layout.chunks[number], topology.tp, topology.ep, topology.etp, lora)


@lru_cache(maxsize=1 << 14)  # layouts that are compared have most of it in common
def _chunk_part(spec: ModelSpec, chunk: Chunk, tp: int, ep: int, etp: int, lora: Lora | None) -> Part:
    key = (spec, tp, ep, etp, lora)
    found = Part()
    # Layers are of a few kinds, and layouts that are considered hundreds.
    kinds = Counter((spec.ratio(index), index < spec.num_hash_layers) for index in range(chunk.start, chunk.stop))
    for (ratio, hashed), times in kinds.items():
        found += _block_part(*key, ratio, hashed, False) * times
    for depth in range(chunk.mtp):
        found += _block_part(*key, spec.ratio(spec.num_hidden_layers + depth), False, True, depth)
    # MTP reads the embedding: a chunk without it has a copy.
    if chunk.embedding or chunk.mtp:
        found += _block_part(*key, -1, False, False)
    if chunk.loss:
        found += _block_part(*key, -2, False, False)
    return found


@cache
def _block_part(
    spec: ModelSpec,
    tp: int,
    ep: int,
    etp: int,
    lora: Lora | None,
    ratio: int,
    hashed: bool,
    mtp: bool,
    depth: int = 0,
) -> Part:
    """Values of one block on a rank; ratio -1 is the embedding, -2 what stands with the output layer.

    One expert stands for all: each rank has as many, of one shape.
    """
    alone = Topology(Sizes(tp, ep=ep, etp=etp), _one_chunk(spec))
    dense, expert = Count(), Count()
    items = _items(spec, ratio, hashed, mtp, depth)
    for item in items:
        held = pieces(item, spec, alone, Coordinate(), 0)
        values = sum((p.rows[1] - p.rows[0]) * (p.columns[1] - p.columns[0]) for p in held)
        count = _counted(item, values)
        if item.expert is not None:
            expert += count * (spec.n_routed_experts // ep)
            continue
        dense += count
    if lora is None:
        return Part(dense, expert)
    adapters = expert_adapters = 0
    for target in targets_of(items, lora.keys):
        out, into = target.shape
        row, routed = target.items[0].row, target.items[0].expert is not None
        cut = etp if routed else tp
        out //= cut if row.cut == "columns" else 1
        into //= cut if row.cut == "rows" else 1
        values = adapter_size(lora, out, into)
        if routed:
            expert_adapters += values * (spec.n_routed_experts // ep)
        else:
            adapters += values
    return Part(dense, expert, adapters, expert_adapters)


def _counted(item: Item, values: int) -> Count:
    if item.row.when in ("routed", "hash"):  # what only a kind of router reads is a buffer of it
        return Count(buffers=values)
    matrices = values if item.row.matrix else 0
    wide = item.row.encoding == "f32"
    return Count(wide=values, matrices=matrices) if wide else Count(plain=values, matrices=matrices)


@cache
def _one_chunk(spec: ModelSpec) -> Layout:
    return Layout((Chunk(0, spec.num_hidden_layers, True, spec.mtp_layers, True),), 1)


@cache
def _items(spec: ModelSpec, ratio: int, hashed: bool, mtp: bool, depth: int) -> tuple[Item, ...]:
    """Items of one block, of its experts the first; a layer of each kind stands for all of its kind."""
    if ratio < 0:
        kind, index = "model", 0
    elif mtp:
        kind, index = "mtp", depth
    else:
        layers = range(spec.num_hidden_layers)
        kind = "layer"
        index = next(i for i in layers if (spec.ratio(i), i < spec.num_hash_layers) == (ratio, hashed))
    found = (i for i in _first_experts(spec) if (i.block.kind, i.block.index) == (kind, index))
    return tuple(i for i in found if ratio >= 0 or (i.row.scope == "first") == (ratio == -1))


@cache
def _first_experts(spec: ModelSpec) -> tuple[Item, ...]:
    return tuple(i for i in expand(spec).items if not i.passenger and not i.expert)
