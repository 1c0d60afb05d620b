"""From a recipe to a model in megatron's wrapper, its optimizer and learning rate."""

import math
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ..errors import BridgeError
from ..lora.adapters import Adapters, check_fit
from ..lora.peft import open_adapters
from ..mcore import initialize, load_weights
from ..mcore.adapters.adapters import add_adapters, load_adapters
from ..mcore.indexer_phase import indexer_settings, set_trained
from ..mcore.model import DeepSeekV4Model, build_chunks
from ..mcore.optim.param_gather import wait_for_inner
from ..mcore.optim.state import fuse
from ..mcore.optim.whole import whole_optimizer
from ..mcore.runtime import free_memory
from ..parallel.notation import parse_layout
from ..planning.memory import check_run, make_run_topology, plan_memory
from ..spec.spec import ModelSpec
from .initial import initialize_weights
from .out import check_room
from .plan import lora_of, run_of
from .recipe import Recipe

_WIDE = "AdamW's moments are float32: types below need Transformer Engine, which is not installed"
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Trainer:
    """What a step needs.

    Attributes:
        recipe: the run.
        spec: the model's numbers, as it is built.
        chunks: this rank's part of the model, bare.
        wrapped: the same in megatron's data-parallel wrapper.
        optimizer: megatron's.
        scheduler: of the learning rate.
        rank: among the data-parallel ranks.
        ranks: their number.
        notes: what is other than the recipe says, in words.
    """

    recipe: Recipe
    spec: ModelSpec
    chunks: list[DeepSeekV4Model]
    wrapped: list[Any]
    optimizer: Any
    scheduler: OptimizerParamScheduler
    rank: int
    ranks: int
    notes: tuple[str, ...]

    @property
    def world(self) -> int:
        """All ranks."""
        return dist.get_world_size()


def make_trainer(recipe: Recipe, spec: ModelSpec, world: int, *, fresh: bool = True) -> Trainer:
    """Build everything; every rank calls it.

    Args:
        recipe: the run.
        spec: the model's numbers.
        world: number of ranks.
        fresh: load or make the weights; otherwise a checkpoint will bring all of them.

    Raises:
        BridgeError: a layout, batch or setting that cannot work, before any process group is made; weights that
            cannot be read.
    """
    p, dp = recipe.parallel, check_layout(recipe, spec, world)
    earlier = _earlier_adapters(recipe, spec) if fresh and recipe.lora.start else None
    initialize(p.sizes)
    _check_memory(recipe, spec, dp)
    check_room(recipe, spec)
    layout = parse_layout(p.layout, p.pp, spec) if p.layout else None
    if layout is None and p.pp > 1:
        from ..parallel.balance import solve

        layout = solve(spec, p.pp, p.vp)
    chunks = build_chunks(
        spec,
        dtype=DTYPES[recipe.model.dtype],
        max_sequence_length=recipe.data.seq_length * recipe.batch.micro,
        initialize_weights=False,
        layout=layout,
        **_settings(recipe),
    )
    if fresh or recipe.lora.rank:  # a checkpoint of adapters does not hold what they adapt
        for chunk in chunks if recipe.start else ():
            load_weights(chunk, recipe.start, allow_lossy=True)
        if not recipe.start:
            initialize_weights(chunks, recipe.model.initial_seed, spec.initializer_range or 0.02)
    if recipe.lora.rank:
        add_adapters(chunks, lora_of(recipe))
        if earlier:
            load_adapters(chunks, earlier)
    set_trained(chunks, recipe.losses.indexer)
    wrapped = _wrap(recipe, chunks)
    optimizer, notes = _optimizer(recipe, chunks, wrapped)
    return Trainer(
        recipe,
        spec,
        chunks,
        wrapped,
        optimizer,
        _scheduler(recipe, optimizer),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        notes,
    )


def _earlier_adapters(recipe: Recipe, spec: ModelSpec) -> Adapters:
    """The adapters that a run begins from: read, and refused if they do not fit, before any weight is."""
    what = f"training with recipe {recipe.name}: lora.start={recipe.lora.start}"
    if not recipe.lora.rank:
        raise BridgeError(f"{what} without lora.rank trains no adapters; set lora.rank to theirs")
    adapters = open_adapters(Path(recipe.lora.start), spec)
    check_fit(adapters, lora_of(recipe), spec, what)
    return adapters


