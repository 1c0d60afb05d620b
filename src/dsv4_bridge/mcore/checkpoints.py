"""Checkpoints that megatron-core itself writes and reads, in the folder layout of the rest of the package.

They do not depend on the layout that saved them: layers and experts have their global numbers, and the
optimizer's state is stored in the shape of the parameters it belongs to (`fully_reshardable`).
"""

import contextlib
import io
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from ..errors import BridgeError
from ..run_config import FILE as RUN_CONFIG
from ..run_config import run_config
from ..store.megatron import TRACKER
from ..store.torch_dist import find_iteration
from .model import DeepSeekV4Model

_PART = ".part"
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}

Chunks = DeepSeekV4Model | Sequence[DeepSeekV4Model]


def save_checkpoint(model: Chunks, root: Path | str, iteration: int = 0, optimizer: Any = None) -> Path:
    """Save the model through `megatron.core.dist_checkpointing`; every rank calls it.

    Args:
        model: the model, or this rank's chunks of it.
        root: checkpoint root; the iteration's folder must not exist yet.
        iteration: its number.
        optimizer: megatron's optimizer, whose state is saved too; None: the model alone.

    Returns:
        The iteration folder, `root/iter_NNNNNNN`. It appears when it is complete, and the tracker
        names it last: a run that dies while saving leaves the checkpoint before.

    Raises:
        BridgeError: the folder is in the way, or cannot be written.
    """
    chunks = _chunks(model)
    final = Path(root) / f"iter_{iteration:07d}"
    part = final.with_name(final.name + _PART)
    if final.exists():
        raise BridgeError(f"saving {final}: it exists; save another iteration or remove it")
    try:
        with _rank_zero() as first:
            if first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
        state = {"iteration": iteration, "checkpoint_version": 3.0} | _state(chunks, optimizer, loading=False)
        with _quiet():
            dist_checkpointing.save(state, str(part))
        with _rank_zero() as first:
            if first:
                source = {"variant": "saved by megatron-core", "own_mtp_head": False, "passengers": False}
                spec, layout = _built(chunks[0]), chunks[0].topology.layout
                (part / RUN_CONFIG).write_bytes(run_config(spec, source, layout.to_list() if layout.pp > 1 else None))
                part.rename(final)
                _replace(Path(root) / TRACKER, str(iteration).encode())
    except OSError as error:
        raise BridgeError(f"saving {final}: {error.strerror or error}") from None
    return final


def load_checkpoint(model: Chunks, checkpoint: Path | str, optimizer: Any = None) -> int:
    """Load a torch_dist checkpoint through `megatron.core.dist_checkpointing`, strictly; every rank calls it.

    `load_weights` reads the same folders with this package's own reader, and Hugging Face ones too.

    Args:
        model: the model, or this rank's chunks of it; of any layout.
        checkpoint: root or iteration folder.
        optimizer: megatron's optimizer, whose state is loaded too; None: the model alone.

    Returns:
        The iteration.

    Raises:
        BridgeError: no checkpoint, or keys that are missing in it or in the model.
    """
    chunks = _chunks(model)
    folder, _ = find_iteration(checkpoint)
    with _quiet():
        _begin(optimizer)
        wanted = _state(chunks, optimizer, loading=True)
        loaded: Any = dist_checkpointing.load(wanted, str(folder), strict="return_all")
    state, missing, unexpected = loaded
    # Megatron's words: `unexpected` keys are the model's, `missing` ones the checkpoint's. A rank sees all of
    # the checkpoint's keys and asks for its own, so only one rank alone can tell that some are strange.
    strange = sorted(k for k in missing if not k.endswith("_extra_state") and not _of_training(k))
    if unexpected or (strange and dist.get_world_size() == 1):
        raise BridgeError(
            f"loading {folder}: {len(unexpected)} keys of the model are not in it ({sorted(unexpected)[:3]}), "
            f"{len(strange)} keys in it are not the model's ({strange[:3]})"
        )
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{number}"])
    if optimizer is not None:
        _load_optimizer(optimizer, state["optimizer"], int(state["optimizer_step"]))
    return int(state.get("iteration", 0))


def _state(chunks: Sequence[DeepSeekV4Model], optimizer: Any, loading: bool) -> dict[str, Any]:
    metadata = _SHARDING | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {
        f"model{number}": chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        parts = [part.sharded_state_dict(state, is_loading=loading, metadata=metadata) for part in _parts_of(optimizer)]
        # What depends on how the layout groups parameters (one optimizer, or a second for experts) stays out;
        # hyperparameters are the new run's.
        state["optimizer"] = [part["param_state"] for part in parts]
        state["optimizer_step"] = parts[0]["optimizer"]["param_groups"][0]["step"]
    return state


def _load_optimizer(optimizer: Any, loaded: list[Any], step: int) -> None:
    for part, values in zip(_parts_of(optimizer), loaded, strict=True):
        own = part.state_dict()
        for group in own["optimizer"]["param_groups"]:
            group["step"] = step
        sharding = {"param_state_sharding_type": _SHARDING["distrib_optim_sharding_type"]}
        part.load_state_dict(own | sharding | {"param_state": values})
        # Megatron gives torch's Adam one counter for all parameters: every one of them would count it up.
        for state in part.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def _parts_of(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _begin(optimizer: Any) -> None:
    """Give torch's Adam its state before the first step: megatron-core asks a new optimizer for its step count."""
    for part in _parts_of(optimizer):
        inner = getattr(part, "optimizer", None)
        if not isinstance(inner, torch.optim.Adam):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {"step": torch.zeros(())} | {
                        name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")
                    }


def _chunks(model: Chunks) -> Sequence[DeepSeekV4Model]:
    return [model] if isinstance(model, torch.nn.Module) else model


def _of_training(key: str) -> bool:
    return key.startswith(("optimizer", "chained_", "rng_state", "rerun_state", "common_state"))


def _built(model: DeepSeekV4Model) -> Any:
    return model.spec.without_draft() if model.spec.dspark or not model.config.mtp_num_layers else model.spec


@contextlib.contextmanager
def _rank_zero() -> Iterator[bool]:
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
