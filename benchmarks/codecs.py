"""Speed of the codecs on one core, against a copy of the bf16 bytes and against Megatron-Bridge.

    python benchmarks/codecs.py [--incumbent PATH] [--rounds 7] [--json]

The incumbent is Megatron-Bridge's `quantization_utils`, loaded from its file alone (importing the
package pulls in a training stack): from the installed `megatron-bridge`, or from PATH, which may be
that file, a folder that contains it, or the wheel. Without it, only the copy is compared with.
One tensor, reused output buffers, one thread, interleaved rounds, medians. Encoding is given the
source's scales: of values that still fit them, or "trained", where no block does.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dsv4_bridge.codec import fp8, mxfp4, mxfp4_to_fp8

MODULE = "megatron/bridge/models/conversion/quantization_utils.py"
COPY = "copy bf16"


def load_incumbent(path: Path | None) -> ModuleType | None:
    if path is None:
        try:
            files = importlib.metadata.distribution("megatron-bridge").files or []
        except importlib.metadata.PackageNotFoundError:
            return None
        path = next((Path(f.locate()) for f in files if str(f) == MODULE), None)
        if path is None:
            return None
    if path.is_dir():
        path = next(path.rglob(Path(MODULE).name))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            path = Path(wheel.extract(MODULE, tempfile.mkdtemp()))
    spec = importlib.util.spec_from_file_location("incumbent", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scales(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.integers(112, 122, shape, dtype=np.uint8)


def cases(rows: int, columns: int, mb: ModuleType | None) -> dict[str, tuple[Callable, Callable | None]]:
    """Name -> (ours, the incumbent's), each a call without arguments."""
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    packed_scale = scales(rng, mxfp4.scale_shape(rows, columns))
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x38
    block_scale = scales(rng, fp8.scale_shape(rows, columns))
    float_scale = np.ldexp(rng.uniform(1, 2, block_scale.shape), block_scale.astype(int) - 127)
    float_scale = float_scale.astype(np.float32)

    out = np.zeros((rows, columns), np.uint16)
    from_mxfp4, from_fp8, from_f32, trained = (np.zeros_like(out) for _ in range(4))
    mxfp4.decode(packed, packed_scale, from_mxfp4)
    fp8.decode(codes, block_scale, from_fp8)
    fp8.decode(codes, float_scale, from_f32)
    gaussian = rng.normal(0, 0.02, trained.shape).astype(np.float32)
    trained[:] = gaussian.view(np.uint32) >> 16
    out_packed, out_packed_scale = np.zeros_like(packed), np.zeros_like(packed_scale)
    out_codes, out_scale, out_float = np.zeros_like(codes), np.zeros_like(block_scale), float_scale.copy()

    def t(array: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if dtype is None else tensor.view(dtype)

    def e8m0(array: np.ndarray) -> torch.Tensor:
        return t(array, torch.float8_e8m0fnu)

    def bf16(array: np.ndarray) -> torch.Tensor:
        return t(array, torch.bfloat16)

    e4m3 = torch.float8_e4m3fn
    ours: dict[str, Callable] = {
        COPY: lambda: np.copyto(out, from_mxfp4),
        "MXFP4 decode": lambda: mxfp4.decode(packed, packed_scale, out),
        "FP8 decode, E8M0": lambda: fp8.decode(codes, block_scale, out),
        "FP8 decode, F32": lambda: fp8.decode(codes, float_scale, out),
        "MXFP4 encode": lambda: mxfp4.encode(from_mxfp4, packed_scale, out_packed, out_packed_scale),
        "MXFP4 encode, trained": lambda: mxfp4.encode(trained, packed_scale, out_packed, out_packed_scale),
        "FP8 encode, E8M0": lambda: fp8.encode(from_fp8, block_scale, out_codes, out_scale),
        "FP8 encode, F32": lambda: fp8.encode(from_f32, float_scale, out_codes, out_float),
        "FP8 encode, E8M0, trained": lambda: fp8.encode(trained, block_scale, out_codes, out_scale),
        "MXFP4 to FP8": lambda: mxfp4_to_fp8(packed, packed_scale, out_codes, out_scale),
    }
    if mb is None:
        return {name: (call, None) for name, call in ours.items()}
    decode4, decode8 = mb.dequantize_mxfp4_e2m1_packed, mb.dequantize_fp8_e4m3fn_with_scale
    encode4, encode8 = mb.quantize_mxfp4_e2m1_like_scale, mb.quantize_fp8_e4m3fn_like_scale
    theirs: dict[str, Callable] = {
        "MXFP4 decode": lambda: decode4(t(packed), e8m0(packed_scale)).bfloat16(),
        "FP8 decode, E8M0": lambda: decode8(t(codes, e4m3), e8m0(block_scale)),
        "FP8 decode, F32": lambda: decode8(t(codes, e4m3), t(float_scale)),
        "MXFP4 encode": lambda: encode4(bf16(from_mxfp4), e8m0(packed_scale)),
        "MXFP4 encode, trained": lambda: encode4(bf16(trained), e8m0(packed_scale)),
        "FP8 encode, E8M0": lambda: encode8(bf16(from_fp8), e8m0(block_scale)),
        "FP8 encode, F32": lambda: encode8(bf16(from_f32), t(float_scale)),
        "FP8 encode, E8M0, trained": lambda: encode8(bf16(trained), e8m0(block_scale)),
        "MXFP4 to FP8": lambda: encode8(decode4(t(packed), e8m0(packed_scale)), e8m0(block_scale)),
    }
    return {name: (call, theirs.get(name)) for name, call in ours.items()}


def measure(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Median seconds of each call; rounds are interleaved, the first (compilation) is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--incumbent", type=Path, help="file, folder or wheel of megatron-bridge")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 4096), metavar=("R", "K"))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, columns = args.shape
    table = cases(rows, columns, load_incumbent(args.incumbent))
    ours = measure({name: call for name, (call, _) in table.items()}, args.rounds)
    theirs = measure({name: call for name, (_, call) in table.items() if call}, max(3, args.rounds // 2))

    size = rows * columns * 2 / 1e9
    results = [
        {
            "operation": name,
            "ms": seconds * 1e3,
            "gb_per_s": size / seconds,
            "of_copy": ours[COPY] / seconds,
            "incumbent_gb_per_s": size / theirs[name] if name in theirs else None,
            "times_incumbent": theirs[name] / seconds if name in theirs else None,
        }
        for name, seconds in ours.items()
    ]
    if args.json:
        print(json.dumps({"shape": [rows, columns], "rounds": args.rounds, "results": results}))
        return
    view = Table(title=f"[{rows}, {columns}], GB/s of bf16 bytes, one thread")
    for heading in ("operation", "ms", "GB/s", "of copy", "incumbent", "times"):
        view.add_column(heading, justify="left" if heading == "operation" else "right", no_wrap=True)
    for row in results:
        old, times = row["incumbent_gb_per_s"], row["times_incumbent"]
        view.add_row(
            row["operation"],
            f"{row['ms']:.2f}",
            f"{row['gb_per_s']:.2f}",
            f"{row['of_copy']:.2f}",
            f"{old:.3f}" if old else "-",
            f"{times:.0f}" if times else "-",
        )
    Console().print(view)


if __name__ == "__main__":
    main()
