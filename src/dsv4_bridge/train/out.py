"""The folder of a run: one run at a time, no other checkpoint in it, writable, and large enough."""

import contextlib
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from ..errors import BridgeError, size
from ..lock import hold
from ..spec.plan import expand
from ..spec.spec import ModelSpec
from ..store.megatron import looks_megatron
from ..store.safetensors import INDEX
from .recipe import Recipe

_RELEASED = ("config.json", INDEX, ".dsv4-partial")
_SLACK = 64 << 20


def run_lock(recipe: Recipe) -> AbstractContextManager[None]:
    """Rank 0 keeps other runs out of `out`; the other ranks follow it.

    Raises:
        BridgeError: another run is writing there, or it cannot be written.
    """
    _check_place(recipe)
    return hold(Path(recipe.out), _doing(recipe)) if _first() else contextlib.nullcontext()


def check_out(recipe: Recipe) -> None:
    """Refuse a folder that holds something else or cannot be written.

    Raises:
        BridgeError: the first of these that is so.
    """
    out, doing = Path(recipe.out), _doing(recipe)
    there = [name for name in _RELEASED if (out / name).exists()]
    there += sorted(p.name for p in out.glob("*.safetensors"))[:1]
    if there:
        raise BridgeError(f"{doing} holds another checkpoint ({there[0]}); name a folder of its own")
    if (out / "chat_data.json").exists():
        raise BridgeError(f"{doing} is training data that dsv4 data made; name a folder of its own")
    if not _first():
        return
    try:
        probe = _there(out) / ".dsv4-probe"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise BridgeError(f"{doing} cannot be written ({error.strerror or error}); name another folder") from None


def check_room(recipe: Recipe, spec: ModelSpec) -> None:
    """Refuse a disk that has no room for the checkpoints to come.

    Raises:
        BridgeError: with what they take and what is free.
    """
    out, doing = Path(recipe.out), _doing(recipe)
    if not recipe.out or not _first():
        return
    need, free = _checkpoint_bytes(recipe, spec) * _to_come(recipe, out), shutil.disk_usage(_there(out)).free
    if need + _SLACK > free:
        raise BridgeError(
            f"{doing}: its checkpoints (checkpoint.keep={recipe.checkpoint.keep}, and one more while it is written) "
            f"take {size(need)} more and {size(_SLACK)} to spare, and {size(free)} are free there; keep fewer, say "
            "checkpoint.optimizer=false, or name a larger disk"
        )


def _check_place(recipe: Recipe) -> None:
    out, doing = Path(recipe.out), _doing(recipe)
    if out.exists() and not out.is_dir():
        raise BridgeError(f"{doing} is no folder; name one for checkpoints and logs")
    start = Path(recipe.start)
    if recipe.start and not looks_megatron(start) and out.resolve().is_relative_to(start.resolve()):
        raise BridgeError(f"{doing} lies in start={recipe.start}, a released folder; name another")


def _checkpoint_bytes(recipe: Recipe, spec: ModelSpec) -> int:
    """About the size of one checkpoint: weights, and AdamW's or Muon's float32 state of what is trained."""
    if recipe.lora.rank:
        return 0  # adapters: megabytes
    built = spec if recipe.model.mtp and not spec.dspark else spec.without_draft()
    values = sum(i.numel for i in expand(built).items if not i.passenger and i.row.encoding != "int")
    narrow = recipe.model.dtype == "bf16"
    state = 4 * (2 if recipe.optimizer.name == "adamw" else 1) + 4 * narrow
    return values * ((2 if narrow else 4) + state * recipe.checkpoint.optimizer)


def _to_come(recipe: Recipe, out: Path) -> int:
    """Checkpoints that will be there at a time, those not counted that are."""
    saves = -(-recipe.schedule.steps // recipe.checkpoint.save_every)
    there = sum(1 for p in out.glob("iter_*") if p.is_dir())
    return max(1, min(recipe.checkpoint.keep + 1, saves) - there)


def _there(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _doing(recipe: Recipe) -> str:
    return f"training with recipe {recipe.name}: out={recipe.out}"
