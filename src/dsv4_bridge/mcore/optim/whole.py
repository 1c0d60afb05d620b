"""Optimizers whose state every data-parallel rank holds whole, under megatron-core's mixed precision and clipping."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from ..model import DeepSeekV4Model
from .muon import Matrix, Muon, matrices_of

# One of megatron's optimizers each: experts are clipped over other ranks, float32 parameters have no master.
Part = tuple[str, bool, bool]


def whole_optimizer(
    wrapped: Sequence[Any],
    chunks: Sequence[DeepSeekV4Model],
    config: OptimizerConfig,
    muon: tuple[float, Sequence[int]] | None = None,
) -> ChainedOptimizer:
    """AdamW, or Muon for linear maps and AdamW for the rest, as one of megatron's optimizers.

    Args:
        wrapped: the chunks in megatron's data-parallel wrapper, without `use_distributed_optimizer`.
        chunks: bare.
        config: lr, min_lr, weight_decay (none on vectors), betas, eps, clip_grad, muon_momentum, muon_nesterov.
        muon: RMS of Muon's updates and its Newton-Schulz iterations; None: AdamW for all.
    """
    held: dict[Part, list[tuple[Any, tuple[Matrix, ...]]]] = {
        (kind, expert, wide): []
        for kind in (("muon", "adamw") if muon else ("adamw",))
        for expert in (False, True)
        for wide in ((False, True) if config.bf16 else (True,))
    }
    for chunk in chunks:
        matrices = matrices_of(chunk) if muon else {}
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                kind = "muon" if name in matrices else "adamw"
                part = (kind, not getattr(parameter, "allreduce", True), parameter.dtype is torch.float32)
                held[part].append((parameter, matrices.get(name, ())))
    return ChainedOptimizer([_part(part, values, config, muon, wrapped) for part, values in held.items()])


def _part(
    part: Part,
    held: list[tuple[Any, tuple[Matrix, ...]]],
    config: OptimizerConfig,
    muon: tuple[float, Sequence[int]] | None,
    wrapped: Sequence[Any],
) -> Any:
    kind, expert, wide = part
    vectors = [pair for pair in held if pair[0].ndim == 1]
    others = [pair for pair in held if pair[0].ndim > 1]
    groups = [_group(others, config, expert, 1.0), _group(vectors, config, expert, 0.0)]
    lr = config.lr or 0.0
    inner: torch.optim.Optimizer
    if kind == "muon":
        assert muon
        rms, steps = muon
        matrices = [[where for _, where in pairs] for pairs in (others, vectors)]
        inner = Muon(groups, matrices, lr, config.weight_decay, config.muon_momentum, config.muon_nesterov, rms, steps)
    else:
        betas = (config.adam_beta1, config.adam_beta2)
        inner = torch.optim.AdamW(groups, lr, betas, config.adam_eps, config.weight_decay)
    own: Any = (
        FP32Optimizer(inner, config, _nothing)
        if wide
        else Float16OptimizerWithFloat16Params(inner, config, None, _nothing)  # type: ignore[arg-type]
    )
    own.grad_stats_parallel_group = (
        parallel_state.get_expert_tensor_model_pipeline_parallel_group()
        if expert
        else parallel_state.get_model_parallel_group()
    )
    own.tp_group = parallel_state.get_tensor_model_parallel_group()
    own.model_chunks = list(wrapped)
    return own


def _group(
    held: list[tuple[Any, tuple[Matrix, ...]]], config: OptimizerConfig, expert: bool, decay: float
) -> dict[str, Any]:
    """A param group with what megatron's scheduler and clipping read."""
    return {
        "params": [parameter for parameter, _ in held],
        "is_expert_parallel": expert,
        "default_config": True,
        "wd_mult": decay,
        "lr_mult": 1.0,
        "is_decoupled_lr": False,
        "max_lr": config.lr,
        "min_lr": config.min_lr,
    }


def _nothing(optimizer: Any, config: Any = None) -> None:
    """State is made when it is saved or loaded (`state`)."""
