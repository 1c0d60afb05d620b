"""The loop: steps, validation, checkpoints, and when to stop."""

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    get_current_global_batch_size,
    init_num_microbatches_calculator,
    update_num_microbatches,
)

from ..errors import BridgeError, counted, files_named
from ..mcore.checkpoints import Saver, load_checkpoint
from ..mcore.device import device
from ..mcore.layers.context import over_ranks
from ..mcore.metrics import collect
from ..mcore.optim.param_gather import gather_all
from ..mcore.schedule import Batch, cut, forward_backward
from ..spec.spec import ModelSpec
from ..store.megatron import ALONG
from ..store.small_files import small_files
from .build import Trainer, make_trainer
from .choose import dump
from .feed import Feed, make_feeds
from .log import Teller, Watch, carefully
from .out import check_out, run_lock
from .pace import Pace, peak_memory
from .plan import small_folder
from .profile import phase, taken_apart
from .rank_log import rank_log
from .recipe import Recipe, Schedule
from .resume import PROGRESS, RECIPE, Resumed, State, find_resumed
from .stopping import asked_to_stop
from .trackers import check_trackers, make_trackers

_Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        state: where it ended.
        losses: of the steps made now.
        valid_losses: step -> loss.
        stopped: why it ended before its last step; None: it did not.
        checkpoint: the last one; None without an output folder.
    """

    state: State
    losses: list[float] = field(default_factory=list)
    valid_losses: dict[int, float] = field(default_factory=dict)
    stopped: str | None = None
    checkpoint: Path | None = None


@files_named("training")
def train(recipe: Recipe, spec: ModelSpec, world: int, say: _Say = print) -> Outcome:
    """Run a recipe; every rank calls it. Where the output folder has a checkpoint, it goes on from there.

    Args:
        recipe: the run.
        spec: the model's numbers (`start_spec`).
        world: number of ranks.
        say: what prints a line; rank 0 alone calls it.

    Returns:
        How it ended: at its last step, or stopped by SIGTERM or Ctrl-C with a checkpoint saved.

    Raises:
        BridgeError: what cannot work, found before the first step, another run in the same folder among it; a loss
            that is no number or leaps.
    """
    if not recipe.out:
        raise BridgeError(f"training with recipe {recipe.name}: out is empty; say out=FOLDER for checkpoints and logs")
    small_folder(recipe)  # before weights are read
    with run_lock(recipe):
        check_out(recipe)
        check_trackers(recipe)
        with rank_log(recipe) as note:
            return _train(recipe, spec, world, carefully(say), note)


def _train(recipe: Recipe, spec: ModelSpec, world: int, say: _Say, note: _Say) -> Outcome:
    out = Path(recipe.out)
    resumed = find_resumed(recipe, spec)
    trainer = make_trainer(recipe, spec, world, fresh=resumed is None)
    first = dist.get_rank() == 0

    def talk(line: str) -> None:
        note(line)
        if first:
            say(line)

    saver = Saver(out, recipe.checkpoint.keep, recipe.checkpoint.background, adapters=bool(recipe.lora.rank))
    state = _load(trainer, resumed, talk) if resumed else State()
    if state.step >= recipe.schedule.steps:
        talk(f"step {state.step} of {recipe.schedule.steps} is made already: nothing to do")
        return Outcome(state, checkpoint=saver.last)
    train_feed, valid_feed = make_feeds(recipe, spec, _rows_of(recipe), _valid_rows(trainer))
    if first:
        out.mkdir(parents=True, exist_ok=True)
        (out / RECIPE).write_text(dump(recipe))
    dist.barrier()
    trackers = make_trackers(recipe, state.step, talk) if first else []
    for words in trainer.notes:
        talk(words)
    if recipe.log.valid_every and valid_feed is None:
        talk("no validation: chats have no split; say data.valid=FOLDER")
    beside = _beside(recipe, resumed)
    if first and f"{ALONG}/tokenizer.json" not in beside:
        talk("no tokenizer: from its checkpoints text is made by ids alone; tokenizer=CKPT takes one along")
    talk(
        f"{recipe.name}: {counted(spec.num_hidden_layers, 'layer')}, "
        f"{counted(trainer.world, 'rank')} (dp {trainer.ranks}), "
        f"{counted(train_feed.count, 'row')} of {recipe.data.seq_length}, steps {state.step} to {recipe.schedule.steps}"
    )
    with (
        Teller(out if first else None, recipe.log.every, recipe.schedule.steps, talk, state.step, trackers) as teller,
        asked_to_stop(talk) as asked,
    ):
        return _run(trainer, state, train_feed, valid_feed, teller, saver, beside, asked, note)


def _run(
    trainer: Trainer,
    state: State,
    feed: Feed,
    valid_feed: Feed | None,
    teller: Teller,
    saver: Saver,
    beside: dict[str, bytes],
    asked: Callable[[], bool],
    note: _Say,
) -> Outcome:
    recipe, watch = trainer.recipe, Watch(trainer.recipe.log.spike)
    outcome = Outcome(state)
    pace = Pace(trainer, feed.epoch_rows() if dist.get_rank() == 0 else None)
    with _sizes(recipe, trainer.ranks), _garbage(recipe.parallel.gc_every) as tidy:
        while state.step < recipe.schedule.steps:
            began = time.perf_counter()
            update_num_microbatches(state.rows, consistency_check=False)
            size = get_current_global_batch_size()
            with _profiled(recipe, state.step + 1, teller.say):
                facts = _step(trainer, feed, state, size)
            now = time.perf_counter()
            numbers = feed.numbers(state.rows, min(size, 8))
            state.step, state.rows = state.step + 1, state.rows + size
            state.tokens += size * recipe.data.seq_length
            mine = peak_memory()
            facts |= {"rows": size, "seconds": now - began, "memory_bytes": _largest(mine)}
            note(f"step {state.step}: {now - began:.3f} s, {mine / 1e9:.3f} GB at most on this rank")
            facts |= pace.of(state.step, state.rows, size * recipe.data.seq_length, now - began, now)
            if wrong := watch.trouble(facts["loss"], facts["grad_norm"]):
                raise BridgeError(_advice(wrong, trainer, state, numbers, facts, saver))
            outcome.losses.append(facts["loss"])
            teller.step(state.step, facts)
            every = recipe.log.valid_every
            if valid_feed and every and (state.step % every == 0 or state.step == recipe.schedule.steps):
                outcome.valid_losses[state.step] = _validate(trainer, valid_feed)
                teller.validation(state.step, outcome.valid_losses[state.step])
            stop = bool(_largest(asked()))
            last = state.step == recipe.schedule.steps
            if stop or last or state.step % recipe.checkpoint.save_every == 0:
                gather_all(trainer.wrapped)
                saver.save(
                    trainer.chunks,
                    state.step,
                    trainer.optimizer if recipe.checkpoint.optimizer else None,
                    beside | {PROGRESS: json.dumps(vars(state)).encode(), RECIPE: dump(recipe).encode()},
                )
            saver.poll()
            tidy(state.step)
            if stop and not last:
                saver.finish()
                teller.say(f"asked to stop: step {state.step} is saved; the same command goes on from there")
                return Outcome(state, outcome.losses, outcome.valid_losses, "asked to stop", saver.last)
        saver.finish()
    return Outcome(state, outcome.losses, outcome.valid_losses, None, saver.last)


def _beside(recipe: Recipe, resumed: Resumed | None) -> dict[str, bytes]:
    """The small files of the run, by their names in a checkpoint; the first rank's."""
    folder = resumed.folder / ALONG if resumed and not recipe.tokenizer else small_folder(recipe)
    if folder is None or dist.get_rank():
        return {}
    return {f"{ALONG}/{name}": path.read_bytes() for name, path in small_files(folder).items()}


