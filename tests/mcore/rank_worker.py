"""What each rank of a multi-process test does; started by `ranks.run_ranks` with a JSON of instructions."""

import json
import sys
from pathlib import Path
from typing import Any

import torch


def main(path: str) -> None:
    told = json.loads(Path(path).read_text())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import torch.distributed as dist

    from dsv4_bridge.mcore import Parallel, initialize

    initialize(Parallel(**told["parallel"]))
    result = ACTIONS[told["action"]](told)
    torch.save(result, Path(told["folder"]) / f"{told['tag']}.rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def build(told: dict[str, Any]) -> tuple[list[Any], list[Any], Any]:
    """This rank's chunks with the reference's weights: bare, wrapped for training, and the optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from dsv4_bridge.mcore import load_weights
    from dsv4_bridge.mcore.model import build_chunks
    from dsv4_bridge.store.hf import open_hf
    from dsv4_bridge.topology import parse_layout, solve

    spec = open_hf(Path(told["weights"])).spec
    pp = told["parallel"].get("pp", 1)
    layout = parse_layout(told["layout"], pp, spec) if told.get("layout") else solve(spec, pp, told.get("vp", 1))
    chunks = build_chunks(spec, initialize_weights=False, layout=layout, **told.get("settings", {}))
    for chunk in chunks:
        load_weights(chunk, told["weights"])
        chunk.train()
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=bool(told.get("distributed_optimizer"))
    )
    wrapped = [
        DistributedDataParallel(config, options, chunk, disable_bucketing=n > 0) for n, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            clip_grad=1.0,
            weight_decay=0.1,
            use_distributed_optimizer=bool(told.get("distributed_optimizer")),
        ),
        wrapped,
    )
    return chunks, wrapped, optimizer


def batches(told: dict[str, Any], chunks: list[Any]) -> list[Any]:
    """This rank's micro-batches: all of them, or its share of every one under data parallelism."""
    from megatron.core import parallel_state

    from dsv4_bridge.mcore.schedule import Batch

    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    found = []
    for seed in told["seeds"]:
        ids = torch.randint(
            0,
            chunks[0].spec.vocab_size,
            (told["batch"], told["length"] + 1),
            generator=torch.Generator().manual_seed(seed),
        )
        mine = ids.chunk(size)[rank]
        found.append(Batch(mine[:, :-1].contiguous(), mine[:, 1:].contiguous()))
    return found


def gradients(chunks: list[Any]) -> dict[str, list[tuple[Any, ...]]]:
    """Item -> boxes of its gradient that this rank holds."""
    from dsv4_bridge.mcore.places import places

    found: dict[str, list[tuple[Any, ...]]] = {}
    for chunk in chunks:
        for name, here in places(chunk)[1].items():
            for place in here:
                if not isinstance(place.tensor, torch.nn.Parameter):
                    continue
                grad = place.tensor.main_grad[place.row : place.row + place.stop - place.start]
                found.setdefault(name, []).append((place.start, place.stop, place.columns, grad.clone()))
    return found


def complete(wrapped: Any) -> None:
    """Under the distributed optimizer a rank has reduced only its share of the gradients: gather the others'."""
    import torch.distributed as dist

    for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            each = bucket.grad_data.numel() // group.size()
            own = slice(group.rank() * each, (group.rank() + 1) * each)
            mine = bucket.grad_data[own].clone()
            bucket.grad_data.zero_()
            bucket.grad_data[own] = mine
            dist.all_reduce(bucket.grad_data, group=group)


def step(told: dict[str, Any]) -> dict[str, Any]:
    """Forward, backward, gradients, one optimizer step, and the loss behind it."""
    from dsv4_bridge.mcore.schedule import forward_backward

    chunks, wrapped, optimizer = build(told)
    feed = batches(told, chunks)
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = forward_backward(wrapped, feed)
    for chunk in wrapped:
        if told.get("distributed_optimizer"):
            complete(chunk)
    result: dict[str, Any] = {"losses": losses, "gradients": gradients(chunks)}
    _, result["norm"], _ = optimizer.step()
    result["after"] = forward_backward(wrapped, feed, forward_only=True)
    result["bias"] = {
        name: tensor.clone()
        for chunk in chunks
        for name, tensor in chunk.named_buffers()
        if name.endswith("expert_bias")
    }
    return result


ACTIONS = {"step": step}

if __name__ == "__main__":
    main(sys.argv[1])
