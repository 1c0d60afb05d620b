"""How long the verbs take to start: their help, and the light ones at work on a toy; medians of five.

    python benchmarks/start_up.py [--runs 5]

Every run is a fresh interpreter with warm file caches. Seconds are those of the clock; CPU those of the process, user
and system, which other work on the machine changes less.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dsv4_bridge import make_toy
from dsv4_bridge.cli.help import VERBS

FLOOR = ["-c", "import typer, pydantic, rich.console, numpy"]  # what typer itself takes, a table, and an array


def measure(words: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and CPU seconds of one run of the interpreter; byte code is kept, as of an installed package."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    nowhere = subprocess.DEVNULL
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=folder, env=env, stdout=nowhere, stderr=nowhere)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def median(words: list[str], folder: Path, runs: int) -> tuple[float, ...]:
    """Of each number, over the runs; one more, before them, warms the caches."""
    measure(words, folder)
    return tuple(map(statistics.median, zip(*(measure(words, folder) for _ in range(runs)), strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_toy(folder / "toy")

        def told(what: str, found: tuple[float, ...]) -> None:
            print(f"| {what} | {found[0]:.2f} | {found[1]:.2f} |", flush=True)

        def of(line: str) -> tuple[float, ...]:
            return median(["-m", "dsv4_bridge", *line.split()], folder, runs)

        print("| command | seconds | CPU s |\n|---|---|---|")
        told("python -c pass", median(["-c", "pass"], folder, runs))
        told("python, with typer, pydantic (typer's), rich and numpy imported", median(FLOOR, folder, runs))
        told("`dsv4 --help`", of("--help"))
        helps = [measure(["-m", "dsv4_bridge", verb, "--help"], folder) for verb in VERBS]
        told("`dsv4 VERB --help`, once each, the slowest of all", tuple(map(max, zip(*helps, strict=True))))
        for line in AT_WORK:
            told(f"`dsv4 {line}`", of(line))


AT_WORK = (
    "inspect toy",
    "plan Flash",
    "plan toy",
    "plan Flash --tp 2",
    "flops Flash",
    "recipes",
    "recipes flash-lora",
    "train flash-lora --dry-run",
    "verify toy toy --level names",
)


if __name__ == "__main__":
    main()
