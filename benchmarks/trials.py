"""Killed, signalled, started twice: every verb, at random moments; then the same command as its messages advise.

    python benchmarks/trials.py kill --count 30        # SIGKILL to the process group
    python benchmarks/trials.py signal --count 30      # SIGTERM and Ctrl-C to the process group, in turn
    python benchmarks/trials.py two --count 20         # two starts at once with one output
    python benchmarks/trials.py kill --variant V4.1-Flash   # of those that convert its checkpoints

A table by verb. What must not be: an output that looks whole and is not the expected one (wrong), a command that, given
again with what its own message advises, does not end in the expected bytes (lost), a traceback, a process that does
not end (hang).
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from verbs import Verb, dsv4, make_inputs, verbs

_PATIENCE = 300.0  # seconds after which a command hangs
_BAD = ("WRONG", "LOST", "TRACEBACK", "HANG", "SILENT")


class Trials:
    """Trials of one verb in a folder of its own."""

    def __init__(self, verb: Verb, folder: Path, seed: int):
        self.verb, self.folder, self.rng = verb, folder, random.Random(seed)
        self.tally: Counter[str] = Counter()
        self.told: list[str] = []
        self.expected = folder / "expected" / "out"
        self.expected.parent.mkdir(parents=True)
        began = time.monotonic()
        code, said = self.finish(self.start(self.expected))
        if code:
            raise RuntimeError(f"{verb.name}: {said}")
        self.seconds = time.monotonic() - began

    def start(self, out: Path, *more: str) -> "subprocess.Popen[str]":
        """The command, as the leader of a process group."""
        command = dsv4([*self.verb.words(out), *more])
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def finish(self, process: "subprocess.Popen[str]") -> tuple[int, str]:
        """Its exit code and what it said."""
        try:
            said = process.communicate(timeout=_PATIENCE)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[1]
            self.note("HANG", said)
        if "Traceback" in said:
            # Ctrl-C while Python itself starts is Python's to tell: nothing of the command has begun.
            early = said.rstrip().endswith("KeyboardInterrupt") and "cli/__init__.py" not in said
            self.note("interrupted before it had begun" if early else "TRACEBACK", said)
        return process.returncode, said

    def note(self, what: str, said: str = "") -> None:
        """Count an outcome; say what was said where it is a bad one."""
        self.tally[what] += 1
        if what.startswith(_BAD):
            self.told.append(f"{self.verb.name}: {what}: {said[-1500:]}")

    def stop(self, number: int, out: Path) -> None:
        """Signal the group of one run at a random moment, then go on as advised."""
        process = self.start(out)
        time.sleep(self.rng.uniform(0, 1.05 * self.seconds))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        code, said = self.finish(process)
        if code == 0:
            self.note("ended before, or saved and ended")
        elif number == signal.SIGKILL:
            self.note("killed, nothing there" if not _anything(out) else "killed, something there")
        else:
            self.note("stopped, nothing there" if not _anything(out) else "stopped, something there")
            early = process.returncode == -number and not said.strip()  # before the command had begun
            if not said.strip() and not early:
                self.note("SILENT", f"exit code {code}")
        if self.verb.looks_whole(out) and (wrong := self.verb.wrong(out, self.expected)):
            self.note("WRONG", f"looks whole: {wrong[:5]}")
        self.go_on(out)

    def go_on(self, out: Path) -> None:
        """The command again, and again with the option that its refusal names."""
        options: list[str] = []
        for _ in range(4):
            code, said = self.finish(self.start(out, *options))
            if code == 0 or (code == 2 and self.verb.looks_whole(out) and "--resume" not in said):
                break
            advised = [o for o in ("--resume", "--overwrite") if o in said and o not in options]
            if code != 2 or not advised:
                break
            options = [*options, advised[0]] if "overwrite" in advised[0] else [advised[0]]
        try:
            wrong = self.verb.wrong(out, self.expected)
        except OSError as error:
            wrong = [str(error)]
        if wrong:
            self.note("LOST", f"{wrong[:5]} after {options}; exit code {code}: {said}")
        else:
            self.note("then right")

    def two(self, out: Path) -> None:
        """Two starts at once."""
        both = [self.start(out) for _ in range(2)]
        ends = [self.finish(process) for process in both]
        codes = sorted(code for code, _ in ends)
        self.note(
            {(0, 2): "one did it, one was refused", (0, 0): "both exit 0"}.get(tuple(codes), f"LOST codes {codes}")
        )
        if wrong := self.verb.wrong(out, self.expected):
            self.note("WRONG", f"{wrong[:5]}")
        else:
            self.note("then right")


def _anything(out: Path) -> bool:
    return any(out.parent.glob(f"{out.name}*"))


def examine(trials: Trials, kind: str, count: int) -> None:
    """So many trials of a kind."""
    for number in range(count):
        folder = trials.folder / f"{number}"
        folder.mkdir()
        out = folder / "out"
        match kind:
            case "kill":
                trials.stop(signal.SIGKILL, out)
            case "signal":
                trials.stop((signal.SIGTERM, signal.SIGINT)[number % 2], out)
            case "two":
                trials.two(out)
        shutil.rmtree(folder)


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("kill", "signal", "two"))
    parser.add_argument("verbs", nargs="*", help="which verbs; by default all")
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", default="Flash", help="of the checkpoint, as V4.1-Flash")
    args = parser.parse_args(argv)  # type: ignore[arg-type]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="dsv4-trials-") as name:
        inputs = Path(name) / "inputs"
        inputs.mkdir()
        make_inputs(inputs, args.variant)
        for verb in verbs(inputs, args.variant).values():
            if args.verbs and verb.name not in args.verbs:
                continue
            trials = Trials(verb, Path(name) / verb.name.replace(" ", "-"), args.seed)
            examine(trials, args.kind, args.count)
            print(
                f"| {verb.name} | {args.count} | ",
                "; ".join(f"{k} {n}" for k, n in trials.tally.items()),
                "|",
                flush=True,
            )
            for line in trials.told:
                print(f"  {line}", flush=True)
            bad += len(trials.told)
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
