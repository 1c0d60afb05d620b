"""A training step against transformers' Trainer on the same model, values and rows; memory of full training and LoRA.

    python benchmarks/training_speed.py [--specs tiny,medium] [--lengths 256,1024] [--steps 6] [--only WHAT] [--json]

Float32, one rank, one thread, AdamW, the specs of `benchmarks/model.py`, micro-batches of `--rows` rows, one a step.
Ours is `train`, of a recipe without draft block, balance loss and packing, which transformers does not have; theirs is
`transformers.Trainer` with its default AdamW and without its logging and saving. The two take turns, one round each,
with and without recomputation (the whole layer on both sides); a step is from the batch to moved weights, by the
wall clock, and each round's first steps (`--warm`) do not count. Memory: a process each, its high-water mark behind
the last step, and the same with saving the checkpoint.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model import SPECS
from model_memory import status_mib

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "mcore"))

_WORDS = """
    data.kind=text data.documents_apart=false model.mtp=false losses.mtp=0 losses.balance=0 losses.bias_update=0
    model.dense_attention=false model.dtype=float32 parallel.pp=1 parallel.ep=1 parallel.gpus=1
    optimizer.grad_dtype=float32 optimizer.lr=1e-4 optimizer.min_lr=1e-4 optimizer.beta2=0.95 optimizer.eps=1e-8
    schedule.decay=constant schedule.warmup=0 log.valid_every=0 log.tensorboard=false log.spike=0 log.every=1
    checkpoint.save_every=1000000
"""
WORDS = tuple(_WORDS.split())


def prepare(name: str, folder: Path) -> tuple[Any, Path]:
    """A folder that transformers saved, of random values, and the standard library's source as data."""
    from reference import reference_model, small_spec

    from dsv4_bridge.data.indexed import prepare_pretraining
    from dsv4_bridge.toy.tokenizer import toy_tokenizer

    spec = small_spec(**SPECS[name])
    reference_model(spec, folder / "made", embedding_rms=0.02).save_pretrained(folder / "start")
    (folder / "tokenizer").mkdir()
    for file, content in toy_tokenizer(spec).items():
        (folder / "tokenizer" / file).write_bytes(content)
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [library / "asyncio", library / "email"]
    prepare_pretraining(sources, folder / "text", folder / "tokenizer", spec, suffixes=(".py",))
    return spec, folder


def recipe_of(folder: Path, length: int, rows: int, steps: int, *words: str, name: str = "flash-pretrain") -> Any:
    from dsv4_bridge.train.choose import choose

    own = [f"start={folder / 'start'}", f"data.train={folder / 'text'}", f"data.seq_length={length}"]
    own += [f"batch.size={rows}", f"batch.micro={rows}", f"schedule.steps={steps}"]
    return choose(name, (*WORDS, *own, *words)).recipe


def ours(spec: Any, recipe: Any, out: Path) -> tuple[list[float], list[float]]:
    """Losses and seconds of steps."""
    from dsv4_bridge.train.choose import change
    from dsv4_bridge.train.loop import train

    outcome = train(change(recipe, {"out": str(out)}), spec, 1, lambda _: None)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return outcome.losses, [line["seconds"] for line in log]


