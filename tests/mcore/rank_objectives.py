"""What each rank does for test_objectives_parallel: a step on packed rows with every auxiliary objective."""

from typing import Any

import torch


def packed_batches(told: dict[str, Any], vocabulary: int) -> list[Any]:
    """This rank's micro-batches, of one packed row each; of other boundaries each."""
    from megatron.core import parallel_state
    from rank_worker import share

    from dsv4_bridge.mcore.schedule import Batch

    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    found = []
    for number, ends in list(enumerate(told["boundaries"]))[rank::size]:
        random = torch.Generator().manual_seed(number)
        ids, labels = torch.randint(0, vocabulary, (2, 1, ends[-1]), generator=random)
        padding = torch.zeros_like(ids).bool()
        padding[:, ends[-2] :] = True  # the last document is what fills the row
        mask = (torch.rand(ids.shape, generator=random) < 0.8) & ~padding
        if told.get("fractions"):  # and one that learns nothing
            mask = mask * torch.rand(ids.shape, generator=random) * 0.3 * (number != 1)
        found.append(share(Batch(ids, labels, mask.float(), padding, torch.tensor(ends, dtype=torch.int32))))
    return found


def objectives(told: dict[str, Any]) -> dict[str, Any]:
    """Losses, gradients, metrics and the experts' biases after a step."""
    from context_bugs import put
    from rank_worker import boxes, build, complete, mean_losses

    from dsv4_bridge.mcore.metrics import collect
    from dsv4_bridge.mcore.schedule import forward_backward

    chunks, wrapped, _ = build(told)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    feed = packed_batches(told, chunks[0].spec.vocab_size)
    with put(told.get("bug")):
        found = forward_backward(wrapped, feed)
    losses = mean_losses([torch.stack(found).mean()] if found else [])
    for chunk in wrapped:
        complete(chunk)
    biases = {name: held for name, held in boxes(chunks, "data").items() if name.endswith("gate.bias")}
    return {
        "losses": losses,
        "gradients": boxes(chunks, "main_grad"),
        "biases": biases,
        "metrics": collect(wrapped),
        "again": collect(wrapped),
    }
