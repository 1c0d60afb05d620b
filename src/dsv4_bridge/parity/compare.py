"""`parity`: both models on the same tokens, one after the other."""

import gc
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BridgeError, files_named
from ..items import Plan, expand
from ..spec import ModelSpec
from .inputs import Inputs, token_ids
from .memory import check_memory, needed
from .opened import opened, spec_of
from .reference import Record, record_reference, reference_model
from .result import TOLERANCES, ParityReport, Run
from .verdict import judge, unlooked_at

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_PACKAGES = ("dsv4-bridge", "torch", "transformers", "megatron-core")


@files_named("comparing")
def parity(
    checkpoint: Path | str,
    *,
    reference_checkpoint: Path | str | None = None,
    inputs: Inputs | None = None,
    dtype: str = "float32",
    replay: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ParityReport:
    """Compare our model's forward pass with transformers', sub-layer by sub-layer.

    One model is in memory at a time: the reference runs first and is recorded, then ours is compared
    with the record as it runs. MTP and DSpark blocks, which transformers lacks, take no part.

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
    plan = expand(spec)
    bytes_needed = needed(plan, ids.shape[0], ids.shape[1], DTYPES[dtype])
    device = _device()
    check_memory(bytes_needed, device, spec, dtype)
    say(f"loading {theirs} into transformers")
    record = _record(theirs, ids, DTYPES[dtype], device)
    say(f"loading {ours} into the Megatron model")
    free, replayed = _runs(ours, spec, ids, record, dtype, replay, device, say)
    tolerance = TOLERANCES[dtype]
    facts |= _exercised(ids, spec)
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
        free,
        replayed,
        judge(free, replayed, tolerance, plan, unlooked_at(facts, spec)),
        bytes_needed,
        time.monotonic() - began,
    )


def _exercised(ids: Tensor, spec: ModelSpec) -> dict[str, int]:
    """Distinct token ids, and queries of one layer whose indexer had more blocks than it may choose."""
    batch, length = ids.shape
    return {
        "ids": len(ids.unique()),
        "vocab_size": spec.vocab_size,
        "chosen": batch * max(0, length - 4 * (spec.index_topk + 1) + 1),
    }


def _record(path: Path, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Record:
    with opened(path) as (spec, values):
        model = reference_model(spec, values, dtype, device)
    record = record_reference(model, ids.to(device))
    del model
    gc.collect()
    return record


def _runs(
    path: Path,
    spec: ModelSpec,
    ids: Tensor,
    record: Record,
    dtype: str,
    replay: bool | None,
    device: torch.device,
    say: Callable[[str], None],
) -> tuple[Run, Run | None]:
    from ..mcore import build_model, load_weights
    from .recording import compare_run

    with warnings.catch_warnings():  # megatron-core warns of defaults of its own
        warnings.simplefilter("ignore")
        model = build_model(spec, dtype=DTYPES[dtype], initialize_weights=False, max_sequence_length=ids.shape[1])
    load_weights(model, path, allow_lossy=True)  # the reference is rounded in the same way
    model.eval()
    ids, tolerance = ids.to(device), TOLERANCES[dtype]
    say("running, with choices of its own")
    free = compare_run(model, ids, record, False, tolerance)
    if replay is False or (replay is None and free.within(tolerance)):
        return free, None
    say("running, with the reference's choices")
    return free, compare_run(model, ids, record, True, tolerance)


def _device() -> torch.device:
    try:
        from ..mcore.runtime import device
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
