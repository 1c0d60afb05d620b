"""Every system call that touches a verb's files fails, one a run: never a traceback, never wrong bytes.

    python benchmarks/failing_calls.py                    # every verb, every call
    python benchmarks/failing_calls.py import --every 7   # of one verb, every seventh
    python benchmarks/failing_calls.py import --every 7 --first 3   # the same from the third on
    python benchmarks/failing_calls.py train --places   # one of each place: a call, its file's kind, who calls
    python benchmarks/failing_calls.py --every 7 --variant V4.1-Flash   # of those that convert its checkpoints

A verb runs in a forked child, and its N-th call on a path of the trial (open, rename, mkdir, unlink, listing, mapping,
read, write, sync, truncation; named by Python's audit events, or wrapped) raises an OSError: no space, input/output
error, permission denied, stale handle, in turn. Afterwards: is what is there whole and right, or does it not look
whole; and does the command, given again as advised, end in the expected bytes?
"""

import argparse
import contextlib
import errno
import faulthandler
import io
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from verbs import Verb, make_inputs, verbs

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.ESTALE)
_EVENTS = {
    *("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.link", "os.symlink"),
    *("os.truncate", "os.utime", "os.chmod", "shutil.copyfile", "shutil.rmtree"),
}
_WRAPPED = ("pread", "preadv", "pwrite", "write", "read", "fsync", "ftruncate", "stat", "sendfile", "copy_file_range")
_PATIENCE = 120.0
# Imported once, before the children part.
_MODULES = (
    *(f"dsv4_bridge.{m}" for m in ("cli", "cli.show.tables", "convert.jobs", "convert.verify", "convert.merge")),
    *(f"dsv4_bridge.{m}" for m in ("lora.peft", "train.loop", "data.indexed", "data.chat.prepare", "mcore")),
    *("megatron.core.dist_checkpointing", "tokenizers"),
)


class Faults:
    """Counts the calls on paths below `root` and has one of them fail."""

    def __init__(self, root: str):
        self.root, self.number, self.calls, self.on = root, 0, 0, False
        self.at: int | str = -1  # a call's number, or a place
        self.places: dict[str, int] | None = None  # where they are counted: place -> calls
        self.failed = ""
        self._lock = threading.Lock()
        sys.addaudithook(self._audit)
        for name in _WRAPPED:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and event in _EVENTS and args and isinstance(args[0], str | bytes | os.PathLike):
            self._count(event, os.fsdecode(args[0]))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **more: Any) -> Any:
            if self.on:
                self._count(name, self._path(first))
            return real(first, *args, **more)

        return call

    def _path(self, first: Any) -> str:
        if isinstance(first, int):
            with contextlib.suppress(OSError):
                return str(Path(f"/proc/self/fd/{first}").readlink())
            return ""
        return os.fsdecode(first) if isinstance(first, str | bytes | os.PathLike) else ""

    def _count(self, name: str, path: str) -> None:
        if not path.startswith(self.root):
            return
        place = _place(name, path) if isinstance(self.at, str) or self.places is not None else ""
        with self._lock:
            self.calls += 1
            if self.places is not None:
                self.places[place] = self.places.get(place, 0) + 1
            if self.failed or self.at not in (self.calls, place):
                return
            self.failed = f"{name} {path.removeprefix(self.root)}"
        raise OSError(self.number, os.strerror(self.number), path)


def _place(name: str, path: str) -> str:
    """The call, its file's name without numbers, and the lines of ours and megatron-core's that lead to it."""
    lines, frame = list[str](), sys._getframe(2)
    while frame:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("dsv4_bridge", "megatron")):
            lines.append(f"{module}:{frame.f_lineno}")
        frame = frame.f_back
    # Words made anew each run (parts are named by a process) are hexadecimal.
    kind = re.sub(r"[0-9a-f]*[0-9][0-9a-f]*", "#", Path(path).name)
    return " ".join((name, kind, *lines))


@dataclass
class Ran:
    """One run: exit code, what it said on stderr, how many calls it made, which failed."""

    code: int
    said: str
    calls: int
    failed: str
    places: tuple[str, ...] = ()


