"""Where a run goes on: how far it is, and whether it is still the run that its last checkpoint is of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BridgeError
from ..spec.megatron import naming_of
from ..spec.spec import ModelSpec
from ..store.megatron import TRACKER
from ..store.run_config import FILE, read_run_config
from ..store.torch_dist.reader import last_iteration, open_torch_dist
from ..strict_json import read_json
from .choose import load, values
from .recipe import Recipe

PROGRESS = "training.json"
RECIPE = "recipe.yaml"
_FORMAT = "metadata.json"  # megatron's, beside the index
_MOST_BYTES = 1 << 16
# What the tensors of a checkpoint follow from, and what those of its optimizer do.
_MODEL = ("model.mtp", "lora.rank", "lora.alpha", "lora.targets", "lora.dora")
_OPTIMIZER = ("optimizer.name", "optimizer.distributed", "losses.indexer")


@dataclass
class State:
    """How far a run is.

    Attributes:
        step: steps made.
        rows: rows of data they took.
        tokens: tokens in these rows.
    """

    step: int = 0
    rows: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from.

    Attributes:
        folder: the iteration.
        state: how far it is.
        changed: values that are others than when it was saved, in words.
    """

    folder: Path
    state: State
    changed: tuple[str, ...]


def find_resumed(recipe: Recipe, spec: ModelSpec) -> Resumed | None:
    """The last checkpoint of a run, which must be of the same model and optimizer; no tensor is read.

    Args:
        recipe: the run; None if its `out` has no checkpoint.
        spec: the model's numbers.

    Raises:
        BridgeError: it is damaged or was not saved by training; it is of another model, other adapters or another
            optimizer.
    """
    folder = last_iteration(Path(recipe.out))
    if folder is None:
        return None
    path, doing = folder / PROGRESS, f"resuming {recipe.out}"
    _check_whole(folder, doing)
    if not path.exists():
        raise BridgeError(
            f"{doing}: {folder.name} has no {PROGRESS}, it was not saved by training; "
            "say start=FOLDER to begin from its weights, and another out"
        )
    before, now = values(load(folder / RECIPE).recipe), values(recipe)
    differing = {key: (before[key], now[key]) for key in now if before[key] != now[key]}
    anew = f"start={recipe.out} and another out to begin from its weights" if not before["lora.rank"] else "another out"
    for key in _MODEL:
        if key in differing:
            raise BridgeError(f"{doing}: {_told(key, *differing[key])}; leave it, or say {anew}")
    recorded = read_run_config(folder / FILE)
    if recorded and recorded[0] != spec:
        raise BridgeError(
            f"{doing}: {_other(recorded[0], spec)}; give the model that it began with (--tiny, if it was), or another "
            "out"
        )
    if recipe.checkpoint.optimizer:
        without = "checkpoint.optimizer=false to go on without the optimizer's state"
        if not before["checkpoint.optimizer"]:
            raise BridgeError(f"{doing}: {folder.name} was saved without optimizer state; say {without}")
        for key in _OPTIMIZER:
            if key in differing:
                raise BridgeError(f"{doing}: {_told(key, *differing[key])}; leave it, or say {without}, or {anew}")
    changed = tuple(f"{key} {was!r} -> {became!r}" for key, (was, became) in differing.items())
    return Resumed(folder, _progress(path, doing), changed)


def _progress(path: Path, doing: str) -> State:
    said = read_json(path, _MOST_BYTES, "go back to an earlier one")
    whole = all(type(said.get(name)) is int and 0 <= said[name] < 1 << 63 for name in vars(State()))
    if not whole or said.keys() != vars(State()).keys():
        raise BridgeError(
            f"{doing}: {path} does not say steps, rows and tokens as whole numbers; go back to an earlier one"
        )
    return State(**said)


def _check_whole(folder: Path, doing: str) -> None:
    """Whether what the checkpoint says of itself is there: its index, and files as long as that wants them."""
    naming = "gpt"
    try:
        with open_torch_dist(folder) as reader:
            naming = naming_of(reader.tensors)
        wrong = "" if (folder / _FORMAT).is_file() else f"{folder} has no {_FORMAT}"
    except BridgeError as error:
        wrong = str(error)
    if naming != "gpt":
        raise BridgeError(
            f"{doing}: the tensors of {folder.name} have {naming} names, and a run goes on from gpt ones; "
            f"`dsv4 rename {folder} OUT --naming gpt` makes a folder that it goes on from"
        )
    if wrong:
        raise BridgeError(
            f"{doing}: {wrong}. Go back to an earlier checkpoint: write its number into {folder.parent / TRACKER}"
        )


def _told(key: str, was: Any, now: Any) -> str:
    return f"{key} is {_plain(now)!r}, the run has {_plain(was)!r}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _other(was: ModelSpec, now: ModelSpec) -> str:
    names = [name for name in vars(was) if getattr(was, name) != getattr(now, name)]
    return "the model is another: " + ", ".join(
        f"{name} is {_plain(getattr(now, name))!r}, the run has {_plain(getattr(was, name))!r}" for name in names[:3]
    )
