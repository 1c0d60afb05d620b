"""Install a wheel in clean environments and use it there: bytes come back, as this user and as nobody.

python .ci/try_wheel.py WHEEL [EXTRAS ...] [--beside VENV]

EXTRAS are `none` or names with commas, an environment each. --beside takes the dependencies from another environment,
where there is no network; the wheel alone is then installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("dsv4_bridge/py.typed", "dsv4_bridge/__init__.py", "dsv4_bridge/cli/__init__.py")
FOREIGN = ("tests/", "benchmarks/", "docs/", "examples/")
NOBODY = 65534


def main() -> None:
    """Try each set of extras."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=lambda path: Path(path).resolve())  # for commands run elsewhere
    parser.add_argument("extras", nargs="*", default=["none"])
    parser.add_argument("--beside", type=Path)
    args = parser.parse_args()
    check_files(args.wheel)
    for extras in args.extras:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)
            began = time.monotonic()
            python = install(args.wheel, extras, Path(folder), args.beside)
            print(f"{extras}: installed in {time.monotonic() - began:.0f} s", flush=True)
            use(python, extras, Path(folder), args.beside is None)


def check_files(wheel: Path) -> None:
    """The package whole, and nothing else."""
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    files = (path for path in (source / "dsv4_bridge").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    expected = {str(path.relative_to(source)) for path in files}
    packed = {name for name in names if ".dist-info/" not in name}
    if packed != expected or not set(NEEDED) <= names or any(name.startswith(FOREIGN) for name in names):
        sys.exit(f"{wheel}: not packed {sorted(expected - packed)[:5]}; too much {sorted(packed - expected)[:5]}")
    print(f"{wheel.name}: {len(packed)} files of the package, {wheel.stat().st_size:,} bytes")


def install(wheel: Path, extras: str, folder: Path, beside: Path | None) -> Path:
    """An environment of its own with the wheel; its interpreter."""
    venv = folder / "venv"
    run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    wanted = str(wheel) if extras == "none" else f"{wheel}[{extras}]"
    if beside is None:
        run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wanted)
        return python
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    there = next((beside / "lib").glob("python3*/site-packages")).resolve()
    here = next((venv / "lib").glob("python3*/site-packages"))
    mine = ("dsv4_bridge", "__editable__", "pip")  # the package, and a path file that names its source
    for path in there.iterdir():
        if not path.name.startswith(mine) and path.suffix != ".pth" and not (here / path.name).exists():
            (here / path.name).symlink_to(path)
    return python


def use(python: Path, extras: str, folder: Path, alone: bool) -> None:
    """Make, import, export and verify a checkpoint, as this user and, where that can be, as nobody."""
    dsv4 = python.with_name("dsv4")
    inside = run(python, "-c", "import dsv4_bridge; print(dsv4_bridge.__file__)").strip()
    if not inside.startswith(str(folder)):
        sys.exit(f"{inside} was used, not the wheel")
    journey(folder / "mine", [dsv4], extras, {})
    if extras == "none" and alone:
        lacks(dsv4, folder / "mine-megatron")
    setpriv = shutil.which("setpriv")
    if os.geteuid() or not setpriv:
        print(f"{extras}: not tried as another user, which takes root and setpriv")
        return
    run("chmod", "-R", "a+rX,a-w", folder / "venv")
    work = folder / "other"
    work.mkdir()
    (work / "tmp").mkdir()
    for path in (work, work / "tmp"):
        os.chown(path, NOBODY, NOBODY)
    # Reading what lies below root's own home, as an interpreter may; writing nothing.
    rights = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    other = [setpriv, "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", *rights, dsv4]
    env = {"HOME": None, "TMPDIR": str(work / "tmp"), "HF_HUB_OFFLINE": "1", "NUMBA_CACHE_DIR": None}
    journey(work / "run", other, f"{extras}, as nobody, read-only, no home, offline", env)


def lacks(dsv4: Path, megatron: Path) -> None:
    """Without extras, what needs one names it."""
    said = run(dsv4, "generate", megatron, "--prompt-ids", "1", code=2).strip()
    if "pip install" not in said or "Traceback" in said:
        sys.exit(f"generate without extras says {said}")
    print(f"none: {said}")


def journey(folder: Path, dsv4: Sequence[object], what: str, env: dict[str, str | None]) -> None:
    """From nothing to a verified copy."""
    began = time.monotonic()
    toy, megatron, back = (f"{folder}-{name}" for name in ("toy", "megatron", "back"))
    print(f"{what}: {run(*dsv4, '--version', env=env).strip()}")
    run(*dsv4, "toy", toy, env=env)
    run(*dsv4, "import", toy, megatron, env=env)
    run(*dsv4, "export", megatron, back, "--like", toy, env=env)
    said = run(*dsv4, "verify", toy, back, "--level", "bytes", env=env).strip().splitlines()
    print(f"{what}: {said[-1]}")
    if "megatron" in what.split(",") and "hf" in what:
        print(
            f"{what}: {run(*dsv4, 'generate', megatron, '--prompt', 'a', '--max-new-tokens', '2', env=env).strip()!r}"
        )
    print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)


def run(*command: object, env: dict[str, str | None] | None = None, code: int = 0) -> str:
    """Standard output of a command that must end with `code`; standard error where that is not 0."""
    merged = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | (env or {})
    set_ones = {k: v for k, v in merged.items() if v is not None}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=set_ones, cwd="/", check=False)
    if done.returncode != code:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stderr if code else done.stdout


main()
