"""Being asked to stop: SIGTERM, as Slurm and `timeout` send it, or Ctrl-C."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def asked_to_stop(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Whether a signal came that asks this process to stop; the handlers that were there return afterwards.

    A second Ctrl-C ends the process at once.

    Args:
        say: told of the first signal, when it is safe to.
    """
    came: list[int] = []
    told: list[bool] = []

    def note(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in came:
            raise KeyboardInterrupt
        came.append(number)

    def asked() -> bool:
        if came and not told:
            told.append(True)
            say(f"{signal.Signals(came[0]).name}: the step is saved, then this ends; Ctrl-C now ends it without")
        return bool(came)

    try:
        before = {number: signal.signal(number, note) for number in _SIGNALS}
    except ValueError:  # not the main thread: whoever started it stops it
        yield lambda: False
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