def _step(trainer: Trainer, feed: Feed, state: State, size: int) -> dict[str, float]:
    """One step of all ranks; what it says about itself."""
    recipe = trainer.recipe
    _seed(recipe.seed, state.step)
    _set_rates(trainer, state.step)
    for chunk in trainer.wrapped:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    with phase("data"):
        batches = _batches(trainer, feed, state.rows, size)
    with phase("forward and backward"):
        loss = _mean(forward_backward(trainer.wrapped, batches), batches, recipe.losses.per_token)
    with phase("optimizer"):
        _, norm, _ = trainer.optimizer.step()
    with phase("counts"):
        counted = collect(trainer.wrapped)
    rate = trainer.optimizer.param_groups[0]["lr"]
    return {"loss": loss, "grad_norm": float(norm or 0.0), "lr": float(rate)} | counted


def _profiled(recipe: Recipe, step: int, say: _Say) -> contextlib.AbstractContextManager[None]:
    """Around the step that is to be taken apart, on the first rank, and on those that have a log."""
    if step != recipe.log.profile or (dist.get_rank() and not recipe.log.ranks):
        return contextlib.nullcontext()
    return taken_apart(Path(recipe.out), step, dist.get_rank(), say)


def _batches(trainer: Trainer, feed: Feed, consumed: int, size: int) -> list[Batch]:
    """This rank's micro-batches: its rows, and of these its tokens."""
    whole = feed.batches(consumed, size, trainer.recipe.batch.micro, trainer.rank, trainer.ranks)
    group: Any = parallel_state.get_context_parallel_group()
    return [_to_device(cut(batch, group.rank(), group.size())) for batch in whole]


