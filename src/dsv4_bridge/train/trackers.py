"""Where else a run is told: TensorBoard, Weights & Biases, MLflow. Each has a thread of its own.

What is slow or broken there neither ends a run nor holds it up: that is told once, and the run goes on without it.
The libraries are imported in these threads, when they are first needed.
"""

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ..errors import BridgeError
from .choose import values
from .recipe import Recipe

_WAITING = 1000  # steps that may wait for a slow one
_PATIENCE = 20.0  # seconds that the end of a run waits for what they have not written yet
_MOST_PARAMS = 100  # of a call to MLflow
_LONGEST = 500  # characters of a value there

Scalars = Mapping[str, float]


class Tracker(Protocol):
    """What takes the numbers of a run."""

    def log(self, step: int, facts: Scalars) -> None:
        """The numbers of a step."""
        ...

    def close(self, failed: bool) -> None:
        """The run has ended."""
        ...


class Aside:
    """A tracker in a thread, which nobody waits for.

    Args:
        name: what it is called, for messages.
        make: opens it, in the thread.
        patience: seconds that `close` waits.
    """

    def __init__(self, name: str, make: Callable[[], Tracker], patience: float = _PATIENCE):
        self.name, self._patience = name, patience
        self._waiting: queue.Queue[tuple[int, Scalars] | bool] = queue.Queue(_WAITING)
        self._wrong: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._broken = self._slow = False
        self._thread = threading.Thread(target=self._work, args=(make,), daemon=True, name=name)
        self._thread.start()

    def log(self, step: int, facts: Scalars) -> None:
        """Hand the numbers of a step over."""
        if self._broken:
            return
        try:
            self._waiting.put_nowait((step, dict(facts)))
        except queue.Full:
            if not self._slow:
                self._slow = True
                self._wrong.put(f"{self.name} does not keep up: steps are left out there, {_KEPT}")

    def troubles(self) -> list[str]:
        """What went wrong since this was last asked."""
        found = []
        while not self._wrong.empty():
            found.append(self._wrong.get())
        return found

    def close(self, failed: bool, *, wait: bool = True) -> None:
        """Write what waits, for a while.

        Args:
            failed: whether the run ended with an error.
            wait: otherwise it is left to itself.
        """
        if self._broken:
            return
        until = time.monotonic() + (self._patience if wait else 0.0)
        try:
            self._waiting.put(failed, timeout=max(0.0, until - time.monotonic()) or 0.001)
            self._thread.join(max(0.0, until - time.monotonic()))
        except queue.Full:
            pass
        if wait and self._thread.is_alive():
            self._wrong.put(f"{self.name} did not take the last steps within {self._patience:.0f} s, {_KEPT}")

    def _work(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
            while not isinstance(item := self._waiting.get(), bool):
                tracker.log(*item)
            tracker.close(item)
        except BaseException as error:  # whatever such a library raises
            said = str(error).strip().partition("\n")[0][:200]
            self._broken = True
            self._wrong.put(f"{self.name} failed ({said or type(error).__name__}): it gets no more steps, {_KEPT}")


_KEPT = "log.jsonl has all"


def check_trackers(recipe: Recipe) -> None:
    """Refuse a tracker that was asked for and is not installed, before the run begins.

    Raises:
        BridgeError: with the extra that brings it.
    """
    for key in ("wandb", "mlflow"):
        if getattr(recipe.log, key) and find_spec(key) is None:
            raise BridgeError(
                f"training with recipe {recipe.name}: log.{key}={getattr(recipe.log, key)}: {key} is not installed; "
                f"pip install 'dsv4-bridge[{key}]', or leave log.{key} out"
            )


def make_trackers(recipe: Recipe, begin: int, say: Callable[[str], None]) -> list[Aside]:
    """Those that a recipe asks for; rank 0 alone has them.

    Args:
        recipe: the run.
        begin: the step that the run goes on behind.
        say: prints a line.
    """
    out, log = Path(recipe.out), recipe.log
    found = []
    if log.tensorboard:
        if find_spec("tensorboard") is None:
            say("TensorBoard is not installed: no events are written (pip install 'dsv4-bridge[train]')")
        else:
            found.append(Aside("TensorBoard", lambda: TensorBoard(out / "tensorboard", recipe, begin)))
    if log.wandb:
        found.append(Aside("Weights & Biases", lambda: WandB(log.wandb, out, recipe)))
    if log.mlflow:
        found.append(Aside("MLflow", lambda: MLflow(log.mlflow, out, recipe)))
    return found


class TensorBoard:
    """Events: a scalar for every number, and the recipe's values for the page of hyperparameters."""

    def __init__(self, folder: Path, recipe: Recipe, begin: int):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self._events = SummaryWriter(str(folder), purge_step=begin + 1)
        # add_hparams would write its metrics as a step of a run of their own
        *begins, self._ends = hparams(plain_values(recipe), {"train/loss": 0.0, "valid/loss": 0.0})
        for summary in begins:
            self._write(summary)

    def log(self, step: int, facts: Scalars) -> None:
        for name, value in facts.items():
            self._events.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        if not failed:
            self._write(self._ends)
        self._events.close()

    def _write(self, summary: Any) -> None:
        assert self._events.file_writer is not None
        self._events.file_writer.add_summary(summary)


class WandB:
    """A run of a project; one that goes on has the same id. WANDB_MODE=offline writes to `out/wandb` alone."""

    def __init__(self, project: str, out: Path, recipe: Recipe):
        os.environ.setdefault("WANDB_SILENT", "true")  # otherwise it asks for a key, where nobody may be
        import wandb  # pyright: ignore[reportMissingImports]

        kept = _Kept(out / ".wandb-run")
        self._run = wandb.init(
            project=project,
            name=out.name,
            dir=str(out),
            id=kept.read(),
            resume="allow",
            config=plain_values(recipe),
            settings=wandb.Settings(console="off"),
        )
        kept.write(self._run.id)
        # A run that goes on from an earlier checkpoint makes steps again, which W&B's own counter refuses.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, facts: Scalars) -> None:
        self._run.log({"step": step, **facts})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of an experiment where MLFLOW_TRACKING_URI says; one that goes on is the same run."""

    def __init__(self, experiment: str, out: Path, recipe: Recipe):
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        self._client, self._metric, kept = MlflowClient(), Metric, _Kept(out / ".mlflow-run")
        run_id = kept.read()
        if run_id is not None:
            self._run = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        there = self._client.get_experiment_by_name(experiment)
        where = there.experiment_id if there else self._client.create_experiment(experiment)
        self._run = self._client.create_run(where, run_name=out.name).info.run_id
        kept.write(self._run)
        params = [Param(key, str(value)[:_LONGEST]) for key, value in plain_values(recipe).items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run, params=params[first : first + _MOST_PARAMS])

    def log(self, step: int, facts: Scalars) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, float(value), now, step) for name, value in facts.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, status="FAILED" if failed else "FINISHED")


def plain_values(recipe: Recipe) -> dict[str, str | float | bool]:
    """Dotted key -> value, in types that trackers know."""
    return {
        key: value if isinstance(value, str | int | float) else " ".join(map(str, value or ()))
        for key, value in values(recipe).items()
    }


class _Kept:
    """The id that a tracker gave a run, in the run's folder."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> str | None:
        try:
            word = self._path.read_text()[:200].strip()
        except (OSError, ValueError):
            return None
        return word if re.fullmatch(r"[\w-]{1,100}", word) else None

    def write(self, word: str) -> None:
        self._path.write_text(f"{word}\n")
