"""A model small enough to train in a test, and text of the standard library to train it on."""

import argparse
import email
import gc
import json
import logging
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_bridge import make_toy
from dsv4_bridge.data.indexed import prepare_pretraining
from dsv4_bridge.spec.spec import ModelSpec, replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.train.choose import choose
from dsv4_bridge.train.loop import Outcome, train
from dsv4_bridge.train.plan import recipe_spec
from dsv4_bridge.train.recipe import Recipe

# One rank, float32, few and short rows; a test says what else differs.
_WORDS = """
    model.dtype=float32 parallel.pp=1 parallel.ep=1 parallel.gpus=1 data.seq_length=48 data.split=90,10,0
    batch.size=4 batch.micro=2 batch.ramp= schedule.steps=6 schedule.warmup=2 schedule.decay=cosine
    schedule.decay_steps=0 optimizer.lr=2e-3 optimizer.min_lr=1e-4 optimizer.grad_dtype=float32 log.valid_every=0
    log.tensorboard=false log.spike=0 checkpoint.save_every=1000
"""
SMALL = tuple(_WORDS.split())
# A micro-batch a step, computed once: half of the time, where neither is what is looked at.
QUICK = ("batch.micro=4", "model.recompute=none")
# What of a line of the log is of the machine and the hour.
TIMED = {"seconds", "tokens_per_second", "tflops_per_gpu", "eta_seconds", "memory_bytes", "time"}


def small_spec(layers: int = 3) -> ModelSpec:
    """Every kind of layer and a draft block, narrow; two interleaved stages take 4 layers."""
    return small_variant("Flash", layers)


def small_variant(name: str, layers: int = 3) -> ModelSpec:
    """The same in the manner of a released model."""
    spec = tiny(VARIANTS[name])
    ratios = (0, 4, 128, 4)[:layers]
    drafter = spec.dspark and replace(spec.dspark, target_layer_ids=(0, 1, 2))
    return replace_spec(
        spec,
        dspark=drafter,
        num_hidden_layers=layers,
        compress_ratios=(*ratios, *([0] * spec.draft_blocks)),
        num_hash_layers=1,
        hidden_size=128,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )


def make_start(folder: Path, layers: int = 3) -> Path:
    """A released checkpoint to start from."""
    return make_toy(folder / "hf", "Flash", 11, spec=small_spec(layers))


def make_text(folder: Path, tokenizer: Path) -> Path:
    """Python's own source as megatron's dataset."""
    sources = [Path(argparse.__file__), *(Path(module.__file__).parent for module in (email, json, logging))]
    return Path(prepare_pretraining(sources, folder / "text", tokenizer, small_spec(), suffixes=[".py"]).out)


def recipe(name: str, *words: str) -> Recipe:
    return choose(name, (*SMALL, *words)).recipe


def run(name: str, *words: str) -> Outcome:
    """Train in this process."""
    chosen = recipe(name, *words)
    gc.freeze()  # the loop looks for garbage, and thaws what it finds: not among all that tests have imported
    return train(chosen, recipe_spec(chosen), 1, lambda _: None)


def log(out: Path) -> list[dict[str, Any]]:
    lines = (out / "log.jsonl").read_text().split("\n")[:-1]  # behind the last newline a line may be half written
    return [json.loads(line) for line in lines]


def unigram_entropy(prefix: Path) -> float:
    """Nats a token: the loss of a model that knows frequencies alone."""
    tokens = np.fromfile(f"{prefix}.bin", dtype=np.uint16)
    counts = Counter(tokens.tolist())
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in counts.values())


def contents(iteration: Path) -> dict[str, bytes]:
    """Every piece of a checkpoint as it is stored, optimizer state among them: where it lies and what it holds."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata = FileSystemReader(iteration).read_metadata()
    kept, pieces = metadata.state_dict_metadata, metadata.storage_data
    files = {name: (iteration / name).read_bytes() for name in {piece.relative_path for piece in pieces.values()}}
    found = {
        f"{index.fqn} {index.offset}": files[piece.relative_path][piece.offset : piece.offset + piece.length]
        for index, piece in pieces.items()
        if hasattr(kept[index.fqn], "size")
    }
    assert len(found) > 20
    return found
