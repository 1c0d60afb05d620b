"""Every verb that writes, as data: its command, what looks whole, and whether the bytes are right."""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dsv4_bridge import make_toy
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny

_WORDS = """
    model.dtype=float32 parallel.pp=1 parallel.ep=1 parallel.gpus=1 data.seq_length=48 batch.size=4 batch.micro=2
    schedule.steps=5 schedule.warmup=1 optimizer.lr=2e-3 optimizer.min_lr=1e-4 log.valid_every=0
    log.tensorboard=false log.spike=0 checkpoint.save_every=1
"""
_TRAIN = _WORDS.split()
PRETRAIN = [*_TRAIN, "batch.ramp=", "schedule.decay=cosine", "schedule.decay_steps=0", "data.split=90,10,0"]


@dataclass(frozen=True)
class Verb:
    """One command that writes.

    Attributes:
        name: what it is called here.
        words: the arguments of `dsv4` for an output.
        looks_whole: whether readers would take what is there for a whole output.
        wrong: names of what is not as it should be, of a whole output and the expected one.
        seconds: how long it takes here, about.
    """

    name: str
    words: Callable[[Path], list[str]]
    looks_whole: Callable[[Path], bool]
    wrong: Callable[[Path, Path], list[str]]


def dsv4(words: list[str]) -> list[str]:
    """The command line of the tool."""
    return [sys.executable, "-W", "ignore", "-m", "dsv4_bridge", *words]


def make_inputs(folder: Path, variant: str = "Flash") -> None:
    """Checkpoints and, of V4, adapters, text and conversations; a few megabytes."""
    if variant != "Flash":
        make_toy(folder / "hf", variant, 11)
        run(["import", str(folder / "hf"), str(folder / "megatron")])
        return
    spec = replace_spec(
        tiny(VARIANTS["Flash"]),
        num_hidden_layers=4,
        compress_ratios=(0, 4, 128, 4, 0),
        num_hash_layers=1,
        hidden_size=128,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )
    make_toy(folder / "hf", "Flash", 11, spec=spec)
    (folder / "text").mkdir()
    for path in sorted(Path(argparse.__file__).parent.glob("[a-d]*.py"))[:12]:
        shutil.copy(path, folder / "text" / path.name)
    with (folder / "chats.jsonl").open("w") as file:
        for n in range(200):
            turns = [{"role": "user", "content": f"What is {n} and {n}?"}, {"role": "assistant", "content": str(2 * n)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    run(["import", str(folder / "hf"), str(folder / "megatron")])
    run(["data", str(folder / "text"), str(folder / "tokens"), "--tokenizer", str(folder / "hf"), "--suffix", ".py"])
    chats = ["--tokenizer", str(folder / "hf"), "--seq-length", "48", "--no-thinking"]
    run(["data", str(folder / "chats.jsonl"), str(folder / "packs"), *chats])
    tuned = [f"start={folder / 'hf'}", f"data.train={folder / 'packs'}", f"out={folder / 'adapters'}"]
    run(["train", "flash-lora", *_TRAIN, *tuned, "schedule.steps=1", "schedule.warmup=0"])


def run(words: list[str]) -> None:
    """The command, which must succeed."""
    done = subprocess.run(dsv4(words), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"dsv4 {' '.join(words)}: {done.stderr[-2000:]}")


def verbs(inputs: Path, variant: str = "Flash") -> dict[str, Verb]:
    """All of them; of another variant, those that convert."""
    hf, megatron, adapters = str(inputs / "hf"), str(inputs / "megatron"), str(inputs / "adapters")
    chats = ["--tokenizer", hf, "--seq-length", "48", "--no-thinking"]
    trained = ["train", "flash-pretrain", *PRETRAIN, f"start={hf}", f"data.train={inputs / 'tokens'}"]
    found = (
        Verb("import", lambda out: ["import", hf, str(out)], _checkpoint, _files),
        Verb("export", lambda out: ["export", megatron, str(out), "--like", hf], _checkpoint, _files),
        Verb("repack", lambda out: ["repack", hf, str(out), "--encoding", "bf16"], _checkpoint, _files),
        Verb("rename", lambda out: ["rename", megatron, str(out), "--naming", "hybrid"], _checkpoint, _files),
        Verb("merge", lambda out: ["merge", hf, adapters, str(out)], _checkpoint, _files),
        Verb("lora", lambda out: ["lora", adapters, str(out)], _adapters, _files),
        Verb(
            "data (text)",
            lambda out: ["data", str(inputs / "text"), str(out), "--tokenizer", hf, "--suffix", ".py"],
            lambda out: out.with_name(f"{out.name}.idx").exists(),  # without it there is no dataset
            _prefix,
        ),
        Verb("data (chats)", lambda out: ["data", str(inputs / "chats.jsonl"), str(out), *chats], _store, _files),
        Verb("train", lambda out: [*trained, f"out={out}"], lambda out: False, _weights),
    )
    converting = ("import", "export", "repack")
    return {verb.name: verb for verb in found if variant == "Flash" or verb.name in converting}


def _checkpoint(out: Path) -> bool:
    tracker = out / "latest_checkpointed_iteration.txt"
    return ((out / "config.json").exists() or tracker.exists()) and not (out / ".dsv4-partial").exists()


def _adapters(out: Path) -> bool:
    return (out / "adapter_config.json").exists() and (out / "adapter_model.safetensors").exists()


def _store(out: Path) -> bool:
    return out.is_dir() and any(out.iterdir())


def _listing(folder: Path) -> dict[str, bytes]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name != ".dsv4-done"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}  # a journal that could not be removed is no part


def _files(out: Path, expected: Path) -> list[str]:
    one, other = _listing(out), _listing(expected)
    return sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))


def _prefix(out: Path, expected: Path) -> list[str]:
    names = [f"{expected.name}{end}" for end in (".bin", ".idx")]
    return [n for n in names if out.with_name(n).read_bytes() != expected.with_name(n).read_bytes()]


def _weights(out: Path, expected: Path) -> list[str]:
    """The last checkpoint's weights and optimizer state, but for what says when or by whom."""
    one, other = (_listing(folder / "iter_0000005") for folder in (out, expected))
    return sorted(n for n in other if n.endswith(".distcp") and one.get(n) != other[n])
