"""The model against transformers' eager DeepseekV4ForCausalLM, with the same values, in one run.

    python benchmarks/model.py [--specs tiny,medium] [--lengths 512,2048,4096,8192] [--limit GIB] [--only WHAT] [--json]

Forward, and forward with backward, batch 1, float32; `decoding.py` has cached decoding. The two sides take turns
on one thread, and what counts is CPU time: on a shared machine it is what the wall clock would show on an idle
one. A side that needs more than `--limit` GiB is reported as such. Last, where our time goes.
"""

import argparse
import gc
import json
import logging
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

# The tests' reference: a transformers model of random values, and ours with the same.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "mcore"))

MEDIUM = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "head_dim": 128,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 256,
    "o_lora_rank": 128,
    "o_groups": 4,
    "moe_intermediate_size": 512,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "index_n_heads": 16,
    "index_head_dim": 64,
    "index_topk": 128,
    "swiglu_limit": 10.0,
}
SPECS: dict[str, dict[str, Any]] = {"tiny": {}, "medium": MEDIUM}
GEMMS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm"}
MOVES = ("index", "gather", "scatter", "sort", "topk", "masked_select", "cat", "clone", "copy_")
PARTS = {
    "_Attend": "attention",
    "_Sinkhorn": "mixing",
    "_Project": "mixing",
    "_Collapse": "mixing",
    "_Expand": "mixing",
}


def both_models(changes: dict[str, Any]) -> tuple[Any, Any]:
    from reference import our_model, reference_model, small_spec

    spec = small_spec(**changes)
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as name:
        reference = reference_model(spec, Path(name))
        return reference, our_model(reference, spec, Path(name))


def seconds(run: Callable[[], object]) -> float | None:
    """CPU seconds of a run; None where memory did not suffice."""
    gc.collect()
    began = time.process_time()
    try:
        run()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        return None
    return time.process_time() - began


def compare(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float | None]:
    """Medians of interleaved rounds behind one to warm up, and the median ratio of the first side to the second."""
    found: dict[str, list[float | None]] = {name: [] for name in sides}
    for number in range(rounds + (rounds > 1)):
        for name, run in sides.items():
            if not found[name] or found[name][-1] is not None:
                took = seconds(run)
                if number or rounds == 1 or took is None:
                    found[name].append(took)
    result: dict[str, float | None] = {}
    for name, took in found.items():
        result[name] = None if None in took else statistics.median(t for t in took if t is not None)
    first, second = found.values()
    pairs = [(a, b) for a, b in zip(first, second, strict=False) if a is not None and b is not None]
    result["times"] = statistics.median(a / b for a, b in pairs) if pairs and None not in first else None
    return result


def forward(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(ids)


def train(model: Any, ids: torch.Tensor) -> None:
    model.zero_grad()
    out = model(ids)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    logits.square().mean().backward()


def shares(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Where the time of forward and backward goes, in shares."""
    from torch.profiler import ProfilerActivity, profile

    train(model, ids)
    runs = []
    for _ in range(5 if ids.shape[1] <= 2048 else 2):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            train(model, ids)
        spent: Counter[str] = Counter()
        for event in profiler.events() or ():
            spent[_part_of(event)] += event.self_cpu_time_total
        runs.append(spent)
    # The profiler reads the wall clock, so the quickest run is the least disturbed.
    best = min(runs, key=lambda spent: spent.total())
    return {name: value / best.total() for name, value in best.most_common()}


def _part_of(event: Any) -> str:
    above = event
    while above is not None:
        for prefix, part in PARTS.items():
            if above.name.startswith(prefix):
                return part
        above = above.cpu_parent
    if event.name in GEMMS:
        return "other matrix products"
    if event.name.startswith("aten::") and event.name.removeprefix("aten::").startswith(MOVES):
        return "moving tokens"
    return "elementwise and overhead"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"speed": {}, "shares": {}}
    for name in args.specs.split(","):
        torch.manual_seed(0)
        reference, model = both_models(SPECS[name])
        for length in map(int, args.lengths.split(",")):
            ids = torch.randint(0, model.spec.vocab_size, (1, length))
            rounds = 5 if length <= 1024 else 3 if length <= 2048 else 1
            for what, run in (("forward", forward), ("forward, backward", train)):
                if args.only in ("", "speed"):
                    sides = {"transformers": partial(run, reference, ids), "ours": partial(run, model, ids)}
                    took = compare(sides, rounds)
                    found["speed"][f"{name}, S = {length}, {what}"] = took
                    print(name, length, what, took, file=sys.stderr, flush=True)
            reference.zero_grad()
            if args.only in ("", "shares"):
                found["shares"][f"{name}, S = {length}"] = shares(model, ids)
    return found


def report(found: dict[str, Any]) -> None:
    console = Console(width=110)

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    if found["speed"]:
        table = Table("what", "transformers", "ours", "times", title="CPU seconds, one thread")
        for name, took in found["speed"].items():
            table.add_row(name, cell(took["transformers"], 2), cell(took["ours"], 2), cell(took["times"], 1))
        console.print(table)
    if found["shares"]:
        names = sorted({name for each in found["shares"].values() for name in each})
        table = Table("forward, backward", *names, title="where our time goes, %")
        for name, each in found["shares"].items():
            table.add_row(name, *(f"{100 * each.get(part, 0):.0f}" for part in names))
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", default="tiny,medium")
    parser.add_argument("--lengths", default="512,2048,4096,8192")
    parser.add_argument("--limit", type=float, default=13, help="GiB of memory that a side may take")
    parser.add_argument("--only", default="", choices=("", "speed", "shares"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (int(args.limit * 2**30),) * 2)
    found = measure(args)
    print(json.dumps(found)) if args.json else report(found)


if __name__ == "__main__":
    main()
