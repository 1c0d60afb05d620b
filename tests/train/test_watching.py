"""What a run tells those who watch it: its lines, its log, trackers, logs of ranks, where a step's time goes."""

import gzip
import html
import json
import math
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_trackers import fake_mlflow, fake_wandb
from html_page import Page
from training import QUICK, SMALL, log, make_start, make_text, run
from typer.testing import CliRunner, Result

from dsv4_bridge import BridgeError
from dsv4_bridge.cli.app import app
from dsv4_bridge.cli.show.lines import folded
from dsv4_bridge.train.charts import ticks
from dsv4_bridge.train.log import duration
from dsv4_bridge.train.pace import Left
from dsv4_bridge.train.trackers import Aside

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("watching"))


@pytest.fixture(scope="module")
def text(hf: Path) -> Path:
    return make_text(hf.parent, hf)


@pytest.fixture(scope="module")
def watched(hf: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """Three steps, with everything that a recipe can ask for but the trackers of others."""
    out = tmp_path_factory.mktemp("run") / "run"
    more = ["log.tensorboard=true", "log.ranks=true", "log.profile=2", "log.every=1"]
    return out, train(hf, text, out, "schedule.steps=3", *more, DSV4_WIDTH="60")


def train(hf: Path, text: Path, out: Path, *words: str, **env: str) -> Result:
    args = [
        "train",
        "flash-pretrain",
        *SMALL,
        *QUICK,
        "schedule.warmup=0",
        f"start={hf}",
        f"data.train={text}",
        f"out={out}",
        *words,
    ]
    done = CliRunner().invoke(app, args, catch_exceptions=False, env=env)
    assert done.exit_code == 0, done.output
    return done


# ---------------------------------------------------------------- lines


def test_a_step_says_its_time_memory_and_place_in_the_data(watched: tuple[Path, Result], text: Path) -> None:
    out, done = watched
    lines = done.stdout.splitlines()
    assert all(len(line) <= 60 for line in lines if re.match(r"step \d/|  ", line))
    whole = re.sub(r"\n {4}(?=\S)", "  ", done.stdout)
    steps = re.findall(r"^step (\d)/3  (loss .*)$", whole, re.MULTILINE)
    assert [number for number, _ in steps] == ["1", "2", "3"]
    tokens = np.fromfile(f"{text}.bin", dtype=np.uint16)
    for (_, said), facts in zip(steps, log(out), strict=True):
        shown = dict(part.rsplit(" ", 1) for part in said.split("  "))
        assert {"loss", "grad", "lr", "left", "s/step", "tok/s", "mem GB", "epoch", "mtp", "balance"} <= shown.keys()
        assert float(shown["mem GB"]) == pytest.approx(facts["memory_bytes"] / 1e9, rel=1e-2)
        assert facts["epoch"] == pytest.approx(facts["step"] * 4 * 48 / len(tokens), rel=1e-4)
        assert facts["tokens_per_second"] == pytest.approx(4 * 48 / facts["seconds"])
        assert 0 <= time.time() - facts["time"] < 600 and 1e8 < facts["memory_bytes"] < 1e11
        assert shown["left"] == duration(facts["eta_seconds"])
    assert log(out)[-1]["eta_seconds"] == 0 < log(out)[0]["eta_seconds"]


def test_the_time_left_is_told_from_recent_steps() -> None:
    left = Left(100)
    assert left.after(1, 30.0, 30.0) == 30.0 * 99  # the first step compiles and warms up
    now = 30.0
    for step in range(2, 91):
        now += 2.0 + 8.0 * (step % 10 == 0)  # every tenth saves or validates, too
        told = left.after(step, 2.0, now)
    assert told == pytest.approx(10 * 2.8, rel=0.05)
    assert [duration(s) for s in (0.4, 62, 3661, 200_000)] == ["0:00", "1:02", "1:01:01", "2 d 7 h"]


def test_a_blend_by_weights_has_no_epoch(hf: Path, text: Path, tmp_path: Path) -> None:
    done = train(hf, text, tmp_path / "run", f"data.train=0.3 {text} 0.7 {text}", "schedule.steps=1")
    assert "epoch" not in log(tmp_path / "run")[0] and "  epoch " not in done.stdout
    both = train(hf, text, tmp_path / "both", f"data.train={text} {text}", "schedule.steps=1")
    assert log(tmp_path / "both")[0]["epoch"] < 0.01 and "  epoch " in both.stdout


@pytest.mark.parametrize("width", [20, 45, 80])
def test_a_folded_line_loses_nothing(width: int) -> None:
    line = "step 1/9  loss 6.2125  grad 20.1  lr 0.00027  left 0:12  s/step 2.42  tok/s 53"
    parts = folded(line, width).splitlines()
    assert "  ".join(part.strip() for part in parts) == line and all(len(part) <= width for part in parts)
    assert folded(line, None) == line and folded("no parts in " + "x" * 99, 40).count("\n") == 0


# ---------------------------------------------------------------- trackers


def test_tensorboard_has_the_scalars_and_the_hyperparameters(watched: tuple[Path, Result]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched[0] / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3]
    losses = [line["loss"] for line in log(watched[0])]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    kept = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optimizer.lr" in kept and b"schedule.decay" in kept and b"cosine" in kept


def test_wandb_is_told_every_step_and_goes_on_as_the_same_run(
    hf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_wandb(monkeypatch)
    mlflow = fake_mlflow(monkeypatch)
    words = ["log.wandb=mine", "log.mlflow=theirs", "log.valid_every=2", "log.valid_steps=1"]
    train(hf, text, tmp_path / "run", "schedule.steps=2", *words)
    (begun,) = calls.named("init")
    assert (begun["project"], begun["id"], begun["name"]) == ("mine", None, "run")
    assert begun["config"]["optimizer.lr"] == 2e-3 and begun["config"]["data.train"] == str(text)
    told = calls.named("log")
    assert [facts["step"] for facts in told] == [1, 2, 2] and told[2].keys() == {"step", "valid/loss"}
    assert [facts["train/loss"] for facts in told[:2]] == [line["loss"] for line in log(tmp_path / "run")[:2]]
    assert calls.named("finish") == [0] and ("*", "step") in calls.named("define_metric")
    train(hf, text, tmp_path / "run", "schedule.steps=3", *words)
    assert calls.named("init")[1]["id"] == "abc123" and calls.named("log")[3]["step"] == 3

    assert mlflow.named("create_experiment") == ["theirs"] and mlflow.named("create_run") == [("7", "run")]
    batches = mlflow.named("log_batch")
    params = {p.key: p.value for _, _, said in batches for p in said}
    assert params["optimizer.lr"] == "0.002" and len(params) > 60
    losses = [(m.step, m.value) for _, metrics, _ in batches for m in metrics if m.key == "train/loss"]
    assert losses == [(line["step"], line["loss"]) for line in log(tmp_path / "run") if "loss" in line]
    run_id = "f" * 32
    assert mlflow.named("update_run") == [(run_id, "RUNNING")]
    assert mlflow.named("set_terminated") == [(run_id, "FINISHED")] * 2


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(
    hf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_wandb(monkeypatch, fails=ConnectionError("no route to api.wandb.ai\nand more"))
    done = train(hf, text, tmp_path / "run", "schedule.steps=3", "log.wandb=mine")
    assert done.stdout.count("Weights & Biases failed (no route to api.wandb.ai)") == 1
    assert "and more" not in done.stdout and calls.named("log") == []
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3]


def test_a_slow_tracker_is_not_waited_for() -> None:
    class Slow:
        told: tuple[int, ...] = ()

        def log(self, step: int, facts: Mapping[str, float]) -> None:
            self.told += (step,)
            time.sleep(60)

        def close(self, failed: bool) -> None:
            raise AssertionError

    slow = Slow()
    aside = Aside("it", lambda: slow, patience=0.2)
    began = time.monotonic()
    for step in range(1500):
        aside.log(step, {"loss": 1.0})
    assert len(aside.troubles()) == 1
    aside.close(False)
    assert time.monotonic() - began < 10 and slow.told == (0,)
    assert "did not take the last steps" in aside.troubles()[0]


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(
    hf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv4_bridge.train.trackers.find_spec", lambda name: None)
    words = [f"start={hf}", f"data.train={text}", f"out={tmp_path / 'run'}"]
    with pytest.raises(BridgeError, match=r"log.mlflow=a: mlflow is not installed; pip install .*mlflow"):
        run("flash-pretrain", *words, "log.mlflow=a")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


# ---------------------------------------------------------------- a rank, a step


def test_a_rank_has_a_log_of_its_own(watched: tuple[Path, Result]) -> None:
    told = (watched[0] / "logs/rank-0.log").read_text()
    assert f"rank 0 of 1, process {os.getpid()} on " in told and told.rstrip().endswith(" ended")
    assert len(re.findall(r"^[\d-]+ [\d:]+ step \d: [\d.]+ s, [\d.]+ GB at most on this rank$", told, re.M)) == 3
    assert "step 3/3  loss " in told


def test_the_log_of_a_rank_says_how_it_ended_and_where_it_stands(
    hf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise RuntimeError("a fault of the machine")

    monkeypatch.setattr("dsv4_bridge.train.loop._step", broken)
    words = [f"start={hf}", f"data.train={text}", f"out={tmp_path / 'run'}", "log.ranks=true"]
    with pytest.raises(RuntimeError):
        run("flash-pretrain", *words)
    told = (tmp_path / "run/logs/rank-0.log").read_text()
    assert "RuntimeError: a fault of the machine" in told and "most recent call first" in told
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_step_is_taken_apart(watched: tuple[Path, Result]) -> None:
    out, done = watched
    assert done.stdout.count("taken apart") == 1
    table = (out / "profile/step-2-rank-0.txt").read_text()
    seconds = float(re.findall(r"step 2 of rank 0: ([\d.]+) s", table)[0])
    parts = dict(re.findall(r"^(\w[\w ]+?) +([\d.]+) +-?[\d.]+%$", table, re.MULTILINE))
    assert list(parts) == ["data", "forward and backward", "optimizer", "counts", "the rest"]
    assert sum(map(float, parts.values())) == pytest.approx(seconds, abs=1e-3)
    assert float(parts["forward and backward"]) > seconds / 3
    operations = re.findall(r"^ +([\d.]+) +([\d.]+)% +([\d,]+)  (\S.*)$", table, re.MULTILINE)
    assert len(operations) == 25 and any(name == "aten::mm" for *_, name in operations)
    took = [float(seconds) for seconds, *_ in operations]
    assert took == sorted(took, reverse=True)
    trace = json.loads(gzip.decompress((out / "profile/step-2-rank-0.json.gz").read_bytes()))
    assert any(event.get("name") == "optimizer" for event in trace["traceEvents"])
    assert not list((out / "profile").glob("step-[13]*"))


# ---------------------------------------------------------------- the page of a run


def report(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_the_page_of_a_run_shows_its_curves_recipe_and_commands(watched: tuple[Path, Result], text: Path) -> None:
    out, _ = watched
    done = report(out, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["step"], told["steps"], told["checkpoints"]) == (3, 3, [3])
    assert told["last"]["loss"] == log(out)[-1]["loss"] and told["page"] == str(out / "report.html")
    source = (out / "report.html").read_text()
    page = Page(source)
    assert page.open == [] and page.fetched == [] and "url(" not in source and "@import" not in source
    assert "prefers-color-scheme: dark" in source and "3 of 3: finished" in page.text
    losses = [line["loss"] for line in log(out)]
    curve = page.charts["Loss, nats a token"]
    assert f"from {losses[0]:.4g} to {losses[-1]:.4g}" in curve and "steps 1 to 3" in curve
    assert {"Learning rate", "Norm of the gradients", "Load of experts, over the mean"} <= page.charts.keys()
    assert "optimizer.lr0.002given" in page.text and "optimizer.beta20.95technical report" in page.text
    assert f"train {out}/recipe.yaml schedule.steps=6" in page.text and f"export {out} {out}-hf --like" in page.text
    assert report(out / "iter_0000003").exit_code == 0  # the run is found from its checkpoint


@pytest.mark.parametrize("kind", ["fresh", "released", "megatron"])
def test_what_a_page_proposes_can_be_done(
    kind: str,
    watched: tuple[Path, Result],
    toy_flash: Path,
    toy_megatron: Path,
    tmp_path: Path,
) -> None:
    """The export, as it stands: of fresh weights there is no release, and a Megatron checkpoint is none."""
    start = {"fresh": "", "released": str(toy_flash), "megatron": str(toy_megatron)}[kind]
    shutil.copytree(watched[0] if kind == "fresh" else toy_megatron, tmp_path / "run")
    for name in ("recipe.yaml", "log.jsonl"):
        shutil.copy(watched[0] / name, tmp_path / "run" / name)
    path = tmp_path / "run/recipe.yaml"
    path.write_text(re.sub(r"^start: .*$", f"start: {json.dumps(start)}", path.read_text(), flags=re.MULTILINE))
    done = report(tmp_path / "run", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    (line,) = re.findall(r"dsv4 (export [^<\n]*)", (tmp_path / "page.html").read_text())
    assert ("--like" in line) == (kind == "released")
    done = CliRunner().invoke(app, shlex.split(html.unescape(line)))
    assert done.exit_code == 0, (line, done.exception)
    assert CliRunner().invoke(app, ["inspect", str(tmp_path / "run-hf")]).exit_code == 0


def test_a_page_of_a_run_that_is_under_way(watched: tuple[Path, Result], tmp_path: Path) -> None:
    """Torn lines, numbers that are none, many steps, and values that are HTML."""
    out = tmp_path / "run"
    out.mkdir()
    recipe = (watched[0] / "recipe.yaml").read_text().replace("Pretraining of", "<script>alert(1)</script>")
    (out / "recipe.yaml").write_text(recipe.replace("steps: 3", "steps: 5000"))
    rows = [{"step": n, "loss": math.nan if n == 7 else 5 - n / 1000, "eta_seconds": 4000 - n} for n in range(1, 3001)]
    lines = [json.dumps(row) for row in rows] + ["[]", '{"step": "x"}', '{"step": 3001, "lo']
    (out / "log.jsonl").write_text("\n".join(lines))
    done = report(out, tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    source = (tmp_path / "page.html").read_text()
    page = Page(source)
    assert page.open == [] and "<script" not in source and "<script>alert(1)</script> Flash" in page.text
    assert "step 3,000 of 5,000" in page.text.lower()
    assert list(page.charts) == ["Loss, nats a token"] and "checkpoints" in page.text and "none yet" in page.text
    points = [p.split() for p in re.findall(r'<polyline[^>]* points="([^"]*)"', source)]
    assert [len(p) for p in points] == [300] and "nan" not in source.lower()
    heights = [float(point.partition(",")[2]) for point in points[0]]
    assert heights == sorted(heights)  # a loss that falls


def test_what_is_no_run_has_no_page(watched: tuple[Path, Result], tmp_path: Path) -> None:
    for words, told in (
        ((tmp_path,), "name the folder that `dsv4 train` had as out="),
        ((watched[0], tmp_path), "is a folder; name a file in it"),
        ((watched[0], watched[0] / "recipe.yaml"), "recipe.yaml is no page of this command"),
    ):
        done = report(*words)
        assert isinstance(done.exception, BridgeError) and told in str(done.exception)
    (tmp_path / "log.jsonl").write_text('{"st')
    (tmp_path / "recipe.yaml").write_text("name: a\nbase: flash-pretrain\n")
    assert "has no step yet" in str(report(tmp_path).exception)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (1.7, 8.9), (-3e-5, 2e-4), (61.4e9, 61.405e9), (5.0, 5.0), (0.0, 0.0), (1e-12, 3e12)]
)
def test_marks_of_an_axis_are_round_and_differ(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 8 and marks[0] <= low <= high <= marks[-1] and marks == sorted(set(marks))
    assert len({f"{mark:.3g}" for mark in marks}) == len(marks)
