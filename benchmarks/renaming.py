"""How fast a Megatron checkpoint is renamed, against a plain copy of the same files in the same run.

    python benchmarks/renaming.py [--experts 96] [--rounds 5]

Each round, in turns of order: `cp -r` and `dsv4 rename`, in processes of their own, both until the bytes are on the
disk, their input out of the cache before. Told: seconds, the ratio of each round, and the largest resident memory.
This process stays small and has another make the checkpoint: a child's peak begins with its parent's.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def measure(words: list[str], out: Path) -> tuple[float, float, float]:
    """Seconds until `out` is on the disk, CPU seconds, MiB at most."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit {process.returncode}")
    for path in out.rglob("*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def make(place: Path, experts: int) -> None:
    """A Megatron checkpoint, `m`, in that folder."""
    from dsv4_bridge import import_hf, make_toy
    from dsv4_bridge.spec.spec import replace_spec
    from dsv4_bridge.spec.variants import VARIANTS, tiny

    wide = {"hidden_size": 1024, "moe_intermediate_size": 1024, "n_routed_experts": experts}
    make_toy(place / "hf", "Flash", 1, spec=replace_spec(tiny(VARIANTS["Flash"]), **wide), workers=2)
    import_hf(place / "hf", place / "m")
    shutil.rmtree(place / "hf")


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.experts)
        return
    with tempfile.TemporaryDirectory(prefix="dsv4-renaming-") as name:
        place = Path(name)
        subprocess.run([sys.executable, __file__, "--make", name, "--experts", str(args.experts)], check=True)
        total = sum(p.stat().st_size for p in (place / "m").rglob("*") if p.is_file())
        rename = [sys.executable, "-m", "dsv4_bridge", "rename", str(place / "m"), str(place / "out"), "--naming"]
        commands = {"copy": ["cp", "-r", str(place / "m"), str(place / "out")], "rename": [*rename, "hybrid"]}
        rounds: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in commands}
        for number in range(args.rounds):
            for kind in list(commands)[:: -1 if number % 2 else 1]:
                shutil.rmtree(place / "out", ignore_errors=True)
                forget(place / "m")
                os.sync()
                rounds[kind].append(measure(commands[kind], place / "out"))
    ratios = [r[0] / c[0] for r, c in zip(rounds["rename"], rounds["copy"], strict=True)]
    told = {
        kind: {name: statistics.median(values) for name, values in zip(("seconds", "cpu", "MiB"), zip(*found))}
        for kind, found in rounds.items()
    }
    print(json.dumps({"bytes": total, **told, "ratios": ratios, "ratio": statistics.median(ratios)}, indent=1))


if __name__ == "__main__":
    main()
