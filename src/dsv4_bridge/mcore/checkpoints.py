"""Checkpoints that megatron-core itself writes and reads, in the folder layout of the rest of the package.

They do not depend on the layout that saved them: layers and experts have their global numbers, and the
optimizer's state is stored in the shape of the parameters it belongs to (`fully_reshardable`).
"""

import contextlib
import io
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import BridgeError, files_named
from ..files import AnyPath, put, sync
from ..spec.megatron import naming_of, of_model
from ..store.megatron import TRACKER
from ..store.run_config import FILE as RUN_CONFIG
from ..store.run_config import run_config
from ..store.torch_dist.reader import find_iteration, last_iteration
from .adapters.adapters import sharded_adapters
from .background import BackgroundQueue
from .model import DeepSeekV4Model
from .optim.state import SHARDING, load_state, sharded_state, steps_made

_PART = ".part"
_UNREADABLE = (OSError, EOFError, pickle.UnpicklingError, CheckpointException, CheckpointingException)
_ADAPTERS = "adapters"
Chunks = DeepSeekV4Model | Sequence[DeepSeekV4Model]


@files_named("saving")
def save_checkpoint(
    model: Chunks,
    root: AnyPath,
    iteration: int = 0,
    optimizer: Any = None,
    *,
    adapters: bool = False,
    files: Mapping[str, bytes] | None = None,
    queue: BackgroundQueue | None = None,
) -> Path:
    """Save the model through `megatron.core.dist_checkpointing`; every rank calls it.

    Args:
        model: the model, or this rank's chunks of it.
        root: checkpoint root; the iteration's folder must not exist yet.
        iteration: its number.
        optimizer: megatron's optimizer, whose state is saved too; None: the model alone.
        adapters: save the adapters in the model, not what they adapt.
        files: further files of the folder, by relative name.
        queue: write in the background: weights are copied at once, and `queue.maybe_finalize_async_calls`, called
            by every rank now and then, makes the checkpoint appear when all is written.

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

    def complete() -> None:
        with _rank_zero() as first:
            if first:
                source = {"variant": "saved by megatron-core", "own_mtp_head": False, "passengers": False}
                spec, layout = _built(chunks[0]), chunks[0].topology.layout
                own = {RUN_CONFIG: run_config(spec, source, layout.to_list() if layout.pp > 1 else None)}
                for name, data in (own | dict(files or {})).items():
                    (part / name).parent.mkdir(exist_ok=True, parents=True)
                    (part / name).write_bytes(data)
                for path in (*part.rglob("*"), part):  # what megatron wrote, too
                    sync(path)
                part.rename(final)
                sync(Path(root))  # its name is there before what names it
                put(Path(root) / TRACKER, str(iteration).encode())

    with _saying(f"saving {final}", Path(root)):
        with _rank_zero() as first:
            if first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
        common = {"iteration": iteration, "checkpoint_version": 3.0}
        state = common | _state(chunks, optimizer, loading=False, adapters=adapters)
        with _quiet():
            # What data-parallel ranks hold alike, each writes a share of.
            group: Any = parallel_state.get_data_parallel_group(with_context_parallel=True)
            strategy: Any = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), group)
            if queue is None:
                dist_checkpointing.save(state, str(part), strategy)
            else:
                request: Any = dist_checkpointing.save(
                    state, str(part), strategy, async_sharded_save=True, async_strategy="mcore"
                )
                request.add_finalize_fn(complete)
                queue.schedule_async_request(request)
        if queue is None:
            complete()
    return final


@files_named("loading")
def load_checkpoint(model: Chunks, checkpoint: AnyPath, optimizer: Any = None, *, adapters: bool = False) -> int:
    """Load a torch_dist checkpoint through `megatron.core.dist_checkpointing`, strictly; every rank calls it.

    `load_weights` reads the same folders with this package's own reader, and Hugging Face ones too.

    Args:
        model: the model, or this rank's chunks of it; of any layout.
        checkpoint: root or iteration folder.
        optimizer: megatron's optimizer, whose state is loaded too; None: the model alone.
        adapters: load the adapters in the model, not what they adapt.

    Returns:
        The iteration.

    Raises:
        BridgeError: no checkpoint, a damaged one, or keys that are missing in it or in the model.
    """
    chunks = _chunks(model)
    folder, _ = find_iteration(checkpoint)
    with _quiet():
        wanted = _state(chunks, optimizer, loading=True, adapters=adapters)
        live = {key: sharded.data for key, sharded in wanted.get(_ADAPTERS, {}).items()}
        try:
            loaded: Any = dist_checkpointing.load(wanted, str(folder), strict="return_all")
        except _UNREADABLE as error:
            cause = _cause(error)
            raise BridgeError(
                f"loading {folder}: a damaged checkpoint? {type(cause).__name__}: {cause}; go back to an earlier one"
            ) from error
    state, missing, unexpected = loaded
    # Megatron's words: `unexpected` keys are the model's, `missing` ones the checkpoint's. A rank sees all of
    # the checkpoint's keys and asks for its own, so only one rank alone can tell that some are strange.
    strange = sorted(k for k in missing if of_model(k))
    if unexpected or (strange and dist.get_world_size() == 1):
        hybrid = naming_of(strange) == "hybrid"
        raise BridgeError(
            f"loading {folder}: {len(unexpected)} keys of the model are not in it ({sorted(unexpected)[:3]}), "
            f"{len(strange)} keys in it are not the model's ({strange[:3]})"
            + ("; they are a HybridModel's, `dsv4 rename` translates them" if hybrid else "")
        )
    with torch.no_grad():
        for key, parameter in live.items():
            parameter.copy_(state[_ADAPTERS][key])
    for number, chunk in enumerate([] if adapters else chunks):
        chunk.load_state_dict(state[f"model{number}"])
    if optimizer is not None:
        load_state(optimizer, state["optimizer"], int(state["optimizer_step"]))
    return int(state.get("iteration", 0))


def _state(chunks: Sequence[DeepSeekV4Model], optimizer: Any, loading: bool, adapters: bool) -> dict[str, Any]:
    metadata = SHARDING | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = (
        {_ADAPTERS: sharded_adapters(chunks)}
        if adapters
        else {f"model{number}": chunk.sharded_state_dict(metadata=metadata) for number, chunk in enumerate(chunks)}
    )
    if optimizer is not None:
        state["optimizer"] = sharded_state(optimizer, state, loading, metadata)
        state["optimizer_step"] = steps_made(optimizer)
    return state


def _chunks(model: Chunks) -> Sequence[DeepSeekV4Model]:
    return [model] if isinstance(model, torch.nn.Module) else model


def _built(model: DeepSeekV4Model) -> Any:
    return model.spec.without_draft() if model.spec.dspark or not model.config.mtp_num_layers else model.spec


class Saver:
    """Checkpoints of a run: the last few, each whole.

    Args:
        root: where they are.
        keep: how many stay; the others go when a newer one is complete.
        background: write while training goes on.
        adapters: save adapters alone.
    """

    def __init__(self, root: Path, keep: int, background: bool = False, adapters: bool = False):
        self._root, self._keep, self._adapters = root, keep, adapters
        self._queue = BackgroundQueue() if background else None

    @property
    def last(self) -> Path | None:
        """The newest that is complete."""
        return last_iteration(self._root)

    def save(self, model: Chunks, iteration: int, optimizer: Any, files: Mapping[str, bytes]) -> None:
        """See `save_checkpoint`; of the same iteration, there is nothing to do."""
        self.finish()
        name = f"iter_{iteration:07d}"
        if self.last is not None and self.last.name == name:
            return
        with _rank_zero() as first:
            for left in self._root.glob(f"iter_*{_PART}") if first else ():  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            if first and (self._root / name).exists():  # of before the run was set back
                shutil.rmtree((self._root / name).rename(self._root / (name + _PART)))
        save_checkpoint(
            model, self._root, iteration, optimizer, adapters=self._adapters, files=files, queue=self._queue
        )
        self._prune()

    def poll(self) -> None:
        """Complete what the background has written by now; every rank calls it after every step."""
        self._complete(blocking=False)

    def finish(self) -> None:
        """Wait for the background."""
        self._complete(blocking=True)

    def _complete(self, blocking: bool) -> None:
        with _saying(f"saving a checkpoint in {self._root}", self._root):
            if self._queue is not None and self._queue.maybe_finalize_async_calls(blocking=blocking):
                self._prune()

    def _prune(self) -> None:
        with _rank_zero() as first:
            if first and self.last is not None:
                newest = self.last
                done = sorted(p for p in self._root.glob("iter_*") if p.is_dir() and p.suffix != _PART)
                for old in [p for p in done if p <= newest][: -self._keep]:
                    shutil.rmtree(old)


@contextlib.contextmanager
def _saying(doing: str, root: Path) -> Iterator[None]:
    """What cannot be written, in words; megatron's writers tell little more than that they failed."""
    try:
        yield
    except OSError as error:
        raise BridgeError(f"{doing}: {error.strerror or error}") from None
    except (RuntimeError, CheckpointException) as error:
        cause = _cause(error)
        raise BridgeError(
            f"{doing}: {type(cause).__name__}: {cause}; {shutil.disk_usage(root).free / 1e9:,.1f} GB are free there. "
            "What was saved before is whole; the same command goes on from it"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """The first rank's own error, where torch has gathered those of all."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


@contextlib.contextmanager
def _rank_zero() -> Iterator[bool]:
    """Whether this is rank 0; the others leave the body when it is done there."""
    try:
        yield dist.get_rank() == 0
    finally:
        dist.barrier()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """megatron-core warns about its own older formats at every save."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
