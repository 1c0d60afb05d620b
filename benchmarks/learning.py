"""Does a tiny model learn, by every kind of recipe and layout?

    python benchmarks/learning.py [--steps 200] [--recipes NAME,…] [--layouts NAME,…] [--keep FOLDER] [--json]

Every rank is a process of its own that runs `dsv4 train`: float32 over gloo, one thread each. Pretraining
begins from fresh weights, on the source of the standard library; fine-tuning and LoRA begin from what the
first pretraining run at one rank saved, on conversations cut from the same source, answered in capitals, so that
they begin above the bar. The bar is the unigram entropy of what is learned: the loss of a model that knows how often
each token comes, and no more.
"""

import argparse
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# What all runs share; a recipe's own learning rates are for models a thousand times wider.
_WORDS = """
    model.dtype=float32 parallel.tp=1 parallel.pp=1 parallel.ep=1 parallel.gpus=1 data.seq_length=64 batch.size=8
    batch.micro=4 optimizer.grad_dtype=float32 schedule.decay=cosine schedule.decay_steps=0 log.valid_every=0
    log.tensorboard=false log.spike=0 log.every=20 checkpoint.save_every=1000000
"""
WORDS = tuple(_WORDS.split())
PRETRAIN = ("optimizer.lr=4e-3", "optimizer.min_lr=4e-4")
RECIPES: dict[str, tuple[str, ...]] = {
    "flash-pretrain": PRETRAIN,
    "flash-pretrain-muon": PRETRAIN,
    "flash-finetune": ("optimizer.lr=1e-3", "optimizer.min_lr=1e-4"),
    "flash-lora": ("optimizer.lr=3e-3", "optimizer.min_lr=3e-4", "lora.rank=8"),
}
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "1 rank": (1, ()),
    "EP2": (2, ("parallel.ep=2",)),
    "PP2": (2, ("parallel.pp=2",)),
    "DP2": (2, ()),
}
TEXTS = ("argparse.py", "ast.py", "json", "asyncio", "email", "dataclasses.py", "typing.py", "pathlib.py")
WINDOW = 10  # steps of the running loss
COMPARED = 20  # losses that are compared with one rank's


@dataclass(frozen=True)
class Inputs:
    """What the runs begin with.

    Attributes:
        text: prefix of the text.
        chat: folder of the conversations.
        fresh: Megatron checkpoint of fresh weights.
        entropy: data -> nats a token.
    """

    text: Path
    chat: Path
    fresh: Path
    entropy: dict[str, float]


def small_spec() -> Any:
    """Every kind of layer and a draft block, narrow."""
    from dsv4_bridge.spec.spec import replace_spec
    from dsv4_bridge.spec.variants import VARIANTS, tiny

    return replace_spec(
        tiny(VARIANTS["Flash"]),
        num_hidden_layers=4,
        compress_ratios=(0, 4, 128, 4, 0),
        num_hash_layers=1,
        hidden_size=128,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )


def make_inputs(folder: Path) -> Inputs:
    """Text, conversations, and a checkpoint of fresh weights."""
    from dsv4_bridge import make_toy
    from dsv4_bridge.data.chat.prepare import prepare_chat
    from dsv4_bridge.data.indexed import prepare_pretraining

    spec = small_spec()
    tokenizer = make_toy(folder / "toy", "Flash", 11, spec=spec)
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [library / name for name in TEXTS]
    text = Path(prepare_pretraining(sources, folder / "text", tokenizer, spec, suffixes=(".py",)).out)
    files = [p for source in sources for p in ([source] if source.is_file() else sorted(source.glob("*.py")))]
    talks = folder / "chats.jsonl"
    talks.write_text("".join(json.dumps(talk) + "\n" for path in files for talk in conversations(path.read_text())))
    prepare_chat(talks, folder / "chat", tokenizer, seq_length=64, thinking=False)
    entropy = {
        "text": unigram_entropy(np.fromfile(f"{text}.bin", dtype=np.uint16)),
        "chat": unigram_entropy(np.load(folder / "chat/tokens.npy")[np.load(folder / "chat/mask.npy") > 0]),
    }
    return Inputs(text, folder / "chat", save_fresh(spec, folder / "fresh"), entropy)


def conversations(source: str) -> list[dict[str, Any]]:
    """The user says a line of the source, the assistant the next one in capitals, which the source hardly has."""
    lines = [line[:28] for line in source.splitlines() if line.strip()]
    pairs = list(itertools.pairwise(lines))[::2]
    return [
        {
            "messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b.upper()}],
            "thinking_mode": "chat",
        }
        for a, b in pairs
    ]


def unigram_entropy(tokens: np.ndarray) -> float:
    """Nats a token."""
    shares = np.array(list(Counter(tokens.tolist()).values())) / len(tokens)
    return float(-(shares * np.log(shares)).sum())


