"""What a run says: lines on the terminal, every step in a JSONL, and to trackers."""

import contextlib
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .trackers import Aside

FILE = "log.jsonl"


def carefully(say: Callable[[str], None]) -> Callable[[str], None]:
    """The same, which does not end a run where nobody listens any more (a closed terminal, a full disk)."""

    def said(line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            say(line)

    return said


class Teller:
    """Rank 0's voice; the other ranks have none. At the end of a block it is closed.

    Args:
        out: the run's folder; None: no files.
        every: steps between lines on the terminal.
        total: steps of the run.
        say: prints a line.
        begin: the step that the run goes on behind: later lines of an earlier run go.
        trackers: what is told every step, too.
    """

    def __init__(
        self,
        out: Path | None,
        every: int,
        total: int,
        say: Callable[[str], None],
        begin: int,
        trackers: Sequence[Aside] = (),
    ):
        self._every, self._total, self.say, self._trackers = every, total, say, trackers
        self._file = None
        if out is None:
            return
        path = out / FILE
        kept = [line for line in path.read_bytes().splitlines() if _step(line) <= begin] if path.is_file() else []
        path.write_bytes(b"".join(line + b"\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def step(self, number: int, facts: Mapping[str, float]) -> None:
        """A training step."""
        self._write({"step": number} | dict(facts))
        self._track(number, {f"train/{name}": value for name, value in facts.items()})
        if number % self._every == 0 or number in (1, self._total):
            self.say(self._line(number, "  ".join(_shown(n, facts[n]) for n in _UNITS if n in facts)))

    def validation(self, number: int, loss: float) -> None:
        """A validation after a step."""
        self._write({"step": number, "valid_loss": loss})
        self._track(number, {"valid/loss": loss})
        self.say(self._line(number, f"validation loss {loss:.4f}"))

    def close(self, failed: bool = False, *, wait: bool = True) -> None:
        """Nothing more will be said.

        Args:
            failed: whether the run ended with an error.
            wait: give trackers a while for what they have not written.
        """
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()
        for tracker in self._trackers:
            tracker.close(failed, wait=wait)
        self._troubles()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(kind is not None, wait=kind is None or issubclass(kind, Exception))

    def _line(self, number: int, words: str) -> str:
        return f"step {number}/{self._total}  {words}"

    def _track(self, number: int, facts: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(number, facts)
        self._troubles()

    def _troubles(self) -> None:
        for tracker in self._trackers:
            for trouble in tracker.troubles():
                self.say(trouble)

    def _write(self, facts: dict[str, Any]) -> None:
        if self._file:
            try:
                self._file.write(json.dumps(facts | {"time": round(time.time(), 3)}) + "\n")
            except OSError as error:
                self._file = None
                self.say(f"{FILE} cannot be written any more ({error.strerror}); the run goes on without it")


def duration(seconds: float) -> str:
    """A time for people: `0:42`, `3:07:00`, `2 d 3 h`."""
    whole = round(seconds)
    if whole >= 2 * 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# In the order of a line: what a glance is for comes first.
_UNITS: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", "{:.4f}".format),
    "grad_norm": ("grad", "{:.3g}".format),
    "lr": ("lr", "{:.3g}".format),
    "eta_seconds": ("left", duration),
    "seconds": ("s/step", "{:.3g}".format),
    "tokens_per_second": ("tok/s", "{:,.0f}".format),
    "memory_bytes": ("mem GB", lambda value: f"{value / 1e9:.3g}"),
    "epoch": ("epoch", "{:.3g}".format),
    "mtp_loss": ("mtp", "{:.4f}".format),
    "indexer_loss": ("indexer", "{:.4f}".format),
    "balance_loss": ("balance", "{:.3f}".format),
    "tflops_per_gpu": ("TFLOP/s/GPU", "{:.3g}".format),
    "mfu": ("MFU", "{:.1%}".format),
}


def _shown(name: str, value: float) -> str:
    label, form = _UNITS[name]
    return f"{label} {form(value)}"


def _step(line: bytes) -> float:
    """The step that a line of the log is of; infinity for what is none, the torn line of a killed run."""
    try:
        step = float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return math.inf
    return math.inf if math.isnan(step) else step


class Watch:
    """Sees a loss that is no number, or far above the recent ones.

    Args:
        spike: nats above the median of the last 50 steps; 0: only what is no number is seen.
    """

    def __init__(self, spike: float):
        self._spike, self._recent = spike, deque[float](maxlen=50)

    def trouble(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, in words; None if nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradients' norm is {grad_norm}, with a loss of {loss:.4f}"
        if self._spike and len(self._recent) >= 10:
            usual = statistics.median(self._recent)
            if loss > usual + self._spike:
                return f"the loss is {loss:.4f}, {loss - usual:.2f} nats above the median {usual:.4f} of recent steps"
        self._recent.append(loss)
        return None
