"""What loading a real-shaped Flash layer costs each rank: bytes read, time, and memory besides the model's own.

    python benchmarks/loading.py [--experts 64] [--layouts ep1 ep2 ep4 …] [--folder DIR] [--json]

Every rank is a process of its own (gloo, on the CPU); its parameters, in bf16, are touched before the measurement
begins, and the input's pages are dropped from the page cache. "read" counts what the reader asked of the input,
"disk" what the kernel fetched for the process; "of all" is the share of the folder's bytes. "above" is the
peak of resident memory while `load_weights` runs, less what was resident before.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from layer import drop_cache, make_layer, size_of
from rank_processes import run_ranks


def status(field: str) -> int:
    """A size from /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def fetched() -> int:
    """Bytes that the kernel read from a disk for this process."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def child(source: Path, sizes: dict[str, int]) -> None:
    import torch
    import torch.distributed as dist

    from dsv4_bridge.codec import fp8, mxfp4
    from dsv4_bridge.mcore import Parallel, build_model, initialize, load_weights
    from dsv4_bridge.store.hf import open_hf
    from dsv4_bridge.store.safetensors import SafetensorsFolder

    torch.set_num_threads(1)
    initialize(Parallel(**sizes))
    opened = open_hf(source)
    model = build_model(opened.spec, dtype=torch.bfloat16, initialize_weights=False)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    for parameter in model.parameters():
        parameter.data.zero_()
    # Compiled code is read from its cache once; that is not the input.
    for codec, width, scale_shape in ((mxfp4, 64, (128, 4)), (fp8, 128, (1, 1))):
        raw, out = torch.zeros(128, width, dtype=torch.uint8), torch.zeros(128, 128, dtype=torch.uint16)
        codec.decode(raw.numpy(), torch.full(scale_shape, 127, dtype=torch.uint8).numpy(), out.numpy())
    opened.close()

    asked = [0]
    read_into = SafetensorsFolder.read_into

    def counting(self: SafetensorsFolder, info: object, offset: int, out: object) -> None:
        asked[0] += out.nbytes  # type: ignore[attr-defined]
        read_into(self, info, offset, out)  # type: ignore[arg-type]

    SafetensorsFolder.read_into = counting  # type: ignore[method-assign,assignment]
    if dist.get_rank() == 0:
        drop_cache(source)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    resident, disk, began = status("VmRSS:"), fetched(), time.perf_counter()
    load_weights(model, source)
    found = {
        "seconds": time.perf_counter() - began,
        "read": asked[0],
        "disk": fetched() - disk,
        "above": status("VmHWM:") - resident,
        "held": held,
    }
    dist.barrier()
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def run(source: Path, layout: str) -> list[dict[str, float]]:
    """One line a rank."""
    sizes = {name: int(size) for name, size in re.findall(r"([a-z]+)(\d+)", layout)}
    world = max(sizes.get("tp", 1), sizes.get("ep", 1) * sizes.get("etp", 1))
    words = ("--child", json.dumps(sizes), "--source", str(source))
    return run_ranks(world, __file__, *words, what=layout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--layouts", nargs="+", default=["ep1", "ep2", "ep4", "tp2", "etp2"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child")
    parser.add_argument("--source", type=Path)
    args = parser.parse_args()
    if args.child:
        child(args.source, json.loads(args.child))
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="dsv4-bench-") as name:
        source = Path(name) / "hf"
        make_layer(source, args.experts)
        total = size_of(source)
        found = {layout: run(source, layout) for layout in args.layouts}
    if args.json:
        print(json.dumps({"bytes": total, "layouts": found}))
        return
    table = Table(title=f"one Flash layer, {args.experts} experts, {total / 1e9:.2f} GB released")
    for column in ("layout", "rank", "holds GB", "read GB", "of all", "disk GB", "seconds", "above MiB"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for layout, ranks in found.items():
        for number, r in enumerate(ranks):
            cells = (f"{r['held'] / 1e9:.2f}", f"{r['read'] / 1e9:.3f}", f"{r['read'] / total:.3f}")
            cells += (f"{r['disk'] / 1e9:.3f}", f"{r['seconds']:.1f}", f"{r['above'] / 2**20:.0f}")
            table.add_row(layout, str(number), *cells)
        disk = sum(r["disk"] for r in ranks)
        table.add_row("", "sum", "", f"{sum(r['read'] for r in ranks) / 1e9:.3f}", "", f"{disk / 1e9:.3f}", "", "")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
