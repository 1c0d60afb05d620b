"""A model larger than memory: parity by layers and text, at released widths, against the disk and the memory.

    dsv4 toy TOY --width full --layers 6
    python benchmarks/streaming.py parity TOY                # peak and seconds a layer, 64 and 2304 tokens
    python benchmarks/streaming.py generate TOY --memory 2 8 16

Every run is the command in a process of its own. Floors are taken in the same run: reading the same files past the
page cache, and summing numbers that are in memory.
"""

import argparse
import json
import mmap
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

_COMMAND = [sys.executable, "-W", "ignore", "-m", "dsv4_bridge"]
_PIECE = 16 << 20
_PROMPT = "0,5,77,1031,9,64021,3,128"


def run(*words: str) -> tuple[dict[str, Any], list[str], float]:
    """What a command printed as JSON, what it said, and the most memory it had, in GiB."""
    with subprocess.Popen(
        [*_COMMAND, *words, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        out, said = process.communicate()
    # Of all children; each is larger than those before it, or the figure is an upper bound.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    if process.returncode not in (0, 1):
        raise RuntimeError(said)
    return json.loads(out), said.splitlines(), peak


def disk_rate(folder: Path, most: int = 4 << 30) -> float:
    """Bytes a second of reading shards past the page cache, the best of one reader and of four, as the command has."""
    shards = sorted(folder.glob("*.safetensors"))
    places = [(shard, at) for shard in shards for at in range(0, shard.stat().st_size, _PIECE)][: most // _PIECE]

    def read(some: list[tuple[Path, int]]) -> int:
        buffer, done = mmap.mmap(-1, _PIECE), 0
        for shard, at in some:
            fd = os.open(shard, os.O_RDONLY | os.O_DIRECT)
            done += os.preadv(fd, [buffer], at)
            os.close(fd)
        return done

    rates = []
    for readers in (1, 4):
        began = time.perf_counter()
        with ThreadPoolExecutor(readers) as pool:
            done = sum(pool.map(read, [places[n::readers] for n in range(readers)]))
        rates.append(done / (time.perf_counter() - began))
    return max(rates)


def memory_rate() -> float:
    """Bytes a second of summing what is in memory, on one core."""
    numbers = np.ones(1 << 27, np.uint64)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - began)
    return numbers.nbytes / min(seconds)


def parity(folder: Path, lengths: list[int], part: str | None) -> None:
    """A table of runs, a line each."""
    print("| tokens | layers | peak GiB | s a layer | read a layer | experts a layer | logits error | passed |")
    print("|---|---|---|---|---|---|---|---|")
    for length in lengths:
        words = ["parity", str(folder), "--seq-length", str(length), "--batch", "1"]
        found, _, peak = run(*words, *(["--layers", part] if part else []))
        steps = found["steps"]
        seconds, read = (sorted(s[key] for s in steps) for key in ("seconds", "nbytes"))
        logits = found["free"]["logits"]
        experts = "/".join(f"{s['experts']}" for s in steps)
        error = f"{logits['error']:.2g}" if logits else "-"
        print(
            f"| {length} | {len(steps)} | {peak:.2f} | {seconds[0]:.1f} to {seconds[-1]:.1f} | "
            f"{read[0] / 1e9:.2f} to {read[-1] / 1e9:.2f} GB | {experts} | {error} | {found['passed']} |",
            flush=True,
        )


def generate(folder: Path, memories: list[float], tokens: int) -> None:
    """A table of memories, a line each."""
    disk, memory = disk_rate(folder), memory_rate()
    print(f"disk {disk / 1e9:.2f} GB/s past the page cache; memory {memory / 1e9:.1f} GB/s, one core\n")
    print("| memory | peak GiB | tokens/s | kept | experts a layer | found there | read a token | of the disk's rate |")
    print("|---|---|---|---|---|---|---|---|")
    for most in sorted(memories):
        words = ["--prompt-ids", _PROMPT, "--max-new-tokens", str(tokens), "--memory", str(most)]
        found, _, peak = run("generate", str(folder), *words)
        told, count, seconds = found["streamed"], found["new_tokens"], found["seconds"]
        used = told["hits"] + told["misses"]
        print(
            f"| {most:g} GiB | {peak:.2f} | {count / seconds:.2f} | {told['kept'] / 1e9:.2f} of "
            f"{told['every_token'] / 1e9:.2f} GB | {told['room']} | {100 * told['hits'] / used:.0f} % | "
            f"{told['read'] / count / 1e9:.2f} GB | {told['read'] / seconds / disk:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("parity", "generate"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 2304])
    parser.add_argument("--layers", help="a part, as 0-2")
    parser.add_argument("--memory", type=float, nargs="*", default=[2, 8, 16])
    parser.add_argument("--tokens", type=int, default=64)
    told = parser.parse_args()
    if told.what == "parity":
        parity(told.folder, told.lengths, told.layers)
    else:
        generate(told.folder, told.memory, told.tokens)


if __name__ == "__main__":
    main()
