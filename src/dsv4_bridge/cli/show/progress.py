"""Progress in a terminal, and in a log."""

import time

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ...errors import size
from ..app import quiet
from .console import Plain

_QUIET_SECONDS = 10.0


class TerminalProgress:
    """A bar with bytes, speed and time left on a terminal; a plain line every ten seconds otherwise."""

    def __init__(self) -> None:
        self._console = Plain(stderr=True)
        self._bar: Progress | None = None
        self._done = self._total = 0
        self._began = self._said = 0.0
        self._label = ""
        self._quiet = quiet()

    def start(self, label: str, total: int, done: int) -> None:
        self._label, self._total, self._done = label, total, done
        self._began = self._said = time.monotonic()
        if self._console.is_terminal and not self._quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task(label, total=total, completed=done)
            self._bar.start()

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._quiet:
            return
        if self._bar:
            self._bar.advance(self._task, nbytes)
        elif time.monotonic() - self._said > _QUIET_SECONDS:
            self._said = time.monotonic()
            speed = self._done / (self._said - self._began)
            share = 100 * self._done / max(1, self._total)
            line = f"{self._label}: {share:5.1f} %  {size(self._done)} of {size(self._total)}  {size(speed)}/s"
            self._console.print(line, highlight=False)

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None
