"""Where the items of the plan live in a model on this rank."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.utils import get_pg_rank
from torch import Tensor

from ..dtypes import DTYPES
from ..encodings import ENCODINGS
from ..errors import BridgeError
from ..items import Item, Plan, Region, expand, regions
from ..values import Scratch, check_ids, cuts, stripe_rows
from .model import DeepSeekV4Model

_RAW = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int32: "I32"}


class Place(NamedTuple):
    """Rows `start` to `stop` of an item, in a live tensor.

    Attributes:
        name: of the parameter or buffer in `state_dict`.
        tensor: the parameter or buffer itself.
        row: its first row that holds the item's.
        start: first row of the item held here.
        stop: the row behind the last.
    """

    name: str
    tensor: Tensor
    row: int
    start: int
    stop: int

    def rows(self, first: int, last: int) -> Tensor:
        """A view of the item's rows `first` to `last`."""
        offset = self.row - self.start
        return self.tensor.data[first + offset : last + offset]


def places(model: DeepSeekV4Model) -> tuple[Plan, dict[str, tuple[Place, ...]]]:
    """The plan of the model, and the places of every item of it that this rank holds.

    Raises:
        BridgeError: a tensor of the model that no item claims, or a shape that differs; a mistake in
            this package, never in a checkpoint.
    """
    plan = expand(model.spec)
    live = dict(model.named_parameters()) | dict(model.named_buffers())
    transient = {n for n, _ in model.named_buffers()} - set(model.state_dict())
    found: dict[str, tuple[Place, ...]] = {}
    claimed: set[str] = set()
    for item in plan.items:
        here = tuple(_places(item, model, live))
        if here:
            found[item.name] = here
            claimed |= {p.name for p in here}
    if stray := sorted(set(live) - claimed - transient):
        raise BridgeError(f"binding the model: no row of the table claims {', '.join(stray[:4])}")
    return plan, found


def _places(item: Item, model: DeepSeekV4Model, live: dict[str, Tensor]) -> Iterator[Place]:
    at = 0
    for region in regions(item, model.spec):
        rows = region.sizes[-len(item.shape)]
        name = live_name(region, item, model)
        if name in live:
            tensor = live[name]
            shape = region.global_shape[-len(item.shape) :]
            if tuple(tensor.shape) != shape:
                raise BridgeError(f"binding {item.name}: {name} is {list(tensor.shape)}, expected {list(shape)}")
            yield Place(name, tensor, region.offsets[-len(item.shape)], at, at + rows)
        at += rows


def live_name(region: Region, item: Item, model: DeepSeekV4Model) -> str:
    """Name in the model of what is `region.key` in a checkpoint (megatron.md 1f).

    Layers and experts count from this rank's first; experts are modules of their own; the body of an
    MTP depth is `mtp_model_layer`.
    """
    key = region.key
    if item.block.kind == "layer":
        first = int(model.decoder.layers[0].layer_number) - 1  # type: ignore[arg-type]
        key = key.replace(f"layers.{item.block.index}.", f"layers.{item.block.index - first}.", 1)
    if item.block.kind == "mtp":
        key = key.replace(".transformer_layer.", ".mtp_model_layer.", 1)
    if item.expert is not None:
        experts = model.spec.n_routed_experts // model.pg_collection.ep.size()
        local = item.expert - experts * get_pg_rank(model.pg_collection.ep)
        key = key.replace(".experts.experts.", f".experts.local_experts.{local}.", 1)
    return key


class ModelValues:
    """The items of a live model as a source of values (see `values.Values`)."""

    def __init__(self, model: DeepSeekV4Model):
        self.plan, self._places = places(model)

    def encoding(self, item: Item) -> str:
        dtype = _RAW[self._places[item.name][0].tensor.dtype]
        return next(e.name for e in ENCODINGS.values() if e.dtype == dtype and e.scale_dtype is None)

    def stripes(self, item: Item, start: int, stop: int, scratch: Scratch) -> Iterator[np.ndarray]:
        found = self._places[item.name]
        dtype = DTYPES[_RAW[found[0].tensor.dtype]]
        for first, last in cuts(start, stop, stripe_rows(item.shape, dtype.itemsize)):
            out = scratch.take("decoded", dtype.numpy, (last - first, *item.shape[1:]))
            for place in found:
                low, high = max(first, place.start), min(last, place.stop)
                if low < high:
                    out[low - first : high - first] = to_numpy(place.rows(low, high))
            if item.row.encoding == "int":
                check_ids(out, self.plan.spec, item.name)
            yield out

    def extents(self, item: Item, start: int, stop: int) -> Iterable[tuple[int, int, int]]:
        return ()


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's bits as a raw numpy array (bf16 as uint16), on the host."""
    host = tensor.detach().cpu().contiguous()
    return host.view(torch.uint16).numpy() if host.dtype is torch.bfloat16 else host.numpy()
