"""Cached decoding against transformers' eager DeepseekV4ForCausalLM, with the same values, in one run.

    python benchmarks/decoding.py [--specs tiny,medium] [--types float32,bfloat16] [--prompts 32,512]
        [--batches 1,8] [--new 64] [--threads 1] [--json]

Prompts run once and are not counted; then the two sides take turns of eight greedy steps, the other one first
every second time. What counts is CPU time over the threads: on a shared machine it is what the wall clock would
show on an idle one. Told are medians of tokens a second, and the median of the pairs' ratios.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model import SPECS

# The tests' reference: a transformers model of random values, and ours with the same.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "mcore"))

TURN = 8  # steps


def both_models(changes: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    """Transformers' model and ours of one type; what released checkpoints hold in float32 stays so in both."""
    from reference import loaded_model, reference_model, small_spec
    from transformers import DeepseekV4ForCausalLM

    spec = small_spec(**changes)
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as name:
        reference_model(spec, Path(name)).save_pretrained(Path(name) / "saved")
        saved = Path(name) / "saved"
        reference = DeepseekV4ForCausalLM.from_pretrained(saved, dtype=dtype, attn_implementation="eager")
        return reference.eval(), loaded_model(spec, saved, dtype=dtype)


def sides(reference: Any, model: Any, ids: torch.Tensor, room: int) -> dict[str, Callable[[], None]]:
    """Each side with a cache filled by `ids` [b, s]; a call makes `TURN` greedy steps."""
    from dsv4_bridge.mcore.layers.cache import new_cache

    out = reference(ids, use_cache=True)
    past = out.past_key_values
    cache = new_cache(model.config, torch.full((len(ids),), ids.shape[1]), ids.shape[1] + room)
    tokens = {"transformers": out.logits[:, -1:].argmax(-1)}
    tokens["ours"] = model(ids, cache=cache, last_only=True).argmax(-1)

    def theirs() -> None:
        for _ in range(TURN):
            logits = reference(tokens["transformers"], past_key_values=past, use_cache=True).logits
            tokens["transformers"] = logits.argmax(-1)

    def ours() -> None:
        for _ in range(TURN):
            tokens["ours"] = model(tokens["ours"], cache=cache).argmax(-1)

    return {"transformers": theirs, "ours": ours}


def rates(runs: dict[str, Callable[[], None]], batch: int, turns: int) -> dict[str, float]:
    """Medians of tokens a second, and of the pairs' ratios, ours over theirs; a first pair warms up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name in sorted(runs, reverse=turn % 2 == 1):
            began = time.process_time()
            runs[name]()
            if turn:
                found[name].append(batch * TURN * torch.get_num_threads() / (time.process_time() - began))
    ratios = [ours / theirs for ours, theirs in zip(found["ours"], found["transformers"], strict=True)]
    return {name: statistics.median(seen) for name, seen in found.items()} | {"times": statistics.median(ratios)}


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What was measured -> rates."""
    found: dict[str, dict[str, float]] = {}
    turns = args.new // TURN
    for name in args.specs.split(","):
        for kind in args.types.split(","):
            torch.manual_seed(0)
            reference, model = both_models(SPECS[name], getattr(torch, kind))
            for length in map(int, args.prompts.split(",")):
                for batch in map(int, args.batches.split(",")):
                    ids = torch.randint(0, model.spec.vocab_size, (batch, length))
                    runs = sides(reference, model, ids, (turns + 1) * TURN + 1)
                    what = f"{name}, {kind}, {batch} behind {length}"
                    found[what] = rates(runs, batch, turns)
                    print(what, found[what], file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", default="tiny,medium")
    parser.add_argument("--types", default="float32,bfloat16")
    parser.add_argument("--prompts", default="32,512")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--new", type=int, default=64, help="tokens a row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    found = measure(args)
    if args.json:
        print(json.dumps(found))
        return
    table = Table("tokens a second", "transformers", "ours", "times", title=f"threads: {args.threads}")
    for what, seen in found.items():
        table.add_row(what, f"{seen['transformers']:.1f}", f"{seen['ours']:.1f}", f"{seen['times']:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
