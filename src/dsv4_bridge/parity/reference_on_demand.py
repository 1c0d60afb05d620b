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
from ..mcore.weights.on_demand import RowsOfTable, Source
from ..spec.plan import Item, expand
from ..spec.spec import ModelSpec
from ..store.hf import disk_name
from ..store.values import Scratch, Values
from .reference import copy_stripes, empty_reference, fill_reference


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
        experts: dict[int, dict[tuple[str, int], list[Item]]] = {}
        plan = expand(spec)
        for item in plan.items:
            layer = item.block.index if item.block.kind == "layer" else None
            if item.expert is None or layer is None:
                self._held.setdefault(layer, []).append(item)
            else:
                name = disk_name(item, "modules", spec)[0]
                experts.setdefault(layer, {}).setdefault((name, item.expert), []).append(item)
        self.model.model.embed_tokens = RowsOfTable(self.source, plan.by_name["embed.weight"], dtype)
        stacks: dict[tuple[int, ...], Tensor] = {}  # every layer's experts are read into the same memory
        for index, layer in enumerate(self.model.model.layers):
            for name, stack in list(layer.mlp.experts.named_parameters(recurse=False)):
                del layer.mlp.experts._parameters[name]
                whole = f"model.layers.{index}.mlp.experts.{name}"
                into = stacks.setdefault(stack.shape[1:], torch.empty(stack.shape[1:], dtype=dtype, device=device))
                setattr(layer.mlp.experts, name, _Stack(self.source, experts[index], whole, into))

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
            yield self.model.model.layers[index]

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


class _Stack:
    """[experts, rows, columns] of which one expert is in memory: the last that was asked for."""

    def __init__(self, source: Source, parts: dict[tuple[str, int], list[Item]], name: str, into: Tensor):
        self.source, self.parts, self.name, self.into = source, parts, name, into

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        for item in self.parts[self.name, int(expert)]:
            self.source.count(item)
            first = item.row.part[0] * item.shape[0]
            stripes = self.source.values.stripes(item, 0, item.shape[0], self.source.scratch)
            copy_stripes(self.into[first : first + item.shape[0]], stripes)
        return self.into