def _set_rates(trainer: Trainer, step: int) -> None:
    """Learning rate and weight decay of the step that follows `step` others; the MTP loss's weight."""
    scheduler, recipe = trainer.scheduler, trainer.recipe
    scheduler.num_steps = step
    scheduler.step(1)
    late, begins = recipe.losses.mtp_late, decay_begins(recipe.schedule)
    if late is not None and recipe.model.mtp:
        decays = begins is not None and step >= begins
        trainer.chunks[0].config.mtp_loss_scaling_factor = late if decays else recipe.losses.mtp


def decay_begins(schedule: Schedule) -> int | None:
    """The step from which on the learning rate falls; None where it never does."""
    if schedule.decay == "constant":
        return None
    if schedule.decay == "wsd":
        return schedule.steps - min(schedule.decay_steps or schedule.steps, schedule.steps - schedule.warmup)
    return schedule.warmup


def _seed(seed: int, step: int) -> None:
    """Random numbers of a step depend on nothing before it: a resumed run has the same."""
    number = (seed * 1_000_003 + step) % (1 << 31)
    torch.manual_seed(number)
    tensor_parallel.model_parallel_cuda_manual_seed(number, force_reset_rng=True)


def _validate(trainer: Trainer, feed: Feed) -> float:
    """Mean loss of the first rows of the validation data, always the same ones."""
    recipe = trainer.recipe
    rows = _valid_rows(trainer)
    for chunk in trainer.wrapped:
        chunk.eval()
    batches = _batches(trainer, feed, 0, rows)
    with torch.no_grad():
        losses = forward_backward(trainer.wrapped, batches, forward_only=True)
    for chunk in trainer.wrapped:
        chunk.train()
    collect(trainer.wrapped)  # what validation counted is no part of the next step
    return _mean(losses, batches, recipe.losses.per_token)


def _mean(losses: list[torch.Tensor], batches: list[Batch], per_token: bool) -> float:
    """Of all micro-batches of all ranks that learn something, or of their learned tokens, on every rank."""
    total = torch.zeros(2, dtype=torch.float64, device=device())
    masks = [batch.loss_mask for batch in batches]
    weights = torch.stack([total.new_ones(()) if mask is None else mask.sum().double() for mask in masks])
    weights = over_ranks(weights, parallel_state.get_context_parallel_group())  # of whole rows, as losses are
    if not per_token:
        weights = (weights > 0).double()
    for loss, weight in zip(losses, weights, strict=False):  # stages other than the last have no losses
        total += torch.stack([loss.double() * weight, weight])
    groups: tuple[Any, ...] = (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_data_parallel_group(),
    )
    for group in groups:
        dist.all_reduce(total, group=group)
    return float(total[0] / total[1].clamp(min=1e-300))


