"""Checkpoints that megatron-core itself writes and reads, in the folder layout of the rest of the package."""

import contextlib
import io
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from ..errors import BridgeError
from ..run_config import FILE as RUN_CONFIG
from ..run_config import run_config
from ..store.megatron import TRACKER
from ..store.torch_dist import find_iteration
from .model import DeepSeekV4Model

_PART = ".part"


def save_checkpoint(model: DeepSeekV4Model, root: Path | str, iteration: int = 0) -> Path:
    """Save the model through `megatron.core.dist_checkpointing`; every rank calls it.

    Args:
        model: the model.
        root: checkpoint root; the iteration's folder must not exist yet.
        iteration: its number.

    Returns:
        The iteration folder, `root/iter_NNNNNNN`. It appears when it is complete, and the tracker
        names it last: a run that dies while saving leaves the checkpoint before.

    Raises:
        BridgeError: the folder is in the way, or cannot be written.
    """
    final = Path(root) / f"iter_{iteration:07d}"
    part = final.with_name(final.name + _PART)
    if final.exists():
        raise BridgeError(f"saving {final}: it exists; save another iteration or remove it")
    try:
        with _first_rank_first() as first:
            if first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
        state = {"iteration": iteration, "checkpoint_version": 3.0} | model.sharded_state_dict()
        with _quiet():
            dist_checkpointing.save(state, str(part))
        with _first_rank_first() as first:
            if first:
                source = {"variant": "saved by megatron-core", "own_mtp_head": False, "passengers": False}
                (part / RUN_CONFIG).write_bytes(run_config(_built(model), source))
                part.rename(final)
                _replace(Path(root) / TRACKER, str(iteration).encode())
    except OSError as error:
        raise BridgeError(f"saving {final}: {error.strerror or error}") from None
    return final


def load_checkpoint(model: DeepSeekV4Model, checkpoint: Path | str) -> int:
    """Load a torch_dist checkpoint through `megatron.core.dist_checkpointing`, strictly; every rank calls it.

    `load_weights` reads the same folders with this package's own reader, and Hugging Face ones too.

    Args:
        model: the model.
        checkpoint: root or iteration folder.

    Returns:
        The iteration.

    Raises:
        BridgeError: no checkpoint, or keys that are missing in it or in the model.
    """
    folder, _ = find_iteration(checkpoint)
    with _quiet():
        loaded: Any = dist_checkpointing.load(model.sharded_state_dict(), str(folder), strict="return_all")
    state, missing, unexpected = loaded
    # Megatron's words: `unexpected` keys are the model's, `missing` ones the checkpoint's.
    strange = sorted(k for k in missing if not k.endswith("_extra_state") and not _of_training(k))
    if unexpected or strange:
        raise BridgeError(
            f"loading {folder}: {len(unexpected)} keys of the model are not in it ({sorted(unexpected)[:3]}), "
            f"{len(strange)} keys in it are not the model's ({strange[:3]})"
        )
    iteration = int(state.pop("iteration", 0))
    own = {key: value for key, value in state.items() if key in model.state_dict()}
    model.load_state_dict(own)
    return iteration


def _of_training(key: str) -> bool:
    return key.startswith(("optimizer", "chained_", "rng_state", "rerun_state", "common_state"))


def _built(model: DeepSeekV4Model) -> Any:
    return model.spec.without_draft() if model.spec.dspark or not model.config.mtp_num_layers else model.spec


@contextlib.contextmanager
def _first_rank_first() -> Iterator[bool]:
    """Whether this is rank 0; the others leave the body when it is done there."""
    try:
        yield dist.get_rank() == 0
    finally:
        dist.barrier()


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + _PART)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """megatron-core warns about its own older formats at every save."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
