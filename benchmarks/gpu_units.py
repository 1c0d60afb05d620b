"""What `gpu.py` measures, a unit at a time; a process runs a list of units and prints a line of JSON behind each.

The first line is their list. A unit is words joined by colons: `facts`, `ceilings`, `kernel:LENGTH:NAME`,
`layer:LENGTH:KIND:SIDE`, `generate:SIDE`, `load`, `codec`.
"""

import argparse
import contextlib
import gc
import itertools
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

MARK = "@@"
KINDS = {"window, hash": (0, 1), "CSA, routed": (4, 0), "HCA, routed": (128, 0)}
SIDES = ("ours", "ours by torch", "transformers")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


class Times:
    """Sizes of a whole run, or of a tiny one."""

    def __init__(self, tiny: bool):
        self.tiny = tiny
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.sides = ("ours", "transformers") if tiny else SIDES
        self.lengths = (48,) if tiny else (4096, 16384)
        self.rounds, self.seconds = (1, 0.0) if tiny else (15, 1.5)
        self.experts = None if tiny else 64  # of the model that generates
        self.prompt, self.new = (24, 4) if tiny else (1024, 48)

    def spec(self, **changes: Any) -> Any:
        from dsv4_bridge.spec.spec import replace_spec
        from dsv4_bridge.spec.variants import VARIANTS, tiny

        flash = tiny(VARIANTS["Flash"]) if self.tiny else VARIANTS["Flash"].spec
        return replace_spec(flash.without_draft(), **changes)

    def layer(self, kind: str) -> Any:
        ratio, hashed = KINDS[kind]
        return self.spec(num_hidden_layers=1, compress_ratios=(ratio,), num_hash_layers=hashed, vocab_size=1280)


def ms(run: Callable[[], object], times: Times) -> float:
    """Median milliseconds of a call, behind one or two that warm up."""
    if not CUDA:
        taken = []
        for _ in range(times.rounds):
            began = time.perf_counter()
            run()
            taken.append((time.perf_counter() - began) * 1e3)
        return statistics.median(taken)
    began = time.perf_counter()
    run()  # compiles
    torch.cuda.synchronize()
    if time.perf_counter() - began < 5:
        run()
    taken, until = [], time.perf_counter() + times.seconds
    while len(taken) < 3 or (len(taken) < times.rounds and time.perf_counter() < until):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        taken.append(start.elapsed_time(stop))
    return statistics.median(taken)


def facts() -> dict[str, Any]:
    import triton

    import dsv4_bridge

    found = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    for name in ("megatron-core", "transformers", "dsv4-bridge"):
        from importlib import metadata

        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["dsv4-bridge at"] = str(Path(dsv4_bridge.__file__).parent)
    if CUDA:
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "GiB": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        found |= {"multiprocessors": card.multi_processor_count, "capability": f"{card.major}.{card.minor}"}
    else:
        found["card"] = "none: the CPU, with Triton's interpreter"
    return found


def ceilings(times: Times) -> dict[str, float]:
    """What the card does: bytes read and written a second by a copy, and bf16 and float32 products."""
    size, side = (1 << 18, 64) if times.tiny else (1 << 30, 8192)
    found = {"copy GB/s": 2 * size / _copy_ms(size, times) / 1e6}
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        x, y = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
        found[f"{name} TFLOP/s"] = 2 * side**3 / ms(lambda x=x, y=y: x @ y, times) / 1e9
    return found


def _copy_ms(size: int, times: Times) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    into = torch.empty_like(source)
    return ms(lambda: into.copy_(source), times)


