"""The loop at one rank: what it learns, and that a stopped run goes on as if nothing had happened."""

import math
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training import QUICK, SMALL, TIMED, contents, log, make_start, make_text, recipe, run, small_spec, unigram_entropy
from warm import Warm

from dsv4_bridge import BridgeError
from dsv4_bridge.planning.ranks import GIB
from dsv4_bridge.planning.search import USABLE
from dsv4_bridge.train import build as setup
from dsv4_bridge.train import loop
from dsv4_bridge.train.build import check_layout
from dsv4_bridge.train.choose import change, choose, load
from dsv4_bridge.train.plan import plan_recipe, recipe_spec
from dsv4_bridge.train.recipes import RECIPES

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def text(hf: Path) -> Path:
    return make_text(hf.parent, hf)


# ---------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash-pretrain", "flash-pretrain-muon"])
def test_fresh_weights_learn_more_than_frequencies(name: str, text: Path, tmp_path: Path) -> None:
    words = ["schedule.steps=40", "batch.size=8", "batch.micro=8", "log.valid_every=40", "log.valid_steps=4"]
    chosen = recipe(name, f"out={tmp_path / 'run'}", f"data.train={text}", *words, "optimizer.lr=4e-3")
    outcome = loop.train(chosen, small_spec(), 1, lambda _: None)
    assert outcome.losses[0] == pytest.approx(math.log(512), rel=0.05)  # nothing known: all tokens alike
    assert outcome.valid_losses[40] < unigram_entropy(text)


# ---------------------------------------------------------------- stop and go on


