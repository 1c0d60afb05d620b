"""What a recipe would need, before anything starts: no torch, no megatron."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import BridgeError
from ..files import local
from ..planning.memory import Run
from ..planning.ranks import Asked, RanksReport, plan_ranks
from ..spec.lora import Lora
from ..spec.plan import check_computed
from ..spec.spec import ModelSpec
from ..spec.variants import VARIANTS, known_variant, tiny
from ..store.named import files_of, spec_of
from ..text.tokens import TOKENIZER
from .choose import change
from .recipe import Recipe


def lora_of(recipe: Recipe) -> Lora:
    """The adapters of a recipe."""
    lora = recipe.lora
    return Lora(lora.rank, lora.alpha, lora.dropout, lora.targets, lora.dora, recipe.seed)


def run_of(recipe: Recipe, dp: int) -> Run:
    """What a rank does, in the words of the memory plan."""
    return Run(
        mode="lora" if recipe.lora.rank else "training",
        dtype=recipe.model.dtype,
        seq_length=recipe.data.seq_length,
        micro_batch=recipe.batch.micro,
        micro_batches=max(1, recipe.batch.size // (recipe.batch.micro * dp)),
        recompute=recipe.model.recompute == "full",
        grad_dtype=recipe.optimizer.grad_dtype,
        distributed_optimizer=recipe.optimizer.distributed and recipe.optimizer.name == "adamw",
        lora=lora_of(recipe),
        optimizer=recipe.optimizer.name,
        moments_dtype=recipe.optimizer.moments_dtype if recipe.model.dtype == "bf16" else "float32",
        # Other layouts of experts keep what the definitions keep, and more than the fused activation.
        fused=recipe.model.kernels in ("auto", "triton") and recipe.model.experts == "grouped",
        loss_chunk=recipe.model.loss_chunk,
        indexer=recipe.losses.indexer != "frozen",
    )


def plan_recipe(recipe: Recipe, spec: ModelSpec, gpu_memory: float | None = None) -> RanksReport:
    """Memory of every rank at the recipe's layout on its number of GPUs.

    Args:
        recipe: the run.
        spec: the model's numbers.
        gpu_memory: GiB of a GPU, to tell whether it fits.

    Raises:
        BridgeError: a layout that cannot work, and the nearest that does.
    """
    p = recipe.parallel
    dp = max(1, p.gpus // (p.tp * p.pp * p.cp))
    asked = Asked(
        tp=p.tp,
        pp=p.pp,
        ep=p.ep,
        etp=p.etp,
        cp=p.cp,
        vp=p.vp,
        layout=p.layout or None,
        gpus=p.gpus,
        global_batch=recipe.batch.size,
        gpu_memory=gpu_memory,
        run=run_of(recipe, dp),
    )
    return plan_ranks(recipe.name, spec, asked)


def recipe_spec(recipe: Recipe, scaled: bool = False) -> ModelSpec:
    """The numbers of the model that a recipe trains, without what it leaves out.

    Args:
        recipe: the run.
        scaled: take the variant's tiny numbers, where `start` does not say.

    Raises:
        BridgeError: `start` is no checkpoint, or the variant is unknown.
    """
    doing = f"training with recipe {recipe.name}:"
    for place in (recipe.start, recipe.out, recipe.tokenizer, *recipe.data.train, *recipe.data.valid):
        local(place, doing)
    if recipe.start and not Path(recipe.start).is_dir():
        raise BridgeError(f"{doing} start={recipe.start}: no such folder{_fetched_first(recipe.start)}")
    if recipe.tokenizer and not Path(recipe.tokenizer).is_dir():
        raise BridgeError(f"{doing} tokenizer={recipe.tokenizer}: no such folder{_fetched_first(recipe.tokenizer)}")
    if scaled and not recipe.start and recipe.variant in VARIANTS:
        spec = tiny(VARIANTS[recipe.variant])
    else:
        spec = spec_of(recipe.start or recipe.variant)
    check_computed(spec, doing.removesuffix(":"))
    return spec if recipe.model.mtp and not spec.dspark else spec.without_draft()


def _fetched_first(name: str) -> str:
    """How to get what may be a repository on the Hub, or a release by its name; "" where it can be neither."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        variant = known_variant(name)
        if variant is None or not variant.hub_id:
            return ""
        name = variant.hub_id
    fetch = f"hf download {name} --local-dir {name.rpartition('/')[2]}"
    return f"; a repository on the Hub is fetched first: {fetch}"


def small_folder(recipe: Recipe) -> Path | None:
    """Where the tokenizer and the other small files of a run are; None where it has none.

    Raises:
        BridgeError: `tokenizer` names a folder without one.
    """
    named = recipe.tokenizer or recipe.start
    if not named:
        return None
    folder = files_of(Path(named))
    if recipe.tokenizer and not (folder / TOKENIZER).is_file():
        raise BridgeError(f"training with recipe {recipe.name}: tokenizer={named}: it has no {TOKENIZER}")
    return folder


def scaled_down(recipe: Recipe, given: Iterable[str] = ()) -> Recipe:
    """The same run in the smallest: one rank, two steps of two rows; what was given stays.

    Args:
        recipe: the run.
        given: `key=value` words that were said.
    """
    smaller: dict[str, Any] = {
        "parallel.tp": 1,
        "parallel.pp": 1,
        "parallel.vp": 1,
        "parallel.ep": 1,
        "parallel.etp": 1,
        "parallel.cp": 1,
        "parallel.gpus": 1,
        "batch.size": 2,
        "batch.ramp": "",
        "data.seq_length": min(recipe.data.seq_length, 64),
        "schedule.steps": 2,
        "schedule.warmup": 1,
        "schedule.decay_steps": min(recipe.schedule.decay_steps, 1),
        "log.valid_every": 0,
    }
    said = {word.partition("=")[0] for word in given}
    return change(recipe, {key: value for key, value in smaller.items() if key not in said})
