"""What of a conversion is finished: a line a file, on disk before the next is begun.

`journal.jsonl` begins with the identity of the job; a rank other than 0 writes a journal of its own, and a
restart gathers them. A line is written when the file and its name are on the disk, and says how to know the file
again: its size and the time of its last write, which moving it does not change; its CRC-32C goes to the file of
checksums (see `checksums`). The last line says that the files are being moved to their places: only behind it can a
file of the output folder be one of this run.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import BridgeError
from ..files import sync
from .emitter import Report

_NAME = "journal"
_PLACING = {"placing": True}
_MOST_BYTES = 1 << 28
_MOST_LINE = 1 << 22


def begin(work: Path, identity: str, label: str, finished: Iterable[Mapping[str, Any]] = ()) -> None:
    """Begin the journal of rank 0 with what is finished already; those of other ranks go."""
    part = work / f"{_NAME}.part"
    part.unlink(missing_ok=True)
    moving = [_PLACING] if placing(work) else []
    _append(part, {"identity": identity, "label": label}, *finished, *moving)
    part.replace(_path(work, 0))
    sync(work)
    for other in work.glob(f"{_NAME}.*.jsonl"):
        other.unlink()


def enter(work: Path, rank: int, file: str, path: Path, crc32c: int, report: Mapping[str, Any]) -> None:
    """Note a finished file, which lies at `path`."""
    facts = path.stat()
    known = {"size": facts.st_size, "written": facts.st_mtime_ns, "crc32c": crc32c}
    _append(_path(work, rank), {"file": file, **known, "report": dict(report)})


def place(work: Path) -> None:
    """Note that everything is finished and the files begin to move."""
    if not placing(work):
        _append(_path(work, 0), _PLACING)


def placing(work: Path) -> bool:
    """Whether the files of the run began to move."""
    return _PLACING in _raw(work)


def header(work: Path) -> Mapping[str, Any] | None:
    """The first line: `identity` and `label` of the job; None if no run got so far."""
    entries = _raw(work)
    first = entries[0] if entries else {}
    good = isinstance(first.get("identity"), str) and isinstance(first.get("label"), str)
    return first if good else None


def lines(work: Path) -> list[dict[str, Any]]:
    """The lines of finished files, of every rank; what is no such line does not count."""
    return [entry for entry in _raw(work) if _finished(entry)] if header(work) else []


def is_of(line: Mapping[str, Any], path: Path) -> bool:
    """Whether the file at `path` is the one that a line speaks of."""
    try:
        facts = path.stat()
    except OSError:
        return False
    return path.is_file() and (facts.st_size, facts.st_mtime_ns) == (line["size"], line["written"])


def _finished(entry: Mapping[str, Any]) -> bool:
    numbers = (entry.get("size"), entry.get("written"), entry.get("crc32c"))
    if not isinstance(entry.get("file"), str) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
        return False
    try:
        Report.from_json(entry["report"])
    except (KeyError, BridgeError):
        return False
    return True


def _raw(work: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in (_path(work, 0), *sorted(work.glob(f"{_NAME}.*.jsonl"))):
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            continue
        for raw in path.read_bytes().splitlines():
            if len(raw) > _MOST_LINE:
                continue
            with contextlib.suppress(ValueError, RecursionError):  # the last line of a killed run may be torn
                entry = json.loads(raw)
                found += [entry] if isinstance(entry, dict) else []
    return found


def _path(work: Path, rank: int) -> Path:
    return work / (f"{_NAME}.{rank}.jsonl" if rank else f"{_NAME}.jsonl")


def _append(path: Path, *entries: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
        file.flush()
        os.fsync(file.fileno())
