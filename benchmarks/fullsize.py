"""A whole released variant, every tensor with its real name and shape, through the importer, and back.

    python benchmarks/fullsize.py [--variant Flash] [--folder DIR] [--back]
    python benchmarks/fullsize.py --variant V4.1-Flash [--experts 24] [--engram-rows 24000000]

The shards are sparse files: they claim their full size and take almost no disk. The importer reads
and decodes every byte and writes into sinks that count and discard. Shows tensors, bytes, speed,
and resident memory sampled once a second: the first and last tenth of the run and the peak.
`--back` makes a Megatron checkpoint of sparse files too, as the importer lays it out, and exports it like the release:
every byte is compared with the release's on its way into the sink.
With fewer experts a layer, or rows of an Engram table, it is shorter; every other number stays as released. `--part`
does the whole in several runs.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dsv4_bridge.cli.show.progress import TerminalProgress
from dsv4_bridge.convert.job import Job
from dsv4_bridge.convert.jobs import export_job, import_job
from dsv4_bridge.convert.report import Report
from dsv4_bridge.convert.run import dry_run
from dsv4_bridge.convert.segments import Copy, Frame, Literal
from dsv4_bridge.progress import Progress
from dsv4_bridge.spec.plan import expand, shard_name, shard_of, stored
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.spec_v41 import V41Spec
from dsv4_bridge.spec.variants import Variant, variant_named
from dsv4_bridge.store.hf import HFCheckpoint, open_hf
from dsv4_bridge.store.hf_config import released_config
from dsv4_bridge.store.megatron import open_along, open_megatron
from dsv4_bridge.store.safetensors import INDEX, make_header, make_index
from dsv4_bridge.store.stream import Bytes, as_bytes


def make_sparse(folder: Path, variant: Variant) -> None:
    """Only headers and FP8 scale bytes (a zero there would be illegal) are written."""
    plan = expand(variant.spec, variant.own_mtp_head)
    shards: dict[int, list] = {}
    for item in plan.items:
        shards.setdefault(shard_of(item, plan.spec), []).extend(stored(item, variant.encodings[item.row.encoding]))
    weight_map, total = {}, 0
    for number, facts in shards.items():
        file = shard_name(number, plan.spec)
        with (folder / file).open("wb") as out:
            header = make_header(facts, {})
            out.write(header)
            at = len(header)
            for fact in facts:
                block_scale = fact.name.endswith(".scale") and ".experts." not in fact.name
                if block_scale:
                    out.seek(at)
                    for start in range(0, fact.nbytes, 1 << 22):
                        out.write(b"\x7f" * min(1 << 22, fact.nbytes - start))
                at += fact.nbytes
            out.truncate(at)
        weight_map |= {f.name: file for f in facts}
        total += sum(f.nbytes for f in facts)
    (folder / INDEX).write_bytes(make_index(weight_map, total))
    config = released_config(variant.spec, variant.expert_dtype, True)
    (folder / "config.json").write_text(json.dumps(config))


def cut(name: str, experts: int | None, rows: int | None) -> Variant:
    """The variant, with fewer experts or rows where that was said."""
    variant, changes = variant_named(name), dict[str, Any]()
    if experts:
        changes["n_routed_experts"] = experts
    if rows and isinstance(variant.spec, V41Spec):
        tables = tuple(min(rows, n) for n in variant.spec.engram.num_embeddings)
        changes["engram"] = replace(variant.spec.engram, num_embeddings=tables)
    return replace(variant, spec=replace_spec(variant.spec, **changes))


def make_sparse_megatron(checkpoint: HFCheckpoint, out: Path) -> None:
    """What the importer would write, with holes for values; scales of passengers are real."""
    job = import_job(checkpoint)
    for file in job.files:
        path = out / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as target:
            at = 0
            for segment in file.segments:
                if isinstance(segment, Literal | Frame):
                    target.seek(at)
                    target.write(segment.data if isinstance(segment, Literal) else segment.make())
                elif isinstance(segment, Copy) and segment.info.dtype == "F8_E8M0":
                    raw = np.empty(segment.nbytes, np.uint8)
                    segment.folder.read_into(segment.info, 0, raw)
                    target.seek(at)
                    target.write(raw)
                at += segment.nbytes
            target.truncate(at)
    for name, data in job.markers.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)


class Compared:
    """A sink that holds what comes against a file, counts and discards it."""

    def __init__(self, path: Path, progress: Progress):
        self._file, self._progress, self._at = path.open("rb"), progress, 0
        self.differing = 0

    def write(self, data: Bytes) -> None:
        raw = as_bytes(data)
        there = np.fromfile(self._file, np.uint8, raw.size)
        self.differing += raw.size - int(np.count_nonzero(there == raw)) if there.size == raw.size else raw.size
        self._at += raw.size
        self._progress.advance(raw.size)

    def patch(self, offset: int, old: bytes, new: bytes) -> None:
        self.differing += old != new

    def close(self) -> None:
        left = self._file.read(1)
        self._file.close()
        self.differing += len(left)

    abort = close


def compare(job: Job, folder: Path, progress: Progress) -> tuple[Report, int]:
    """Run a job into sinks that compare with the files of a folder; its report, and how many bytes differ."""
    emitter, report, differing = job.emitter(), Report(), 0
    progress.start(job.label, job.nbytes, 0)
    for file in job.files:
        sink = Compared(folder / file.name, progress)
        report.merge(emitter.emit(file.segments, sink))
        sink.close()
        differing += sink.differing
    emitter.close()
    progress.stop()
    return report, differing


def part_of(job: Job, part: str) -> Job:
    """The job with those of its files that begin in that part of its bytes."""
    number, parts = map(int, part.split("/"))
    whole, at, kept = sum(f.nbytes for f in job.files), 0, []
    for file in job.files:
        if at * parts // whole == number - 1:
            kept.append(file)
        at += file.nbytes
    return replace(job, files=tuple(kept))


def resident() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="Flash")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--experts", type=int, help="of a layer, fewer than released")
    parser.add_argument("--engram-rows", type=int, help="of each table, fewer than released")
    parser.add_argument("--back", action="store_true", help="export, and compare every byte")
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of N parts of the output's bytes; whole files")
    args = parser.parse_args()
    show = Console(highlight=False, soft_wrap=True).print
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="dsv4-full-") as name:
        folder = Path(name) / "hf"
        folder.mkdir()
        make_sparse(folder, cut(args.variant, args.experts, args.engram_rows))
        before = resident()
        checkpoint = open_hf(folder)
        source = sum(t.nbytes for t in checkpoint.folder.tensors.values())
        count = f"{len(checkpoint.folder.tensors):,} tensors, {source:,} bytes, {len(checkpoint.folder.shards)} shards"
        show(f"{args.variant}: {count}")
        if args.back:
            make_sparse_megatron(checkpoint, Path(name) / "megatron")
            megatron = open_megatron(Path(name) / "megatron", checkpoint)
            job = export_job(megatron, checkpoint, open_along(megatron), "source")
            job = part_of(job, args.part)
            (report, differing), seconds, told = watched(before, lambda: compare(job, folder, TerminalProgress()))
            show(f"{report.tensors:,} weights, {report.bytes_written:,} bytes of files out, {differing:,} differ")
        else:
            job = part_of(import_job(checkpoint), args.part)
            report, seconds, told = watched(before, lambda: dry_run(job, TerminalProgress()))
        out = report.bytes_written
        of = f" of {source / 1e9:.1f} GB released" if args.part == "1/1" else f", part {args.part}"
        speed = f"{seconds:.0f} s: {out / seconds / 1e9:.2f} GB/s out"
        show(f"{report.tensors:,} tensors, {out / 1e9:.1f} GB out{of}, {speed}")
        show(told)


def watched(before: float, work: Callable[[], Any]) -> tuple[Any, float, str]:
    """What some work returns, its seconds, and the memory that it had while it ran, in words."""
    samples, done, planned = [resident()], threading.Event(), resident()

    def sample() -> None:
        while not done.wait(1):
            samples.append(resident())

    watch = threading.Thread(target=sample)
    watch.start()
    began = time.perf_counter()
    try:
        found = work()
    finally:
        done.set()
        watch.join()
    seconds, tenth = time.perf_counter() - began, max(1, len(samples) // 10)
    first, last = sum(samples[:tenth]) / tenth, sum(samples[-tenth:]) / tenth
    told = f"resident MiB: {before:.0f} after imports, {planned:.0f} with headers and plan; first tenth of the run "
    return found, seconds, told + f"{first:.0f}, last tenth {last:.0f}, peak {max(samples):.0f}"


if __name__ == "__main__":
    main()
