"""A comparison by layers: from the checkpoints to what was found, with progress, and kept on disk on request."""

import time
from collections.abc import Callable
from pathlib import Path

from ..errors import counted, size
from ..files import every_file
from ..free_memory import give_back
from ..spec.spec import ModelSpec
from ..store.checkpoint import open_checkpoint
from ..store.reading import kept_in_cache
from . import walk_state
from .drafts import compare_drafts
from .question import DTYPES, Question, choosing
from .result import TOLERANCES, Narrow, Run, Step
from .verdict import Found
from .walk import State, Walk


def compare_streamed(
    asked: Question, part: tuple[int, int] | None, work: Path | None, say: Callable[[str], None]
) -> tuple[Found, tuple[Step, ...]]:
    """Everything that is asked.

    Args:
        asked: the comparison.
        part: first and last layer; None: all, and what comes behind them.
        work: folder that keeps the state behind every layer, and is gone on from.
        say: told of every layer, with the time that is left.

    Raises:
        BridgeError: a checkpoint that cannot be read, or a state of another comparison.
    """
    tolerance, spec = TOLERANCES[asked.dtype], asked.spec
    first, last = part or (0, spec.num_hidden_layers - 1)
    with open_checkpoint(asked.ours) as ours, open_checkpoint(asked.theirs) as other, kept_in_cache():
        theirs = ours.source if asked.theirs == asked.ours else other.source
        say("embedding the tokens, comparing the tables")
        replay = asked.replay is not False
        walk = Walk(ours.source, theirs, spec, asked.ids, DTYPES[asked.dtype], tolerance, replay, asked.topk)
        of = _fingerprint(asked, part) if work else ""
        state = work and walk_state.load(work, of, asked.device)
        if state:
            say(f"going on behind layer {state.next - 1}, kept in {work}")
        state = state or walk.start(first)
        while state.next <= last:
            state = walk.step(state)
            say(_progress(state, last, spec))
            if work:
                walk_state.save(work, state, of)
        if last < spec.num_hidden_layers - 1:
            runs = [(Run(tuple(w.sites), None), Run(tuple(w.replays), None) if w.replays else None) for w in state.ways]
        else:
            say("running the head and the output layer")
            give_back()
            runs = walk.finish(state)
        drafts = ()
        if spec.mtp_layers and last == spec.num_hidden_layers - 1:
            say("running the MTP blocks, and the formula")
            give_back()
            streams = state.ways[0].theirs.flatten(2).cpu()
            held = walk.ours.held("mtp.", "output_layer.")
            drafts = compare_drafts(walk.ours.model, asked.theirs, asked.ids, streams, tolerance, asked.device, held)
    pairs = [_asked_for(free, replayed, asked) for free, replayed in runs]
    narrow = None
    if asked.topk is not None:
        narrow = Narrow(asked.topk, 1, choosing(asked.ids[:1], asked.topk), *pairs[1])
    return Found(*pairs[0], tuple(state.tables), narrow, drafts), tuple(state.steps)


def _asked_for(free: Run, replayed: Run | None, asked: Question) -> tuple[Run, Run | None]:
    """The replayed run where it is wanted; without a choice that differs it is the free one."""
    if asked.replay is False or (asked.replay is None and free.within(TOLERANCES[asked.dtype])):
        return free, None
    return free, replayed or free


def _fingerprint(asked: Question, part: tuple[int, int] | None) -> str:
    facts = {
        "dtype": asked.dtype,
        "replay": asked.replay,
        "topk": asked.topk,
        "part": part,
        "device": str(asked.device),
    }
    files = [p for folder in (asked.ours, asked.theirs) for p in every_file(folder)]
    return walk_state.fingerprint(facts, files, asked.ids)


def _progress(state: State, last: int, spec: ModelSpec) -> str:
    step = state.steps[-1]
    kind = {0: "window", 4: "CSA", 128: "HCA"}.get(spec.ratio(step.layer), str(spec.ratio(step.layer)))
    some = state.steps[-8:]
    left = (last - step.layer) * sum(s.seconds for s in some) / len(some)
    until = time.strftime("%H:%M:%S", time.gmtime(left)) if left < 86400 else f"{left / 3600:,.0f} hours"
    worst = max((s.error for w in state.ways for s in w.sites if s.layer == step.layer), default=0.0)
    return (
        f"layer {step.layer} ({kind}) of {spec.num_hidden_layers}: worst {worst:.1e}, {step.seconds:,.1f} s, "
        f"{size(step.nbytes)} read, {counted(step.experts, 'expert')}" + (f"; {until} left" if left else "")
    )