def check_layout(recipe: Recipe, spec: ModelSpec, world: int) -> int:
    """Refuse what ranks could not do, with the rule and the nearest that works; the data-parallel size."""
    sizes = recipe.parallel.sizes
    model_ranks = sizes.tp * sizes.pp * sizes.cp
    needed = math.lcm(model_ranks, sizes.etp * sizes.ep * sizes.pp)
    if world == 1 < needed:
        raise BridgeError(
            f"training with recipe {recipe.name}: it cuts the model over at least {needed} ranks ({sizes}), and this "
            f"is one process. Start them: {torchrun_line(needed)}; or set parallel.ep=1 and the like; --tiny makes a "
            "small model in one process"
        )
    if world % model_ranks:
        near = max(1, round(world / model_ranks)) * model_ranks
        raise BridgeError(
            f"training with recipe {recipe.name}: {world} ranks do not divide into "
            f"{'tp*pp' if sizes.cp == 1 else 'tp*pp*cp'} = {model_ranks}. "
            f"Nearest that works: {near} ranks"
        )
    dp = world // model_ranks
    topology, _ = make_run_topology(spec, sizes, recipe.parallel.layout or None, dp)
    each = recipe.batch.micro * dp
    if recipe.batch.size % each:
        near = max(1, round(recipe.batch.size / each)) * each
        raise BridgeError(
            f"training with recipe {recipe.name}: batch.size {recipe.batch.size} is no multiple of batch.micro * "
            f"data-parallel ranks = {recipe.batch.micro} * {dp}. Nearest that works: {near}"
        )
    check_run(spec, topology, run_of(recipe, dp))
    if topology.layout.vp > 1:
        _check_interleaved(recipe, topology.layout.vp, each)
    return dp


