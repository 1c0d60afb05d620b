"""How fast a whole checkpoint is looked through, against the disk and against the processor, in the same run.

    python benchmarks/reading.py FOLDER [--rounds 3] [--workers 2] [--layers 1]

FOLDER is made where it does not exist: Flash at the released widths, without the MTP block. Each round reads it once in
every way, its pages out of the cache before (`posix_fadvise`): plainly, by CRC-32C (`verify A`), by SHA-256
(`verify A --release`), and value by value (`inspect --deep`). SHA-256 has a floor of its own where a processor has no
instructions for it, and that is measured too: the same bytes, already in memory, on as many threads.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

from dsv4_bridge import examine, make_toy
from dsv4_bridge.convert.checksums import file_sum
from dsv4_bridge.spec.variants import shortened, variant_named
from dsv4_bridge.store.digests import file_digest, pieces

_SAMPLE = 256 << 20


def main() -> None:
    """Run and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--layers", type=int, default=1)
    args = parser.parse_args()
    made = None
    if not args.folder.exists():
        began, used = time.perf_counter(), time.process_time()
        spec = shortened(variant_named("Flash"), args.layers).without_draft()
        make_toy(args.folder, "Flash", 7, spec=spec, width="full", workers=args.workers)
        made = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - used}
    files = sorted(args.folder.glob("*.safetensors"), key=lambda p: -p.stat().st_size)
    total = sum(p.stat().st_size for p in files)
    examine(args.folder, workers=args.workers)  # compiled, and the toy is sound

    def each(work: Callable[[Path], object]) -> Callable[[], None]:
        def run() -> None:
            with ThreadPoolExecutor(args.workers) as pool:
                list(pool.map(work, files))

        return run

    ways = {
        "plain read": each(lambda path: sum(len(piece) for piece in pieces(path))),
        "crc32c": each(file_sum),
        "sha256": each(lambda path: file_digest(path, "sha256")),
        "deep": lambda: examine(args.folder, workers=args.workers),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            cold(files)
            began, used = time.perf_counter(), time.process_time()
            way()
            found[name].append((time.perf_counter() - began, time.process_time() - used))
    rates = {name: total / median(s for s, _ in times) / 1e9 for name, times in found.items()}
    floor = hashing(args.workers)
    print(
        json.dumps(
            {
                "GB": total / 1e9,
                "workers": args.workers,
                "made": made,
                "GB/s": rates,
                "CPU s/GB": {name: median(c for _, c in times) / total * 1e9 for name, times in found.items()},
                "of the plain read": {name: rate / rates["plain read"] for name, rate in rates.items()},
                "sha256 in memory, GB/s": floor,
                "sha256 of the lower floor": rates["sha256"] / min(floor, rates["plain read"]),
            },
            indent=1,
        )
    )


def cold(files: list[Path]) -> None:
    """Take files out of the page cache."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def hashing(workers: int) -> float:
    """GB/s of SHA-256 on bytes in memory."""
    data = np.random.default_rng(0).integers(0, 256, _SAMPLE, dtype=np.uint8)
    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda n: hashlib.sha256(data).digest(), range(workers)))
    return workers * _SAMPLE / (time.perf_counter() - began) / 1e9


if __name__ == "__main__":
    main()
