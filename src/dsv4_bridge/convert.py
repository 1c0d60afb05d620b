"""The one loop that every conversion is: files of segments, written by workers, resumable.

While it runs, the output folder holds only a work folder, `.dsv4-partial`, with finished files and
a journal. When every file is there they move to their places and the files that readers look for
(index, config.json, .metadata, tracker) follow last, by rename: a folder that looks complete is
complete, whenever the process was killed.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .emit import Emitter, Report
from .errors import BridgeError
from .layout import OutFile
from .store.stream import Buffers, CountingStream, FileStream

WORK = ".dsv4-partial"
_JOURNAL = "journal.jsonl"
_SLACK = 64 << 20  # left free on the disk

# What a checkpoint folder of either kind may hold at its top; --overwrite removes nothing else.
_MARKS = ("config.json", "model.safetensors.index.json", "latest_checkpointed_iteration.txt", WORK)


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
    """

    label: str
    files: tuple[OutFile, ...]
    emitter: Callable[[], Emitter]
    identity: Mapping[str, Any]
    copies: Mapping[str, Path] = field(default_factory=dict)
    markers: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all output files."""
        return sum(f.nbytes for f in self.files) + sum(len(m) for m in self.markers.values())


@dataclass(frozen=True)
class Options:
    """How to run a job: worker threads, continue an earlier run, replace an earlier output, write nothing."""

    workers: int = 1
    resume: bool = False
    overwrite: bool = False
    progress: Progress = field(default_factory=Silent)
    dry_run: bool = False


def run(job: Job, out: Path, options: Options) -> Report:
    """Run a job into the folder `out`.

    Raises:
        BridgeError: the folder is in the way, the disk is too small, or a tensor cannot be
            converted; in the last case nothing stays behind.
    """
    if options.dry_run:
        with _named_errors(job, out):
            return dry_run(job, options.progress)
    work = out / WORK
    with _named_errors(job, out), _leave_no_folders(out):
        copies = sum(_readable(p) for p in job.copies.values())
        done = _prepare(job, out, work, options)
        report = Report()
        for entry in done.values():
            report.merge(Report.from_json(entry))
        left = [f for f in job.files if f.name not in done]
        need = sum(f.nbytes for f in left) + copies
        try:
            _check_space(out, need, job)
        except BridgeError:
            if not options.resume:
                shutil.rmtree(work, ignore_errors=True)
            raise
        options.progress.start(job.label, job.nbytes, job.nbytes - sum(f.nbytes for f in left))
        try:
            report.merge(_write_files(job, left, work, options))
            _finish(job, out, work)
        except BridgeError:
            # The input cannot be converted: a restart would not help.
            shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            options.progress.stop()
        return report


@contextlib.contextmanager
def _leave_no_folders(out: Path) -> Iterator[None]:
    """After a failure, remove the folders that were made for `out` and hold nothing."""
    made = [p for p in (out, *out.parents) if not p.exists()]
    try:
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def dry_run(job: Job, progress: Progress | None = None) -> Report:
    """Run a job into sinks that count and discard."""
    progress = progress or Silent()
    emitter, report = job.emitter(), Report()
    progress.start(job.label, job.nbytes, 0)
    try:
        for file in job.files:
            report.merge(emitter.emit(file.segments, CountingStream(progress.advance)))
    finally:
        emitter.close()
        progress.stop()
    return report


def _write_files(job: Job, files: Iterable[OutFile], work: Path, options: Options) -> Report:
    total, lock, local, stop = Report(), threading.Lock(), threading.local(), threading.Event()
    emitters: list[Emitter] = []

    def one(file: OutFile) -> None:
        if stop.is_set():
            return
        if not hasattr(local, "emitter"):
            local.emitter, local.buffers = job.emitter(), Buffers()
            with lock:
                emitters.append(local.emitter)
        path = work / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = FileStream(path.with_name(path.name + ".part"), local.buffers, options.progress.advance)
        try:
            report = local.emitter.emit(file.segments, stream)
            stream.close()
        except BaseException:
            stop.set()
            with contextlib.suppress(OSError):
                stream.abort()
            path.with_name(path.name + ".part").unlink(missing_ok=True)
            raise
        path.with_name(path.name + ".part").replace(path)
        with lock:
            _append(work / _JOURNAL, {"file": file.name, "size": file.nbytes, "report": report.to_json()})
            total.merge(report)

    try:
        if options.workers <= 1:
            for file in files:
                one(file)
        else:
            _in_threads(one, files, options.workers, stop)
    finally:
        for emitter in emitters:
            emitter.close()
    return total


def _in_threads(one: Callable[[OutFile], None], files: Iterable[OutFile], workers: int, stop: threading.Event) -> None:
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, file) for file in files]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            stop.set()
            raise
        for future in futures:
            future.result()


# ---------------------------------------------------------------- before


def identity_hash(job: Job) -> str:
    """Digest of everything that decides a job's bytes."""
    files = [(f.name, f.nbytes, len(f.segments)) for f in job.files]
    markers = {name: hashlib.sha256(data).hexdigest() for name, data in job.markers.items()}
    text = json.dumps([dict(job.identity), files, markers, sorted(job.copies)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _prepare(job: Job, out: Path, work: Path, options: Options) -> dict[str, Any]:
    """Make the work folder; return the journal's reports of files that are already finished."""
    if out.exists() and not out.is_dir():
        raise BridgeError(f"writing {out}: it exists and is not a folder")
    present = sorted(p.name for p in out.iterdir()) if out.exists() else []
    if work.is_dir():
        if not options.resume and not options.overwrite:
            raise BridgeError(
                f"writing {out}: an earlier run stopped half way here; --resume continues it, --overwrite starts over"
            )
        if options.resume:
            return _read_journal(job, out, work)
        shutil.rmtree(work)
    elif present and not options.overwrite:
        if options.resume and any(m in present for m in _MARKS):
            raise BridgeError(
                f"writing {out}: there is nothing to resume, the folder is complete; --overwrite replaces it"
            )
        raise BridgeError(
            f"writing {out}: the folder is not empty; choose another, or --overwrite replaces a checkpoint"
        )
    elif present and not any(m in present for m in _MARKS):
        raise BridgeError(
            f"writing {out}: --overwrite replaces checkpoints, and this folder is none ({', '.join(present[:3])} …)"
        )
    work.mkdir(parents=True)
    _append(work / _JOURNAL, {"identity": identity_hash(job), "label": job.label})
    return {}


def _read_journal(job: Job, out: Path, work: Path) -> dict[str, Any]:
    lines = []
    for raw in (work / _JOURNAL).read_bytes().splitlines() if (work / _JOURNAL).exists() else []:
        with contextlib.suppress(ValueError):  # the last line of a killed run may be torn
            lines.append(json.loads(raw))
    if not lines:
        shutil.rmtree(work)
        work.mkdir(parents=True)
        _append(work / _JOURNAL, {"identity": identity_hash(job), "label": job.label})
        return {}
    if lines[0].get("identity") != identity_hash(job):
        raise BridgeError(
            f"resuming {out}: the earlier run ({lines[0].get('label')}) had another input or other options; "
            "repeat it with the same, or start over with --overwrite"
        )
    sizes = {f.name: f.nbytes for f in job.files}
    done = {}
    for line in lines[1:]:
        name = line.get("file")
        if any(p.is_file() and p.stat().st_size == sizes.get(name) for p in (work / str(name), out / str(name))):
            done[name] = line["report"]
    return done


def _readable(path: Path) -> int:
    """Size of a file that can be opened; found out before hours of work, not after."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size


def _amount(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _check_space(out: Path, need: int, job: Job) -> None:
    probe = next(p for p in (out, *out.parents) if p.exists())
    free = shutil.disk_usage(probe).free
    if need + _SLACK > free:
        raise BridgeError(
            f"writing {out}: {job.label} needs {_amount(need)} more and {_amount(_SLACK)} to spare, "
            f"{_amount(free)} are free on that disk"
        )


# ---------------------------------------------------------------- after


def _finish(job: Job, out: Path, work: Path) -> None:
    for name, source in job.copies.items():
        target = work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    keep = {WORK}
    names = [f.name for f in job.files]
    # A previous checkpoint goes first, its markers before its data.
    placed = {n for n in names if not (work / n).exists() and (out / n).exists()}
    for old in sorted(out.iterdir(), key=lambda p: p.name not in _MARKS):
        if old.name not in keep and not any(n == old.name or n.startswith(old.name + "/") for n in placed):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name in (*names, *job.copies):
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (work / name).exists():
            (work / name).replace(target)
    for name, data in job.markers.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = work / (name.replace("/", "_") + ".part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
        _sync_folder(target.parent)
    shutil.rmtree(work)
    _sync_folder(out)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


class _named_errors(contextlib.AbstractContextManager[None]):
    """Turns operating-system errors into messages that say what to do."""

    def __init__(self, job: Job, out: Path):
        self._job, self._out = job, out

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BridgeError(
                f"writing {self._out}: the disk is full; what is finished is kept: make room "
                f"({_amount(self._job.nbytes)} in all) and repeat the command with --resume"
            ) from None
        where = error.filename or self._out
        raise BridgeError(f"{self._job.label}: {where}: {error.strerror or error}") from None
