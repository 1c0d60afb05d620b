"""Files of tests need not outlive a loss of power."""

import os


def do_not_wait() -> None:
    """No process waits from now on for the disk to have what was written; fresh ones of the command do, as ever.

    A conversion of a toy waits over a hundred times, for as long as its computing takes.
    """
    os.fsync = _refused_where_closed


def _refused_where_closed(file: int | object) -> None:
    os.fstat(file if isinstance(file, int) else file.fileno())  # type: ignore[attr-defined]
