"""What a rank holds of long rows that context-parallel ranks share, and one step of a row of a million tokens.

    python benchmarks/long_rows.py [--lengths 8192,16384,32768,65536] [--ranks 1,2,4] [--loss-chunk 2048] [--json]
    python benchmarks/long_rows.py --million [--ranks 1,4] [--length 1048576] [--index-queries auto] [--json]

Every rank is a process of its own (gloo, on the CPU, one thread). The model has a window layer, a CSA layer with its
indexer and an HCA layer, four hyper-connection streams and routed experts; windows and ratios are the released ones,
widths are small. Weights and tokens are random and the same for any number of ranks.

"kept" is what autograd holds between forward and backward, each storage once; "peak" is the kernel's high-water mark
of the pass above what was resident before it, temporaries and messages with it. Both are those of the fullest rank. The
head's share is how far "kept" rises from where the head begins, of the loss in chunks and of all tokens at once.

With `--million`, one forward and backward of a small vocabulary with full recompute at each number of ranks: seconds,
the peak of every rank, the loss, how far loss and gradients lie from those of the first, and the seconds of its core
that a rank scores blocks for the indexer, the longest over the mean too.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rank_processes import run_ranks

NARROW: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "index_n_heads": 1,
    "index_head_dim": 8,
    "index_topk": 16,
    "hc_mult": 2,
}
TABLE: dict[str, Any] = NARROW | {"vocab_size": 4096}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def status(field: str) -> int:
    """A size from /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def child(told: dict[str, Any]) -> None:
    """One rank: a pass at every length, and what each took."""
    import torch
    import torch.distributed as dist

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "mcore"))
    from rank_memory import Kept
    from reference import randomise

    from dsv4_bridge.mcore import Parallel, build_model, initialize
    from dsv4_bridge.mcore.layers.indexer import Indexer
    from dsv4_bridge.mcore.schedule import Batch, cut, forward_backward
    from dsv4_bridge.spec.spec import replace_spec
    from dsv4_bridge.spec.variants import VARIANTS, tiny

    torch.set_num_threads(1)
    initialize(Parallel(cp=told["ranks"]))
    base = tiny(VARIANTS["Flash"]).without_draft()
    shape = {"num_hidden_layers": 3, "compress_ratios": (0, 4, 128), "num_hash_layers": 0}
    spec = replace_spec(base, **shape, **told["spec"])
    model = randomise(build_model(spec, initialize_weights=False, **told["settings"]), 3).train()

    def step(length: int) -> float:
        random = torch.Generator().manual_seed(length)
        ids = torch.randint(0, spec.vocab_size, (1, length + 1), generator=random)
        whole = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        batch = cut(whole, dist.get_rank(), told["ranks"])
        model.zero_grad()
        (loss,) = forward_backward([model], [batch])
        return float(loss)

    step(512 * told["ranks"])
    scored, choose = [0.0], Indexer.choose

    def timed(*given: Any, **named: Any) -> torch.Tensor:
        began = time.thread_time()
        chosen = choose(*given, **named)
        scored[0] += time.thread_time() - began
        return chosen

    Indexer.choose = timed  # type: ignore[method-assign]
    found = []
    for length in told["lengths"]:
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
        before, began, scored[0] = status("VmRSS"), time.perf_counter(), 0.0
        loss = step(length)
        at = {"loss": loss, "seconds": time.perf_counter() - began, "peak": status("VmHWM") - before}
        at["scoring"] = scored[0]
        if told["kept"]:  # apart: held tensors are not freed as soon
            kept, begins = Kept([*model.parameters(), *model.buffers()]), list[int]()
            watched = model.decoder.register_forward_hook(lambda *_, kept=kept, begins=begins: begins.append(kept.now))
            with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.tensor):
                step(length)
            watched.remove()
            at |= {"kept": kept.most, "head": kept.most - begins[0]}
        found.append(at)
    if told["gradients"]:
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for gradient in gradients.values():  # what megatron-core averages over data and context
            dist.all_reduce(gradient)
            gradient.div_(told["ranks"])
        if dist.get_rank() == 0:
            torch.save(gradients, told["gradients"])
    dist.barrier()
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def run(ranks: int, lengths: list[int], **told: Any) -> list[list[dict[str, Any]]]:
    """What each rank found, a dict for every length."""
    env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DSV4_RANK_TIMEOUT": "36000"}
    whole = {"settings": {}, "spec": TABLE, "kept": False, "gradients": None} | told
    word = json.dumps(whole | {"ranks": ranks, "lengths": lengths})
    return run_ranks(ranks, __file__, "--child", word, what=f"{ranks} ranks", **env)


