"""Two source trees, the same commands, in turn: ratios of wall time, CPU time and peak memory.

    python benchmarks/paired.py OLD NEW --pairs 7

A machine that others use is believed in ratios only: each pair runs OLD and NEW one behind the other, in the other
order every second time, and the median of the pairs' ratios is told.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_TOY = """
import sys
from dsv4_bridge import make_toy
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny
layers = int(sys.argv[2])
wide = dict(hidden_size=1024, moe_intermediate_size=512, n_routed_experts=16, num_hidden_layers=layers)
ratios = (*((4, 128) * layers)[:layers], 0)
make_toy(sys.argv[1], "Flash", 1, spec=replace_spec(tiny(VARIANTS["Flash"]), compress_ratios=ratios, **wide))
"""
COMMANDS = {
    "--help": ["--help"],
    "plan Pro": ["plan", "Pro"],
    "inspect": ["inspect", "hf"],
    "import": ["import", "hf", "out"],
    "export --like": ["export", "megatron", "out", "--like", "hf"],
    "repack bf16": ["repack", "hf", "out", "--encoding", "bf16"],
    "verify": ["verify", "hf", "megatron"],
}


def measure(tree: Path, place: Path, words: list[str]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and MiB at most of one command."""
    shutil.rmtree(place / "out", ignore_errors=True)
    known = dict(os.environ) | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "dsv4_bridge", *words],
        cwd=place,
        env=known,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"dsv4 {' '.join(words)} of {tree}: exit {process.returncode}")
    return time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--layers", type=int, default=24, help="of the checkpoint: about 18 MB each")
    args = parser.parse_args()
    trees = args.old.resolve(), args.new.resolve()
    with tempfile.TemporaryDirectory(prefix="dsv4-paired-") as folder:
        place = Path(folder)
        # In a process of its own: what this one holds would count as the peak of those that it starts.
        subprocess.run([sys.executable, "-c", _TOY, str(place / "hf"), str(args.layers)], check=True)
        size = sum(p.stat().st_size for p in (place / "hf").iterdir())
        measure(trees[1], place, ["import", "hf", "megatron"])
        print(
            f"checkpoint of {size / 1e6:.0f} MB, {args.pairs} pairs; seconds, CPU seconds and MiB are NEW's medians\n"
        )
        print("| command | wall | CPU | memory | s | CPU s | MiB |\n|---|---|---|---|---|---|---|")
        for name, words in COMMANDS.items():
            ratios, seen = [], []
            for n in range(args.pairs + 1):
                order = (0, 1) if n % 2 else (1, 0)
                found = {side: measure(trees[side], place, words) for side in order}
                if n:  # the first warms caches
                    ratios.append([new / old for new, old in zip(found[1], found[0], strict=True)])
                    seen.append(found[1])
            middle = [statistics.median(column) for column in zip(*ratios, strict=True)]
            figures = [statistics.median(column) for column in zip(*seen, strict=True)]
            said = [*(f"x{m:.3f}" for m in middle), f"{figures[0]:.2f}", f"{figures[1]:.2f}", f"{figures[2]:.0f}"]
            print(f"| {name} | {' | '.join(said)} |", flush=True)


if __name__ == "__main__":
    main()