def kernel(length: int, name: str, times: Times) -> dict[str, Any]:
    """One public function by torch and by Triton: forward, and forward with backward."""
    from dsv4_bridge.mcore.kernels.choice import Choice
    from gpu_kernels import cases

    make = dict(cases(times.spec(), length, times.dtype, DEVICE))[name]
    case = make()
    found: dict[str, Any] = {}
    for by in ("torch",) if name == "grouped_linear" else ("torch", "triton"):
        try:
            outs = case.out(Choice(by))
            wanted = [t for t in case.inputs if t.requires_grad]
            weights = [torch.randn_like(o) if o.is_floating_point() else o for o in outs]
            read = case.least_bytes(outs, False), case.least_bytes(outs, True)
            del outs

            def both(by: str = by, wanted: Any = wanted, weights: Any = weights) -> None:
                torch.autograd.grad(case.out(Choice(by)), wanted, weights, allow_unused=True)

            def forward(by: str = by) -> None:
                with torch.no_grad():
                    case.out(Choice(by))

            found[by] = {"forward ms": ms(forward, times)}
            if case.back and wanted:
                found[by]["both ms"] = ms(both, times)
            found |= {"flops": case.flops, "both flops": case.flops * (1 + case.back)}
            found |= {"bytes": read[0], "both bytes": read[1]}
        except Exception as error:
            found[by] = {"error": said(error)}
            if poisoned():
                break
    return found


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
            _wait()
            began = time.perf_counter()
            for _ in range(times.new - 1):
                next(steps)
            _wait()
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


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def load(times: Times) -> dict[str, Any]:
    """A layer of real widths in and out, from the page cache: GB of bf16 values a second."""
    from dsv4_bridge.mcore import build_model, load_weights, stream_weights
    from dsv4_bridge.store.hf import open_hf
    from dsv4_bridge.toy.checkpoint import make_toy
    from layer import make_layer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "hf"
        if times.tiny:
            make_toy(folder, "Flash", 0)
        else:
            make_layer(folder, 32)
        opened = open_hf(folder)
        model = build_model(opened.spec, dtype=torch.bfloat16, initialize_weights=False)
        opened.close()
        size = sum(p.numel() for p in model.parameters()) * 2 / 1e9
        stored = sum(p.stat().st_size for p in folder.iterdir()) / 1e9
        found: dict[str, Any] = {"bf16 GB": size, "stored GB": stored}
        for _ in range(1 if times.tiny else 2):
            began = time.perf_counter()
            load_weights(model, folder)
            _wait()
            found["load GB/s"] = size / (time.perf_counter() - began)
            began = time.perf_counter()
            for _ in stream_weights(model, "source", like=folder):
                pass
            found["stream GB/s"] = size / (time.perf_counter() - began)
    return found


def codec(times: Times) -> dict[str, Any]:
    """Decoding and encoding on the device alone: GB of bf16 values a second."""
    from dsv4_bridge.codec import tensors

    rows, columns = (256, 256) if times.tiny else (16384, 4096)
    size = rows * columns * 2 / 1e6
    found: dict[str, Any] = {}
    for name, codes, scale in (
        ("FP8", (rows, columns), (rows // 128, columns // 128)),
        ("MXFP4", (rows, columns // 2), (rows, columns // 32)),
    ):
        encoding = name.lower()
        stored = torch.randint(0, 0x78, codes, dtype=torch.uint8, device=DEVICE)
        scales = torch.randint(112, 122, scale, dtype=torch.uint8, device=DEVICE)
        values = tensors.decode(encoding, stored, scales)
        found[f"{name} decode GB/s"] = size / ms(lambda a=encoding, b=stored, c=scales: tensors.decode(a, b, c), times)
        found[f"{name} encode GB/s"] = size / ms(lambda a=encoding, b=values, c=scales: tensors.encode(a, b, c), times)
    return found


def said(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()[-600:]


def poisoned() -> bool:
    """Whether the device does nothing more for this process, after an illegal access."""
    try:
        _wait()
    except RuntimeError:
        return True
    return False


def measure(unit: str, times: Times) -> dict[str, Any]:
    what, *words = unit.split(":")
    if what in ("kernel", "layer"):
        return {"kernel": kernel, "layer": layer}[what](int(words[0]), *words[1:], times)  # type: ignore[operator]
    if what == "facts":
        return facts()
    return {"ceilings": ceilings, "generate": generate, "load": load, "codec": codec}[what](*words, times)


def units(times: Times) -> list[str]:
    """All of them, the most wanted first."""
    import dsv4_bridge.mcore  # noqa: F401
    from gpu_kernels import cases

    found: list[list[str]] = []
    for length in times.lengths:
        found.append([f"kernel:{length}:{name}" for name, _ in cases(times.spec(), length, times.dtype, "meta")])
        found[-1] += [f"kernel:{length}:grouped_linear"]
        found[-1] += [f"layer:{length}:{kind}:{side}" for kind in KINDS for side in times.sides]
    others = ["load", "codec", *(f"generate:{side}" for side in times.sides)]
    return ["facts", "ceilings", *found[0], *others, *itertools.chain(*found[1:])]


def tell(out: Any, unit: str, began: float, found: Any, bad: bool = False) -> None:
    row = {"unit": unit, "s": time.perf_counter() - began, "found": found, "poisoned": bad}
    print(MARK + json.dumps(row), file=out, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--done", type=json.loads, default=[], help="units to leave out")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    times = Times(args.tiny)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not a result
    import dsv4_bridge.mcore  # noqa: F401

    begun = time.perf_counter()
    listed = [u for u in units(times) if args.only in u or u in ("facts", "ceilings")]
    tell(out, "units", begun, listed)
    for unit in listed:
        if unit in args.done:
            continue
        torch.manual_seed(0)
        began = time.perf_counter()
        try:
            found: Any = measure(unit, times)
        except Exception as error:
            traceback.print_exc()
            found = {"error": said(error)}
        gc.collect()
        bad = poisoned()
        tell(out, unit, began, found, bad)
        if bad:
            sys.exit(3)
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
