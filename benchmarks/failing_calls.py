"""Every system call that touches a verb's files fails, one a run: never a traceback, never wrong bytes.

    python benchmarks/failing_calls.py                    # every verb, every call
    python benchmarks/failing_calls.py import --every 7   # of one verb, every seventh
    python benchmarks/failing_calls.py import --every 7 --first 3   # the same from the third on
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
import os
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
        self.root, self.at, self.number, self.calls, self.on = root, -1, 0, 0, False
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
        with self._lock:
            self.calls += 1
            if self.calls != self.at:
                return
        self.failed = f"{name} {path.removeprefix(self.root)}"
        raise OSError(self.number, os.strerror(self.number), path)


@dataclass
class Ran:
    """One run: exit code, what it said on stderr, how many calls it made, which failed."""

    code: int
    said: str
    calls: int
    failed: str


def run(faults: Faults, words: list[str], at: int = -1, number: int = 0) -> Ran:
    """The command in a child; its call number `at` fails with `number`."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.close(read)
        os.setsid()
        faulthandler.register(signal.SIGUSR1, sys.__stderr__, all_threads=True)
        code, said, leave = 99, io.StringIO(), os._exit
        os._exit = _left  # the command's way out beside a display that is stuck
        sys.stdout, sys.stderr = io.StringIO(), said
        faults.at, faults.number, faults.calls = at, number, 0
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
        raw = f"{code}\n{faults.calls}\n{faults.failed}\n{said.getvalue()}".encode(errors="replace")
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
    parts = raw.decode(errors="replace").split("\n", 3)
    if len(parts) < 4:
        hung = time.monotonic() >= ends
        return Ran(-1, "hang" if hung else f"died: {os.waitstatus_to_exitcode(status)}", 0, "")
    return Ran(int(parts[0]), parts[3], int(parts[1]), parts[2])


def _left(code: int) -> NoReturn:
    raise SystemExit(code)


def examine(faults: Faults, verb: Verb, folder: Path, calls: slice) -> Iterator[tuple[str, str]]:
    """Outcomes of one verb: what it was, and the story where it is a bad one."""
    expected = folder / "expected" / "out"
    expected.parent.mkdir(parents=True)
    whole = run(faults, verb.words(expected))
    if whole.code:
        raise RuntimeError(f"{verb.name}: {whole.said}")
    for at in range(whole.calls + 1)[calls]:
        number = ERRORS[(at // calls.step) % len(ERRORS)]
        trial = folder / f"{at}"
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="*", help="which verbs; by default all")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--variant", default="Flash", help="of the checkpoint, as V4.1-Flash")
    args = parser.parse_args()
    calls = slice(args.first, None, args.every)
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
            stories: list[str] = []
            for what, story in examine(faults, verb, Path(name) / verb.name.replace(" ", "-"), calls):
                tally[what] += 1
                stories += [f"{what}: {story}"] if story else []
            outcomes = "; ".join(f"{k} {n}" for k, n in sorted(tally.items()))
            print(f"| {verb.name} | {outcomes} |", flush=True)
            for story in stories[:20]:
                print(f"  {story}", flush=True)
            bad += len(stories)
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
