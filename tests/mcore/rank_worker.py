"""What each rank of a multi-process test does; started by `ranks.run_ranks` with a JSON of instructions.

A process group runs many cases, one after another: making processes costs more than running them.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch


def main(path: str) -> None:
    told = json.loads(Path(path).read_text())
    torch.set_num_threads(1)
    import torch.distributed as dist
    from megatron.core import parallel_state

    from dsv4_bridge.mcore import Parallel, initialize

    results = []
    for case in told["cases"]:
        torch.manual_seed(0)
        initialize(Parallel(**case.get("parallel", {})))
        results.append(ACTIONS[case["action"]](told | case))
        dist.barrier()
        parallel_state.destroy_model_parallel()
    torch.save(results, Path(told["folder"]) / f"{told['tag']}.rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def build_only(told: dict[str, Any]) -> list[Any]:
    """This rank's chunks, without weights."""
    from dsv4_bridge.mcore.model import build_chunks
    from dsv4_bridge.parallel.balance import solve
    from dsv4_bridge.parallel.notation import parse_layout
    from dsv4_bridge.store.hf import open_hf

    spec = open_hf(Path(told["weights"])).spec
    pp = told.get("parallel", {}).get("pp", 1)
    layout = parse_layout(told["layout"], pp, spec) if told.get("layout") else solve(spec, pp, told.get("vp", 1))
    settings = dict(told.get("settings", {}))
    if "dtype" in settings:
        settings["dtype"] = getattr(torch, settings["dtype"])
    return build_chunks(spec, initialize_weights=False, layout=layout, **settings)


def wrap(chunks: list[Any], told: dict[str, Any]) -> tuple[list[Any], Any]:
    """Chunks in megatron's data-parallel wrapper, and its distributed optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, bucket_size=told.get("bucket_size")
    )
    for chunk in chunks:
        chunk.train()
    wrapped = [
        DistributedDataParallel(config, options, chunk, disable_bucketing=n > 0) for n, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, clip_grad=1.0, weight_decay=0.1, use_distributed_optimizer=True),
        wrapped,
    )
    return wrapped, optimizer


def build(told: dict[str, Any]) -> tuple[list[Any], list[Any], Any]:
    """This rank's chunks with the reference's weights: bare, wrapped for training, and the optimizer."""
    from dsv4_bridge.mcore import load_weights

    chunks = build_only(told)
    for chunk in chunks:
        load_weights(chunk, told["weights"])
    return chunks, *wrap(chunks, told)


def batches(told: dict[str, Any], chunks: list[Any]) -> list[Any]:
    """This rank's micro-batches: its rows of every one under data parallelism."""
    from megatron.core import parallel_state

    from dsv4_bridge.mcore.schedule import Batch

    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    found = []
    for seed in told["seeds"]:
        random = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, chunks[0].spec.vocab_size, (told["batch"], told["length"] + 1), generator=random)
        mine = ids.chunk(size)[rank]
        found.append(share(Batch(mine[:, :-1].contiguous(), mine[:, 1:].contiguous())))
    return found


def share(batch: Any) -> Any:
    """What this rank has of a micro-batch under context parallelism."""
    from megatron.core import parallel_state

    from dsv4_bridge.mcore.schedule import cut

    return cut(batch, parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size())


def boxes(chunks: list[Any], what: str) -> dict[str, list[tuple[Any, ...]]]:
    """Item -> what this rank holds of its gradient (`main_grad`) or value (`data`)."""
    from dsv4_bridge.mcore.weights.places import places

    found: dict[str, list[tuple[Any, ...]]] = {}
    for chunk in chunks:
        for name, here in places(chunk)[1].items():
            for place in here:
                if what == "data" or isinstance(place.tensor, torch.nn.Parameter):
                    values = getattr(place.tensor, what)[place.row : place.row + place.stop - place.start]
                    found.setdefault(name, []).append((place.start, place.stop, place.columns, values.clone()))
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


