"""A model larger than memory: its weights come from a checkpoint where they are needed, and go again.

What is held is said by the beginnings of live names, as `decoder.layers.3.`: everything of a layer but its routed
experts, each of which is read when tokens go to it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...codec.tensors import as_tensor
from ...parallel.pieces import Piece, pieces
from ...spec.plan import Item, expand, stored
from ...spec.spec import ModelSpec
from ...store.values import Scratch, Values
from ..config import ON_DEMAND
from ..device import device
from ..layers.moe import ExpertsOnDemand, HashableMoELayer, Part
from ..model import DeepSeekV4Model, build_model
from .absent import memory_for, without_memory
from .experts import ExpertWeights
from .load import fill_item
from .on_device import scratch_for
from .places import place_of


class Source:
    """Where weights come from, and how much was asked for.

    Attributes:
        values: items of the checkpoint.
        nbytes: bytes of a checkpoint that were read.
        experts: how many experts were read, each time counted.
    """

    def __init__(self, values: Values):
        self.values, self.nbytes, self.experts = values, 0, 0
        self.scratch = Scratch()

    def count(self, item: Item, share: float = 1.0) -> None:
        """Note that so large a part of an item is read."""
        size = sum(fact.nbytes for fact in stored(item, self.values.encoding(item)))
        self.nbytes += round(size * share)

    def whole(self, item: Item) -> Iterator[Tensor]:
        """An item, stripe by stripe, decoded."""
        self.count(item)
        return map(as_tensor, self.values.stripes(item, 0, item.shape[0], self.scratch))

    def rows(self, item: Item, ids: Tensor) -> Tensor:
        """Rows of a table that is stored plainly: […] int64 -> […, width], each row read once."""
        wanted, back = ids.cpu().unique(return_inverse=True)
        self.count(item, len(wanted) / item.shape[0])
        found = [as_tensor(next(iter(self.values.stripes(item, i, i + 1, self.scratch)))).clone() for i in wanted]
        return torch.cat(found)[back]


class RowsOfTable(torch.nn.Module):
    """Takes the place of an embedding: rows are read where they are asked for."""

    def __init__(self, source: Source, item: Item, dtype: torch.dtype):
        super().__init__()
        self.source, self.item, self.dtype = source, item, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, h]."""
        return self.source.rows(self.item, ids).to(ids.device, self.dtype)


class _Embedding(RowsOfTable):
    """The same as megatron's model calls it."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """[b, s] -> [s, b, h]."""
        return super().forward(input_ids).transpose(0, 1).contiguous()


class OnDemand:
    """A model with the weights of a checkpoint that are held; on one rank.

    Args:
        values: of the checkpoint.
        spec: its numbers; draft blocks are left out where they say none.
        dtype: of the parameters; wider weights are rounded to it.
        length: tokens a row at most.

    Attributes:
        model: it runs where what it needs is held.
        source: what was read.
        experts: weights of every expert, by the prefix of its block and its number.
    """

    def __init__(self, values: Values, spec: ModelSpec, dtype: torch.dtype, length: int, **settings: Any):
        self.source, self.device = Source(values), device()
        with without_memory():
            model = build_model(
                spec,
                dtype=dtype,
                initialize_weights=False,
                max_sequence_length=length,
                expert_layout=ON_DEMAND,
                **settings,
            )
        self.model: DeepSeekV4Model = model.eval()
        self._scratch = scratch_for(self.device)
        self._held: dict[str, list[tuple[Item, tuple[Piece, ...]]]] = {}
        self.experts: dict[tuple[str, int], list[Item]] = {}
        plan = expand(spec)
        for item in plan.items:
            found = pieces(item, spec, model.topology, model.coordinate, model.chunk)
            if found and item.expert is not None:
                self.experts.setdefault((item.block.prefix, item.expert), []).append(item)
            elif found:
                self._held.setdefault(found[0].name, []).append((item, found))
        (table,) = self.take("embedding.word_embeddings.weight")
        model.embedding = _Embedding(self.source, table, dtype)  # type: ignore[assignment]
        self._weights = ExpertWeights(values, self.experts, dtype, self.device)
        for module in model.modules():
            if isinstance(module, HashableMoELayer) and isinstance(module.experts, ExpertsOnDemand):
                module.experts.run = self._runner(module.block, module.experts)

    def take(self, name: str) -> tuple[Item, ...]:
        """The items of a live tensor, which somebody else holds from now on."""
        return tuple(item for item, _ in self._held.pop(name, ()))

    def size(self, *beginnings: str) -> int:
        """Bytes of memory that `held` takes."""
        named = (*self.model.named_parameters(), *self.model.named_buffers())
        return sum(t.numel() * t.element_size() for name, t in named if t.is_meta and name.startswith(beginnings))

    @contextmanager
    def held(self, *beginnings: str) -> Iterator[None]:
        """In the body the parameters whose names begin so are there, with their values.

        Raises:
            BridgeError: the checkpoint cannot be read.
        """
        model = self.model
        named = (*model.named_parameters(), *model.named_buffers())
        names = [name for name, _ in named if name.startswith(beginnings)]
        with memory_for(model, names, self.device):
            live = dict(model.named_parameters()) | dict(model.named_buffers())
            for name, parts in self._held.items():
                if name.startswith(beginnings):
                    for item, found in parts:
                        self.source.count(item)
                        here = [place_of(item, piece, live) for piece in found]
                        fill_item(item, here, self.source.values, self._scratch, True)
            yield

    def _runner(self, block: str, experts: ExpertsOnDemand) -> Callable[[list[Part]], list[Tensor]]:
        """Reads each expert that has tokens, in turn."""

        def run(parts: list[Part]) -> list[Tensor]:
            prefix, numbers = f"{block}.", [part.expert for part in parts]
            self.source.experts += len(numbers)
            for number in numbers:
                for item in self.experts[prefix, number]:
                    self.source.count(item)
            weights = self._weights.each(prefix, numbers)
            return [experts.of_one(part, *both) for part, both in zip(parts, weights, strict=True)]

        return run
