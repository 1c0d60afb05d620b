"""Both models, each whole in memory: the reference is recorded, then ours runs beside the record."""

import gc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..mcore import build_model, load_weights
from ..mcore.layers.indexer import Indexer
from ..spec.spec import ModelSpec
from .drafts import compare_drafts
from .opened import opened
from .question import DTYPES, Question, choosing
from .recording import compare_run
from .reference import Record, record_reference, reference_model, set_index_topk
from .result import TOLERANCES, Narrow, Run
from .tables import compare_tables, kept, our_tables, reference_tables
from .verdict import Found


def compare_whole(asked: Question, say: Callable[[str], None]) -> Found:
    """Everything that is asked, draft blocks among it."""
    ids, spec = asked.ids, asked.spec
    say(f"loading {asked.theirs} into transformers")
    reference = _record(asked.theirs, ids, DTYPES[asked.dtype], asked.device, asked.topk)
    say(f"loading {asked.ours} into the Megatron model")
    model = _load(asked.ours, spec, asked.dtype, ids.shape[1])
    found = _compare(model, ids, reference, asked.dtype, asked.replay, asked.device, say)
    if spec.mtp_layers:
        say("running the MTP blocks, and the formula")
        streams = reference.record.values[f"layers.{spec.num_hidden_layers - 1}", "streams"]
        tolerance = TOLERANCES[asked.dtype]
        found = replace(found, drafts=compare_drafts(model, asked.theirs, ids, streams, tolerance, asked.device))
    return found


@dataclass(frozen=True)
class _Reference:
    """What the reference leaves behind.

    Attributes:
        record: of all rows.
        tables: see `tables.kept`.
        topk: blocks a query in the other pass, None without one.
        narrow: record of the first row in it.
    """

    record: Record
    tables: dict[str, np.ndarray]
    topk: int | None
    narrow: Record | None


def _record(path: Path, ids: Tensor, dtype: torch.dtype, device: torch.device, topk: int | None) -> _Reference:
    with opened(path) as (spec, values):
        model = reference_model(spec, values, dtype, device)
    record, tables = record_reference(model, ids.to(device)), kept(reference_tables(model, spec))
    narrow = None
    if topk is not None:
        set_index_topk(model, topk)
        narrow = record_reference(model, ids[:1].to(device))
    del model
    gc.collect()
    return _Reference(record, tables, topk, narrow)


def _load(path: Path, spec: ModelSpec, dtype: str, length: int) -> Any:
    with warnings.catch_warnings():  # megatron-core warns of defaults of its own
        warnings.simplefilter("ignore")
        model = build_model(spec, dtype=DTYPES[dtype], initialize_weights=False, max_sequence_length=length)
    load_weights(model, path, allow_lossy=True)  # the reference is rounded in the same way
    return model.eval()


def _compare(
    model: Any,
    ids: Tensor,
    reference: _Reference,
    dtype: str,
    replay: bool | None,
    device: torch.device,
    say: Callable[[str], None],
) -> Found:
    free, replayed = _runs(model, ids.to(device), reference.record, dtype, replay, say)
    tables = compare_tables(kept(our_tables(model, model.spec)), reference.tables)
    if reference.narrow is None or reference.topk is None:
        return Found(free, replayed, tables)
    say(f"running the first row, with index_topk {reference.topk} in both models")
    for module in model.modules():
        if isinstance(module, Indexer):
            module.topk = reference.topk
    first = ids[:1]
    runs = _runs(model, first.to(device), reference.narrow, dtype, replay, say)
    return Found(free, replayed, tables, Narrow(reference.topk, 1, choosing(first, reference.topk), *runs))


def _runs(
    model: Any, ids: Tensor, record: Record, dtype: str, replay: bool | None, say: Callable[[str], None]
) -> tuple[Run, Run | None]:
    tolerance = TOLERANCES[dtype]
    say("running, with choices of its own")
    free = compare_run(model, ids, record, False, tolerance)
    if replay is False or (replay is None and free.within(tolerance)):
        return free, None
    say("running, with the reference's choices")
    return free, compare_run(model, ids, record, True, tolerance)
