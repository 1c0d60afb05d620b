"""What a run says: lines on the terminal, every step in a JSONL, TensorBoard's events."""

import contextlib
import json
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILE = "log.jsonl"


def carefully(say: Callable[[str], None]) -> Callable[[str], None]:
    """The same, which does not end a run where nobody listens any more (a closed terminal, a full disk)."""

    def said(line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            say(line)

    return said


class Teller:
    """Rank 0's voice; the other ranks have none.

    Args:
        out: the run's folder; None: no files.
        every: steps between lines on the terminal.
        total: steps of the run.
        say: prints a line.
        tensorboard: whether to write events, where TensorBoard is installed.
        begin: the step that the run goes on behind: later lines of an earlier run go.
    """

    def __init__(
        self, out: Path | None, every: int, total: int, say: Callable[[str], None], tensorboard: bool, begin: int
    ):
        self._every, self._total, self.say = every, total, say
        self._file = self._events = None
        if out is None:
            return
        path = out / FILE
        kept = [line for line in path.read_bytes().splitlines() if _step(line) <= begin] if path.is_file() else []
        path.write_bytes(b"".join(line + b"\n" for line in kept))
        self._file = path.open("a", buffering=1)
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                say("TensorBoard is not installed: no events are written (pip install 'dsv4-bridge[train]')")
            else:
                self._events = SummaryWriter(str(out / "tensorboard"), purge_step=begin + 1)

    def step(self, number: int, facts: Mapping[str, float]) -> None:
        """A training step."""
        self._write({"step": number} | dict(facts))
        if self._events:
            for name, value in facts.items():
                self._events.add_scalar(f"train/{name}", value, number)
        if number % self._every == 0 or number in (1, self._total):
            self.say(
                f"step {number}/{self._total}  " + "  ".join(_shown(n, v) for n, v in facts.items() if n in _UNITS)
            )

    def validation(self, number: int, loss: float) -> None:
        """A validation after a step."""
        self._write({"step": number, "valid_loss": loss})
        if self._events:
            self._events.add_scalar("valid/loss", loss, number)
        self.say(f"step {number}/{self._total}  validation loss {loss:.4f}")

    def close(self) -> None:
        """Nothing more will be said."""
        if self._file:
            self._file.close()
        if self._events:
            self._events.close()

    def _write(self, facts: dict[str, Any]) -> None:
        if self._file:
            try:
                self._file.write(json.dumps(facts) + "\n")
            except OSError as error:
                self._file = None
                self.say(f"{FILE} cannot be written any more ({error.strerror}); the run goes on without it")


_UNITS: dict[str, tuple[str, str]] = {
    "loss": ("loss", ".4f"),
    "mtp_loss": ("mtp", ".4f"),
    "indexer_loss": ("indexer", ".4f"),
    "balance_loss": ("balance", ".3f"),
    "grad_norm": ("grad", ".3g"),
    "lr": ("lr", ".3g"),
    "tokens_per_second": ("tok/s", ",.0f"),
    "tflops_per_gpu": ("TFLOP/s/GPU", ".3g"),
    "mfu": ("MFU", ".1%"),
}


def _shown(name: str, value: float) -> str:
    label, form = _UNITS[name]
    return f"{label} {value:{form}}"


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
