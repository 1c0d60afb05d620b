"""Test and measure on a machine that has a GPU, torch, transformers, triton and numba, and nothing else.

    python run_gpu.py [--out DIR] [--tests-minutes 5] [--minutes 8] [--only WORD] [--tiny] [TEST…]

It lies in the folder that `pack_gpu.py` made. Wheels are unpacked into a temporary folder, which Python finds in front
of what is installed; nothing is installed, and no index is asked. First the tests of kernels, compiled, and those that
need a GPU; then `benchmarks/gpu.py`; 0 minutes leave either out. Everything goes to DIR ($OUT, or `.`): `tests.txt`,
`tests.xml`, `gpu.json`, `gpu.md`, `gpu.log`. The last line says whether all went well, and the exit status too.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = ("tests/mcore", "tests/codec/test_tensors.py", "tests/test_compile_kernels.py")


def unpack(wheels: Path, into: Path) -> None:
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    for folder in into.glob("*.data/*lib"):  # what a wheel has beside its packages
        for path in folder.iterdir():
            path.rename(into / path.name)


def bounded(command: list[str], seconds: float, out: Path, env: dict[str, str], cwd: Path) -> int:
    """Run, what it says to a file, and the end of it on; the status: 0 for no time at all, 124 for too little."""
    if seconds <= 0:
        return 0
    with out.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=cwd, process_group=0)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = 124
    print(out.read_text()[-6000:], flush=True)
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--tests-minutes", type=float, default=5, help="for the tests at most")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", default="", help="units of gpu.py with this word")
    parser.add_argument("--tiny", action="store_true", help="on a CPU: does all this run?")
    parser.add_argument("tests", nargs="*", default=TESTS)
    args = parser.parse_args()
    out, tree = args.out.resolve(), HERE / "tree"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dsv4-gpu-") as name:
        site = Path(name) / "site"
        unpack(HERE / "wheels", site)
        path = [str(tree / "src"), str(site), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in path if p), "PYTHONDONTWRITEBYTECODE": "1"}
        env |= {"TRITON_CACHE_DIR": str(Path(name) / "triton"), "NUMBA_CACHE_DIR": str(Path(name) / "numba")}
        # Compiled kernels and GPU tests; a module that wants more than this machine has is not collected.
        words = ["-m", "pytest", "-q", "-m", "gpu or kernel", "-p", "no:cacheprovider", "--durations=15"]
        words += ["--continue-on-collection-errors", f"--junitxml={out / 'tests.xml'}"]
        began = time.monotonic()
        tested = bounded([sys.executable, *words, *args.tests], 60 * args.tests_minutes, out / "tests.txt", env, tree)
        print(f"tests: status {tested}, {time.monotonic() - began:.0f} s", flush=True)
        words = ["benchmarks/gpu.py", "--out", str(out), "--minutes", str(args.minutes), "--only", args.only]
        words += ["--tiny"] if args.tiny else []
        seconds = 60 * args.minutes + 60 if args.minutes else 0
        measured = bounded([sys.executable, *words], seconds, out / "gpu.txt", env, tree)
    print(f"tests: status {tested}; measuring: status {measured}; all of it in {out}")
    sys.exit(tested or measured)


if __name__ == "__main__":
    main()
