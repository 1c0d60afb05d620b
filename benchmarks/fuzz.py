"""Fuzz every loader: a damaged or hostile file may be refused in words, and nothing else may go wrong.

    python benchmarks/fuzz.py --count 1000 --seed 1                  # of each loader
    python benchmarks/fuzz.py --loader tokenizer --count 1200
    python benchmarks/fuzz.py --loader tokenizer --seed 1 --only 77  # one input again, here, with its traceback

Inputs are sound files with their structure or their bytes changed. They are read in child processes, many in each,
under a limit of time an input and of memory; a child that hangs, dies or has grown is replaced. Counted are inputs
that are taken, refused in one BridgeError, end in another exception, hang, take more than 512 MB, or end the process.
"""

import argparse
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import IO, Any

SECONDS = 10.0  # an input; a machine that is busy may double that
START = 300.0  # a child's imports and sound files
MEGABYTES = 512  # by which one input may raise the peak
MESSAGE = 40_000  # characters of an error
_ADDRESSES = 8 << 30  # of a child, over what its start took
KINDS = ("ok", "refused", "traceback", "hang", "memory", "abort")


def main() -> int:
    """Run as the text above says; 1 where anything went wrong."""
    from fuzz_loaders import LOADERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loader", choices=[*LOADERS, "all"], default="all")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", type=int, help="run this one input in this process")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        read_here(args.loader, args.seed, range(args.first, args.first + args.count))
        return 0
    if args.only is not None:
        with tempfile.TemporaryDirectory(prefix="dsv4-fuzz-") as folder:
            LOADERS[args.loader](Path(folder), args.seed).run(args.only)
        return 0
    names = [name for name in LOADERS if name != "broken"] if args.loader == "all" else [args.loader]
    print("| loader | inputs | " + " | ".join(KINDS) + " | slowest s | peak MB above |")
    print("|---|" + "---|" * (len(KINDS) + 3))
    failures: list[str] = []
    for name in names:
        counts, slowest, peak, found = fuzz(name, args.seed, range(args.first, args.first + args.count))
        figures = " | ".join(str(counts[kind]) for kind in KINDS)
        print(f"| {name} | {sum(counts.values())} | {figures} | {slowest:.1f} | {peak} |", flush=True)
        failures += found
    for failure in failures[:40]:
        print(failure, file=sys.stderr, end="\n\n")
    return 1 if failures else 0


# ---------------------------------------------------------------- the child


def read_here(name: str, seed: int, numbers: range) -> None:
    """Read inputs in this process, and say on stdout what becomes of each."""
    from dsv4_bridge import BridgeError
    from fuzz_loaders import LOADERS

    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not ours
    with tempfile.TemporaryDirectory(prefix="dsv4-fuzz-") as folder:
        loader = LOADERS[name](Path(folder), seed)
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + _ADDRESSES, resource.RLIM_INFINITY))
        for number in numbers:
            say.write(json.dumps({"began": number}) + "\n")
            peak, began, kind, what = _peak(), time.monotonic(), "ok", ""
            try:
                loader.run(number)
            except BridgeError as error:
                kind, what = "refused", wrong_message(str(error))
                kind = "traceback" if what else kind
            except MemoryError:
                kind, what = "memory", traceback.format_exc(limit=-6)
            except KeyboardInterrupt:
                raise
            except BaseException:
                kind, what = "traceback", traceback.format_exc(limit=-6)
            grown = _peak() - peak
            kind = "memory" if grown > MEGABYTES else kind
            seconds = time.monotonic() - began
            say.write(json.dumps({"kind": kind, "what": what, "grown": grown, "seconds": seconds}) + "\n")


def _peak() -> int:
    """Megabytes; getrusage would begin with the peak of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10


def wrong_message(text: str) -> str:
    """What is wrong with an error's text."""
    if not text.strip() or len(text) > MESSAGE or "Traceback" in text:
        return f"a message of {len(text)} characters: {text[:200]!r}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"a message that cannot be printed: {text[:200]!r}"
    return ""


# ---------------------------------------------------------------- the parent


def fuzz(name: str, seed: int, numbers: range) -> tuple[Counter[str], float, int, list[str]]:
    """Read inputs in children.

    Returns:
        inputs of each kind, seconds of the slowest, most megabytes that one took, and failures in words.
    """
    counts: Counter[str] = Counter()
    slowest, peak, failures = 0.0, 0, []
    at = numbers.start
    while at < numbers.stop:
        child = _Child(name, seed, range(at, numbers.stop))
        try:
            done = child.read(at)
        finally:
            child.end()
        if not done:
            raise RuntimeError(f"the loader {name} does not begin:\n{child.errors()}")
        for number, told in enumerate(done, at):
            counts[told["kind"]] += 1
            slowest, peak = max(slowest, told["seconds"]), max(peak, told["grown"])
            if told["kind"] not in ("ok", "refused"):
                failures.append(f"--loader {name} --seed {seed} --only {number}: {told['kind']}\n{told['what']}")
        at += len(done)
    return counts, slowest, peak, failures


class _Child:
    """A process that reads inputs, and what it says."""

    def __init__(self, name: str, seed: int, numbers: range):
        here = Path(__file__).resolve()
        command = [sys.executable, str(here), "--child", "--loader", name, "--seed", str(seed)]
        command += ["--first", str(numbers.start), "--count", str(len(numbers))]
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._stderr)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._said = ""

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def read(self, first: int) -> list[dict[str, Any]]:
        """What became of the inputs until the child ended, hung or grew."""
        done: list[dict[str, Any]] = []
        reading, limit = False, START
        while True:
            try:
                line = self._lines.get(timeout=limit)
            except queue.Empty:
                return [*done, _ended("hang", limit, "")] if reading else done
            if not line:
                self._process.wait()
                told = _ended("abort", 0.0, f"exit code {self._process.returncode}\n{self.errors()}")
                return [*done, told] if reading else done
            told = json.loads(line)
            reading = "began" in told
            limit = 2 * SECONDS if reading else START
            if not reading:
                done.append(told)
                if told["kind"] == "memory":
                    return done  # the peak of a process never falls

    def errors(self) -> str:
        """The end of what the child wrote to stderr."""
        if not self._stderr.closed:
            self._stderr.seek(0)
            self._said = self._stderr.read().decode(errors="replace")[-3000:]
        return self._said

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self.errors()
        self._stderr.close()


def _ended(kind: str, seconds: float, what: str) -> dict[str, Any]:
    return {"kind": kind, "seconds": seconds, "grown": 0, "what": what}


if __name__ == "__main__":
    sys.exit(main())
