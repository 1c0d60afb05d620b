"""What each rank of a test of adapters does; started by `ranks.run_ranks`, as rank_worker.py is."""

import sys
from pathlib import Path
from typing import Any

import torch
from rank_worker import ACTIONS, batches, build_only, complete, main, mean_losses, wrap


def build(told: dict[str, Any]) -> tuple[list[Any], list[Any], Any]:
    """This rank's chunks with weights and adapters, none of them zero; wrapped for training, and the optimizer."""
    from dsv4_bridge.mcore import load_weights
    from dsv4_bridge.mcore.adapters.adapters import Lora, add_adapters, load_adapters

    lora = Lora(**told["lora"] | {"targets": tuple(told["lora"]["targets"])})
    chunks = build_only(told)
    for chunk in chunks:
        load_weights(chunk, told["weights"])
    add_adapters(chunks, lora)
    load_adapters(chunks, some_adapters(chunks[0].spec, lora, Path(told["weights"])))
    return chunks, *wrap(chunks, told)


def some_adapters(spec: Any, lora: Any, weights: Path) -> Any:
    """Random adapters, the same on all ranks; magnitudes near the norms of the rows."""
    from dsv4_bridge.lora.adapters import Adapter, Adapters
    from dsv4_bridge.spec.lora import targets
    from dsv4_bridge.store.hf import open_hf
    from dsv4_bridge.store.values import HFValues, Scratch

    random, values = torch.Generator().manual_seed(11), {}
    released = open_hf(weights)
    for target in targets(spec, lora.keys):
        out, into = target.shape
        a = torch.randn(lora.rank, into, generator=random) * into**-0.5
        b = torch.randn(out, lora.rank, generator=random) * 0.02
        magnitude = None
        if lora.dora:
            (item,) = target.items
            stripes = HFValues(released).stripes(item, 0, out, Scratch())
            bits = torch.cat([torch.from_numpy(s.copy()) for s in stripes])
            norms = bits.view(torch.bfloat16).float().norm(dim=1)
            magnitude = norms * (1 + 0.1 * torch.randn(out, generator=random))
        values[target.name] = Adapter(a, b, magnitude)
    released.close()
    return Adapters(lora, values)


def held(chunks: list[Any], what: str) -> dict[str, list[tuple[Any, ...]]]:
    """Adapter tensor -> what this rank holds of its gradient (`main_grad`) or value (`data`)."""
    from dsv4_bridge.mcore.adapters.adapters import bank_of

    found: dict[str, list[tuple[Any, ...]]] = {}
    for chunk in chunks:
        for adapter in bank_of(chunk):
            for number, part in enumerate(adapter.held()):
                box = (*part.rows, part.columns, getattr(part.tensor, what).clone())
                found.setdefault(f"{adapter.target.name} {part.part} {number}", []).append(box)
    return found


def base_of(chunks: list[Any]) -> list[torch.Tensor]:
    """Everything that must not change."""
    return [
        tensor.clone() for chunk in chunks for _, tensor in sorted(chunk.state_dict().items()) if tensor is not None
    ]


def adapt(told: dict[str, Any]) -> dict[str, Any]:
    """A training step, saved if told where; and what it changed."""
    from dsv4_bridge.mcore import save_checkpoint
    from dsv4_bridge.mcore.adapters.adapters import gather_adapters, trainable
    from dsv4_bridge.mcore.schedule import forward_backward

    chunks, wrapped, optimizer = build(told)
    before, values = base_of(chunks), held(chunks, "data")
    result = train(told, chunks, wrapped, optimizer)
    result["base"] = all(torch.equal(a, b) for a, b in zip(before, base_of(chunks), strict=True))
    after = held(chunks, "data")
    result["still"] = [n for n in values if all(torch.equal(a[3], b[3]) for a, b in zip(values[n], after[n]))]
    result["values"] = after
    result["counts"] = trainable(chunks)
    result["moments"] = moments(optimizer)
    gathered = gather_adapters(chunks, everywhere=True)
    result["gathered"] = {n: tuple(a) for n, a in gathered.values.items()}
    if told.get("save"):
        save_checkpoint(chunks, Path(told["folder"]) / told["save"], 1, optimizer, adapters=True)
    result["after"] = mean_losses(forward_backward(wrapped, batches(told, chunks), forward_only=True))
    return result


def train(told: dict[str, Any], chunks: list[Any], wrapped: list[Any], optimizer: Any) -> dict[str, Any]:
    """One training step: losses, gradients of the adapters, and their norm."""
    from dsv4_bridge.mcore.schedule import forward_backward

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = mean_losses(forward_backward(wrapped, batches(told, chunks)))
    for chunk in wrapped:
        complete(chunk)
    gradients = held(chunks, "main_grad")
    _, norm, _ = optimizer.step()
    return {"losses": losses, "gradients": gradients, "norm": float(norm)}


def moments(optimizer: Any) -> int:
    """Values of optimizer state on this rank."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [s for part in parts for s in part.optimizer.state.values()]
    return sum(s["exp_avg"].numel() for s in states)


def resume(told: dict[str, Any]) -> dict[str, Any]:
    """Load what another layout saved after a step, and make the next one."""
    from dsv4_bridge.mcore import load_checkpoint

    chunks, wrapped, optimizer = build(told)
    assert load_checkpoint(chunks, Path(told["folder"]) / told["load"], optimizer, adapters=True) == 1
    values = held(chunks, "data")
    result = train(told, chunks, wrapped, optimizer)
    return {"losses": result["losses"], "norm": result["norm"], "loaded": values, "values": held(chunks, "data")}


ACTIONS |= {"adapt": adapt, "resume": resume}

if __name__ == "__main__":
    main(sys.argv[1])
