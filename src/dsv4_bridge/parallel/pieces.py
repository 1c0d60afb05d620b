"""How items are cut over ranks: which part of each a rank holds, and where in its model.

Pure data from the table's `cut` and a topology; the live model (`mcore.places`), loading, streaming and
the memory plan all read it.
"""

from typing import NamedTuple

from ..spec.megatron import live_names, regions
from ..spec.plan import Item
from ..spec.spec import ModelSpec
from .topology import Coordinate, Topology, chunk_of


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


def pieces(
    item: Item, spec: ModelSpec, topology: Topology, at: Coordinate, chunk: int, grouped: bool = False
) -> tuple[Piece, ...]:
    """What the rank at `at` holds of an item in its pipeline chunk number `chunk`; empty if nothing.

    Layers and experts are numbered from the chunk's and the rank's first; the body of an MTP layer is
    `mtp_model_layer` in a live model. A module holds one expert, or with `grouped` all of
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
    names = live_names(item, topology.layout.chunks[chunk].start, local, grouped)
    for name, region in zip(names, regions(item, spec), strict=True):
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
        found.append(Piece(name, shape, (first + low, first + high), (left, right), offset))
        first += rows
    return tuple(found)


def _share(total: int, size: int, rank: int) -> tuple[int, int]:
    each = total // size
    return rank * each, (rank + 1) * each
