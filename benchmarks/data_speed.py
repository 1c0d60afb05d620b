"""Text into an indexed dataset: `dsv4 data`, megatron-core's builder behind a pool as in Megatron's tool, datasets.map.

    python benchmarks/data_speed.py [--mb 50 200] [--workers 2]

One made-up corpus of JSON lines, the same tokenizer, end-of-document token and number of processes; every way in
processes of its own. Files of ours and of megatron-core are held equal, byte for byte. Memory is the largest sum of
resident memory over the whole tree of processes, looked at twenty times a second.
"""

import argparse
import filecmp
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from dsv4_bridge import ModelSpec, make_toy

WAYS = ("dsv4", "megatron", "datasets")


def make_corpus(path: Path, megabytes: int, seed: int = 1) -> None:
    """Documents of 100 to 20,000 characters: words by Zipf's law, a few of them not ASCII."""
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz" + "äéß語"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 11))) for _ in range(20_000)]
    chances = [1 / n for n in range(1, len(words) + 1)]
    pool, written = draw.choices(words, chances, k=2_000_000), 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            first, count = draw.randrange(len(pool) - 4000), int(20 * 200 ** draw.random())
            line = json.dumps({"text": " ".join(pool[first : first + count])}, ensure_ascii=False) + "\n"
            written += len(line.encode())
            file.write(line)


class Encode:
    """What a worker of Megatron's tool does with a line."""

    def __init__(self, tokenizer: str, eos: int):
        self.tokenizer, self.eos = tokenizer, eos

    def begin(self) -> None:
        from tokenizers import Tokenizer

        Encode.opened = Tokenizer.from_file(self.tokenizer)

    def ids(self, text: str) -> list[int]:
        return [*Encode.opened.encode(text, add_special_tokens=False).ids, self.eos]

    def line(self, line: str) -> list[int]:
        return self.ids(json.loads(line)["text"])


def by_megatron(corpus: Path, out: Path, toy: Path, workers: int) -> None:
    """A pool that gives lists of ids, and a builder that is told one document at a time."""
    from dsv4_bridge.mcore import cpu

    cpu.install()
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    spec = ModelSpec.from_pretrained(toy)
    encode = Encode(str(toy / "tokenizer.json"), spec.eos_token_id or 0)
    builder = IndexedDatasetBuilder(f"{out}.bin", DType.optimal_dtype(spec.vocab_size))
    with corpus.open(encoding="utf-8") as lines, multiprocessing.Pool(workers, initializer=encode.begin) as pool:
        for ids in pool.imap(encode.line, lines, 32):
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{out}.idx")


def by_datasets(corpus: Path, out: Path, toy: Path, workers: int) -> None:
    """`datasets.map` over the lines; Arrow files, no index."""
    import datasets

    datasets.disable_progress_bars()
    spec = ModelSpec.from_pretrained(toy)
    encode = Encode(str(toy / "tokenizer.json"), spec.eos_token_id or 0)
    encode.begin()
    rows = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=f"{out}.cache")
    rows = rows.map(lambda row: {"ids": encode.ids(row["text"])}, num_proc=workers, remove_columns=["text"])
    rows.save_to_disk(str(out))


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds and the largest memory of a tree of processes."""
    began, most = time.perf_counter(), 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        total = 0
        for one in (process, *_children(process)):
            try:
                total += one.memory_info().rss
            except psutil.Error:
                continue
        most = max(most, total)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - began, most


def _children(process: Any) -> list[Any]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--way", choices=WAYS[1:], help=argparse.SUPPRESS)
    parser.add_argument("--paths", nargs=3, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        {"megatron": by_megatron, "datasets": by_datasets}[asked.way](*asked.paths, asked.workers)
        return
    print("| corpus | way | seconds | million tokens/s | GB of memory |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        toy = make_toy(folder / "toy")
        for megabytes in asked.mb:
            corpus = folder / f"{megabytes}.jsonl"
            make_corpus(corpus, megabytes)
            for way in WAYS:
                if way == "datasets" and find_spec("datasets") is None:
                    continue
                out = folder / f"{way}-{megabytes}"
                command = [sys.executable, __file__, "--workers", str(asked.workers), "--way", way]
                command += ["--paths", *map(str, (corpus, out, toy))]
                if way == "dsv4":
                    command = [sys.executable, "-m", "dsv4_bridge", "data", str(corpus), str(out), "-q"]
                    command += ["--tokenizer", str(toy), "--workers", str(asked.workers)]
                seconds, memory = measure(command)
                if way == "dsv4":
                    tokens = json.loads(out.with_name(f"{out.name}.json").read_text())["tokens"]
                speed = tokens / seconds / 1e6
                print(f"| {megabytes} MB | {way} | {seconds:.1f} | {speed:.2f} | {memory / 1e9:.2f} |", flush=True)
            ours, theirs = (folder / f"{way}-{megabytes}" for way in ("dsv4", "megatron"))
            for ending in (".bin", ".idx"):
                one, other = (path.with_name(path.name + ending) for path in (ours, theirs))
                if not filecmp.cmp(one, other, shallow=False):
                    raise SystemExit(f"{one.name} and {other.name} differ")


if __name__ == "__main__":
    main()
