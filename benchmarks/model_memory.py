"""Peak memory of forward and backward over sequence length, for each kind of attention.

    python benchmarks/model_memory.py [--lengths 1024,2048,4096,8192] [--limit GIB] [--long 65536] [--json]

A one-layer model of hidden size 256 with attention's own proportions: 4 heads of 128 channels, blocks
and indexer where the layer has them. Every point is a process of its own: a short run warms up, the
kernel's high-water mark is reset, and what counts is the mark behind one forward and backward above
what was resident. `transformers` is its eager model of the same numbers. Last, one forward pass of a
CSA layer over `--long` tokens.
"""

import argparse
import itertools
import json
import logging
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

KINDS = {"window": 0, "CSA": 4, "HCA": 128}
LAYER = {
    "num_hidden_layers": 1,
    "num_hash_layers": 0,
    "vocab_size": 256,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "head_dim": 128,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 64,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 64,
}


def status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def child(side: str, ratio: int, length: int, backward: bool) -> float | None:
    """MiB that a pass takes above what was resident; None where it does not fit."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "mcore"))
    from reference import our_model, reference_model, small_spec

    torch.set_num_threads(1)
    spec = small_spec(**LAYER, compress_ratios=(ratio,))
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as name:
        model: Any = reference_model(spec, Path(name))
        if side == "ours":
            model = our_model(model, spec, Path(name))

    def run(tokens: int) -> None:
        with torch.set_grad_enabled(backward):
            out = model(torch.randint(0, spec.vocab_size, (1, tokens)))
            if backward:
                (out if side == "ours" else out.logits).mean().backward()

    run(256)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
    before = status_mib("VmRSS")
    try:
        run(length)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        return None
    return status_mib("VmHWM") - before


def run_child(side: str, ratio: int, length: int, limit: float, backward: bool = True) -> float | None:
    command = [sys.executable, __file__, "--child", side, "--ratio", ratio, "--lengths", length, "--limit", limit]
    command += [] if backward else ["--forward"]
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096,8192")
    parser.add_argument("--limit", type=float, default=12, help="GiB of memory that a process may take")
    parser.add_argument("--long", type=int, default=65536)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--ratio", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--forward", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    if args.child:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        resource.setrlimit(resource.RLIMIT_DATA, (int(args.limit * 2**30),) * 2)
        print(json.dumps(child(args.child, args.ratio, lengths[0], not args.forward)))
        return
    found = {}
    for kind, ratio in KINDS.items():
        for side in ("ours", "transformers"):
            found[f"{kind}, {side}"] = [run_child(side, ratio, length, args.limit) for length in lengths]
            print(kind, side, found[f"{kind}, {side}"], file=sys.stderr, flush=True)
    long = run_child("ours", 4, args.long, args.limit, backward=False) if args.long else None
    if args.json:
        print(json.dumps({"lengths": lengths, "mib": found, "long": long}))
        return
    table = Table(title="peak MiB of forward and backward, and growth a doubling")
    for column in ("what", *(f"S = {length}" for length in lengths), "growth"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, mib in found.items():
        cells = ["does not fit" if m is None else f"{m:.0f}" for m in mib]
        growth = [f"{b / a:.1f}" for a, b in itertools.pairwise(mib) if a and b]
        table.add_row(name, *cells, ", ".join(growth))
    Console(width=110).print(table)
    if long:
        print(f"forward of a CSA layer over {args.long} tokens: {long:.0f} MiB")


if __name__ == "__main__":
    main()
