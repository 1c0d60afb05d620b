"""How items are cut over ranks: which part of each a rank holds, and where in its model.

Pure data from the table's `cut` and a topology; the live model (`mcore.places`), loading, streaming and
the memory plan all read it.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..errors import BridgeError
from ..spec.plan import Item, regions
from ..spec.spec import ModelSpec
from .layout import Layout, solve


@dataclass(frozen=True)
class Topology:
    """Sizes of the parallel groups, and the pipeline layout.

    Attributes:
        tp: tensor-parallel ranks: attention heads, output groups, vocabulary, shared expert.
        pp: pipeline ranks.
        ep: expert-parallel ranks: whole experts.
        etp: expert-tensor-parallel ranks: each expert's width.
        layout: which chunk of the pipeline holds what.
    """

    tp: int
    pp: int
    ep: int
    etp: int
    layout: Layout


class Coordinate(NamedTuple):
    """One rank's place in each group."""

    tp: int = 0
    pp: int = 0
    ep: int = 0
    etp: int = 0


class Piece(NamedTuple):
    """A box of an item, and where it lies in the live tensor of a rank.

    Attributes:
        name: of the live tensor in its chunk's `state_dict`.
        shape: of the live tensor.
        rows: `(start, stop)` of the item.
        columns: the same for columns; `(0, 1)` for a vector. They begin at column 0 of the live tensor.
        row: row of the live tensor where it begins.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    columns: tuple[int, int]
    row: int


def make_topology(
    spec: ModelSpec, tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1, layout: Layout | None = None, vp: int = 1
) -> Topology:
    """A topology that the model can be cut by; without a layout, the solver's.

    Raises:
        BridgeError: each size that does not divide what it cuts, with the sizes that do.
    """
    divided = (
        ("tp", tp, "o_groups", spec.o_groups),
        ("tp", tp, "num_attention_heads", spec.num_attention_heads),
        ("tp", tp, "vocab_size", spec.vocab_size),
        ("tp", tp, "the shared expert's width", spec.shared_intermediate_size),
        ("ep", ep, "n_routed_experts", spec.n_routed_experts),
        ("etp", etp, "moe_intermediate_size", spec.moe_intermediate_size),
    )
    wrong = [
        f"{name} {size} does not divide {what} {total} (nearest that does: {_nearest(size, total)})"
        for name, size, what, total in divided
        if size < 1 or total % size
    ]
    if wrong:
        raise BridgeError("cutting the model: " + "; ".join(wrong))
    return Topology(tp, pp, ep, etp, layout or solve(spec, pp, vp))


def _nearest(size: int, total: int) -> int:
    return min((d for d in range(1, total + 1) if total % d == 0), key=lambda d: (abs(d - size), d))


def chunk_of(item: Item, spec: ModelSpec, layout: Layout) -> tuple[int, ...]:
    """Numbers of the pipeline chunks that hold an item: one, and a second for the embedding that MTP reads."""
    last = len(layout.chunks) - 1
    if item.block.kind == "layer":
        return (next(n for n, c in enumerate(layout.chunks) if c.start <= item.block.index < c.stop),)
    if item.block.kind == "mtp" or item.row.key != "embed":
        return (last,)
    return (0, last) if spec.mtp_layers and last else (0,)


def pieces(
    item: Item, spec: ModelSpec, topology: Topology, at: Coordinate, chunk: int, grouped: bool = False
) -> tuple[Piece, ...]:
    """What the rank at `at` holds of an item in its pipeline chunk number `chunk`; empty if nothing.

    Layers and experts are numbered from the chunk's and the rank's first; the body of an MTP layer is
    `mtp_model_layer` in a live model (megatron.md 1f). A module holds one expert, or with `grouped` all of
    the rank's, which changes names only.
    """
    if item.passenger or chunk not in chunk_of(item, spec, topology.layout):
        return ()
    local, experts = 0, spec.n_routed_experts // topology.ep
    if item.expert is not None:
        if item.expert // experts != at.ep:
            return ()
        local = item.expert - at.ep * experts
    size, rank = (topology.etp, at.etp) if item.expert is not None else (topology.tp, at.tp)
    cut = item.row.cut if size > 1 else "whole"
    vector = len(item.shape) == 1
    found, first = [], 0
    for region in regions(item, spec):
        rows, columns = region.sizes[-len(item.shape)], 1 if vector else item.shape[1]
        height = region.global_shape[-len(item.shape)]
        offset = region.offsets[-len(item.shape)]
        low, high, left, right = 0, rows, 0, columns
        if cut == "rows":
            left, right = _share(columns, size, rank)
        elif cut != "whole":
            low, high = _share(rows, size, rank)
            height, offset = height // size, offset // size
        shape = (height,) if vector else (height, right - left)
        name = _live_name(region.key, item, topology.layout.chunks[chunk].start, local, grouped)
        found.append(Piece(name, shape, (first + low, first + high), (left, right), offset))
        first += rows
    return tuple(found)


def _share(total: int, size: int, rank: int) -> tuple[int, int]:
    each = total // size
    return rank * each, (rank + 1) * each


def _live_name(key: str, item: Item, first_layer: int, expert: int, grouped: bool) -> str:
    if item.block.kind == "layer":
        key = key.replace(f"layers.{item.block.index}.", f"layers.{item.block.index - first_layer}.", 1)
    if item.block.kind == "mtp":
        key = key.replace(".transformer_layer.", ".mtp_model_layer.", 1)
    if item.expert is not None and grouped:
        key = key.replace(".experts.experts.", ".experts.", 1) + str(expert)
    elif item.expert is not None:
        key = key.replace(".experts.experts.", f".experts.local_experts.{expert}.", 1)
    return key
