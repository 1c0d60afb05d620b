"""Import and export of a real-shaped Flash layer: speed against the machine's floors and the
incumbent's path, and peak memory, in one run.

    python benchmarks/layer.py [--experts 256] [--rounds 3] [--folder DIR] [--incumbent PATH] [--json]

Every measurement is a process of its own, in turn, so that the figures share the weather of the
disk. Inputs are cold (their pages dropped), but for "import, warm". `import` is compared with
writing the same number of bytes sequentially past the page cache; `export --like` with reading the
same input and writing the same output at once, without arithmetic. The incumbent's path is: open
with safetensors, dequantise with megatron-bridge's functions, save with
torch.distributed.checkpoint; it runs on `--incumbent-experts` experts, as it holds its whole output
in memory.
"""

import argparse
import json
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

BLOCK = 8 << 20


def drop_cache(*folders: Path) -> None:
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def make_layer(folder: Path, experts: int, layers: int = 1) -> None:
    from dsv4_bridge.spec.spec import replace_spec
    from dsv4_bridge.spec.variants import VARIANTS
    from dsv4_bridge.toy.checkpoint import make_toy

    spec = replace_spec(
        VARIANTS["Flash"].spec.without_draft(),
        num_hidden_layers=layers,
        num_hash_layers=0,
        compress_ratios=(4,) * layers,
        vocab_size=1280,
        n_routed_experts=experts,
    )
    make_toy(folder, "Flash", 0, spec=spec, payload="random")


# ---------------------------------------------------------------- what a child process does


def write_floor(nbytes: int, path: Path) -> None:
    buffer = mmap.mmap(-1, BLOCK)
    buffer[:] = os.urandom(BLOCK)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    for at in range(0, nbytes, BLOCK):
        os.pwrite(fd, buffer, at)
    os.fsync(fd)
    os.close(fd)


def copy_floor(source: Path, nbytes: int, path: Path) -> None:
    writer = threading.Thread(target=write_floor, args=(nbytes, path))
    writer.start()
    buffer = mmap.mmap(-1, BLOCK)
    for file in sorted(source.rglob("*.distcp")):
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
        size = os.fstat(fd).st_size
        for at in range(0, size, BLOCK):
            os.preadv(fd, [buffer], at)
        os.close(fd)
    writer.join()


def incumbent_import(source: Path, out: Path, module: Path) -> None:
    from codecs import load_incumbent  # type: ignore[attr-defined]

    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors import safe_open

    torch.set_num_threads(1)
    functions = load_incumbent(module)
    state = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
            for name in sorted(names):
                if name.endswith(".scale"):
                    continue
                scale = name.removesuffix(".weight") + ".scale"
                tensors = {n: opened.get_tensor(n) for n in (name, scale) if n in names}
                state[name] = functions.maybe_dequantize_hf_quantized_weight(name, tensors)
    dcp.save(state, checkpoint_id=out, no_dist=True)


def peak_mib() -> float:
    """Peak resident memory of this process (ru_maxrss would count its parent's before the exec)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def child(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    folder = args.folder
    if args.child.startswith("import"):
        from dsv4_bridge import import_hf

        import_hf(folder / "hf", folder / "megatron")
    elif args.child == "export":
        from dsv4_bridge import export_hf

        export_hf(folder / "megatron", folder / "back", folder / "hf")
    elif args.child == "write floor":
        write_floor(args.nbytes, folder / "floor")
    elif args.child == "copy floor":
        copy_floor(folder / "megatron", args.nbytes, folder / "floor")
    elif args.child == "incumbent":
        import importlib.util

        spec = importlib.util.spec_from_file_location("codecs", Path(__file__).with_name("codecs.py"))
        assert spec and spec.loader
        sys.modules["codecs"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["codecs"])
        incumbent_import(folder / "small", folder / "theirs", args.incumbent)
    else:
        import torch  # noqa: F401
    seconds = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"seconds": seconds, "mib": peak_mib(), "cpu": usage.ru_utime + usage.ru_stime}))


def run(name: str, folder: Path, nbytes: int = 0, incumbent: Path | None = None) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, "--folder", folder, "--nbytes", nbytes]
    command += ["--incumbent", incumbent] if incumbent else []
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


# ---------------------------------------------------------------- the run


def one_round(folder: Path, incumbent: Path | None, found: dict[str, list[dict[str, float]]]) -> None:
    def record(name: str, nbytes: int, **extra: object) -> None:
        found.setdefault(name, []).append(run(name, folder, nbytes, **extra) | {"nbytes": nbytes})  # type: ignore[arg-type]

    for name in ("import, warm", "import, cold"):
        shutil.rmtree(folder / "megatron", ignore_errors=True)
        drop_cache(folder / "hf")
        if name.endswith("warm"):
            for path in (folder / "hf").iterdir():
                with path.open("rb") as file:
                    while file.read(BLOCK):
                        pass
        record(name, 0)
        written = size_of(folder / "megatron")
        found[name][-1]["nbytes"] = written
    record("write floor", written)
    (folder / "floor").unlink()
    drop_cache(folder)
    shutil.rmtree(folder / "back", ignore_errors=True)
    record("export", written)
    back = size_of(folder / "back")
    drop_cache(folder)
    record("copy floor", back)
    found["copy floor"][-1]["nbytes"] = written
    (folder / "floor").unlink()
    if incumbent:
        shutil.rmtree(folder / "theirs", ignore_errors=True)
        drop_cache(folder / "small")
        record("incumbent", 0, incumbent=incumbent)
        found["incumbent"][-1]["nbytes"] = size_of(folder / "theirs")
    record("torch", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--incumbent-experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--incumbent", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child")
    parser.add_argument("--nbytes", type=int, default=0)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="dsv4-bench-") as name:
        folder = Path(name)
        make_layer(folder / "hf", args.experts, args.layers)
        if args.incumbent:
            make_layer(folder / "small", args.incumbent_experts)
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            one_round(folder, args.incumbent, found)
        report(found, args)


def report(found: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    middle = {
        name: {key: statistics.median(r[key] for r in runs) for key in runs[0]}
        | {"rate": statistics.median(r["nbytes"] / r["seconds"] / 1e9 for r in runs)}
        for name, runs in found.items()
    }
    floors = {
        "import, warm": "write floor",
        "import, cold": "write floor",
        "export": "copy floor",
        "incumbent": "write floor",
    }
    for name, floor in floors.items():
        if name in found:
            pairs = zip(found[name], found[floor], strict=True)
            ratios = [(a["nbytes"] / a["seconds"]) / (b["nbytes"] / b["seconds"]) for a, b in pairs]
            middle[name]["of_floor"] = statistics.median(ratios)
    if args.json:
        print(json.dumps(middle))
        return
    table = Table(title=f"{args.layers} Flash layer(s), {args.experts} experts; medians of {args.rounds} rounds")
    for column in ("what", "bf16 GB", "seconds", "GB/s", "of its floor", "CPU s", "peak MiB", "above torch"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, m in middle.items():
        floor = f"{m['of_floor']:.2f}" if "of_floor" in m else ""
        above = f"{m['mib'] - middle['torch']['mib']:.0f}"
        cells = (f"{m['nbytes'] / 1e9:.2f}", f"{m['seconds']:.1f}", f"{m['rate']:.2f}", floor, f"{m['cpu']:.1f}")
        table.add_row(name, *cells, f"{m['mib']:.0f}", above)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
