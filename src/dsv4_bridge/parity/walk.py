"""Both models a layer at a time, for what does not fit into memory: the same comparison, layer by layer.

Behind each layer of the reference follows the same layer of ours, and neither outlives it; what goes on are streams.
The way with replayed choices parts from the free one where a choice first differs: until then they are one.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mcore.layers.indexer import Indexer
from ..mcore.layers.observe import watching
from ..mcore.weights.on_demand import OnDemand, Source
from ..spec.spec import ModelSpec
from ..store.values import Values
from .metrics import compare_rows_of_logits, rows_at_once
from .recording import Watcher
from .reference import Record, head_hooks, hooked, layer_hooks, set_index_topk
from .reference_on_demand import ReferenceOnDemand
from .result import Run, SiteResult, Step, Tolerance
from .tables import Table, compare_tables, digests, kept, our_table, reference_table

_LOGITS = 128 << 20  # bytes of them at a time, about


@dataclass
class Way:
    """One pass through the layers, as far as it has come.

    Attributes:
        ids: [b, s] tokens.
        topk: blocks a query in both models; None: as many as the model says.
        theirs: the reference's streams, [b, s, n, h].
        free: ours with its own choices, [s, b, n*h].
        replayed: ours with the reference's; None: nothing differed yet.
        sites: of the free way.
        replays: of the replayed, with those that it shares.
    """

    ids: Tensor
    topk: int | None
    theirs: Tensor
    free: Tensor
    replayed: Tensor | None = None
    sites: list[SiteResult] = field(default_factory=list)
    replays: list[SiteResult] = field(default_factory=list)


@dataclass
class State:
    """What a walk has found, and where it goes on.

    Attributes:
        next: number of the layer that comes next.
        ways: the pass over all rows, and the one with a smaller choice.
        tables: what both models look up by token.
        steps: the layers behind it.
    """

    next: int
    ways: list[Way]
    tables: list[Table] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


class Walk:
    """The comparison of two checkpoints.

    Args:
        ours: values of our model's checkpoint.
        theirs: of the reference's, the same object where it is one checkpoint.
        spec: the numbers; with draft blocks where they are compared.
        ids: [b, s] int64.
        dtype: of both models.
        tolerance: for near-ties.
        replay: whether there is a way with the reference's choices.
        topk: blocks a query of another pass with the first row, or None.
    """

    def __init__(
        self,
        ours: Values,
        theirs: Values,
        spec: ModelSpec,
        ids: Tensor,
        dtype: torch.dtype,
        tolerance: Tolerance,
        replay: bool,
        topk: int | None,
    ):
        self.spec, self.ids, self.tolerance, self.replay, self.topk = spec, ids, tolerance, replay, topk
        self.same = ours is theirs
        self.ours = OnDemand(ours, spec, dtype, ids.shape[1])
        self.device, self.dtype = self.ours.device, dtype
        self.theirs = ReferenceOnDemand(theirs, spec.without_draft(), dtype, self.device)
        # What the reference hands to its layers beside the streams, and what ours does, by rows.
        self.given = {len(x): self.theirs.given(x.to(self.device)) for x in self._rows()}
        self.rotary = self.ours.model.rotary(ids.to(self.device), None)

    def _rows(self) -> list[Tensor]:
        return [self.ids] if self.topk is None else [self.ids, self.ids[:1]]

    def start(self, layer: int = 0) -> State:
        """In front of a layer, with the streams that embeddings make."""
        ways = []
        for ids, topk in zip(self._rows(), (None, self.topk), strict=False):
            theirs = self.given[len(ids)][0]
            embedded = self.ours.model.embedding(input_ids=ids.to(self.device), position_ids=None)
            ways.append(Way(ids, topk, theirs, embedded.repeat(1, 1, self.spec.hc_mult)))
        return State(layer, ways, self._embedding())

    @torch.no_grad()
    def step(self, state: State) -> State:
        """Through the next layer."""
        began, layer = time.monotonic(), state.next
        before = self._read()
        with self.theirs.layer(layer) as module:
            records = [self._reference(module, layer, way) for way in state.ways]
            theirs = kept([reference_table(module, layer, self.spec)])
        model = self.ours.model
        with self.ours.held(f"decoder.layers.{layer}."):
            for way, record in zip(state.ways, records, strict=True):
                self._ours(model.decoder.layers[layer], layer, way, record)
            ours = kept([our_table(model.decoder.layers[layer], layer, self.spec)])
        tables = [*state.tables, *compare_tables(ours, theirs)]
        read = [now - then for now, then in zip(self._read(), before, strict=True)]
        steps = [*state.steps, Step(layer, time.monotonic() - began, read[0], read[1])]
        return State(layer + 1, state.ways, tables, steps)

    def _reference(self, module: Any, layer: int, way: Way) -> Record:
        record, more = Record(), self.given[len(way.ids)][1]
        set_index_topk(module, way.topk or self.spec.index_topk)
        with hooked(layer_hooks(module, layer, record)):
            way.theirs = module(way.theirs, **more)
        return record

    def _ours(self, module: torch.nn.Module, layer: int, way: Way, record: Record) -> None:
        for part in module.modules():
            if isinstance(part, Indexer):
                part.topk = way.topk or self.spec.index_topk
        start = way.free
        way.free, sites = self._watched(module, way.free, way, record, False)
        if self.replay and (way.replayed is not None or any(site.flips for site in sites)):
            if way.replayed is None:
                way.replayed, way.replays = start, list(way.sites)
            way.replayed, replays = self._watched(module, way.replayed, way, record, True)
            way.replays += replays
        way.sites += sites

    def _watched(
        self, module: torch.nn.Module, streams: Tensor, way: Way, record: Record, replay: bool
    ) -> tuple[Tensor, list[SiteResult]]:
        ids = way.ids.to(self.device)
        watcher = Watcher(record, (ids.shape[0], ids.shape[1]), replay, self.tolerance, self.spec.num_hash_layers)
        with watching(watcher):
            streams = module(streams, self.rotary, ids, None, None)
        watcher.check_all_seen()
        return streams, watcher.found

    @torch.no_grad()
    def finish(self, state: State) -> list[tuple[Run, Run | None]]:
        """Behind the last layer: of every way the free run and, where it parted, the one with replayed choices."""
        hidden: list[tuple[Tensor, list[Tensor]]] = []
        model = self.ours.model
        with self.theirs.head() as head, self.ours.held("decoder.hc_head_", "decoder.final_layernorm."):
            for way in state.ways:
                record = Record()
                with hooked(head_hooks(self.theirs.model, record)):
                    other = head(way.theirs)
                found = []
                for streams, sites in ((way.free, way.sites), (way.replayed, way.replays)):
                    if streams is not None:
                        watcher = Watcher(record, (way.ids.shape[0], way.ids.shape[1]), False, self.tolerance, 0)
                        with watching(watcher):
                            found.append(model.decoder.head(streams).transpose(0, 1))
                        sites.extend(watcher.found)
                hidden.append((other, found))
        with ExitStack() as held:
            held.enter_context(self.ours.held("output_layer."))
            project = self._project if self.same else held.enter_context(self.theirs.output())
            return [self._runs(way, *both, project) for way, both in zip(state.ways, hidden, strict=True)]

    def _project(self, hidden: Tensor) -> Tensor:
        """[positions, h] -> [positions, vocabulary], by our output layer."""
        return self.ours.model.output_layer(hidden.unsqueeze(1))[0].squeeze(1)

    def _runs(
        self, way: Way, theirs: Tensor, ours: list[Tensor], project: Callable[[Tensor], Tensor]
    ) -> tuple[Run, Run | None]:
        least = rows_at_once(self.spec.vocab_size)
        step = least * max(1, _LOGITS // (least * self.spec.vocab_size * theirs.element_size()))
        flat = theirs.flatten(0, 1)

        def compared(mine: Tensor) -> Any:
            mine = mine.flatten(0, 1)
            cuts = (slice(at, at + step) for at in range(0, len(flat), step))
            parts = ((self._project(mine[rows]).cpu(), project(flat[rows]).cpu()) for rows in cuts)
            return compare_rows_of_logits(parts, (way.ids.shape[0], way.ids.shape[1]))

        free = Run(tuple(way.sites), compared(ours[0]))
        return free, Run(tuple(way.replays), compared(ours[1])) if len(ours) > 1 else None

    def _embedding(self) -> list[Table]:
        ours = {"embed.weight": _digests(self.ours.source, self.spec, self.dtype)}
        if self.same:
            return list(compare_tables(ours, ours))
        return list(compare_tables(ours, {"embed.weight": _digests(self.theirs.source, self.spec, self.dtype)}))

    def _read(self) -> tuple[int, int]:
        sources = self.ours.source, self.theirs.source
        return sum(s.nbytes for s in sources), self.ours.source.experts


def _digests(source: Source, spec: ModelSpec, dtype: torch.dtype) -> np.ndarray:
    from ..spec.plan import expand

    item = expand(spec).by_name["embed.weight"]
    return np.concatenate([digests(stripe.to(dtype)) for stripe in source.whole(item)])
