"""The run for a GPU, at tiny sizes on the CPU; and what becomes of units that fail, die or hang."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import gpu

ROOT = Path(__file__).parents[1]


@pytest.mark.megatron
@pytest.mark.hf
@pytest.mark.kernel
def test_a_tiny_run_measures_everything(tmp_path: Path) -> None:
    path = os.pathsep.join(part for part in (str(ROOT / "src"), os.environ.get("PYTHONPATH", "")) if part)
    env = os.environ | {"PYTHONPATH": path, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--tiny", "--minutes", "4"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [unit for unit, row in found.items() if "error" in json.dumps(row)] == []
    assert {"card", "torch", "triton", "megatron-core"} <= set(found["facts"])
    assert all(value > 0 for value in found["ceilings"].values()) and len(found["ceilings"]) == 3
    kernels = {unit.split(":")[2]: row for unit, row in found.items() if unit.startswith("kernel:")}
    assert {"attend, window", "attend, CSA", "choose_blocks", "indexer_loss", "grouped_linear"} <= set(kernels)
    assert {"project", "sinkhorn", "collapse", "expand", "rotate", "inverse_rms", "clamped_swiglu"} <= set(kernels)
    for name, row in kernels.items():
        sides = ("torch",) if name == "grouped_linear" else ("torch", "triton")
        assert all(row[side]["forward ms"] > 0 for side in sides) and row["bytes"] > 0, name
        assert row["both bytes"] > row["bytes"] and ("both ms" in row["torch"]) == (name != "choose_blocks"), name
    layers = {tuple(unit.split(":")[2:]): row for unit, row in found.items() if unit.startswith("layer:")}
    assert len(layers) == 6 and {side for _, side in layers} == {"ours", "transformers"}
    for (_, side), row in layers.items():
        assert row["forward tokens/s"] > 0 and row["both TFLOP/s"] > 0
        assert side != "ours" or (row["dropped"] == 0 and row["fullest expert"] >= 1 and row["planned GB"] > 0)
    assert found["load"]["load GB/s"] > 0 and found["load"]["stream GB/s"] > 0 and len(found["codec"]) == 4
    assert found["generate:ours"]["1 rows tokens/s"] > 0 and found["generate:transformers"]["1 rows tokens/s"] > 0
    assert "| attend, CSA | 36 | both |" in done.stdout and done.stdout == (tmp_path / "gpu.md").read_text()


class Scripted:
    """Stands for the process of units: one of them fails, one poisons the device, one dies, one hangs."""

    started: list[list[str]] = []  # noqa: RUF012
    units = ("facts", "fails", "poisons", "dies", "hangs", "last")

    def __init__(self, args: argparse.Namespace, done: list[str]):
        self.started.append(done)
        self.left = ["units", *(unit for unit in self.units if unit not in done)]
        self.process = self

    def wait(self) -> int:
        return -11

    def next(self, seconds: float) -> dict[str, Any] | None:
        if not self.left or self.left[0] == "dies":
            return None
        if self.left[0] == "hangs":
            raise TimeoutError
        unit = self.left.pop(0)
        row: Any = {"error": "no"} if unit == "fails" else list(self.units) if unit == "units" else {"ms": 1.0}
        return {"unit": unit, "s": 0.1, "found": row, "poisoned": unit == "poisons"}

    def close(self) -> None:
        pass


def test_what_one_unit_does_wrong_is_written_down_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "Worker", Scripted)
    Scripted.started = []
    found: dict[str, Any] = {}
    args = argparse.Namespace(out=tmp_path, tiny=False, only="")
    gpu.run(args, found, time.monotonic() + 60)
    assert list(found) == list(Scripted.units)
    assert found["last"] == found["poisons"] == {"ms": 1.0} and found["fails"] == {"error": "no"}
    assert "ended (-11)" in found["dies"]["error"] and found["hangs"] == {"error": "it took too long"}
    assert [len(done) for done in Scripted.started] == [0, 3, 4, 5]
    assert json.loads((tmp_path / "gpu.json").read_text()) == found
    late: dict[str, Any] = {}
    gpu.run(args, late, time.monotonic() - 1)
    assert "no time" in late["units"]["error"]


def test_the_table_tells_shares_of_the_least_time_and_failures() -> None:
    row = {"flops": 2e12, "both flops": 6e12, "bytes": 4e9, "both bytes": 8e9}
    found = {
        "ceilings": {"copy GB/s": 2000.0, "bf16 TFLOP/s": 500.0},
        "kernel:4096:attend, CSA": row | {"torch": {"forward ms": 40.0}, "triton": {"forward ms": 8.0}},
        "kernel:4096:expand": row | {"torch": {"forward ms": 4.0}, "triton": {"error": "too much shared memory"}},
        "layer:4096:CSA, routed:transformers": {"forward error": "out of memory", "both error": "out of memory"},
    }
    lines = gpu.table(found).splitlines()
    # Products take 2e12 / 500e12 s = 4 ms, bytes 2 ms; 8 ms are half as fast, at 250 TFLOP/s.
    assert "| attend, CSA | 4096 | forward | 4 | 40 | 8 | 5 | 250 | 0.5 | " in lines
    assert any(line.endswith("triton: too much shared memory") and "| 4 | 4 | - |" in line for line in lines)
    assert "| CSA, routed | 4096 | transformers | forward | out of memory |" in lines


def test_a_pack_has_what_the_machine_lacks_and_not_what_it_has() -> None:
    from pack_gpu import THERE, needed

    names = needed("3.12")
    assert {"megatron-core", "fastcrc", "psutil", "typer", "rich", "pytest", "hypothesis", "pluggy"} <= set(names)
    assert not THERE & set(names) and all(version[0].isdigit() for version in names.values())
