"""Units of `gpu.py` that run a model: a layer of every kind, and decoding; ours, by torch alone, and transformers'."""

import gc
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_timing import CUDA, DEVICE, Times, ms, said, wait


def built(spec: Any, side: str, times: Times, folder: Path) -> Any:
    """The model of one side, of fresh values."""
    if side == "transformers":
        from transformers import AutoConfig, DeepseekV4ForCausalLM

        from dsv4_bridge.store.hf_config import released_config

        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(released_config(spec, None, False)))
        config = AutoConfig.from_pretrained(folder)
        config._attn_implementation = "eager"
        torch.set_default_dtype(times.dtype)
        try:
            with torch.device(DEVICE):
                model = DeepseekV4ForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
        for name, buffer in model.named_buffers():
            if "tid2eid" in name:
                order = torch.rand(len(buffer), spec.n_routed_experts, device=buffer.device)
                buffer.copy_(order.argsort(1)[:, : buffer.shape[1]])
        return model
    from dsv4_bridge.mcore import build_model

    by = "torch" if side == "ours by torch" else "auto"
    model = build_model(spec, dtype=times.dtype, expert_layout="grouped", kernels=by)
    for name, buffer in model.named_buffers():
        if "tid2eid" in name:
            order = torch.rand(len(buffer), spec.n_routed_experts, device=buffer.device)
            buffer.copy_(order.argsort(1)[:, : buffer.shape[1]])
    return model


def layer(length: int, kind: str, side: str, times: Times) -> dict[str, Any]:
    """A model of one layer: forward, and forward with backward; tokens, FLOPs, routing and memory."""
    from dsv4_bridge.spec.flops import count_flops

    spec = times.layer(kind)
    with tempfile.TemporaryDirectory() as folder:
        model = built(spec, side, times, Path(folder)).train()
    ids = torch.randint(0, spec.vocab_size, (1, length), device=DEVICE)
    work = count_flops(spec, length)
    found: dict[str, Any] = {"tokens": length}

    def forward() -> None:
        with torch.no_grad():
            model(ids)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        out = model(ids)
        (out if isinstance(out, torch.Tensor) else out.logits).float().square().mean().backward()

    for what, run, flops in (("forward", forward, work.forward.total), ("both", both, work.training.total)):
        try:
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            found[f"{what} ms"] = took = ms(run, times)
            found |= {f"{what} tokens/s": length / took * 1e3, f"{what} TFLOP/s": flops / took / 1e9}
            found[f"{what} peak GB"] = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
        except torch.OutOfMemoryError as error:
            found[f"{what} error"] = "out of memory: " + said(error)[:120]
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    if side != "transformers":
        found |= routing(model, ids, spec) | planned(spec, length, times)
    return found


def routing(model: Any, ids: torch.Tensor, spec: Any) -> dict[str, Any]:
    """How tokens went to experts by themselves: none may be lost."""
    seen: list[torch.Tensor] = []
    experts = model.decoder.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda module, args: seen.append(args[1].detach().cpu()))
    with torch.no_grad():
        model(ids)
    hook.remove()
    counts = seen[-1]
    routed = ids.numel() * spec.num_experts_per_tok
    return {"dropped": routed - int(counts.sum()), "fullest expert": float(counts.max() / counts.float().mean())}


def planned(spec: Any, length: int, times: Times) -> dict[str, float]:
    """Bytes that `dsv4 plan` says for this: weights, gradients of the parameters' type, and activations."""
    from dsv4_bridge.parallel.topology import Sizes
    from dsv4_bridge.planning.memory import Run, make_run_topology, plan_memory

    kind = "float32" if times.tiny else "bf16"
    topology, dp = make_run_topology(spec, Sizes())
    stage = plan_memory(spec, topology, dp, Run(dtype=kind, grad_dtype=kind, seq_length=length)).worst
    return {"planned GB": (stage.weights + stage.gradients + stage.activations) / 1e9}


def generate(side: str, times: Times) -> dict[str, Any]:
    """Greedy tokens a second of a model of four layers behind a prompt, the prompt not counted; 1 and 8 rows."""
    changes = {} if times.experts is None else {"n_routed_experts": times.experts}
    spec = times.spec(num_hidden_layers=4, compress_ratios=(0, 4, 128, 4), num_hash_layers=1, **changes)
    with tempfile.TemporaryDirectory() as folder:
        model = built(spec, side, times, Path(folder)).eval()
    found: dict[str, Any] = {"layers": 4, "experts": spec.n_routed_experts, "prompt": times.prompt, "new": times.new}
    for rows in (1,) if times.tiny else (1, 8):
        ids = torch.randint(0, spec.vocab_size, (rows, times.prompt), device=DEVICE)
        for _ in range(1 if times.tiny else 2):  # the first compiles
            steps = _theirs(model, ids) if side == "transformers" else _ours(model, ids, times.new)
            next(steps)
            wait()
            began = time.perf_counter()
            for _ in range(times.new - 1):
                next(steps)
            wait()
            found[f"{rows} rows tokens/s"] = rows * (times.new - 1) / (time.perf_counter() - began)
            steps.close()
    return found


def _ours(model: Any, ids: torch.Tensor, new: int) -> Iterator[object]:
    from dsv4_bridge.mcore.generate import generate as steps

    yield from steps(model, ids.tolist(), new)


@torch.no_grad()
def _theirs(model: Any, ids: torch.Tensor) -> Iterator[object]:
    out = model(ids, use_cache=True)
    while True:
        token = out.logits[:, -1:].argmax(-1)
        token.tolist()
        yield token
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
