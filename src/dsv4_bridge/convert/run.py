"""The one loop that every conversion is: files of segments, written by workers, resumable.

While it runs, the output folder holds only a work folder, `.dsv4-partial`, with finished files and
a journal, and what the processes that share the work tell each other (see `team`). When every file
is there they move to their places and the files that readers look for (index, config.json, .metadata,
tracker) follow last, by rename: a folder that looks complete is complete, whenever a process was
killed.
"""

import contextlib
import errno
import shutil
import threading
import warnings
from collections.abc import Callable, Container, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ..errors import BridgeError, size
from ..files import copy, make_folder, move, put, sync
from ..progress import Progress, Silent, in_background
from ..ranks import shares
from ..store.checksum import of_bytes
from ..store.stream import Buffers, Bytes, CountingStream, FileStream
from . import journal
from .checksums import Sum, checksums_path, file_sum, remove_checksums, write_checksums
from .emitter import Emitter, Report
from .job import Job, Options, identity_hash
from .outputs import OutFile
from .prepare import DONE, MARKS, RANKS, WORK, begin, check_space, clear, examine, finished, readable
from .team import Stopped, Team


def run(job: Job, out: Path, options: Options) -> Report:
    """Run a job into the folder `out`, alone or with the other ranks of `options.ranks`.

    Returns:
        What all ranks did, on every one of them.

    Raises:
        BridgeError: the folder is in the way, another run writes into it, the disk is too small, another
            rank failed, or a tensor cannot be converted; in the last case nothing stays behind.
    """
    shown = in_background(options.progress)
    if options.dry_run:
        if options.ranks.world > 1:
            raise BridgeError(f"{job.label}: --dry-run is the work of one process; unset WORLD_SIZE")
        with _named_errors(job, out):
            return dry_run(job, shown)
    work = out / WORK
    shutil.rmtree(out / DONE, ignore_errors=True)
    with _named_errors(job, out):
        copies = sum(readable(p) for p in job.copies.values())
        examine(out, options, job.markers, earlier=work.is_dir())
        if options.resume and options.ranks.world == 1:
            finished(job, out, work, options)  # refuses another job before anything is touched
        team = Team(work / RANKS, options.ranks, _facts(job, options), job.label)
        progress, working = shown if team.leads else Silent(), False
        team.claim()
        try:
            team.meet()
            mine, report = _take_share(job, out, copies, options, team, progress)
            working = True
            report.merge(_write_files(job, mine, work, options.workers, team, progress))
            if team.leads:
                for result in team.results():
                    report.merge(Report.from_json(result))
                _finish(job, out, work)
                team.finish(report.to_json())
            else:
                report = Report.from_json(team.hand_in(report.to_json()))
        except BaseException as error:
            # Where the input cannot be converted, a restart would not help.
            discard = working and isinstance(error, BridgeError) and getattr(error, "discard", True)
            team.fail(_named(job, out, error) or error, discard=discard)
            if discard and team.leads:
                with contextlib.suppress(OSError):  # a rank that does not answer may still hold a file
                    clear(work)
            raise
        finally:
            team.close()
            progress.stop()
        if team.leads:
            # In one step, so that whoever finds a work folder finds a journal in it.
            # From the rename on the output is whole; what cannot be taken away is by the next run.
            shutil.rmtree(work.rename(out / DONE), ignore_errors=True)
            sync(out)
        return report


def _facts(job: Job, options: Options) -> dict[str, str]:
    """What every rank must have been started with."""
    return {
        "WORLD_SIZE": str(options.ranks.world),
        "job": f"{job.label} ({identity_hash(job)[:12]})",
        "--resume": str(options.resume),
        "--overwrite": str(options.overwrite),
    }


def _take_share(
    job: Job, out: Path, copies: int, options: Options, team: Team, progress: Progress
) -> tuple[list[OutFile], Report]:
    """The files that this rank writes, in the order of the job, which is the order of its input.

    And, on rank 0, the report of those that an earlier run finished.
    """
    work, report = out / WORK, Report()
    if not team.leads:
        mine = set(team.assignment())
        return [f for f in job.files if f.name in mine], report
    done = begin(job, out, work, options)
    for entry in done.values():
        report.merge(Report.from_json(entry))
    left = [f for f in job.files if f.name not in done]
    need = sum(f.nbytes for f in left)
    try:
        check_space(out, need + copies, job.label)
    except BridgeError:
        if not options.resume:
            clear(work)
        raise
    progress.start(job.label, job.nbytes, job.nbytes - need)
    team.watch(progress.advance)
    mine = set(team.assign(shares(((f.name, f.nbytes) for f in left), options.ranks.world)))
    return [f for f in left if f.name in mine], report


def dry_run(job: Job, progress: Progress | None = None) -> Report:
    """Run a job into sinks that count and discard."""
    progress = in_background(progress or Silent())
    emitter, report = job.emitter(), Report()
    progress.start(job.label, job.nbytes, 0)
    try:
        for file in job.files:
            report.merge(emitter.emit(file.segments, CountingStream(progress.advance)))
    finally:
        emitter.close()
        progress.stop()
    return report


class _Watched:
    """A stream that stops when the other ranks have stopped."""

    def __init__(self, stream: FileStream, check: Callable[[], None], stop: threading.Event):
        self._stream, self._check, self._stop = stream, check, stop

    def write(self, data: Bytes) -> None:
        self._check()
        if self._stop.is_set():
            raise Stopped("another file of this run could not be written, or it was interrupted")
        self._stream.write(data)

    def patch(self, offset: int, old: bytes, new: bytes) -> None:
        self._stream.patch(offset, old, new)

    @property
    def crc32c(self) -> int:
        return self._stream.crc32c

    def close(self) -> None:
        self._stream.close()

    def abort(self) -> None:
        self._stream.abort()


