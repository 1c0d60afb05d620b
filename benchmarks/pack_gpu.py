"""Pack what a bare GPU machine needs to test and measure this package: one that has torch, transformers, triton and
numba, and no package index.

    python benchmarks/pack_gpu.py [--into build/gpu] [--python 3.12]

Into the folder go this tree's source, tests and benchmarks, and the wheels of what it needs beside those four, in the
versions that are installed here; some 10 MB. `run_gpu.py` of the folder runs them, there or here.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# What the machine has, and all that these need.
STACK = ("torch", "transformers", "triton", "numba")
THERE = {*STACK, "numpy", "llvmlite", "safetensors", "huggingface-hub", "tokenizers", "pyyaml", "setuptools"}
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST = 64 << 20


def needed(python: str) -> dict[str, str]:
    """Name -> version of every distribution to take along."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    todo = [*project["dependencies"], *extras["megatron"], *extras["test"]]
    found: dict[str, str] = {}
    while todo:
        requirement = Requirement(todo.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in THERE or name in found or not wanted(requirement, python):
            continue
        installed = metadata.distribution(name)
        found[name] = installed.version
        todo += list(installed.requires or ())
    return found


def wanted(requirement: Requirement, python: str) -> bool:
    where = {"python_version": python, "sys_platform": "linux", "extra": ""}
    return requirement.marker is None or requirement.marker.evaluate(where)


def download(names: dict[str, str], into: Path, python: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--python-version", python, "--dest", str(into)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(command + [f"{name}=={version}" for name, version in names.items()], check=True)


def copied(into: Path) -> Iterator[Path]:
    """Source, tests and benchmarks."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".hypothesis", ".pytest_cache")
    for name in ("src", "tests", "benchmarks", "docs"):
        yield Path(shutil.copytree(ROOT / name, into / name, ignore=ignore))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        yield Path(shutil.copy2(ROOT / name, into / name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--python", default="{}.{}".format(*sys.version_info), help="version on that machine")
    args = parser.parse_args()
    shutil.rmtree(args.into, ignore_errors=True)
    wheels, tree = args.into / "wheels", args.into / "tree"
    wheels.mkdir(parents=True)
    tree.mkdir()
    download(needed(args.python), wheels, args.python)
    list(copied(tree))
    shutil.copy2(ROOT / "benchmarks" / "run_gpu.py", args.into)
    size = sum(p.stat().st_size for p in args.into.rglob("*") if p.is_file())
    if size > MOST:
        sys.exit(f"{args.into} has {size / 2**20:.0f} MiB, expected {MOST >> 20} at most")
    print(
        f"{args.into}: {size / 2**20:.1f} MiB, {len(list(wheels.iterdir()))} wheels. On a machine with a GPU, torch, "
        f"transformers, triton and numba:\n\n    OUT=results python {args.into}/run_gpu.py"
    )


if __name__ == "__main__":
    main()
