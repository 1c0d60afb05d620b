"""`parity`: both models on the same tokens, one after the other."""

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BridgeError, files_named
from ..files import AnyPath
from ..spec.plan import Plan, expand
from ..spec.spec import ModelSpec
from .inputs import Inputs, token_ids
from .memory import check_memory, needed
from .opened import opened, spec_of, whole_spec_of
from .reference import Record, record_reference, reference_model, set_index_topk
from .result import TOLERANCES, Narrow, ParityReport, Run
from .tables import compare_tables, kept, our_tables, reference_tables
from .verdict import Found, judge, unlooked_at

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_NARROW = 8  # blocks a query, of 75 in the default sample: few enough that they are gathered, not masked
_PACKAGES = ("dsv4-bridge", "torch", "transformers", "megatron-core")


@files_named("comparing")
def parity(
    checkpoint: AnyPath,
    *,
    reference_checkpoint: AnyPath | None = None,
    inputs: Inputs | None = None,
    dtype: str = "float32",
    replay: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ParityReport:
    """Compare our model's forward pass with transformers', sub-layer by sub-layer.

    One model is in memory at a time: the reference runs first and is recorded, then ours is compared
    with the record as it runs. Tables that are looked up by token are compared whole. Where nothing is said of the
    tokens and they are too few for an indexer to choose, the first row runs again with a smaller choice in both
    models. MTP blocks, which transformers lacks, are compared with a formula.

    Args:
        checkpoint: Hugging Face folder of any encoding, or Megatron checkpoint.
        reference_checkpoint: what transformers' model holds, the same by default.
        inputs: the tokens; seeded random ones by default.
        dtype: `float32` or `bf16`, of both models.
        replay: also run ours with the reference's choices of experts and blocks; None: where the free
            run is beyond tolerance.
        say: told what begins, a line at a time.

    Raises:
        BridgeError: unusable input, a package missing, or not enough memory (said before loading).
    """
    began = time.monotonic()
    if dtype not in DTYPES:
        raise BridgeError(f"comparing in {dtype!r}: expected one of {', '.join(DTYPES)}")
    ours, theirs = Path(checkpoint), Path(reference_checkpoint or checkpoint)
    spec = spec_of(ours)
    _check_same(spec, ours, theirs)
    ids, facts = token_ids(inputs or Inputs(), spec, (ours, theirs))
    from .drafts import compare_drafts, left_out

    wholes = whole_spec_of(ours), whole_spec_of(theirs)
    skipped = left_out(*wholes)
    full = wholes[0] if skipped is None else spec
    plan, topk = expand(full), _narrowed(inputs, ids, spec)
    bytes_needed = needed(plan, ids.shape[0], ids.shape[1], DTYPES[dtype], 1 if topk is None else 2)
    device = _device()
    check_memory(bytes_needed, device, spec, dtype)
    say(f"loading {theirs} into transformers")
    reference = _record(theirs, ids, DTYPES[dtype], device, topk)
    say(f"loading {ours} into the Megatron model")
    model = _load(ours, full, dtype, ids.shape[1])
    found = _compare(model, ids, reference, dtype, replay, device, say)
    tolerance = TOLERANCES[dtype]
    if full.mtp_layers:
        say("running the MTP blocks, and the formula")
        streams = reference.record.values[f"layers.{spec.num_hidden_layers - 1}", "streams"]
        found = replace(found, drafts=compare_drafts(model, theirs, ids, streams, tolerance))
    facts |= _exercised(ids, spec.vocab_size, spec.index_topk)
    return ParityReport(
        str(ours),
        str(theirs),
        "transformers",
        dtype,
        device.type,
        facts,
        _layers(plan),
        _versions(),
        tolerance,
        found.free,
        found.replayed,
        found.tables,
        found.narrow,
        found.drafts,
        skipped,
        judge(found, tolerance, plan, unlooked_at(facts, spec, found.narrow)),
        bytes_needed,
        time.monotonic() - began,
    )


def _narrowed(inputs: Inputs | None, ids: Tensor, spec: ModelSpec) -> int | None:
    """How many blocks a query may choose in another pass; None: none is needed, or the tokens were given."""
    blocks = ids.shape[1] // 4
    if not (inputs or Inputs()).own or 4 not in spec.compress_ratios[: spec.num_hidden_layers]:
        return None
    return None if blocks > spec.index_topk else _NARROW


def _exercised(ids: Tensor, vocab_size: int, topk: int) -> dict[str, int]:
    """Distinct token ids, and queries of one layer whose indexer had more blocks than it may choose."""
    return {"ids": len(ids.unique()), "vocab_size": vocab_size, "chosen": _choosing(ids, topk)}


def _choosing(ids: Tensor, topk: int) -> int:
    return ids.shape[0] * max(0, ids.shape[1] - 4 * (topk + 1) + 1)


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
    from ..mcore import build_model, load_weights

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
    from ..mcore.layers.indexer import Indexer

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
    return Found(free, replayed, tables, Narrow(reference.topk, 1, _choosing(first, reference.topk), *runs))


def _runs(
    model: Any, ids: Tensor, record: Record, dtype: str, replay: bool | None, say: Callable[[str], None]
) -> tuple[Run, Run | None]:
    from .recording import compare_run

    tolerance = TOLERANCES[dtype]
    say("running, with choices of its own")
    free = compare_run(model, ids, record, False, tolerance)
    if replay is False or (replay is None and free.within(tolerance)):
        return free, None
    say("running, with the reference's choices")
    return free, compare_run(model, ids, record, True, tolerance)


def _device() -> torch.device:
    try:
        from ..mcore.device import device
    except ImportError:
        raise BridgeError(
            "comparing with our model: megatron-core is not installed; pip install 'dsv4-bridge[megatron,hf]'"
        ) from None
    return device()


def _check_same(spec: ModelSpec, ours: Path, theirs: Path) -> None:
    other = spec_of(theirs) if theirs != ours else spec
    if differing := [n for n in vars(spec) if getattr(spec, n) != getattr(other, n)]:
        what = ", ".join(f"{n} {getattr(spec, n)} and {getattr(other, n)}" for n in differing[:4])
        raise BridgeError(f"comparing {ours} with {theirs}: their numbers differ ({what}); parity needs one model")


def _layers(plan: Plan) -> tuple[str, ...]:
    kinds = {0: "window", 4: "CSA", 128: "HCA"}
    found = {i.block.index: i.block for i in plan.items if i.block.kind == "layer"}
    return tuple(
        f"{kinds.get(b.ratio, b.ratio)}, {'hashed' if b.hashed else 'routed'}" for _, b in sorted(found.items())
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