def _write_files(
    job: Job, files: Iterable[OutFile], work: Path, workers: int, team: Team, progress: Progress
) -> Report:
    total, lock, local, stop = Report(), threading.Lock(), threading.local(), threading.Event()
    emitters: list[Emitter] = []

    def advance(nbytes: int) -> None:
        progress.advance(nbytes)
        team.wrote(nbytes)

    def one(file: OutFile) -> None:
        if stop.is_set():
            return
        if not hasattr(local, "emitter"):
            local.emitter, local.buffers = job.emitter(), Buffers()
            with lock:
                emitters.append(local.emitter)
        path = work / file.name
        make_folder(path.parent)
        part = path.with_name(f"{path.name}.{team.word}.part")
        stream = _Watched(FileStream(part, local.buffers, advance), team.check, stop)
        try:
            report = local.emitter.emit(file.segments, stream)
            stream.close()
            _check_size(job, file, part, report)
        except BaseException:
            stop.set()
            with contextlib.suppress(OSError):
                stream.abort()
            part.unlink(missing_ok=True)
            raise
        team.confirm()
        move([(part, path)])
        with lock:
            journal.enter(work, team.ranks.rank, file.name, path, stream.crc32c, report.to_json())
            total.merge(report)

    try:
        if workers <= 1:
            for file in files:
                one(file)
        else:
            _in_threads(one, files, workers, stop)
    finally:
        for emitter in emitters:
            emitter.close()
    return total


def _check_size(job: Job, file: OutFile, part: Path, report: Report) -> None:
    """What is placed has the size that was planned: a writer that stopped early left less."""
    there = part.stat().st_size
    if not file.nbytes == report.bytes_written == there:
        raise BridgeError(
            f"{job.label}: {file.name} has {there} bytes and {report.bytes_written} were made of the {file.nbytes} "
            "that were planned; it is not kept. Is something else writing there?"
        )


def _in_threads(one: Callable[[OutFile], None], files: Iterable[OutFile], workers: int, stop: threading.Event) -> None:
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, file) for file in files]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            stop.set()
            raise
        failed = [error for future in futures if not future.cancelled() and (error := future.exception())]
        if failed:  # those that stopped for another's sake say nothing new
            raise next((error for error in failed if not isinstance(error, Stopped)), failed[0])


# ---------------------------------------------------------------- after


def _finish(job: Job, out: Path, work: Path) -> None:
    """Bring everything to its place: what was there goes, its markers first; the new markers come last."""
    for name, source in job.copies.items():
        copy(source, work / name)
    names = [f.name for f in job.files]
    # Files that a killed run has moved already; before its line in the journal, `out` holds old ones alone.
    placed = {n for n in names if not (work / n).exists()} if journal.placing(work) else set[str]()
    journal.place(work)
    _clear_old(out, placed)
    sums = _sums(job, work)
    move((work / n, out / n) for n in (*names, *job.copies) if n not in placed)
    for name, data in job.markers.items():
        target = out / name
        make_folder(target.parent)
        put(target, data, work / (name.replace("/", "_") + ".part"))
    try:
        sums |= {name: file_sum(out / name) for name in job.copies}
        write_checksums(out, job.label, sums)
    except OSError as error:
        _warn(f"{job.label}: no checksums are kept of {out}: {error.filename}: {error.strerror or error}")


def _sums(job: Job, work: Path) -> dict[str, Sum]:
    """Of the files that were written and of the markers to come."""
    written = {line["file"]: Sum(line["size"], line["crc32c"]) for line in journal.lines(work)}
    return {f.name: written[f.name] for f in job.files} | {n: Sum(len(m), of_bytes(m)) for n, m in job.markers.items()}


def _warn(what: str) -> None:
    warnings.warn(what, RuntimeWarning, stacklevel=2)


def _clear_old(out: Path, placed: Container[str]) -> None:
    """Remove what was there before, and have its markers gone from the disk before its first byte goes."""
    try:
        remove_checksums(out)
    except OSError as error:
        _warn(f"{checksums_path(out)} speaks of what was here before, and cannot be removed ({error.strerror})")
    old = [p for p in out.iterdir() if p.name not in (WORK, *MARKS)]
    for marker in MARKS:
        if marker != WORK:
            (out / marker).unlink(missing_ok=True)
    sync(out)
    for path in old:
        if path.is_dir() and not path.is_symlink():
            _clear_folder(out, path, placed)
        elif path.name not in placed:
            path.unlink(missing_ok=True)
    sync(out)


def _clear_folder(out: Path, folder: Path, placed: Container[str]) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            _clear_folder(out, path, placed)
        elif str(path.relative_to(out)) not in placed:
            path.unlink()
    with contextlib.suppress(OSError):  # something placed is in it
        folder.rmdir()


class _named_errors(contextlib.AbstractContextManager[None]):
    """Turns operating-system errors into messages that say what to do."""

    def __init__(self, job: Job, out: Path):
        self._job, self._out = job, out

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if named := _named(self._job, self._out, error):
            raise named from None


def _named(job: Job, out: Path, error: BaseException | None) -> BridgeError | None:
    """The message of an operating-system error."""
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BridgeError(
            f"writing {out}: the disk is full; "
            + ("what is finished is kept: " if job.resumable else "")
            + f"make room ({size(job.nbytes)} in all) and repeat the command with "
            + ("--resume" if job.resumable else "--overwrite")
        )
    return BridgeError(f"{job.label}: {error.filename or out}: {error.strerror or error}")
