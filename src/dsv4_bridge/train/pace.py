"""How fast a run is, what memory it takes, how far it is in its data, and how long it still takes."""

import resource
from collections import deque
from typing import TYPE_CHECKING

import torch

from ..planning.peaks import mfu, peak_named, peak_tflops
from ..spec.flops import flops_per_token
from .plan import lora_of

if TYPE_CHECKING:
    from .build import Trainer

_RECENT = 50  # steps that the time left is told from


class Left:
    """The time that a run still takes, from the pace of its last steps, with what was saved and validated between.

    Args:
        total: steps of the run.
    """

    def __init__(self, total: int):
        self._total, self._ends = total, deque[float](maxlen=_RECENT + 1)

    def after(self, step: int, seconds: float, now: float) -> float:
        """Seconds until the last step ends.

        Args:
            step: made just now.
            seconds: that it took.
            now: on a clock that never goes back.
        """
        self._ends.append(now)
        steps = len(self._ends) - 1
        each = (now - self._ends[0]) / steps if steps else seconds
        return each * max(0, self._total - step)


class Pace:
    """What the steps of a run say about time, memory and data.

    Args:
        trainer: the run.
        epoch_rows: rows of one pass through the data; None where that is not known.
    """

    def __init__(self, trainer: "Trainer", epoch_rows: float | None):
        recipe, self._world = trainer.recipe, trainer.world
        self._epoch_rows, self._left = epoch_rows, Left(recipe.schedule.steps)
        lora = lora_of(recipe) if recipe.lora.rank else None
        self._flops = flops_per_token(trainer.spec, recipe.data.seq_length, lora=lora)
        name = recipe.log.gpu or (torch.cuda.get_device_name() if torch.cuda.is_available() else "")
        self._peak = peak_named(recipe.log.gpu) if recipe.log.gpu else peak_tflops(name) if name else None

    def of(self, step: int, rows: int, tokens: int, seconds: float, now: float) -> dict[str, float]:
        """Of a step.

        Args:
            step: its number, from 1.
            rows: of data, with its own.
            tokens: that it took.
            seconds: that it lasted.
            now: when it ended, on a clock that never goes back.
        """
        rate = tokens / seconds
        found = {"tokens_per_second": rate, "tflops_per_gpu": rate * self._flops / self._world / 1e12}
        if self._peak:
            found["mfu"] = mfu(self._flops, rate / self._world, self._peak)
        found["eta_seconds"] = round(self._left.after(step, seconds, now), 3)
        if self._epoch_rows:
            found["epoch"] = rows / self._epoch_rows
        return found


def peak_memory() -> int:
    """Bytes that this process held at most: allocated by torch on its GPU, else in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
