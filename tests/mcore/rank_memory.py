"""What a rank of a real run holds, in bytes: run inside rank_worker.py."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch


class Kept:
    """Storages that autograd keeps for the backward, each once, parameters left out; the most at a time."""

    def __init__(self, own: list[torch.Tensor]):
        self.own = {t.untyped_storage()._cdata for t in own}
        self.uses: Counter[int] = Counter()
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor) -> "Saved":
        return Saved(self, tensor)

    def add(self, storage: Any) -> None:
        if storage._cdata in self.own:
            return
        self.uses[storage._cdata] += 1
        if self.uses[storage._cdata] == 1:
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)

    def drop(self, storage: Any) -> None:
        if storage._cdata in self.own:
            return
        self.uses[storage._cdata] -= 1
        if not self.uses[storage._cdata]:
            self.now -= storage.nbytes()


class Saved:
    """One saved tensor; autograd lets go of it when its backward is done."""

    def __init__(self, kept: Kept, tensor: torch.Tensor):
        self.kept, self.storage = kept, tensor.untyped_storage()
        # Not the tensor itself: an output that its own function saved would never be let go.
        self.tensor = tensor.detach().requires_grad_(tensor.requires_grad)
        kept.add(self.storage)

    def __del__(self) -> None:
        self.kept.drop(self.storage)


def nbytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(told: dict[str, Any], chunks: list[Any], batches: Callable[..., list[Any]]) -> dict[str, Any]:
    """Bytes of weights, gradients, optimizer and its step, and activations at their peak for each shape."""
    from dsv4_bridge.mcore.schedule import forward_backward

    wrapped, optimizer = wrap(chunks, told)
    saved = {n for chunk in chunks for n in chunk.state_dict()}
    state = [t for chunk in chunks for n, t in [*chunk.named_parameters(), *chunk.named_buffers()] if n in saved]
    found: dict[str, Any] = {
        "values": sum(t.numel() for t in state),
        "weights": nbytes(state),
        "gradients": nbytes(b.grad_data for c in wrapped for b in (*c.buffers, *c.expert_parallel_buffers)),
        "activations": [],
    }
    for batch, length in told["shapes"]:
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        kept = Kept([p for c in chunks for p in (*c.parameters(), *c.buffers())])
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.tensor):
            forward_backward(wrapped, batches(told | {"batch": batch, "length": length}, chunks))
        assert kept.now == 0, f"{kept.now} bytes are kept behind the backward"
        found["activations"].append(kept.most)
    optimizer.step()
    found["optimizer"] = optimizer_bytes(optimizer, state)
    buffers = {b.grad_data.untyped_storage()._cdata for c in wrapped for b in (*c.buffers, *c.expert_parallel_buffers)}
    found["step"] = nbytes(
        p.grad
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        for group in part.optimizer.param_groups
        for p in group["params"]
        if p.grad is not None and p.grad.untyped_storage()._cdata not in buffers
    )
    return found


def wrap(chunks: list[Any], told: dict[str, Any]) -> tuple[list[Any], Any]:
    """Chunks in megatron's wrapper, and its optimizer, distributed or not, for float32 and bf16 models."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config, cut = chunks[0].config, told.get("distributed_optimizer", True)
    config.finalize_model_grads_func = finalize_model_grads
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=told.get("grad_dtype", "float32") == "float32", use_distributed_optimizer=cut
    )
    for chunk in chunks:
        chunk.train()
    wrapped = [DistributedDataParallel(config, options, c, disable_bucketing=n > 0) for n, c in enumerate(chunks)]
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=config.bf16, use_distributed_optimizer=cut)
    return wrapped, get_megatron_optimizer(settings, wrapped)


def optimizer_bytes(optimizer: Any, state: list[torch.Tensor]) -> int:
    """Moments, and masters that are no views of the model."""
    own = {t.untyped_storage()._cdata for t in state}
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        total += nbytes(t for held in inner.state.values() for t in held.values() if torch.is_tensor(t) and t.dim())
        masters = (p for group in inner.param_groups for p in group["params"])
        total += nbytes(p for p in masters if p.untyped_storage()._cdata not in own)
    return total
