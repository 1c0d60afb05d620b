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
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from gpu_models import generate, layer
from gpu_timing import CUDA, DEVICE, KINDS, Times, ms, poisoned, said, wait
from quick_interpreter import quicken

MARK = "@@"


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
            outs: list[torch.Tensor] = []
            wanted = [t for t in case.inputs if t.requires_grad]

            def forward(by: str = by, outs: Any = outs) -> None:
                with torch.no_grad():
                    outs[:] = case.out(Choice(by))

            found[by] = {"forward ms": ms(forward, times)}
            weights = [torch.randn_like(o) if o.is_floating_point() else o for o in outs]
            read = case.least_bytes(tuple(outs), False), case.least_bytes(tuple(outs), True)
            outs.clear()

            def both(by: str = by, wanted: Any = wanted, weights: Any = weights) -> None:
                torch.autograd.grad(case.out(Choice(by)), wanted, weights, allow_unused=True)

            if case.back and wanted:
                found[by]["both ms"] = ms(both, times)
            found |= {"flops": case.flops, "both flops": case.flops * (1 + case.back)}
            found |= {"bytes": read[0], "both bytes": read[1]}
        except Exception as error:
            found[by] = {"error": said(error)}
            if poisoned():
                break
    return found


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
            wait()
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
    if args.tiny:
        quicken()
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
