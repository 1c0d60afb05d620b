"""A run among others: signals to its group, what a kill leaves, and folders that are not its own."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import QUICK, SMALL, make_start, make_text, run
from warm import Warm

from dsv4_bridge import BridgeError, make_toy
from dsv4_bridge.lock import hold
from dsv4_bridge.store.torch_dist.reader import last_iteration

pytestmark = pytest.mark.megatron

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("stopping"))


@pytest.fixture(scope="module")
def text(hf: Path) -> Path:
    return make_text(hf.parent, hf)


def start(out: Path, hf: Path, text: Path, *words: str) -> Warm:
    """`dsv4 train` as the leader of a process group."""
    command = ["-m", "dsv4_bridge", "train", "flash-pretrain", *SMALL, *QUICK, f"start={hf}", f"out={out}"]
    command += [f"data.train={text}", "schedule.steps=100000", *words]
    return Warm(*command, out=out.with_name(f"{out.name}.said"), new_session=True)


def wait_for_save(process: Warm, out: Path, behind: int) -> None:
    for _ in range(6000):
        if saved(out) > behind:
            return
        assert process.poll() is None, out.with_name(f"{out.name}.said").read_text()[-2000:]
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint behind {behind} came")


def saved(out: Path) -> int:
    return int((out / TRACKER).read_text()) if (out / TRACKER).exists() else 0


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_signal_to_the_group_saves(background: str, hf: Path, text: Path, tmp_path: Path) -> None:
    """As `timeout`, Slurm and a terminal send it; at any moment behind the first save."""
    out, rng = tmp_path / "run", random.Random(len(background))
    for number in (signal.SIGTERM, signal.SIGINT):
        before = saved(out)
        process = start(out, hf, text, "checkpoint.save_every=2", f"checkpoint.background={background}")
        wait_for_save(process, out, before)
        time.sleep(rng.random() * 0.6)
        os.killpg(process.pid, number)
        assert process.wait(timeout=120) == 0
        said = (tmp_path / "run.said").read_text()
        assert "asked to stop: step" in said and number.name in said, said[-2000:]
        assert "Traceback" not in said and "Error" not in said
        steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, saved(out) + 1))  # every step that was made is saved
        assert not list(out.glob("*.part")) and saved(out) > before


def test_a_second_run_in_the_same_folder_is_refused(hf: Path, text: Path, tmp_path: Path) -> None:
    words = [f"start={hf}", f"out={tmp_path / 'run'}", f"data.train={text}", "schedule.steps=2", "schedule.warmup=1"]
    words += QUICK
    with (
        hold(tmp_path / "run", "something else"),
        pytest.raises(BridgeError, match=f"another run is writing .*process {os.getpid()}"),
    ):
        run("flash-pretrain", *words)
    assert not (tmp_path / "run").exists()
    run("flash-pretrain", *words)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_what_a_kill_leaves_is_understood(hf: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [f"start={hf}", f"out={out}", f"data.train={text}", "schedule.warmup=1", "checkpoint.save_every=1", *QUICK]
    whole = run("flash-pretrain", *words, "schedule.steps=4", "checkpoint.keep=9")
    younger = time.time() + 5

    def tracker(number: int | None, *, set_back: bool) -> None:
        (out / TRACKER).unlink(missing_ok=True)
        if number is not None:
            (out / TRACKER).write_text(str(number))
            os.utime(out / TRACKER, (younger, younger) if set_back else (0, 0))

    # Killed between the name of the fourth and the tracker; then: before there was a tracker at all.
    for number in (3, None):
        tracker(number, set_back=False)
        assert last_iteration(out) == out / "iter_0000004"
        went = run("flash-pretrain", *words, "schedule.steps=4", "checkpoint.keep=9")
        assert went.losses == [] and went.state.step == 4
    # Set back by hand: it goes on from there, and replaces what came behind.
    tracker(2, set_back=True)
    shutil.copytree(out / "iter_0000003", out / "iter_0000004.part")
    (tmp_path / "before").hardlink_to(out / "iter_0000003" / ".metadata")  # held, so that no other file gets its number
    went = run("flash-pretrain", *words, "schedule.steps=4", "checkpoint.keep=9")
    assert went.losses == whole.losses[2:]
    assert not (tmp_path / "before").samefile(out / "iter_0000003" / ".metadata")
    assert saved(out) == 4 and not list(out.glob("*.part"))


@pytest.mark.parametrize("step", ["true", "4.5", "-1", '"3"', "null", "1e400", "9" * 30])
def test_a_state_that_says_no_numbers_is_refused(
    step: str, hf: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.getbasetemp() / "stopping-state"
    words = [f"start={hf}", f"out={out}", f"data.train={text}", "schedule.warmup=1", *QUICK]
    if not out.exists():
        run("flash-pretrain", *words, "schedule.steps=2")
    path = out / "iter_0000002" / "training.json"
    path.write_text(f'{{"step": {step}, "rows": 8, "tokens": 64}}')
    with pytest.raises(BridgeError, match=r"steps, rows and tokens as whole numbers|training\.json"):
        run("flash-pretrain", *words, "schedule.steps=3")


def test_an_output_that_is_something_else_is_refused(
    hf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(out: Path, message: str) -> None:
        before = sorted(out.iterdir()) if out.is_dir() else None
        with pytest.raises(BridgeError, match=message):
            run("flash-pretrain", f"start={hf}", f"out={out}", f"data.train={text}", "schedule.steps=4")
        assert (sorted(out.iterdir()) if out.is_dir() else None) == before

    other = make_toy(tmp_path / "other", "Flash", 5)
    refused(other, r"holds another checkpoint \(config\.json\)")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is no folder")
    refused(tmp_path / "file" / "below", "cannot be written")
    usage = shutil.disk_usage(tmp_path)._replace(free=66_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(tmp_path / "small", r"checkpoint\.keep=\d+.*MB more and 67\.1 MB to spare, and 66\.0 MB are free")


FLAT = """
import sys
from pathlib import Path
from dsv4_bridge import mcore
from dsv4_bridge.store.hf import open_hf
print("once")
model = mcore.build_model(open_hf(Path(sys.argv[1])).spec)
mcore.load_weights(model, sys.argv[1])
print(mcore.save_checkpoint(model, sys.argv[2], 1).name)
"""


def test_a_flat_script_can_save(hf: Path, tmp_path: Path) -> None:
    """Without a `__main__` guard: nothing may start it again."""
    (tmp_path / "flat.py").write_text(FLAT)
    command = [sys.executable, "-W", "ignore", tmp_path / "flat.py", hf, tmp_path / "saved"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "once\niter_0000001\n"), done.stderr[-2000:]
    assert last_iteration(tmp_path / "saved") == tmp_path / "saved" / "iter_0000001"