def save_fresh(spec: Any, root: Path) -> Path:
    """A Megatron checkpoint of fresh weights, as training without `start` makes them."""
    from dsv4_bridge import mcore
    from dsv4_bridge.mcore.checkpoints import save_checkpoint
    from dsv4_bridge.train.initial import initialize_weights

    model = mcore.build_model(spec, initialize_weights=False)
    initialize_weights([model], 1234, spec.initializer_range or 0.02)
    save_checkpoint(model, root)
    return root


def train(name: str, layout: str, words: Sequence[str], out: Path) -> list[dict[str, float]]:
    """Run `dsv4 train` in as many processes as the layout has ranks; what rank 0 logged."""
    world, cut = LAYOUTS[layout]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-W", "ignore", "-m", "dsv4_bridge", "train", name]
    command += [*WORDS, *RECIPES[name], *words, *cut, f"out={out}"]
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(world):
            own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            with out.with_name(f"{out.name}.rank{rank}.txt").open("w") as told:
                processes.append(subprocess.Popen(command, env=own, stdout=told, stderr=subprocess.STDOUT, text=True))
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        said = out.with_name(f"{out.name}.rank0.txt").read_text()
        raise SystemExit(f"{name}, {layout}: exit codes {codes}\n{said[-3000:]}")
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def running(losses: Sequence[float]) -> list[float]:
    """Mean of the last WINDOW losses, of fewer at the start."""
    return [statistics.fmean(losses[max(0, n - WINDOW) : n]) for n in range(1, len(losses) + 1)]


def summary(log: list[dict[str, float]], entropy: float, one: list[dict[str, float]] | None) -> dict[str, Any]:
    """What a run's log comes to."""
    losses = [line["loss"] for line in log]
    means = running(losses)
    apart = None
    if one is not None:
        pairs = zip(losses[:COMPARED], one[:COMPARED], strict=True)
        apart = max(abs(a - b["loss"]) / abs(b["loss"]) for a, b in pairs)
    return {
        "first": losses[0],
        "last": means[-1],
        "entropy": entropy,
        "under": next((n for n, mean in enumerate(means, 1) if mean < entropy), None),
        "seconds": statistics.median(line["seconds"] for line in log),
        "apart": apart,
        "finite": all(math.isfinite(loss) for loss in losses),
    }


def measure(folder: Path, steps: int, recipes: Sequence[str], layouts: Sequence[str]) -> dict[str, Any]:
    inputs, found = make_inputs(folder), {}
    logs: dict[tuple[str, str], list[dict[str, float]]] = {}
    pretrained = folder / "flash-pretrain-1_rank"
    # Later recipes start from the first one's end, and every layout is compared with one rank.
    wanted = [(name, layout) for name in recipes for layout in layouts]
    needed = [("flash-pretrain", "1 rank")] if set(recipes) & {"flash-finetune", "flash-lora"} else []
    needed += [(name, "1 rank") for name in recipes]
    for name, layout in dict.fromkeys((*needed, *wanted)):
        kind = "text" if "pretrain" in name else "chat"
        words = [f"schedule.steps={steps}", f"schedule.warmup={min(10, steps - 1)}"]
        words += [f"data.train={inputs.text if kind == 'text' else inputs.chat}"]
        words += [f"start={inputs.fresh if kind == 'text' else pretrained}"]
        logs[name, layout] = train(name, layout, words, folder / f"{name}-{layout.replace(' ', '_')}")
        one = None if layout == "1 rank" else logs[name, "1 rank"]
        found[f"{name}, {layout}"] = summary(logs[name, layout], inputs.entropy[kind], one)
        print(name, layout, found[f"{name}, {layout}"], file=sys.stderr, flush=True)
    return {f"{name}, {layout}": found[f"{name}, {layout}"] for name, layout in wanted}


def markdown(found: dict[str, Any]) -> str:
    head = ["recipe", "layout", "first loss", f"last {WINDOW}", "unigram", "under it at", "s a step", "from one rank"]
    lines = [head, ["---"] * len(head)]
    for name, row in found.items():
        apart = "-" if row["apart"] is None else f"{row['apart']:.1e}"
        numbers = [f"{row[key]:.3f}" for key in ("first", "last", "entropy")]
        lines.append([*name.split(", "), *numbers, str(row["under"] or "never"), f"{row['seconds']:.2f}", apart])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--keep", type=Path, help="new folder for checkpoints and logs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps is at least 2: one of them warms up")
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as name:
        folder = args.keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, args.steps, args.recipes.split(","), args.layouts.split(","))
    print(json.dumps(found) if args.json else markdown(found))


if __name__ == "__main__":
    main()