def memory(lengths: list[int], counts: list[int], chunk: int) -> dict[str, Any]:
    """Bytes of the fullest rank: with chunks, by ranks; and what one keeps with all logits at once."""
    found: dict[str, Any] = {}
    for ranks in counts:
        each = run(ranks, lengths, kept=True, settings={"loss_chunk": chunk})
        for what in ("kept", "head", "peak"):
            found[f"{what}, cp {ranks}"] = [max(rank[at][what] for rank in each) for at in range(len(lengths))]
        found[f"loss, cp {ranks}"] = [at["loss"] for at in each[0]]
        print(f"cp {ranks}", found[f"kept, cp {ranks}"], file=sys.stderr, flush=True)
    (whole,) = run(1, lengths, kept=True, settings={"loss_chunk": 0})
    for what in ("kept", "head"):
        found[f"{what}, cp 1, logits of all tokens at once"] = [at[what] for at in whole]
    return found


def million(length: int, counts: list[int], queries: str) -> list[dict[str, Any]]:
    """A step at each number of ranks; distances to the first one's."""
    import torch

    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as name:
        for ranks in counts:
            file = Path(name) / f"{ranks}.pt"
            settings = FULL | {"index_queries": queries}
            each = [rank[0] for rank in run(ranks, [length], settings=settings, spec=NARROW, gradients=str(file))]
            at = {"ranks": ranks, "loss": each[0]["loss"], "peaks": [rank["peak"] for rank in each]}
            at |= {"seconds": max(rank["seconds"] for rank in each), "scoring": [rank["scoring"] for rank in each]}
            theirs, ours = (torch.load(Path(name) / f"{n}.pt") for n in (counts[0], ranks))
            at["loss_apart"] = abs(at["loss"] / (found or [at])[0]["loss"] - 1)
            apart = {n: float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items() if g.norm() > 1e-9}
            worst = max(apart, key=apart.__getitem__)
            at |= {"gradients": len(apart), "gradient_apart": apart[worst], "worst": worst}
            found.append(at)
            print(at, file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="8192,16384,32768,65536")
    parser.add_argument("--ranks", default=None, help="context-parallel ranks; 1,2,4, of a million tokens 1,4")
    parser.add_argument("--loss-chunk", type=int, default=2048, help="tokens whose logits a rank holds at a time")
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--length", type=int, default=1 << 20, help="tokens of the long row")
    parser.add_argument("--index-queries", default="auto", help="of the long row: auto, home or spread")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    lengths = [int(length) for length in args.lengths.split(",")]
    counts = [int(ranks) for ranks in (args.ranks or ("1,4" if args.million else "1,2,4")).split(",")]
    if args.million:
        steps = million(args.length, counts, args.index_queries)
        if args.json:
            print(json.dumps({"length": args.length, "steps": steps}))
            return
        table = Table(title=f"one forward and backward of {args.length} tokens")
        for column in (
            "ranks",
            "seconds",
            "peak of a rank, MiB",
            "loss",
            "loss apart",
            "gradients apart",
            "scoring, s",
        ):
            table.add_column(column, justify="right")
        for at in steps:
            peaks = f"{max(at['peaks']) / 2**20:.0f}"
            apart = f"{at['loss_apart']:.1e}", f"{at['gradient_apart']:.1e}"
            longest, mean = max(at["scoring"]), sum(at["scoring"]) / len(at["scoring"])
            took = f"{longest:.1f}, {longest / mean:.2f} x mean"
            table.add_row(str(at["ranks"]), f"{at['seconds']:.0f}", peaks, f"{at['loss']:.7f}", *apart, took)
        Console(width=110).print(table)
        return
    found = memory(lengths, counts, args.loss_chunk)
    if args.json:
        print(json.dumps({"lengths": lengths, "bytes": found}))
        return
    table = Table(title="MiB of the fullest rank, forward and backward")
    for column in ("what", *(f"S = {length}" for length in lengths)):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, values in found.items():
        if not name.startswith("loss"):
            table.add_row(name, *(f"{value / 2**20:.1f}" for value in values))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