def theirs(spec: Any, recipe: Any, out: Path) -> tuple[list[float], list[float]]:
    """The same of transformers' Trainer, on the same rows."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import DeepseekV4ForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from dsv4_bridge.mcore import initialize
    from dsv4_bridge.train.choose import change
    from dsv4_bridge.train.feed import make_feeds

    initialize()  # megatron's data sets ask who this rank is
    rows, o = recipe.batch.size, recipe.optimizer
    feed, _ = make_feeds(change(recipe, {"out": str(out)}), spec, rows * recipe.schedule.steps, 0)
    batches = []
    for step in range(recipe.schedule.steps):
        (batch,) = feed.batches(step * rows, rows, rows)
        batches.append({"input_ids": batch.input_ids, "labels": batch.labels, "shift_labels": batch.labels})
    losses: list[float] = []
    seconds: list[float] = []

    class Timed(Trainer):
        """Rows as they are, and the loss of every step."""

        def get_train_dataloader(self) -> Any:
            return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    class Clock(TrainerCallback):
        """Wall seconds between the begin and the end of a step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    model = DeepseekV4ForCausalLM.from_pretrained(recipe.start, dtype=torch.float32, attn_implementation="eager")
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=recipe.schedule.steps,
        learning_rate=o.lr,
        lr_scheduler_type="constant",
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_epsilon=o.eps,
        max_grad_norm=o.clip_grad,
        gradient_checkpointing=recipe.model.recompute == "full",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model.config.use_cache = False
    trainer = Timed(model=model, args=arguments, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return losses, seconds


def speed(name: str, length: int, args: argparse.Namespace, spec: Any, folder: Path) -> dict[str, Any]:
    """Median seconds of both sides, without recomputation and with."""
    found = {}
    steps = args.warm + args.steps
    for recompute in ("none", "full"):
        recipe = recipe_of(folder, length, args.rows, steps, f"model.recompute={recompute}")
        sides: dict[str, Callable[..., tuple[list[float], list[float]]]] = {"transformers": theirs, "ours": ours}
        took: dict[str, list[float]] = {side: [] for side in sides}
        firsts: dict[str, float] = {}
        for number in range(args.rounds):
            for side, run in sides.items():
                out = folder / f"{side}-{length}-{recompute}-{number}"
                losses, seconds = run(spec, recipe, out)
                took[side] += seconds[args.warm :]
                firsts[side] = losses[0]
        row: dict[str, Any] = {side: statistics.median(times) for side, times in took.items()}
        row |= {"times": row["transformers"] / row["ours"], "tokens": args.rows * length / row["ours"]}
        row |= {"first_losses": firsts, "steps": len(took["ours"])}
        key = f"{name}, S = {length}, " + ("recomputed" if recompute == "full" else "all kept")
        found[key] = row
        print(key, row, file=sys.stderr, flush=True)
    return found


def memory_child(name: str, folder: Path, which: str, length: int, rows: int, steps: int) -> dict[str, float]:
    """High-water marks of one run, in MiB."""
    import torch

    from dsv4_bridge.train.loop import train
    from dsv4_bridge.train.plan import recipe_spec

    torch.set_num_threads(1)
    recipe = recipe_of(
        folder,
        length,
        rows,
        steps,
        f"out={folder / f'memory-{which}'}",
        "model.recompute=full",
        name="flash-lora" if which == "LoRA" else "flash-finetune-no-mtp",
    )
    spec = recipe_spec(recipe)
    found = {"before": status_mib("VmRSS")}

    def say(line: str) -> None:
        if line.startswith(f"step {steps}/"):  # said before the checkpoint is saved
            found["training"] = status_mib("VmHWM")

    train(recipe, spec, 1, say)
    return found | {"saving": status_mib("VmHWM")}


def memory(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found = {}
    for which in ("full", "LoRA"):
        command = [sys.executable, "-W", "ignore", __file__, "--child", which, "--specs", name, "--folder", folder]
        command += ["--lengths", args.lengths.split(",")[0], "--rows", args.rows, "--steps", args.steps]
        done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, check=True)
        found[f"{name}, {which}"] = json.loads(done.stdout.splitlines()[-1])
        print(name, which, found[f"{name}, {which}"], file=sys.stderr, flush=True)
    return found


def markdown(found: dict[str, Any]) -> str:
    lines = []
    if found["speed"]:
        lines += [
            "| step | transformers s | ours s | times | our tokens/s | first losses |",
            "|---|---|---|---|---|---|",
        ]
        for key, row in found["speed"].items():
            firsts = " ".join(f"{loss:.5f}" for loss in row["first_losses"].values())
            numbers = f"{row['transformers']:.3f} | {row['ours']:.3f} | {row['times']:.2f} | {row['tokens']:.0f}"
            lines.append(f"| {key} | {numbers} | {firsts} |")
        lines.append("")
    if found["memory"]:
        lines += ["| peak MiB | before | training | and saving |", "|---|---|---|---|"]
        for key, row in found["memory"].items():
            lines.append(f"| {key} | {row['before']:.0f} | {row['training']:.0f} | {row['saving']:.0f} |")
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"speed": {}, "memory": {}}
    for name in args.specs.split(","):
        with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as folder:
            spec, made = prepare(name, Path(folder))
            for length in map(int, args.lengths.split(",")):
                if args.only in ("", "speed"):
                    found["speed"] |= speed(name, length, args, spec, made)
            if args.only in ("", "memory"):
                found["memory"] |= memory(name, args, made)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", default="tiny,medium")
    parser.add_argument("--lengths", default="256,1024")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="that count, a round")
    parser.add_argument("--warm", type=int, default=2, help="steps before them")
    parser.add_argument("--only", default="", choices=("", "speed", "memory"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch
    import transformers

    from dsv4_bridge import mcore  # noqa: F401 - prepares torch for megatron-core

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.child:
        length = int(args.lengths.split(",")[0])
        print(json.dumps(memory_child(args.specs, args.folder, args.child, length, args.rows, args.steps)))
        return
    found = measure(args)
    print(json.dumps(found) if args.json else markdown(found))


if __name__ == "__main__":
    main()