def run(faults: Faults, words: list[str], at: int | str = -1, number: int = 0, *, places: bool = False) -> Ran:
    """The command in a child; its call number `at`, or the first at that place, fails with `number`."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.close(read)
        os.setsid()
        faulthandler.register(signal.SIGUSR1, sys.__stderr__, all_threads=True)
        code, said, leave = 99, io.StringIO(), os._exit
        os._exit = _left  # the command's way out beside a display that is stuck
        sys.stdout, sys.stderr = io.StringIO(), said
        faults.at, faults.number, faults.calls, faults.places = at, number, 0, {} if places else None
        try:
            from dsv4_bridge.cli import main

            sys.argv = ["dsv4", *words]
            faults.on = True
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            import traceback

            said.write(traceback.format_exc())
        faults.on = False
        report = (code, faults.calls, faults.failed, list(faults.places or ()), said.getvalue())
        raw = json.dumps(report).encode()
        with contextlib.suppress(BaseException), open(write, "wb") as pipe:
            pipe.write(raw)
        leave(0)
    os.close(write)
    raw, ends = b"", time.monotonic() + _PATIENCE
    while time.monotonic() < ends:
        if select.select([read], [], [], 1.0)[0]:
            if not (piece := os.read(read, 1 << 20)):
                break
            raw += piece
    else:
        os.kill(pid, signal.SIGUSR1)  # its threads say where they stand
        time.sleep(1)
        os.killpg(pid, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if not raw:
        hung = time.monotonic() >= ends
        return Ran(-1, "hang" if hung else f"died: {os.waitstatus_to_exitcode(status)}", 0, "")
    code, calls, failed, found, words = json.loads(raw)
    return Ran(code, words, calls, failed, tuple(found))


def _left(code: int) -> NoReturn:
    raise SystemExit(code)


def examine(faults: Faults, verb: Verb, folder: Path, calls: slice, places: bool) -> Iterator[tuple[str, str]]:
    """Outcomes of one verb: what it was, and the story where it is a bad one."""
    expected = folder / "expected" / "out"
    expected.parent.mkdir(parents=True)
    whole = run(faults, verb.words(expected), places=places)
    if whole.code:
        raise RuntimeError(f"{verb.name}: {whole.said}")
    every = sorted(whole.places) if places else range(whole.calls + 1)
    print(f"{verb.name}: {whole.calls} calls, {len(every[calls])} of them fail", flush=True)
    for turn, at in enumerate(every[calls]):
        number = ERRORS[turn % len(ERRORS)]
        trial = folder / f"{turn}"
        trial.mkdir()
        out = trial / "out"
        ran = run(faults, verb.words(out), at, number)
        story = f"{verb.name}: call {at} ({ran.failed}), {errno.errorcode[number]}: exit {ran.code}: {ran.said[-1200:]}"
        if ran.code == -1:
            yield "HANG" if ran.said == "hang" else "DIED", story
        elif "Traceback" in ran.said or ran.code == 99:
            yield "TRACEBACK", story
        elif ran.code not in (0, 1, 2):
            yield "CODE", story
        if ran.code == 0 and not ran.failed:
            yield "not reached", ""
        else:
            yield ("went on" if ran.code == 0 else "refused"), ""
        if verb.looks_whole(out) and (wrong := verb.wrong(out, expected)):
            yield "WRONG", f"{story} {wrong[:3]}"
        if ran.code == 0:
            if wrong := _wrong(verb, out, expected):
                yield "WRONG", f"{story} {wrong[:3]}"
        elif said := _again(faults, verb, out, expected):
            yield "LOST", f"{story}; then: {said}"
        shutil.rmtree(trial)


def _wrong(verb: Verb, out: Path, expected: Path) -> list[str]:
    try:
        return verb.wrong(out, expected)
    except OSError as error:
        return [str(error)]


def _again(faults: Faults, verb: Verb, out: Path, expected: Path) -> str:
    """The command again as advised; what is wrong then."""
    options: list[str] = []
    for _ in range(3):
        ran = run(faults, [*verb.words(out), *options])
        if ran.code == 0 or not (advised := [o for o in ("--resume", "--overwrite") if o in ran.said]):
            break
        options = [advised[0]]
    wrong = _wrong(verb, out, expected)
    return f"{wrong[:3]} after {options}: {ran.code} {ran.said[-500:]}" if wrong else ""


def _outcomes(tally: Counter[str]) -> str:
    return "; ".join(f"{k} {n}" for k, n in sorted(tally.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="*", help="which verbs; by default all")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, help="by default 1, of places 0")
    parser.add_argument("--places", action="store_true", help="the first call of each place, and no other")
    parser.add_argument("--variant", default="Flash", help="of the checkpoint, as V4.1-Flash")
    args = parser.parse_args()
    first = args.first if args.first is not None else 0 if args.places else 1
    calls = slice(first, None, args.every)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    bad = 0
    with tempfile.TemporaryDirectory(prefix="dsv4-calls-") as name:
        inputs = Path(name) / "inputs"
        inputs.mkdir()
        make_inputs(inputs, args.variant)
        for module in _MODULES:
            import_module(module)
        faults = Faults(name)
        for verb in verbs(inputs, args.variant).values():
            if args.verbs and verb.name not in args.verbs:
                continue
            tally: Counter[str] = Counter()
            where, told = Path(name) / verb.name.replace(" ", "-"), time.monotonic()
            for what, story in examine(faults, verb, where, calls, args.places):
                tally[what] += 1
                if story:
                    bad += 1
                    print(f"  {what}: {story}", flush=True)
                if time.monotonic() > told + 60:
                    told = time.monotonic()
                    print(f"  so far: {_outcomes(tally)}", flush=True)
            print(f"| {verb.name} | {_outcomes(tally)} |", flush=True)
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
