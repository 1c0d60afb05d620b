"""The phases of an indexer: left as it is, warmed up alone, or trained along with the model.

Pretraining goes from dense attention by a short warm-up of the indexers to sparse attention (technical
report, arXiv 2606.19348). A phase is configuration (`indexer_settings`, for `build_model`) and a choice of
what trains (`set_trained`, before the model is wrapped for data parallelism and the optimizer made).
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import BridgeError
from .layers.indexer import Indexer

PHASES = ("frozen", "warmup", "sparse")


def indexer_settings(phase: str, coefficient: float = 0.01) -> dict[str, Any]:
    """Configuration of a phase.

    Args:
        phase: `frozen`, no loss; `warmup`, dense attention and a loss over all visible blocks; `sparse`, over
            the chosen ones.
        coefficient: weight of the loss; 0.01 is megatron's recipe for Flash.

    Raises:
        BridgeError: no such phase.
    """
    if _known(phase) == "frozen":
        return {"dsa_indexer_loss_coeff": None}
    warmup = phase == "warmup"
    return {
        "dsa_indexer_loss_coeff": coefficient,
        "dsa_indexer_use_sparse_loss": not warmup,
        "csa_dense_attention": warmup,
    }


def set_trained(model: torch.nn.Module | Sequence[torch.nn.Module], phase: str) -> None:
    """Let only the parameters of a phase train: everything but the indexers, the indexers alone, or all.

    Without a loss indexers have no gradients: left trainable, weight decay would shrink them all the same,
    and data parallelism that overlaps its sums with the backward would wait for them. In the warm-up the biases
    of the experts rest too.

    Args:
        model: the model or this rank's chunks, not wrapped yet.
        phase: see `indexer_settings`. What is frozen for another reason stays so.

    Raises:
        BridgeError: no such phase.
    """
    _known(phase)
    for chunk in [model] if isinstance(model, torch.nn.Module) else model:
        own = {id(p) for part in chunk.modules() if isinstance(part, Indexer) for p in part.parameters()}
        for parameter in chunk.parameters():
            rests = id(parameter) in own if phase == "frozen" else phase == "warmup" and id(parameter) not in own
            if rests:
                parameter.requires_grad_(False)
        if phase == "warmup":
            for part in chunk.modules():
                if hasattr(part, "frozen_expert_bias"):
                    part.frozen_expert_bias = True  # type: ignore[assignment]


def _known(phase: str) -> str:
    if phase not in PHASES:
        raise BridgeError(f"training the indexer: no phase {phase!r}, expected one of {', '.join(PHASES)}")
    return phase