def torchrun_line(ranks: int) -> str:
    """The command of this process as torchrun starts it, on each of the nodes that `ranks` take at 8 a node."""
    words = shlex.join(sys.argv[1:]) if sys.argv[1:2] == ["train"] else "train …"
    nodes = -(-ranks // 8)
    where = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 " if nodes > 1 else ""
    return f"torchrun {where}--nproc-per-node {min(ranks, 8)} -m dsv4_bridge {words}"


def _check_interleaved(recipe: Recipe, chunks: int, each: int) -> None:
    """What `check_run` asks of a step's micro-batches, of those on the way to it and of validation."""
    pp, log = recipe.parallel.pp, recipe.log
    counts = [("batch.ramp", int(size), each * pp) for size in re.findall(r":(\d+)", recipe.batch.ramp)]
    counts += [("log.valid_steps", log.valid_steps, pp)] if log.valid_every else []
    for name, count, unit in counts:
        if count % unit:
            raise BridgeError(
                f"training with recipe {recipe.name}: {name} of {count} with {chunks} chunks a pipeline rank "
                f"(rule: interleaved stages take a multiple of pp {pp} micro-batches). Nearest that works: "
                f"{max(unit, round(count / unit) * unit)}"
            )


def _check_memory(recipe: Recipe, spec: ModelSpec, dp: int) -> None:
    """Refuse what this rank has no room for, before it begins to fill the memory."""
    topology, _ = make_run_topology(spec, recipe.parallel.sizes, recipe.parallel.layout or None, dp)
    run = run_of(recipe, dp)
    fused = run.fused and torch.cuda.is_available()
    run = replace(run, moments_dtype="bf16" if _precise(recipe) else "float32", fused=fused)
    stage = plan_memory(spec, topology, dp, run).stages[parallel_state.get_pipeline_model_parallel_rank()]
    free, where = free_memory()
    if stage.total > free:
        raise BridgeError(
            f"training with recipe {recipe.name}: a rank takes {stage.total / 1e9:,.1f} GB (`--dry-run` lists it), and "
            f"{free / 1e9:,.1f} GB of {where} are free; take more ranks, another layout, or --tiny for a trial"
            + (f". {_WIDE}" if _widened(recipe) else "")
        )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe in the words of megatron's configuration."""
    losses, model = recipe.losses, recipe.model
    found: dict[str, Any] = {
        "expert_layout": model.experts,
        "kernels": model.kernels,
        "deterministic_mode": model.deterministic,
        "loss_chunk": model.loss_chunk,
        "mtp_loss_scaling_factor": losses.mtp,
        "moe_router_bias_update_rate": losses.bias_update,
        "csa_dense_attention": model.dense_attention,
        "calculate_per_token_loss": losses.per_token,
    } | indexer_settings(losses.indexer, losses.indexer_weight)
    if losses.per_token and (losses.balance or losses.indexer != "frozen"):
        raise BridgeError(
            f"training with recipe {recipe.name}: losses.per_token weighs micro-batches by their learned tokens, and "
            "the balance and indexer losses do not; set losses.balance=0 and losses.indexer=frozen, or "
            "losses.per_token=false"
        )
    if losses.balance:
        found |= {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": losses.balance}
    if model.recompute == "full":
        found |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif model.recompute == "moe":
        found |= {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    return found


def _wrap(recipe: Recipe, chunks: list[DeepSeekV4Model]) -> list[Any]:
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    overlap = recipe.parallel.overlap and parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1
    options = DistributedDataParallelConfig(
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and _distributed(recipe) and not recipe.lora.rank,  # adapters are small
        bucket_size=recipe.parallel.bucket or None,
        grad_reduce_in_fp32=recipe.optimizer.grad_dtype == "float32",
        use_distributed_optimizer=_distributed(recipe),
    )
    for chunk in chunks:
        chunk.train()
    wrapped = [
        DistributedDataParallel(config, options, chunk, disable_bucketing=n > 0) for n, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        wait_for_inner(chunk)
    if overlap:  # a step's last micro-batch sends what all of them summed up
        waiting = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = waiting if len(waiting) > 1 else waiting[0]  # type: ignore[assignment]
    return wrapped


def _distributed(recipe: Recipe) -> bool:
    return recipe.optimizer.distributed and recipe.optimizer.name == "adamw"


def _precise(recipe: Recipe) -> bool:
    """Whether AdamW's moments can have the narrow type that the recipe says."""
    narrow = recipe.optimizer.moments_dtype == "bf16" and recipe.model.dtype == "bf16"
    return narrow and _distributed(recipe) and HAVE_TE


def _widened(recipe: Recipe) -> bool:
    """Whether they are to be narrow, and cannot."""
    o = recipe.optimizer
    return o.name == "adamw" and o.moments_dtype == "bf16" and recipe.model.dtype == "bf16" and not _precise(recipe)


def _optimizer(recipe: Recipe, chunks: list[DeepSeekV4Model], wrapped: list[Any]) -> tuple[Any, tuple[str, ...]]:
    o, notes = recipe.optimizer, []
    bf16 = recipe.model.dtype == "bf16"
    precise = _precise(recipe)
    if _widened(recipe):
        notes.append(_WIDE)
    config = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=bf16,
        params_dtype=DTYPES[recipe.model.dtype],
        use_distributed_optimizer=_distributed(recipe),
        use_precision_aware_optimizer=precise,
        exp_avg_dtype=DTYPES[o.moments_dtype] if precise else torch.float32,
        exp_avg_sq_dtype=DTYPES[o.moments_dtype] if precise else torch.float32,
        muon_momentum=o.muon_momentum,
        muon_nesterov=o.muon_nesterov,
    )
    if o.name == "muon" and len(o.muon_steps) != 2:
        raise BridgeError(f"optimizer.muon_steps is {list(o.muon_steps)}, expected two numbers, as [8, 2]")
    if _distributed(recipe):
        made = get_megatron_optimizer(config, wrapped)
    else:
        made = whole_optimizer(wrapped, chunks, config, (o.muon_rms, o.muon_steps) if o.name == "muon" else None)
    fuse(made)
    return made, tuple(notes)


def _scheduler(recipe: Recipe, optimizer: Any) -> OptimizerParamScheduler:
    s, o = recipe.schedule, recipe.optimizer
    if s.warmup >= s.steps and s.decay != "constant":
        raise BridgeError(
            f"training with recipe {recipe.name}: schedule.warmup {s.warmup} leaves nothing of schedule.steps {s.steps}"
        )
    style = {"wsd": "WSD"}.get(s.decay, s.decay)
    last = s.warmup + s.decay_steps if s.decay_steps and style != "WSD" else s.steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=min(o.min_lr, o.lr),
        lr_warmup_steps=s.warmup,
        lr_decay_steps=max(last, s.warmup + 1),
        lr_decay_style=style,
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=max(s.steps, 1),
        wd_incr_style="constant",
        wsd_decay_steps=min(s.decay_steps or s.steps, s.steps - s.warmup) if style == "WSD" else None,
        lr_wsd_decay_style="cosine" if style == "WSD" else None,
    )
