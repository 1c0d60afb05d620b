"""Where the items of the plan live in a model on this rank."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import BridgeError
from ...parallel.pieces import Piece, pieces
from ...spec.plan import Item, Plan, expand
from ..model import DeepSeekV4Model


class Place(NamedTuple):
    """A box of an item, in a live tensor.

    Attributes:
        name: of the parameter or buffer in `state_dict`.
        tensor: the parameter or buffer itself.
        row: its row where the box begins.
        start: first row of the item held here.
        stop: the row behind the last.
        columns: `(start, stop)` of the item held here.
    """

    name: str
    tensor: Tensor
    row: int
    start: int
    stop: int
    columns: tuple[int, int]

    def rows(self, first: int, last: int) -> Tensor:
        """A view of the item's rows `first` to `last`, with the columns that are here."""
        offset = self.row - self.start
        return self.tensor.data[first + offset : last + offset]


def places(model: DeepSeekV4Model) -> tuple[Plan, dict[str, tuple[Place, ...]]]:
    """The plan of the model, and the places of every item of it that this rank holds in this chunk.

    Raises:
        BridgeError: a tensor of the model that no item claims, or a shape that differs; a mistake in
            this package, never in a checkpoint.
    """
    plan = expand(model.spec)
    live = dict(model.named_parameters()) | dict(model.named_buffers())
    transient = set(live) - set(model.state_dict())  # what the model does not save: counters, adapters
    found: dict[str, tuple[Place, ...]] = {}
    claimed: set[str] = set()
    grouped = model.config.expert_layout != "sequential"
    for item in plan.items:
        here = pieces(item, model.spec, model.topology, model.coordinate, model.chunk, grouped)
        if here:
            found[item.name] = tuple(place_of(item, piece, live) for piece in here)
            claimed |= {p.name for p in here}
    if stray := sorted(set(live) - claimed - transient):
        raise BridgeError(f"binding the model: no row of the table claims {', '.join(stray[:4])}")
    return plan, found


def place_of(item: Item, piece: Piece, live: Mapping[str, Tensor]) -> Place:
    """A piece of an item in a model with these tensors.

    Raises:
        BridgeError: it has no such tensor, or one of another shape; a mistake in this package.
    """
    tensor = live.get(piece.name)
    shape = None if tensor is None else tuple(tensor.shape)
    if tensor is None or shape != piece.shape:
        raise BridgeError(f"binding {item.name}: {piece.name} is {shape}, expected {piece.shape}")
    return Place(piece.name, tensor, piece.row, *piece.rows, piece.columns)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's bits as a raw numpy array (bf16 as uint16), on the host."""
    host = tensor.detach().cpu().contiguous()
    return host.view(torch.uint16).numpy() if host.dtype is torch.bfloat16 else host.numpy()