def _valid_rows(trainer: Trainer) -> int:
    recipe = trainer.recipe
    return recipe.log.valid_steps * recipe.batch.micro * trainer.ranks if recipe.log.valid_every else 0


def _rows_of(recipe: Recipe) -> int:
    """Rows that all steps take."""
    if not recipe.batch.ramp:
        return recipe.schedule.steps * recipe.batch.size
    rows = 0
    with _sizes(recipe, 1):
        for _ in range(recipe.schedule.steps):
            update_num_microbatches(rows, consistency_check=False)
            rows += get_current_global_batch_size()
    return rows


@contextlib.contextmanager
def _sizes(recipe: Recipe, ranks: int) -> Iterator[None]:
    """Megatron's calculator of batch sizes, of this run."""
    batch = recipe.batch
    if batch.ramp and not batch.ramp.split()[-1].endswith(f":{batch.size}"):
        raise BridgeError(
            f"training with recipe {recipe.name}: batch.ramp {batch.ramp!r} ends elsewhere than at {batch.size}"
        )
    destroy_num_microbatches_calculator()
    try:
        init_num_microbatches_calculator(1, None, batch.size, batch.micro, ranks, False, batch.ramp or None)
    except (AssertionError, ValueError) as error:
        raise BridgeError(
            f"training with recipe {recipe.name}: batch sizes {batch.ramp or batch.size}: {error}"
        ) from None
    try:
        yield
    finally:
        destroy_num_microbatches_calculator()


def _load(trainer: Trainer, resumed: Resumed, talk: _Say) -> State:
    """Everything that a checkpoint of the run holds."""
    optimizer = trainer.optimizer if trainer.recipe.checkpoint.optimizer else None
    load_checkpoint(trainer.chunks, resumed.folder, optimizer, adapters=bool(trainer.recipe.lora.rank))
    if optimizer is None:
        trainer.optimizer.reload_model_params()
    state, changed = resumed.state, resumed.changed
    talk(f"goes on from {resumed.folder}, step {state.step}" + (f"; changed: {', '.join(changed)}" if changed else ""))
    return state


def _advice(
    wrong: str, trainer: Trainer, state: State, numbers: list[int], facts: dict[str, float], saver: Saver
) -> str:
    more = ", ".join(f"{name} {facts[name]:.4g}" for name in ("grad_norm", "lr", "expert_load_max") if name in facts)
    kept = f"the last good checkpoint is {saver.last}" if saver.last else "no checkpoint was saved yet"
    return (
        f"training with recipe {trainer.recipe.name}, step {state.step}: {wrong} ({more}). Nothing of this step is "
        f"saved; {kept}. Look at rows {numbers} of the data (and what follows them), the learning rate and the load of "
        "the experts; resume with a lower optimizer.lr, or with another data.seed to pass these rows; log.spike=0 goes "
        "on over leaps"
    )


@contextlib.contextmanager
def _garbage(every: int) -> Iterator[Callable[[int], None]]:
    """Collect garbage at the same steps on all ranks: else each waits for whoever does it now, in turn."""
    if not every or not gc.isenabled():
        yield lambda step: None
        return
    gc.collect()
    gc.freeze()  # what is there stays; a collection need not look at it
    gc.disable()

    def tidy(step: int) -> None:
        if step % every == 0:
            gc.collect()

    try:
        yield tidy
    finally:
        gc.enable()
        gc.unfreeze()


def _largest(mine: int) -> int:
    """Of all ranks."""
    largest = torch.tensor([int(mine)], device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def _to_device(batch: Batch) -> Batch:
    if not torch.cuda.is_available():
        return batch
    moved = {k: v.cuda(non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()}
    return type(batch)(**moved)
