"""Multiplying by encoded weights as they are, beside decoding them first, and beside merely reading them.

    python benchmarks/multiply.py [--threads 1] [--tokens 1,8] [--clock wall|cpu] [--rounds 31] [--json]

Shapes are Flash's. Every call takes the next of so many copies of a weight that no cache holds them (--cold), so that
it comes from memory. Per weight and number of vectors, medians of rounds in which all take turns:

- ours: `dsv4_bridge.codec.multiply`.
- bf16, float32: this project's own decode into a reused bf16 buffer, then torch's matmul in bf16, or one more copy to a
  reused float32 buffer and torch's matmul there. (Weights that are bf16 already are not decoded.)
- read: what adding up the same bytes as 64-bit integers takes, on as many threads: the floor.

"GB/s" is of encoded bytes, scales included. `--clock cpu` divides processor seconds by the number of threads: the one
to believe where other work runs on the machine.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from dsv4_bridge.codec import CODECS
from dsv4_bridge.codec.multiply import multiply

# name, encoding, rows, columns
SHAPES = (
    ("expert w1, w3", "mxfp4", 2048, 4096),
    ("expert w2", "mxfp4", 4096, 2048),
    ("wq_a", "fp8", 1024, 4096),
    ("wq_b", "fp8", 32768, 1024),
    ("wo_b", "fp8", 4096, 8192),
    ("an eighth of head", "bf16", 16160, 4096),
)


def weight(rng: np.random.Generator, encoding: str, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes and scale as of a trained weight: a normal distribution, encoded by the released rule."""
    bits = (rng.normal(0, 0.02, (rows, columns)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if encoding == "bf16":
        return bits, None
    codec = CODECS[encoding]
    codes = np.zeros((rows, columns // 2 if encoding == "mxfp4" else columns), np.uint8)
    shape = (rows, columns // 32) if encoding == "mxfp4" else (-(-rows // 128), -(-columns // 128))
    scale = np.zeros(shape, np.uint8)
    codec.encode(bits, None, codes, scale)
    return codes, scale


def copies(encoding: str, rows: int, columns: int, cold: int) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """So many copies of a weight that they take `cold` bytes."""
    codes, scale = weight(np.random.default_rng(0), encoding, rows, columns)
    size = codes.nbytes + (0 if scale is None else scale.nbytes)
    return [(codes.copy(), None if scale is None else scale.copy()) for _ in range(max(2, -(-cold // size)))]


def contenders(
    encoding: str, rows: int, columns: int, tokens: int, threads: int, cold: int
) -> tuple[int, dict[str, Callable[[], object]]]:
    """Bytes of a weight, and a call a contender, which takes the next copy each time."""
    held = copies(encoding, rows, columns, cold)
    turn = itertools.cycle(held)
    x = np.random.default_rng(1).normal(0, 1, (tokens, columns)).astype(np.float32)
    out = np.zeros((tokens, rows), np.float32)
    bits, wide = np.zeros((rows, columns), np.uint16), torch.zeros(rows, columns)
    x32, x16 = torch.from_numpy(x), torch.from_numpy(x).bfloat16()
    spread = map if threads == 1 else ThreadPoolExecutor(threads).map

    def ours() -> None:
        codes, scale = next(turn)
        multiply(x, encoding, codes, scale, out, threads)

    def decoded() -> torch.Tensor:
        codes, scale = next(turn)
        if scale is None:
            return torch.from_numpy(codes).view(torch.bfloat16)
        step = -(-rows // (128 * threads)) * 128  # a stripe of rows a thread

        def part(first: int) -> None:
            last = min(first + step, rows)
            high = 1 if encoding == "mxfp4" else 128
            CODECS[encoding].decode(codes[first:last], scale[first // high : -(-last // high)], bits[first:last])

        list(spread(part, range(0, rows, step)))
        return torch.from_numpy(bits).view(torch.bfloat16)

    def in_bf16() -> None:
        F.linear(x16, decoded())

    def in_float32() -> None:
        wide.copy_(decoded())
        F.linear(x32, wide)

    def read() -> None:
        codes, scale = next(turn)
        words = codes.reshape(-1).view(np.uint64)
        step = -(-words.size // threads)
        list(spread(np.add.reduce, [words[first : first + step] for first in range(0, words.size, step)]))
        if scale is not None and scale.size % 8 == 0:
            np.add.reduce(scale.reshape(-1).view(np.uint64))

    codes, scale = held[0]
    size = codes.nbytes + (0 if scale is None else scale.nbytes)
    return size, {"ours": ours, "bf16": in_bf16, "float32": in_float32, "read": read}


def measure(calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each; the first call of each is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            taken[name].append(clock() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", default="1,8")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--cold", type=int, default=256 << 20, help="bytes of all copies of a weight")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    divisor = args.threads if args.clock == "cpu" else 1
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    results = []
    for (name, encoding, rows, columns), tokens in itertools.product(SHAPES, map(int, args.tokens.split(","))):
        if args.only not in name:
            continue
        size, calls = contenders(encoding, rows, columns, tokens, args.threads, args.cold)
        seconds = {who: taken / divisor for who, taken in measure(calls, args.rounds, clock).items()}
        ours = seconds["ours"]
        results.append(
            {
                "weight": name,
                "encoding": encoding,
                "shape": [rows, columns],
                "tokens": tokens,
                "ms": {who: taken * 1e3 for who, taken in seconds.items()},
                "gb_per_s": size / ours / 1e9,
                "of_read": seconds["read"] / ours,
                "times_incumbent": min(seconds["bf16"], seconds["float32"]) / ours,
                "gfma_per_s": rows * columns * tokens / ours / 1e9,
            }
        )
    if args.json:
        print(json.dumps({"threads": args.threads, "clock": args.clock, "rounds": args.rounds, "results": results}))
        return
    view = Table(title=f"{args.threads} threads, {args.clock} time, ms")
    for heading in ("weight", "t", "ours", "bf16", "float32", "read", "GB/s", "of read", "times", "GFMA/s"):
        view.add_column(heading, justify="left" if heading == "weight" else "right", no_wrap=True)
    for row in results:
        shape = "x".join(map(str, row["shape"]))
        view.add_row(
            f"{row['weight']}, {row['encoding']} {shape}",
            str(row["tokens"]),
            *(f"{row['ms'][who]:.2f}" for who in ("ours", "bf16", "float32", "read")),
            *(f"{row['gb_per_s']:.1f}", f"{row['of_read']:.2f}", f"{row['times_incumbent']:.1f}"),
            f"{row['gfma_per_s']:.1f}",
        )
    Console(width=140).print(view)


if __name__ == "__main__":
    main()
