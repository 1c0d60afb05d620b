"""A log of every rank, for what goes wrong on one of many."""

import contextlib
import faulthandler
import logging
import os
import platform
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from .recipe import Recipe

_STAMP = "%Y-%m-%d %H:%M:%S"


@contextlib.contextmanager
def rank_log(recipe: Recipe) -> Iterator[Callable[[str], None]]:
    """What writes a line to `logs/rank-N.log` in the output folder, where the recipe wants such logs.

    Warnings of libraries go there, too, and how the rank ended. SIGUSR1 writes where every thread of it stands, if
    nobody else has use for that signal.
    """
    if not recipe.log.ranks:
        yield lambda line: None
        return
    rank = os.environ.get("RANK", "0")
    path = Path(recipe.out) / "logs" / f"rank-{int(rank) if rank.isdecimal() else 0}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", buffering=1, errors="replace") as file:

        def note(line: str) -> None:
            with contextlib.suppress(OSError, ValueError):
                file.write(f"{time.strftime(_STAMP)} {line}\n")

        handler = logging.StreamHandler(file)
        handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", _STAMP))
        logging.getLogger().addHandler(handler)
        stands = signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        if stands:
            faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        note(f"rank {rank} of {os.environ.get('WORLD_SIZE', '1')}, process {os.getpid()} on {platform.node()}")
        try:
            yield note
            note("ended")
        except BaseException as error:
            note("ended by an error\n" + "".join(traceback.format_exception(error)).rstrip())
            raise
        finally:
            if stands:
                faulthandler.unregister(signal.SIGUSR1)
            logging.getLogger().removeHandler(handler)
