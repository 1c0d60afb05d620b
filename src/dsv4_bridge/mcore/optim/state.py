"""Megatron's optimizers in checkpoints: state in the shapes of the parameters, whatever the layout.

What depends on how a layout groups parameters (param groups and their indices, one optimizer for experts
and another for the rest) stays out; hyperparameters are the new run's.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from .muon import Muon

SHARDING: dict[str, Any] = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def sharded_state(
    optimizer: Any, model_state: dict[str, Any], loading: bool, metadata: dict[str, Any]
) -> dict[str, Any]:
    """State of each part of a (chained) optimizer that has any, by its number, as sharded tensors.

    Args:
        optimizer: megatron's.
        model_state: the model's sharded state, of the very parameters that are optimized.
        loading: whether what it has now is only a form to fill.
        metadata: as megatron's sharded_state_dict takes it.
    """
    _begin(optimizer)
    found: dict[str, Any] = {}
    for number, part in enumerate(_parts_of(optimizer)):
        if _empty(part):
            continue
        whole = part.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)
        if isinstance(part, DistributedOptimizer):
            found[str(number)] = whole["param_state"]
        elif "optimizer" in whole:
            states = _without_step(whole["optimizer"]["state"])
            masters = {str(n): group for n, group in enumerate(whole["fp32_from_fp16_params"]) if group}
            found[str(number)] = {"state": states, "masters": masters}
        else:
            found[str(number)] = {"state": _without_step(whole["state"])}
    return found


def load_state(optimizer: Any, loaded: dict[str, Any], step: int) -> None:
    """Put back what `sharded_state` described.

    Args:
        optimizer: of the new run.
        loaded: state by a part's number.
        step: steps that were made.
    """
    for number, part in enumerate(_parts_of(optimizer)):
        if _empty(part):
            continue
        own, values = part.state_dict(), loaded[str(number)]
        if isinstance(part, DistributedOptimizer):
            for group in own["optimizer"]["param_groups"]:
                group["step"] = step
            kind = {"param_state_sharding_type": SHARDING["distrib_optim_sharding_type"]}
            part.load_state_dict(own | kind | {"param_state": values})
        else:
            inner = own.get("optimizer", own)
            inner["state"] = {
                number: {name: torch.tensor(float(step)) for name in inner["state"][number] if name == "step"} | state
                for number, state in values["state"].items()
            }
            if "masters" in values:
                masters = values["masters"]
                own["fp32_from_fp16_params"] = [masters.get(str(n), []) for n in range(len(inner["param_groups"]))]
            part.load_state_dict(own)
        # Megatron gives torch's Adam one counter for all parameters: every one of them would count it up.
        for state in part.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def steps_made(optimizer: Any) -> int:
    """How many steps AdamW has made; Muon does not count them."""
    inner = [part.optimizer for part in _parts_of(optimizer)]
    return max((int(state["step"]) for one in inner for state in one.state.values() if "step" in state), default=0)


def fuse(optimizer: Any) -> None:
    """Let torch's AdamW pass over memory once on a CPU; on CUDA its default, or Transformer Engine's, does."""
    for part in _parts_of(optimizer):
        inner = getattr(part, "optimizer", None)
        if isinstance(inner, torch.optim.AdamW) and not torch.cuda.is_available():
            for group in inner.param_groups:
                group["fused"] = True


def _empty(part: Any) -> bool:
    """Whether a part has no state here: megatron-core leaves empty entries out of what it loads.

    A distributed optimizer's is gathered: what no parameter's shard is left of on this rank has some all the same.
    """
    if isinstance(part, DistributedOptimizer):
        return not any(len(buffer.params) for buffer in part.buffers)
    return not part.get_parameters()


def _without_step(states: dict[Any, Any]) -> dict[Any, Any]:
    return {number: state for number, state in states.items() if number != "common_step"}


def _parts_of(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _begin(optimizer: Any) -> None:
    """Give optimizers their state before the first step: megatron-core asks a new one for its step count."""
    for part in _parts_of(optimizer):
        inner = getattr(part, "optimizer", None)
        if isinstance(inner, Muon):
            inner.begin()
        if not isinstance(inner, torch.optim.Adam):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {"step": torch.zeros(())} | {
                        name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")
                    }
