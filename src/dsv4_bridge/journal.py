"""What of a conversion is finished: a line a file, on disk before the next is begun.

`journal.jsonl` begins with the identity of the job; a rank other than 0 writes a journal of its own, and a
restart gathers them.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_NAME = "journal"


def begin(work: Path, identity: str, label: str, finished: Iterable[Mapping[str, Any]] = ()) -> None:
    """Begin the journal of rank 0 with what is finished already; those of other ranks go."""
    part = work / f"{_NAME}.part"
    part.unlink(missing_ok=True)
    _append(part, {"identity": identity, "label": label}, *finished)
    part.replace(_path(work, 0))
    for other in work.glob(f"{_NAME}.*.jsonl"):
        other.unlink()


def enter(work: Path, rank: int, file: str, size: int, report: Mapping[str, Any]) -> None:
    """Note a finished file."""
    _append(_path(work, rank), {"file": file, "size": size, "report": report})


def lines(work: Path) -> list[dict[str, Any]]:
    """Every line of every rank, the one with the identity first; empty if no run got so far."""
    found = []
    for path in (_path(work, 0), *sorted(work.glob(f"{_NAME}.*.jsonl"))):
        for raw in path.read_bytes().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):  # the last line of a killed run may be torn
                found.append(json.loads(raw))
    return found if found and "identity" in found[0] else []


def _path(work: Path, rank: int) -> Path:
    return work / (f"{_NAME}.{rank}.jsonl" if rank else f"{_NAME}.jsonl")


def _append(path: Path, *entries: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
        file.flush()
        os.fsync(file.fileno())
