"""transformers' model a layer at a time: nothing in it is changed, its weights come when it asks for them.

Its layers get what its own forward pass hands to them. Its stacked experts are read by number alone, so that an
object which reads the one asked for from the checkpoint stands in their place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mcore.weights.absent import memory_for, without_memory
from ..mcore.weights.experts import ExpertWeights
from ..mcore.weights.on_demand import RowsOfTable, Source
from ..spec.plan import Item, expand
from ..spec.spec import ModelSpec
from ..store.hf import disk_name
from ..store.values import Scratch, Values
from .reference import empty_reference, fill_reference


class ReferenceOnDemand:
    """The model with the weights of a checkpoint that are held.

    Args:
        values: of the checkpoint.
        spec: its numbers, without draft blocks.
        dtype: of its parameters; what transformers keeps in float32 stays so.
        device: where it runs.

    Attributes:
        source: what was read.
    """

    def __init__(self, values: Values, spec: ModelSpec, dtype: torch.dtype, device: torch.device):
        self.source, self.spec, self.device = Source(values), spec, device
        with without_memory():
            self.model: Any = empty_reference(spec, dtype)
        self.model._apply(lambda t: t if t.is_meta else t.to(device))
        self._held: dict[int | None, list[Item]] = {}
        experts: dict[tuple[str, int], list[Item]] = {}
        plan = expand(spec)
        for item in plan.items:
            layer = item.block.index if item.block.kind == "layer" else None
            if item.expert is None or layer is None:
                self._held.setdefault(layer, []).append(item)
            else:
                experts.setdefault((item.block.prefix, item.expert), []).append(item)
        self.model.model.embed_tokens = RowsOfTable(self.source, plan.by_name["embed.weight"], dtype)
        weights = ExpertWeights(values, experts, dtype, device)
        self._stacks: list[_Stacks] = []
        for index, layer in enumerate(self.model.model.layers):
            self._stacks.append(_Stacks(self.source, weights, f"layers.{index}."))
            self._stacks[-1].stand_in(layer.mlp)

    def given(self, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the model's first layer gets for ids [b, s]: streams [b, s, n, h], and further arguments."""
        inner, caught = self.model.model, _Caught()
        replaced = {
            "layers": torch.nn.ModuleList([caught]),
            "hc_head": torch.nn.Identity(),
            "norm": torch.nn.Identity(),
        }
        own = {name: getattr(inner, name) for name in replaced}
        try:
            for name, module in replaced.items():
                setattr(inner, name, module)
            inner(ids, use_cache=False)
        finally:
            for name, module in own.items():
                setattr(inner, name, module)
        assert caught.streams is not None
        return caught.streams, caught.more

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """In the body layer `index` has its values, but for its experts, which it reads."""
        prefix = f"model.layers.{index}."
        with self._holding(self._held[index], {name for name in self.model.state_dict() if name.startswith(prefix)}):
            try:
                yield self.model.model.layers[index]
            finally:
                self._stacks[index].let_go()

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """In the body what comes behind the last layer: streams [b, s, n, h] -> normed hidden states [b, s, h]."""
        with self._holding([i for i in self._held[None] if i.row.role != "table"]):
            yield lambda streams: self.model.model.norm(self.model.model.hc_head(streams))

    @contextmanager
    def output(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """In the body the output layer: hidden states [b, s, h] -> logits [b, s, vocabulary]."""
        with self._holding([i for i in self._held[None] if i.row.role == "table" and i.row.scope == "last"]):
            yield self.model.lm_head

    @contextmanager
    def _holding(self, items: list[Item], awaited: set[str] | None = None) -> Iterator[None]:
        """In the body these items are there; `awaited` are the names that they fill, where a whole part is held."""
        names = {disk_name(item, "modules", self.spec)[0] for item in items}
        awaited = set(awaited or names)
        with memory_for(self.model, names, self.device):
            fill_reference(self.model, items, self.spec, self._stripes, awaited)
            assert not awaited, f"no tensor of a checkpoint is {sorted(awaited)[0]} of transformers' model"
            yield

    def _stripes(self, item: Item, start: int, stop: int, scratch: Scratch) -> Iterator[np.ndarray]:
        self.source.count(item)
        return self.source.values.stripes(item, start, stop, scratch)


class _Caught(torch.nn.Module):
    """Stands for the layers and keeps what the first of them is given."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: Tensor | None = None
        self.more: dict[str, Any] = {}

    def forward(self, streams: Tensor, **more: Any) -> Tensor:
        self.streams, self.more = streams, more
        return streams


class _Stacks:
    """Stand for the stacked experts of a layer: of each stack one is in memory, the one that was asked for.

    The layer asks by ascending number for those that its router has chosen.
    """

    def __init__(self, source: Source, weights: ExpertWeights, prefix: str):
        self.source, self.weights, self.prefix = source, weights, prefix
        self._numbers: list[int] = []
        self._coming: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._held: tuple[int, tuple[Tensor, Tensor]] | None = None

    def stand_in(self, experts: Any) -> None:
        """Take the place of both stacks of a layer's experts."""
        experts.gate.register_forward_hook(self._chosen)
        for place, name in enumerate(("gate_up_proj", "down_proj")):
            del experts.experts._parameters[name]
            setattr(experts.experts, name, _Stack(self, place))

    def let_go(self) -> None:
        """Give the memory back, to the next layer's."""
        self._held = None
        for _ in self._coming:
            pass

    def _chosen(self, module: Any, args: Any, output: Any) -> None:
        self.let_go()
        self._numbers = output[2].unique().tolist()
        self._coming = self.weights.each(self.prefix, list(self._numbers))
        for number in self._numbers:
            for item in self.weights.items[self.prefix, number]:
                self.source.count(item)

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        """Both weights of an expert."""
        if self._held is None or self._held[0] != number:
            assert self._numbers.pop(0) == number, "transformers asks for its experts in another order"
            self._held = number, next(self._coming)
        return self._held[1]


class _Stack:
    """One of both stacks, as [experts, rows, columns] is indexed."""

    def __init__(self, stacks: _Stacks, place: int):
        self.stacks, self.place = stacks, place

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        return self.stacks.of(int(expert))[self.place]
