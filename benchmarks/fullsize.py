"""A whole released variant, every tensor with its real name and shape, through the importer.

    python benchmarks/fullsize.py [--variant Flash] [--folder DIR]

The shards are sparse files: they claim their full size and take almost no disk. The importer reads
and decodes every byte and writes into sinks that count and discard. Shows tensors, bytes, speed,
and resident memory sampled once a second: the first and last tenth of the run and the peak.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console

from dsv4_bridge.cli.show.progress import TerminalProgress
from dsv4_bridge.convert.jobs import import_job
from dsv4_bridge.convert.run import dry_run
from dsv4_bridge.spec.plan import expand, shard_name, shard_of, stored
from dsv4_bridge.spec.variants import variant_named
from dsv4_bridge.store.hf import open_hf
from dsv4_bridge.store.hf_config import released_config
from dsv4_bridge.store.safetensors import INDEX, make_header, make_index


def make_sparse(folder: Path, name: str) -> None:
    """Only headers and FP8 scale bytes (a zero there would be illegal) are written."""
    variant = variant_named(name)
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
                    out.write(b"\x7f" * fact.nbytes)
                at += fact.nbytes
            out.truncate(at)
        weight_map |= {f.name: file for f in facts}
        total += sum(f.nbytes for f in facts)
    (folder / INDEX).write_bytes(make_index(weight_map, total))
    config = released_config(variant.spec, variant.expert_dtype, True)
    (folder / "config.json").write_text(json.dumps(config))


def resident() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="Flash")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    samples: list[float] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(1):
            samples.append(resident())

    with tempfile.TemporaryDirectory(dir=args.folder, prefix="dsv4-full-") as name:
        make_sparse(Path(name), args.variant)
        before = resident()
        checkpoint = open_hf(Path(name))
        job = import_job(checkpoint)
        planned = resident()
        watch = threading.Thread(target=sample)
        watch.start()
        began = time.perf_counter()
        report = dry_run(job, TerminalProgress())
        seconds = time.perf_counter() - began
        done.set()
        watch.join()
        tenth = max(1, len(samples) // 10)
        show = Console(highlight=False).print
        show(f"{args.variant}: {len(checkpoint.folder.tensors):,} tensors, {len(checkpoint.folder.shards)} shards")
        source = sum(t.nbytes for t in checkpoint.folder.tensors.values())
        rates = f"{source / seconds / 1e9:.2f} GB/s in, {report.bytes_written / seconds / 1e9:.2f} GB/s out"
        show(f"{source / 1e9:.1f} GB in, {report.bytes_written / 1e9:.1f} GB out, {seconds:.0f} s: {rates}")
        first, last = sum(samples[:tenth]) / tenth, sum(samples[-tenth:]) / tenth
        show(f"resident MiB: {before:.0f} after imports, {planned:.0f} with headers and plan;")
        show(f"first tenth of the run {first:.0f}, last tenth {last:.0f}, peak {max(samples):.0f}")


if __name__ == "__main__":
    main()
