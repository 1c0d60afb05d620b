"""Progress that cannot reach the work: told from a thread of its own, whatever becomes of it there."""

import contextlib
import threading
import warnings
from collections.abc import Callable
from typing import Protocol

from .threads import ended


class Progress(Protocol):
    """Told what is about to be written and every piece that was."""

    def start(self, label: str, total: int, done: int) -> None:
        """`total` bytes are to be written, `done` of them are there already."""
        ...

    def advance(self, nbytes: int) -> None:
        """`nbytes` more are on disk."""
        ...

    def stop(self) -> None:
        """The work is over, or failed."""
        ...


class Silent:
    """No progress."""

    def start(self, label: str, total: int, done: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def stop(self) -> None:
        pass


_PAUSE = 0.1  # seconds between two words to the display
_PATIENCE = 2.0  # seconds that the end of the work waits for a display that is stuck


def in_background(progress: Progress) -> Progress:
    """The same progress, behind a thread: it can neither end, nor delay, nor corrupt what it watches."""
    return progress if isinstance(progress, Silent | _Background) else _Background(progress)


class _Background:
    """Adds up what is told and passes it on, from one daemon thread; a display that fails is told of once."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._waiting: list[Callable[[], None]] = []
        self._nbytes = 0
        self._thread: threading.Thread | None = None
        self._over = self._broken = False

    def start(self, label: str, total: int, done: int) -> None:
        self._send(lambda: self._progress.start(label, total, done))

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._nbytes += nbytes

    def stop(self) -> None:
        if self._over:
            return
        self._over = True
        if self._thread is None:
            self._send(lambda: None)
        self._wake.set()
        ended(self._thread, _PATIENCE)

    def _send(self, call: Callable[[], None]) -> None:
        with self._lock:
            self._waiting.append(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="progress")
                with contextlib.suppress(RuntimeError):  # no thread, no display
                    self._thread.start()

    def _run(self) -> None:
        over = False
        while not over:
            over = self._wake.wait(_PAUSE)
            with self._lock:
                calls, self._waiting = self._waiting, []
                nbytes, self._nbytes = self._nbytes, 0
            for call in calls:
                self._try(call)
            if nbytes:
                self._try(lambda n=nbytes: self._progress.advance(n))
        self._try(self._progress.stop)

    def _try(self, call: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            call()
        except BaseException as error:
            self._broken = True
            with contextlib.suppress(BaseException):
                self._progress.stop()
            with contextlib.suppress(BaseException):
                warnings.warn(
                    f"the progress display failed ({error!r}); the work goes on without it",
                    RuntimeWarning,
                    stacklevel=2,
                )
