"""`parity`: both models on the same tokens, one after the other, whole or by layers."""

import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BridgeError, files_named
from ..files import AnyPath
from ..spec.plan import Plan, check_computed, expand
from ..spec.spec import ModelSpec
from .inputs import Inputs, token_ids
from .memory import check_memory, needed, needed_streamed
from .opened import spec_of, whole_spec_of
from .question import DTYPES, Question, choosing
from .result import TOLERANCES, ParityReport
from .verdict import judge, unlooked_at

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
    stream: bool = True,
    layers: tuple[int, int] | None = None,
    work: AnyPath | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ParityReport:
    """Compare our model's forward pass with transformers', sub-layer by sub-layer.

    One layer of one model is in memory at a time: its weights are read, of experts those that tokens go to, the
    reference's layer is recorded, and ours is compared with the record as it runs; what goes on are the activations.
    Or one whole model, the reference first: the numbers are the same. Tables that are looked up by token are compared
    whole.
    Where nothing is said of the tokens and they are too few for an indexer to choose, the first row runs again with a
    smaller choice in both models. MTP blocks, which transformers lacks, are compared with a formula.

    Args:
        checkpoint: Hugging Face folder of any encoding, or Megatron checkpoint.
        reference_checkpoint: what transformers' model holds, the same by default.
        inputs: the tokens; seeded random ones by default.
        dtype: `float32` or `bf16`, of both models.
        replay: also run ours with the reference's choices of experts and blocks; None: where the free
            run is beyond tolerance.
        stream: a layer at a time, or whole models.
        layers: first and last of those that are compared; those from 1 on start with the embeddings' streams.
        work: folder that keeps what is known behind every layer: the same comparison, started again, goes on there.
        say: told what begins, a line at a time.

    Raises:
        BridgeError: unusable input, a package missing, or not enough memory (said before loading).
    """
    began = time.monotonic()
    if dtype not in DTYPES:
        raise BridgeError(f"comparing in {dtype!r}: expected one of {', '.join(DTYPES)}")
    ours, theirs = Path(checkpoint), Path(reference_checkpoint or checkpoint)
    spec = spec_of(ours)
    check_computed(spec, f"comparing {ours}")
    _check_same(spec, ours, theirs)
    part = _part(layers, spec)
    if not stream and (part or work):
        raise BridgeError("comparing: a part of the layers, and a folder to go on from, are of a streamed comparison")
    ids, facts = token_ids(inputs or Inputs(), spec, (ours, theirs))
    device = _device()
    from .drafts import left_out

    wholes = whole_spec_of(ours), whole_spec_of(theirs)
    skipped = left_out(*wholes)
    if part and part[1] < spec.num_hidden_layers - 1 and wholes[0].mtp_layers:
        skipped = "MTP blocks, for a part of the layers is compared"
    full = wholes[0] if skipped is None else spec
    plan, topk = expand(full), _narrowed(inputs, ids, spec)
    asked = Question(ours, theirs, full, ids, dtype, device, replay, topk)
    bytes_needed = _bytes(asked, plan, stream)
    check_memory(bytes_needed, device, spec, dtype, stream)
    if stream:
        from .streamed import compare_streamed

        found, steps = compare_streamed(asked, part, Path(work) if work else None, say)
    else:
        from .whole import compare_whole

        found, steps = compare_whole(asked, say), ()
    tolerance = TOLERANCES[dtype]
    facts |= _exercised(ids, spec.vocab_size, spec.index_topk)
    if part:
        facts |= {"layers": list(part)}
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
        steps,
    )


def _part(layers: tuple[int, int] | None, spec: ModelSpec) -> tuple[int, int] | None:
    """First and last layer; None: all."""
    if layers is None or layers == (0, spec.num_hidden_layers - 1):
        return None
    first, last = layers
    if not 0 <= first <= last < spec.num_hidden_layers:
        raise BridgeError(
            f"comparing layers {first} to {last}: expected some of 0 to {spec.num_hidden_layers - 1}, the first first"
        )
    return layers


def _bytes(asked: Question, plan: Plan, stream: bool) -> int:
    """Bytes at the peak."""
    (batch, length), dtype, ways = asked.ids.shape, DTYPES[asked.dtype], 1 if asked.topk is None else 2
    if stream:
        return needed_streamed(plan, batch, length, dtype, asked.ours == asked.theirs, ways)
    return needed(plan, batch, length, dtype, ways)


def _narrowed(inputs: Inputs | None, ids: Tensor, spec: ModelSpec) -> int | None:
    """How many blocks a query may choose in another pass; None: none is needed, or the tokens were given."""
    blocks = ids.shape[1] // 4
    if not (inputs or Inputs()).own or 4 not in spec.compress_ratios[: spec.num_hidden_layers]:
        return None
    return None if blocks > spec.index_topk else _NARROW


def _exercised(ids: Tensor, vocab_size: int, topk: int) -> dict[str, int]:
    """Distinct token ids, and queries of one layer whose indexer had more blocks than it may choose."""
    return {"ids": len(ids.unique()), "vocab_size": vocab_size, "chosen": choosing(ids, topk)}


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
