"""What a GPU does with this package, in one run of at most eight minutes: a table last, and everything as JSON.

    python benchmarks/gpu.py [--out DIR] [--minutes 8] [--only WORD] [--tiny]

Measured: the card's own ceilings; every kernel function by torch and by Triton, against the least that it could take
(its products at the card's rate, or its bytes at the card's bandwidth); a decoder layer of every kind at Flash's real
widths, 256 experts, against transformers' eager one in the same run; routing, memory against `dsv4 plan`; loading,
streaming; decoding. Units run one after another in a process beside this one, which starts another where that one
dies or hangs: what one unit does wrong is written down, and the others go on. `gpu.json` in DIR ($OUT, or `.`) is
written behind every unit, for the machine may be taken away. `--tiny`: small sizes on a CPU, Triton in its
interpreter; its figures say nothing.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MARK = "@@"
# Seconds for a unit, most of them to compile kernels; `units` is to import everything.
PATIENCE = {"kernel": 75, "layer": 90, "units": 120}


class Worker:
    """A process that runs units, and the lines that it prints."""

    def __init__(self, args: argparse.Namespace, done: list[str]):
        script = Path(__file__).with_name("gpu_units.py")
        command = [sys.executable, str(script), "--only", args.only, "--done", json.dumps(done)]
        command += ["--tiny"] if args.tiny else []
        env = os.environ | ({"TRITON_INTERPRET": "1"} if args.tiny else {})
        self._log = (args.out / "gpu.log").open("a")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True, env=env)
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(MARK):
                self._lines.put(line.removeprefix(MARK))
        self._lines.put(None)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """What it says next; None: it ended. TimeoutError: nothing in time."""
        try:
            line = self._lines.get(timeout=max(0.1, seconds))
        except queue.Empty:
            raise TimeoutError from None
        return None if line is None else json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


def run(args: argparse.Namespace, found: dict[str, Any], until: float) -> None:
    """Run all units in as many processes as it takes; `found` gets one entry each."""
    left: list[str] | None = None  # until a process has said what there is
    while left is None or left:
        worker, listed = Worker(args, list(found)), False
        try:
            while not listed or left:
                at = left[0] if listed and left else "units"
                patience = (PATIENCE.get(at.split(":")[0], 60)) * (5 if args.tiny else 1)
                if until < time.monotonic():
                    found |= {unit: {"error": "no time was left"} for unit in left or [at]}
                    return
                said = worker.next(min(patience, until - time.monotonic()))
                if said is None:
                    found[at] = {"error": f"its process ended ({worker.process.wait()}); see gpu.log"}
                elif said["unit"] == "units":
                    listed, left = True, [u for u in said["found"] if u not in found]
                    continue
                else:
                    found[said["unit"]] = said["found"]
                    show(said)
                if at == "units":
                    sys.exit(f"no list of units: {found[at]['error']}")
                assert left is not None
                left.remove(at)
                write(args.out, found)
                if said is None or said["poisoned"]:
                    break
        except TimeoutError:
            if left is None:
                sys.exit("no list of units in time")
            if left:
                found[left.pop(0)] = {"error": "no time was left" if until < time.monotonic() else "it took too long"}
        finally:
            worker.close()
            write(args.out, found)


def show(said: dict[str, Any]) -> None:
    print(f"{said['s']:6.1f} s  {said['unit']}  {json.dumps(said['found'])[:160]}", file=sys.stderr, flush=True)


def write(out: Path, found: dict[str, Any]) -> None:
    new = out / "gpu.json.new"
    new.write_text(json.dumps(found, indent=1))
    new.replace(out / "gpu.json")


def floor_ms(row: dict[str, Any], ceilings: dict[str, float], both: bool) -> float:
    """The least that a kernel could take: its products, or its bytes."""
    prefix = "both " if both else ""
    products = row[f"{prefix}flops"] / ceilings["bf16 TFLOP/s"] / 1e9
    return max(products, row[f"{prefix}bytes"] / ceilings["copy GB/s"] / 1e6)


def table(found: dict[str, Any]) -> str:
    """Markdown of everything, short."""
    facts, ceilings = found.get("facts", {}), found.get("ceilings", {})
    lines = [", ".join(f"{k} {v}" for k, v in {**facts, **{k: number(v) for k, v in ceilings.items()}}.items()), ""]
    lines += [
        "| kernel | S | pass | floor ms | torch ms | Triton ms | times | TFLOP/s | of floor |",
        "|---|" + "---|" * 8,
    ]
    for unit, row in found.items():
        if unit.startswith("kernel:"):
            lines += kernel_lines(unit, row, ceilings)
    for what, heads in (
        ("layer", ("ms", "tokens/s", "TFLOP/s", "peak GB")),
        ("generate", ("1 rows tokens/s", "8 rows tokens/s")),
        ("load", ("load GB/s", "stream GB/s")),
        ("codec", ()),
    ):
        lines += ["", *other_lines(found, what, heads)]
    return "\n".join(lines)


def kernel_lines(unit: str, row: dict[str, Any], ceilings: dict[str, float]) -> list[str]:
    _, length, name = unit.split(":")
    if "error" in row:
        return [f"| {name} | {length} | {short(row['error'])} |"]
    lines = []
    for key, what in (("forward ms", "forward"), ("both ms", "both")):
        took = [row.get(by, {}).get(key) for by in ("torch", "triton")]
        wrong = [f"{by}: {short(row[by]['error'])}" for by in ("torch", "triton") if "error" in row.get(by, {})]
        if took == [None, None] and (what == "both" or not wrong):
            continue
        least = floor_ms(row, ceilings, what == "both") if "flops" in row and "copy GB/s" in ceilings else None
        best = took[1] or took[0]
        rate = row["flops" if what == "forward" else "both flops"] / best / 1e9 if best else None
        cells = [
            least,
            *took,
            took[0] / took[1] if took[0] and took[1] else None,
            rate,
            least / best if best and least else None,
        ]
        lines.append(f"| {name} | {length} | {what} | {' | '.join(map(number, cells))} | {' '.join(wrong)}")
    return lines


def other_lines(found: dict[str, Any], what: str, heads: tuple[str, ...]) -> list[str]:
    rows = {unit: row for unit, row in found.items() if unit.split(":")[0] == what}
    if what != "layer":
        return [f"{unit}: " + ", ".join(f"{k} {number(v)}" for k, v in row.items()) for unit, row in rows.items()]
    lines = [
        "| layer | S | side | pass | " + " | ".join(heads) + " | planned GB | dropped |",
        "|---|" + "---|" * (5 + len(heads)),
    ]
    for unit, row in rows.items():
        _, length, kind, side = unit.split(":")
        for part in ("forward", "both"):
            if wrong := row.get("error") or row.get(f"{part} error"):
                lines.append(f"| {kind} | {length} | {side} | {part} | {short(wrong)} |")
                continue
            cells = [number(row.get(f"{part} {head}")) for head in heads]
            more = [number(row.get("planned GB") if part == "both" else None), number(row.get("dropped"))]
            lines.append(f"| {kind} | {length} | {side} | {part} | {' | '.join([*cells, *more])} |")
    return lines


def number(value: Any) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, str | int) else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def short(text: str) -> str:
    return " ".join(text.split())[:120]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", default="", help="units whose name has this word, and the ceilings")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    run(args, found, until)
    text = table(found)
    (args.out / "gpu.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