class _Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flash-pretrain", ["model.dtype=bf16"]),
        pytest.param("flash-pretrain", ["optimizer.distributed=false"], marks=pytest.mark.slow),
        pytest.param("flash-pretrain-muon", ["model.dtype=bf16", "batch.ramp=0:2 4:4"], marks=pytest.mark.slow),
        ("flash-lora", ["data.kind=text", "lora.rank=4", "lora.dropout=0.3"]),
    ],
)
def test_a_run_that_stopped_goes_on_bit_for_bit(
    name: str, words: list[str], hf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = [f"start={hf}", f"data.train={text}", *words]
    whole = run(name, f"out={tmp_path / 'whole'}", *common)
    step = loop._step

    def killed(trainer: object, feed: object, state: loop.State, size: int) -> dict[str, float]:
        if state.step == 4:  # one step behind its last checkpoint
            raise _Killed
        return step(trainer, feed, state, size)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(loop, "_step", killed)
        run(name, f"out={tmp_path / 'parts'}", *common, "checkpoint.save_every=3", "schedule.steps=6")
    assert [line["step"] for line in log(tmp_path / "parts")] == [1, 2, 3, 4]
    assert (tmp_path / "parts" / "latest_checkpointed_iteration.txt").read_text().strip() == "3"
    again = run(name, f"out={tmp_path / 'parts'}", *common)
    assert len(whole.losses) == 6 and again.losses == whole.losses[3:]
    assert contents(tmp_path / "whole" / "iter_0000006") == contents(tmp_path / "parts" / "iter_0000006")
    assert [line["step"] for line in log(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    differing = {
        k for a, b in zip(log(tmp_path / "whole"), log(tmp_path / "parts"), strict=True) for k in a if a[k] != b[k]
    }
    assert differing <= TIMED


def test_the_last_few_checkpoints_stay(hf: Path, text: Path, tmp_path: Path) -> None:
    words = ["schedule.steps=5", "checkpoint.save_every=1", "checkpoint.keep=2", "checkpoint.background=true", *QUICK]
    outcome = run("flash-pretrain", f"start={hf}", f"out={tmp_path / 'run'}", f"data.train={text}", *words)
    assert sorted(p.name for p in (tmp_path / "run").glob("iter_*")) == ["iter_0000004", "iter_0000005"]
    assert outcome.checkpoint == tmp_path / "run" / "iter_0000005"
    assert load(tmp_path / "run" / "iter_0000005" / "recipe.yaml").recipe.schedule.steps == 5


@pytest.mark.parametrize("name", ["flash-pretrain", "flash-pretrain-muon"])
def test_what_the_background_writes_is_of_its_step(name: str, hf: Path, text: Path, tmp_path: Path) -> None:
    """Training goes on meanwhile, and changes in place what is being written."""
    words = [
        f"start={hf}",
        f"data.train={text}",
        "schedule.steps=3",
        "checkpoint.save_every=1",
        "checkpoint.keep=9",
        *QUICK,
    ]
    for kind in ("true", "false"):
        run(name, *words, f"out={tmp_path / kind}", f"checkpoint.background={kind}")
    for step in (1, 2, 3):
        folder = f"iter_{step:07d}"
        assert contents(tmp_path / "true" / folder) == contents(tmp_path / "false" / folder), step


LIMITED = """
import resource
import sys
from dsv4_bridge.cli import main
largest = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
main()
"""


def _start(out: Path, hf: Path, text: Path, *words: str, largest: int = -1) -> Warm:
    """`dsv4 train`, which can write files of `largest` bytes."""
    command = ["-c", LIMITED, largest, "train", "flash-pretrain", *SMALL, f"start={hf}", f"out={out}"]
    return Warm(*command, f"data.train={text}", *words, out=out.parent / "said.txt")


def _wait_for_step(out: Path, step: int, process: Warm) -> int:
    """The step that the log has reached, `step` or later."""
    for _ in range(6000):
        reached = [line["step"] for line in log(out)] if (out / "log.jsonl").exists() else []
        if reached and reached[-1] >= step:
            return reached[-1]
        assert process.poll() is None, (out.parent / "said.txt").read_text()[-3000:]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def test_what_cannot_be_saved_leaves_what_was(hf: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    same = [f"start={hf}", f"out={out}", f"data.train={text}", *QUICK]
    run("flash-pretrain", *same, "schedule.steps=2", "schedule.warmup=1")
    words = [*QUICK, "schedule.steps=4", "checkpoint.background=true"]
    assert _start(out, hf, text, *words, largest=1_024_000).wait(timeout=120) == 2
    said = (tmp_path / "said.txt").read_text()
    assert "dsv4: saving a checkpoint in" in said and "GB are free there" in said and "Traceback" not in said
    assert sorted(p.name for p in out.glob("iter_*")) == ["iter_0000002", "iter_0000004.part"]
    went = run("flash-pretrain", *same, "schedule.steps=3")
    assert len(went.losses) == 1 and not list(out.glob("*.part"))


@pytest.mark.slow
def test_sigterm_saves_and_sigkill_leaves_the_last_good_checkpoint(hf: Path, text: Path, tmp_path: Path) -> None:
    out, rng, kept = tmp_path / "run", random.Random(5), 0
    for blow in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = _start(out, hf, text, "schedule.steps=100000", "checkpoint.save_every=2")
        seen = _wait_for_step(out, kept + rng.randint(3, 6), process)
        time.sleep(rng.random() * 0.3)
        process.send_signal(blow)
        process.wait(timeout=120)
        now = int((out / "latest_checkpointed_iteration.txt").read_text())
        # At most the steps since the last save, and none where there was time to save.
        assert now >= (seen if blow == signal.SIGTERM else seen - 2)
        if blow == signal.SIGTERM:
            assert process.returncode == 0 and "asked to stop" in (tmp_path / "said.txt").read_text()
        assert (out / f"iter_{now:07d}" / ".metadata").exists() and now >= kept
        kept = now
    again = run("flash-pretrain", f"start={hf}", f"out={out}", f"data.train={text}", f"schedule.steps={kept + 1}")
    assert again.state.step == kept + 1 and len(again.losses) == 1


# ---------------------------------------------------------------- what it says and refuses


def test_learning_rate_and_mtp_weight_follow_the_recipe(hf: Path, text: Path, tmp_path: Path) -> None:
    words = [
        "schedule.decay=wsd",
        "schedule.decay_steps=3",
        "losses.mtp=0.3",
        "losses.mtp_late=0.1",
        "schedule.steps=7",
        *QUICK,
    ]
    run("flash-pretrain", f"start={hf}", f"out={tmp_path / 'run'}", f"data.train={text}", *words)
    rates = [line["lr"] for line in log(tmp_path / "run")]
    low, high = 1e-4, 2e-3
    decay = [low + (high - low) * 0.5 * (1 + math.cos(math.pi * k / 3)) for k in (1, 2, 3)]
    assert rates == pytest.approx([high / 2, high, high, high, *decay])


def test_a_leap_of_the_loss_stops_with_what_to_look_at(
    hf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["schedule.steps=14", "checkpoint.save_every=5", "log.spike=2", *QUICK]
    step = loop._step

    def leaping(trainer: object, feed: object, state: loop.State, size: int) -> dict[str, float]:
        facts = step(trainer, feed, state, size)  # type: ignore[arg-type]
        return facts | ({"loss": facts["loss"] + 2.5} if state.step == 12 else {})

    monkeypatch.setattr(loop, "_step", leaping)
    with pytest.raises(BridgeError, match=r"step 13: the loss is .* nats above .*iter_0000010.*rows \[") as error:
        run("flash-pretrain", f"start={hf}", f"out={tmp_path / 'run'}", f"data.train={text}", *words)
    assert "optimizer.lr" in str(error.value)


def test_a_loss_that_is_no_number_stops(hf: Path, text: Path, tmp_path: Path) -> None:
    words = ["schedule.warmup=0", "optimizer.lr=1e30", "optimizer.clip_grad=0"]
    with pytest.raises(BridgeError, match=r"(loss is (nan|inf))|norm is (nan|inf)"):
        run("flash-pretrain", f"start={hf}", f"out={tmp_path / 'run'}", f"data.train={text}", *words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["batch.size=3"], r"no multiple of batch.micro .* Nearest that works: 4"),
        (["parallel.tp=3"], r"over at least 3 ranks \(tp 3\), and this is one process.*torchrun --nproc-per-node 3"),
        (["schedule.warmup=6"], "leaves nothing of schedule.steps 6"),
        (["batch.ramp=0:2 4:8"], "ends elsewhere than at 4"),
        (["data.train="], "data.train is empty"),
        (["data.train=/nowhere/text"], "/nowhere/text"),
        (["start=/nowhere"], "start=/nowhere: no such folder"),
        (["out="], "out is empty"),
        (["data.split=abc"], "split 'abc', expected shares"),
        (["data.split=0,0,0"], "split '0,0,0', expected shares"),
        (["start="], r"a rank takes [\d,]+\.\d GB .* are free"),
        (["data.seq_length=2000000"], "the model takes"),
    ],
)
def test_refused_before_the_first_step(words: list[str], told: str, hf: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=told):
        run("flash-pretrain", f"start={hf}", f"out={tmp_path / 'run'}", f"data.train={text}", *words)
    assert not (tmp_path / "run" / "latest_checkpointed_iteration.txt").exists()


def test_memory_is_of_the_moments_that_there_will_be(
    hf: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrow moments need Transformer Engine, which a CPU has not: room for them is not enough."""
    words = ["model.dtype=bf16", f"start={hf}", f"out={tmp_path / 'run'}", f"data.train={text}", "schedule.steps=1"]
    words += ["schedule.warmup=0", "schedule.decay=constant", "batch.micro=4", "model.kernels=torch"]
    chosen = recipe("flash-pretrain", *words)
    assert chosen.optimizer.moments_dtype == "bf16"
    wide, narrow = (
        plan_recipe(change(chosen, {"optimizer.moments_dtype": dtype}), recipe_spec(chosen)).chosen.plan.stages[0].total
        for dtype in ("float32", "bf16")
    )
    monkeypatch.setattr(setup, "free_memory", lambda: ((wide + narrow) // 2, "memory"))
    with pytest.raises(BridgeError, match=r"of memory are free; .* moments are float32: types below need Transformer"):
        run("flash-pretrain", *words)
    monkeypatch.setattr(setup, "free_memory", lambda: (wide + 1, "memory"))
    assert len(run("flash-pretrain", *words).losses) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["batch.size=2"], r"1 micro-batches a step with 2 chunks .* multiple of pp 2"),
        (["log.valid_every=1", "log.valid_steps=3"], r"log.valid_steps of 3 with 2 chunks .* works: 4"),
        (["batch.ramp=0:2 8:4"], r"batch.ramp of 2 with 2 chunks .* works: 4"),
    ],
)
def test_interleaved_stages_take_micro_batches_in_turn(words: list[str], told: str) -> None:
    chosen = recipe("flash-pretrain", "parallel.pp=2", "parallel.vp=2", *words)
    with pytest.raises(BridgeError, match=told):
        check_layout(chosen, small_spec(layers=4), 2)


@pytest.mark.parametrize(
    ("words", "world", "told"),
    [
        (["data.seq_length=257"], 2, r"257 tokens a row over cp 2 .* Nearest that works: 256"),
        (["data.seq_length=128"], 2, r"128 tokens a row over cp 2 .* Nearest that works: 254"),
        (["data.seq_length=256"], 3, r"3 ranks do not divide into tp\*pp\*cp = 2. Nearest that works: 4 ranks"),
        (["data.seq_length=256"], 1, r"at least 2 ranks \(cp 2\), and this is one process"),
    ],
)
def test_rows_that_ranks_cannot_share(words: list[str], world: int, told: str) -> None:
    with pytest.raises(BridgeError, match=told):
        check_layout(recipe("flash-pretrain", "parallel.cp=2", *words), small_spec(), world)


def test_out_is_a_folder_of_its_own(hf: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = sorted(p.name for p in hf.iterdir())
    for out, told in (
        (tmp_path / "file", "is no folder"),
        (hf, "a released folder"),
        (hf / "run", "a released folder"),
    ):
        with pytest.raises(BridgeError, match=told):
            run("flash-pretrain", f"start={hf}", f"out={out}", f"data.train={text}")
    assert sorted(p.name for p in hf.iterdir()) == before


@pytest.fixture(scope="module")
def begun(hf: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    out = tmp_path_factory.mktemp("begun") / "run"
    words = [f"start={hf}", f"out={out}", f"data.train={text}", "schedule.steps=2", "schedule.warmup=1"]
    run("flash-pretrain", *words, *QUICK)
    return out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.mtp=false"], "model.mtp is False, the run has True; leave it, or say start="),
        (["lora.rank=2"], "lora.rank is 2, the run has 0"),
        (["variant=Pro", "start="], "the model is another: .* is 7168, the run has 128"),
        (["optimizer.name=muon"], "optimizer.name is 'muon', the run has 'adamw'; .*checkpoint.optimizer=false"),
        (["optimizer.distributed=false"], "optimizer.distributed is False, the run has True"),
        (["losses.indexer=sparse"], "losses.indexer is 'sparse', the run has 'frozen'"),
    ],
)
def test_another_run_is_not_gone_on_with(
    words: list[str], told: str, hf: Path, text: Path, begun: Path, tmp_path: Path
) -> None:
    shutil.copytree(begun, tmp_path / "run")
    before = contents(begun / "iter_0000002")
    same = [f"start={hf}", f"out={tmp_path / 'run'}", f"data.train={text}", "schedule.steps=3", "schedule.warmup=1"]
    same += QUICK
    with pytest.raises(BridgeError, match=told):
        run("flash-pretrain", *same, *words)
    assert contents(tmp_path / "run" / "iter_0000002") == before
    if "optimizer" in told or "indexer" in told:
        went = run("flash-pretrain", *same, *words, "checkpoint.optimizer=false")
        assert went.state.step == 3 and len(went.losses) == 1
        with pytest.raises(BridgeError, match="iter_0000003 was saved without optimizer state"):
            run("flash-pretrain", *same, "schedule.steps=4")


def test_what_training_did_not_save_is_not_gone_on_with(hf: Path, text: Path, begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "run")
    told = tmp_path / "run" / "iter_0000002" / "training.json"
    for content, wrong in (
        ('{"step": 2, "row": 8}', "does not say"),
        ('{"step": 2', "training.json"),
        (None, "start="),
    ):
        told.unlink()
        if content:
            told.write_text(content)
        with pytest.raises(BridgeError, match=wrong):
            run("flash-pretrain", f"start={hf}", f"out={tmp_path / 'run'}", f"data.train={text}")


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _blank(path: Path) -> None:
    path.write_bytes(bytes(3000) + path.read_bytes()[3000:])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "__0_0.distcp").unlink(), "not there.* Go back to an earlier .* write its number into"),
        (lambda f: _cut(f / "__0_0.distcp", 1000), "truncated.* Go back to an earlier"),
        (lambda f: _cut(f / ".metadata", 100), "damaged pickle.* Go back to an earlier"),
        (lambda f: (f / "metadata.json").unlink(), "has no metadata.json"),
        (lambda f: (f / "recipe.yaml").unlink(), "recipe.yaml"),
        (lambda f: _blank(f / "__0_0.distcp"), "a damaged checkpoint. UnpicklingError: .*; go back to an earlier one"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    damage: Callable[[Path], None], told: str, hf: Path, text: Path, begun: Path, tmp_path: Path
) -> None:
    shutil.copytree(begun, tmp_path / "run")
    damage(tmp_path / "run" / "iter_0000002")
    with pytest.raises(BridgeError, match=told):
        run("flash-pretrain", f"start={hf}", f"out={tmp_path / 'run'}", f"data.train={text}")


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_fits_its_published_layout(name: str) -> None:
    chosen = choose(name).recipe
    memory = 141.0 if chosen.lora.rank else 80.0
    plan = plan_recipe(chosen, recipe_spec(chosen)).chosen.plan  # told the memory, it would look for other layouts
    assert plan.gpus == chosen.parallel.gpus
    assert plan.worst.total <= USABLE * memory * GIB, [s.total for s in plan.stages]
