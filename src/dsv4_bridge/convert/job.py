"""A conversion as data: its files, and how to run it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BridgeError, short
from ..progress import Progress, Silent
from ..ranks import Ranks
from .emitter import Emitter
from .outputs import OutFile


@dataclass(frozen=True)
class Job:
    """One conversion, ready to run.

    Attributes:
        label: what it is, for people.
        files: output files.
        emitter: makes the emitter of one worker.
        identity: everything that decides the bytes of the output; a restart must agree with it.
        copies: output name -> file to copy (tokenizer, licence).
        markers: the files that make the folder a checkpoint, written last, in this order.
        resumable: whether an earlier run of it can be continued.
    """

    label: str
    files: tuple[OutFile, ...]
    emitter: Callable[[], Emitter]
    identity: Mapping[str, Any]
    copies: Mapping[str, Path] = field(default_factory=dict)
    markers: Mapping[str, bytes] = field(default_factory=dict)
    resumable: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of all output files."""
        return sum(f.nbytes for f in self.files) + sum(len(m) for m in self.markers.values())


@dataclass(frozen=True)
class Options:
    """How to run a job.

    Attributes:
        workers: files written at a time by this process.
        resume: continue an earlier run.
        overwrite: replace an earlier output; with `resume`, only where there is no earlier run to continue.
        progress: told of what is written.
        dry_run: write nothing.
        ranks: this process among those that share the job.
    """

    workers: int = 1
    resume: bool = False
    overwrite: bool = False
    progress: Progress = field(default_factory=Silent)
    dry_run: bool = False
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        if type(self.workers) is not int or self.workers < 1:
            raise BridgeError(
                f"running a conversion: workers is {short(self.workers)}, expected a whole number from 1 on"
            )


def identity_hash(job: Job) -> str:
    """Digest of everything that decides a job's bytes."""
    files = [(f.name, f.nbytes, len(f.segments)) for f in job.files]
    markers = {name: hashlib.sha256(data).hexdigest() for name, data in job.markers.items()}
    text = json.dumps([dict(job.identity), files, markers, sorted(job.copies)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
