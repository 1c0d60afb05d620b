"""Every Triton kernel compiled for real GPUs, without one: what it takes of registers and shared memory.

    python benchmarks/compile_kernels.py [--targets 80,90,100] [--types float32,bfloat16] [--only NAME] [--json]

Nobody writes signatures down: the public functions of `gpu_kernels.py` run, forward and backward, on torch's device of
shapes ("meta") at Flash's real sizes, and what they would launch is compiled instead, just as it would be on the
card: types, alignments, constants, warps and stages. A kernel module may add launches that no function of the table
makes, as `compilations()`: a list of calls without arguments, each launching on meta tensors.

A line a kernel: shared memory and registers, what a thread keeps on its stack (what spilled, mostly), seconds. It fails
where a kernel does not compile, or takes more shared memory than a block of the card may have.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

if os.environ.pop("TRITON_INTERPRET", None):  # Triton looks when it is imported
    print("TRITON_INTERPRET does not count here: kernels are compiled", file=sys.stderr)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import dsv4_bridge.mcore  # noqa: F401  (prepares torch for megatron-core)
from dsv4_bridge.mcore import kernels
from dsv4_bridge.mcore.kernels.choice import Choice
from dsv4_bridge.spec.variants import VARIANTS, tiny
from gpu_kernels import cases

# Bytes of shared memory that a block may ask for (CUDA C++ Programming Guide, technical specifications).
ROOM = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Card:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: int):
        self.target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are kept a device apart

    def get_current_stream(self, device: int) -> int:
        return 0


def modules() -> list[ModuleType]:
    """Modules of Triton kernels, imported."""
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__) if m.name.endswith("_triton")]
    return [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]


@contextmanager
def compiling(target: int, rows: list[dict[str, Any]], about: dict[str, Any], seen: set[Any]) -> Iterator[None]:
    """Launches compile; `rows` gets what came of each that is not among `seen`."""
    run = JITFunction.run

    def instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        began = time.perf_counter()
        row = about | {"kernel": self.fn.__name__, "target": target}
        try:
            made = run(self, *args, grid=grid, warmup=True, **kwargs)
            if (target, made.hash) in seen:
                return made
            seen.add((target, made.hash))
            row |= {"shared": made.metadata.shared, "warps": made.metadata.num_warps, **resources(made.asm["cubin"])}
            row["seconds"] = round(time.perf_counter() - began, 2)
        except Exception as error:
            row["error"] = "".join(traceback.format_exception_only(error)).strip()[-400:]
            made = None
        rows.append(row)
        return made

    JITFunction.run = instead
    driver.set_active(Card(target))  # type: ignore[arg-type]
    os.environ["TRITON_INTERPRET"] = "1"  # `Choice.fused` asks; Triton no longer does
    rooms = [m for m in list(sys.modules.values()) if hasattr(m, "shared_memory") and kernels.__name__ in m.__name__]
    kept = [m.shared_memory for m in rooms]
    for module in rooms:
        module.shared_memory = lambda device: ROOM.get(target, ROOM[90])  # type: ignore[attr-defined]
    try:
        yield
    finally:
        JITFunction.run = run
        del os.environ["TRITON_INTERPRET"]
        for module, function in zip(rooms, kept, strict=True):
            module.shared_memory = function  # type: ignore[attr-defined]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack a thread, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]) + int(found.get("LOCAL", 0))}


def launches(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and call of everything that launches."""
    spec = tiny(VARIANTS["Flash"]) if args.tiny else VARIANTS["Flash"].spec
    for name, make in cases(spec, args.length, dtype, "meta"):

        def call(make: Callable[[], Any] = make, deterministic: bool = False) -> None:
            case = make()
            outs = case.out(Choice("triton", deterministic))
            wanted = [t for t in case.inputs if t.requires_grad]
            if case.back and wanted:
                torch.autograd.grad(outs, wanted, [torch.empty_like(o) for o in outs], allow_unused=True)

        yield name, call
        yield f"{name}, in order", lambda call=call: call(deterministic=True)
    for module in args.modules:
        for number, more in enumerate(getattr(module, "compilations", list)()):
            yield f"{module.__name__.rpartition('.')[2]}, {number}", more


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    seen: set[Any] = set()
    for target in map(int, args.targets.split(",")):
        for type_name in args.types.split(","):
            for name, call in launches(args, getattr(torch, type_name)):
                if args.only not in name:
                    continue
                about = {"function": name, "type": type_name}
                with compiling(target, rows, about, seen):
                    try:
                        call()
                    except Exception as error:
                        said = "".join(traceback.format_exception_only(error)).strip()[-400:]
                        rows.append(about | {"kernel": "-", "target": target, "error": said})
                if not args.json:
                    for row in rows:
                        if not row.pop("told", False):
                            print(line(row), flush=True)
                        row["told"] = True
    for row in rows:
        row.pop("told", None)
    return rows


def line(row: dict[str, Any]) -> str:
    start = f"sm_{row['target']} {row['type']:<9} {row['function']:<26} {row['kernel']:<20}"
    if "error" in row:
        return f"{start} FAILS: {row['error']}"
    used = f"{row['shared']:>7} B shared {row['registers']:>4} registers {row['stack']:>5} B stack"
    return f"{start} {used} {row['warps']:>2} warps {row['seconds']:>6.1f} s{'' if fits(row) else '  TOO MUCH SHARED'}"


def fits(row: dict[str, Any]) -> bool:
    return "error" not in row and row["shared"] <= ROOM.get(row["target"], ROOM[90])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="80,90,100")
    parser.add_argument("--types", default="float32,bfloat16")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--only", default="")
    parser.add_argument("--tiny", action="store_true", help="the numbers of a tiny model")
    parser.add_argument("--more", action="append", default=[], metavar="MODULE", help="a further module of kernels")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.modules = modules() + [importlib.import_module(name) for name in args.more]
    rows = measure(args)
    if args.json:
        print(json.dumps(rows))
    bad = [row for row in rows if not fits(row)]
    print(f"{len(rows)} kernels compiled from {len(args.modules)} modules, {len(bad)} that fail", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