def train(told: dict[str, Any], chunks: list[Any], wrapped: list[Any], optimizer: Any) -> dict[str, Any]:
    """One training step: losses (mean over data parallelism), gradients, and their norm."""
    from dsv4_bridge.mcore.schedule import forward_backward

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    losses = mean_losses(forward_backward(wrapped, batches(told, chunks)))
    for chunk in wrapped:
        complete(chunk)
    gradients = boxes(chunks, "main_grad")
    _, norm, _ = optimizer.step()
    return {"losses": losses, "gradients": gradients, "norm": float(norm)}


def mean_losses(losses: list[torch.Tensor]) -> list[float]:
    """Over the data-parallel ranks; empty where the stage is not the last."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    group, means = parallel_state.get_data_parallel_group(), []
    for loss in losses:
        total = loss.clone()
        dist.all_reduce(total, group=group)
        means.append(float(total) / group.size())
    return means


def step(told: dict[str, Any]) -> dict[str, Any]:
    """A training step; saved, if told where, with the optimizer's state."""
    from dsv4_bridge.mcore import save_checkpoint
    from dsv4_bridge.mcore.schedule import forward_backward

    chunks, wrapped, optimizer = build(told)
    result = train(told, chunks, wrapped, optimizer)
    result["values"] = boxes(chunks, "data")
    if told.get("save"):
        save_checkpoint(chunks, Path(told["folder"]) / told["save"], 1, optimizer)
    feed = batches(told, chunks)
    result["after"] = mean_losses(forward_backward(wrapped, feed, forward_only=True))
    return result


def resume(told: dict[str, Any]) -> dict[str, Any]:
    """Load what another layout saved after a step, and make the next one."""
    from dsv4_bridge.mcore import load_checkpoint

    chunks = build_only(told)
    wrapped, optimizer = wrap(chunks, told)
    assert load_checkpoint(chunks, Path(told["folder"]) / told["load"], optimizer) == 1
    result = train(told, chunks, wrapped, optimizer)
    return {"losses": result["losses"], "norm": result["norm"], "values": boxes(chunks, "data")}


def stream(told: dict[str, Any]) -> dict[str, Any]:
    """Digest of every tensor that `stream_weights` gives in the source's encoding."""
    from dsv4_bridge.mcore import load_weights, stream_weights

    chunks = build_only(told)
    for chunk in chunks:
        load_weights(chunk, told["weights"])
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), digest(tensor))
        for name, tensor in stream_weights(chunks, "source", like=told["weights"])
    }


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def logits(told: dict[str, Any]) -> torch.Tensor | None:
    """Logits of the whole vocabulary, without a pipeline; of a rank's tokens under context parallelism."""
    from dsv4_bridge.mcore import load_weights
    from dsv4_bridge.mcore.schedule import Batch

    (chunk,) = build_only(told)
    load_weights(chunk, told["weights"])
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(0, chunk.spec.vocab_size, (told["batch"], told["length"]), generator=random)
    ends = told.get("ends") and torch.tensor(told["ends"], dtype=torch.int32)
    with torch.no_grad():
        return chunk.eval()(share(Batch(ids, ids)).input_ids, runtime_gather_output=True, cu_seqlens=ends)


def memory(told: dict[str, Any]) -> dict[str, Any]:
    """Bytes that this rank holds, of everything."""
    from rank_memory import measure

    from dsv4_bridge.mcore import load_weights

    chunks = build_only(told)
    for chunk in chunks:
        load_weights(chunk, told["weights"])
    return measure(told, chunks, batches)


def objectives(told: dict[str, Any]) -> dict[str, Any]:
    """A step on packed rows with every auxiliary objective."""
    from rank_objectives import objectives as run

    return run(told)


def traffic(told: dict[str, Any]) -> dict[str, int]:
    """Bytes sent between context-parallel ranks."""
    from rank_traffic import traffic as run

    return run(told)


def chosen(told: dict[str, Any]) -> dict[str, Any]:
    """What the ranks' indexers choose."""
    from rank_index import chosen as run

    return run(told)


ACTIONS = {
    "chosen": chosen,
    "memory": memory,
    "step": step,
    "resume": resume,
    "stream": stream,
    "logits": logits,
    "objectives": objectives,
    "traffic": traffic,
}

if __name__ == "__main__":
    main(sys.argv[1])
