"""Before a conversion writes: is the folder free, is there room, what did an earlier run finish."""

import os
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

from ..errors import BridgeError, size
from . import journal
from .job import Job, Options, identity_hash

WORK = ".dsv4-partial"
DONE = ".dsv4-done"  # what the work folder is called while it is taken away
RANKS = "ranks"
_SLACK = 64 << 20  # left free on the disk

# What a checkpoint folder of either kind may hold at its top; --overwrite removes nothing else.
MARKS = ("config.json", "model.safetensors.index.json", "latest_checkpointed_iteration.txt", WORK)


def examine(out: Path, options: Options, job_markers: Container[str] = (), *, earlier: bool) -> None:
    """Refuse a folder that is in the way; `earlier` tells that a run stopped half way there.

    `job_markers` are the files that make the new output a checkpoint: one of the other kind is not replaced.
    """
    if out.exists() and not out.is_dir():
        raise BridgeError(f"writing {out}: it exists and is not a folder")
    present = sorted(p.name for p in out.iterdir() if p.name not in (WORK, DONE)) if out.exists() else []
    if not present or earlier:
        return
    if not options.overwrite:
        if options.resume and (out / WORK).is_dir():
            raise BridgeError(
                f"writing {out}: the earlier run stopped before it had written anything, and a checkpoint of before is "
                "there; --overwrite replaces it"
            )
        if options.resume and any(m in present for m in MARKS):
            raise BridgeError(
                f"writing {out}: there is nothing to resume, the folder is complete; --overwrite replaces it"
            )
        raise BridgeError(
            f"writing {out}: the folder is not empty; choose another, or --overwrite replaces a checkpoint"
        )
    there, made = ("config.json" in present), ("config.json" in job_markers)
    if any(m in present for m in MARKS) and job_markers and there != made:
        kinds = ("a Megatron checkpoint", "a Hugging Face folder")
        raise BridgeError(
            f"writing {out}: {kinds[there]} is there, and this makes {kinds[made]}; --overwrite replaces one of the "
            "same kind. Name another folder, or remove that one"
        )
    if not any(m in present for m in MARKS):
        raise BridgeError(
            f"writing {out}: --overwrite replaces checkpoints, and this folder is none ({', '.join(present[:3])} …)"
        )


def begin(job: Job, out: Path, work: Path, options: Options) -> dict[str, Any]:
    """Begin the journal; the reports of files that an earlier run finished."""
    earlier = any(p.name != RANKS for p in work.iterdir())
    examine(out, options, job.markers, earlier=earlier)
    if earlier and not options.resume and not options.overwrite:
        continues = "--resume continues it, " if job.resumable else ""
        raise BridgeError(f"writing {out}: an earlier run stopped half way here; {continues}--overwrite starts over")
    done = finished(job, out, work, options) if earlier and options.resume else {}
    if not done:
        clear(work)
    for part in work.rglob("*.part"):
        part.unlink()
    journal.begin(work, identity_hash(job), job.label, done.values())
    return {name: line["report"] for name, line in done.items()}


def clear(work: Path) -> None:
    """Remove what an earlier run left."""
    for path in work.iterdir():
        if path.name != RANKS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def finished(job: Job, out: Path, work: Path, options: Options) -> dict[str, Any]:
    """File -> its line in the journals of an earlier run, where the file is there.

    Raises:
        BridgeError: that run had another input or other options, and is not to be replaced.
    """
    header = journal.header(work)
    if header and header["identity"] != identity_hash(job):
        if options.overwrite:
            return {}
        raise BridgeError(
            f"resuming {out}: the earlier run ({header['label']}) had another input or other options; "
            "repeat it with the same, or start over with --overwrite"
        )
    sizes = {f.name: f.nbytes for f in job.files}
    folders = (work, out) if journal.placing(work) else (work,)
    return {
        line["file"]: line
        for line in journal.lines(work)
        if line["size"] == sizes.get(line["file"]) and any(journal.is_of(line, p / line["file"]) for p in folders)
    }


def readable(path: Path) -> int:
    """Size of a file that can be opened; found out before hours of work, not after."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size


def check_space(out: Path, need: int, label: str) -> None:
    """Refuse to write `need` bytes where they do not fit; `label` says in messages what they are of."""
    probe = next(p for p in (out, *out.parents) if p.exists())
    free = shutil.disk_usage(probe).free
    if need + _SLACK > free:
        raise BridgeError(
            f"writing {out}: {label} needs {size(need)} more and {size(_SLACK)} to spare, "
            f"{size(free)} are free on that disk"
        )
