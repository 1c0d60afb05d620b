"""A whole released variant, every tensor with its real name and shape, through the importer.

    python benchmarks/fullsize.py [--variant Flash] [--folder DIR]
    python benchmarks/fullsize.py --variant V4.1-Flash [--experts 24] [--engram-rows 24000000]

The shards are sparse files: they claim their full size and take almost no disk. The importer reads
and decodes every byte and writes into sinks that count and discard. Shows tensors, bytes, speed,
and resident memory sampled once a second: the first and last tenth of the run and the peak.
With fewer experts a layer, or rows of an Engram table, it is shorter; every other number stays as released.
"""

import argparse
import json
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dsv4_bridge.cli.show.progress import TerminalProgress
from dsv4_bridge.convert.jobs import import_job
from dsv4_bridge.convert.run import dry_run
from dsv4_bridge.spec.plan import expand, shard_name, shard_of, stored
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.spec_v41 import V41Spec
from dsv4_bridge.spec.variants import Variant, variant_named
from dsv4_bridge.store.hf import open_hf
from dsv4_bridge.store.hf_config import released_config
from dsv4_bridge.store.safetensors import INDEX, make_header, make_index


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
    args = parser.parse_args()
    samples: list[float] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(1):
            samples.append(resident())

    with tempfile.TemporaryDirectory(dir=args.folder, prefix="dsv4-full-") as name:
        make_sparse(Path(name), cut(args.variant, args.experts, args.engram_rows))
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
