"""Kernels compile for a GPU that is not there: what each takes is told, and what does not compile too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.megatron
@pytest.mark.kernel
def test_a_launch_is_compiled_for_hopper_and_a_broken_one_is_told() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT / "src"), str(ROOT / "tests" / "tools"), str(ROOT / "benchmarks"), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    words = ["--targets", "90", "--types", "float32", "--only", "small_triton", "--more", "small_triton", "--json"]
    script = ROOT / "benchmarks" / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *words], env=env, capture_output=True, text=True, check=False
    )
    rows = json.loads(done.stdout)
    assert done.returncode == 1 and "1 that fail" in done.stderr
    assert [row["kernel"] for row in rows] == ["_gram", "_gram", "_broken"], done.stderr
    for row in rows[:2]:
        assert 0 < row["registers"] <= 255 and row["stack"] == 0 and row["warps"] == 4 and row["shared"] > 0
    assert "error" in rows[2] and "shared" not in rows[2]
