"""One writer an output: a small file beside it that its process keeps writing, and that dies with the process.

The same means as between the ranks of a conversion (see `ranks`): a holder on this machine is known by its
process, one on another machine that shares the file system by its beats. A run that was killed leaves a file
that the next one takes over.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BridgeError
from .ranks import BEAT, HERE, introduction, read, take
from .threads import ended

_NAME = ".{}.dsv4-lock"


def lock_path(out: Path) -> Path:
    """The file that says who writes `out`."""
    out = Path(os.path.realpath(out))  # two ways to one place are one lock
    return out.with_name(_NAME.format(out.name))


@contextlib.contextmanager
def hold(out: Path, what: str) -> Iterator[None]:
    """Keep every other process of this tool from writing `out` while the block runs.

    Args:
        out: a file, a folder or the common start of several files; it need not be there, its parent is made.
        what: what is being done, for the message.

    Raises:
        BridgeError: a process that lives holds it, or the lock cannot be written.
    """
    path = lock_path(out)
    entry = introduction(0, "holding", {})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = take(path, entry)
    except OSError as error:
        raise BridgeError(f"{what}: {path.parent} cannot be written ({error.strerror or error})") from None
    if there:
        raise BridgeError(
            f"{what}: another run is writing {out}, process {there['pid']} on {there['host']}; wait until it has "
            "ended, or stop it"
        )
    HERE.add(entry["word"])
    closing = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, entry, closing), daemon=True, name=f"lock {out.name}")
    try:
        beats.start()
        yield
    finally:
        closing.set()
        ended(beats)
        HERE.discard(entry["word"])
        mine = read(path)
        if mine and mine["word"] == entry["word"]:
            with contextlib.suppress(OSError):
                path.unlink()


def _beat(path: Path, entry: dict[str, Any], closing: threading.Event) -> None:
    part = path.with_name(f"{path.name}.{entry['word']}")
    while not closing.wait(BEAT):
        mine = read(path)
        if mine is not None and mine["word"] != entry["word"]:
            return  # given up for dead (it slept) and taken over
        entry["beat"] += 1
        with contextlib.suppress(OSError):  # a full disk: the next beat may fit
            part.write_text(json.dumps(entry))
            part.replace(path)
