"""`dsv4 recipes` and `dsv4 train`: what they print, chats end to end, every recipe in the smallest."""

import gc
import json
import math
import os
from pathlib import Path

import pytest
from training import SMALL, log, make_start, make_text, run
from typer.testing import CliRunner

from conftest import fresh_dsv4
from dsv4_bridge import BridgeError
from dsv4_bridge.cli.app import app
from dsv4_bridge.train.choose import choose, dump, load, values
from dsv4_bridge.train.recipes import RECIPES

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("command"))


@pytest.fixture(scope="module")
def text(start: Path) -> Path:
    return make_text(start.parent, start)


def make_chats(folder: Path, tokenizer: Path, *words: str) -> Path:
    """Short conversations, packed."""
    said = [(f"{a} and {b}?", f"It is {a + b}" + "." * a) for a in range(3) for b in range(4)]
    rows = [
        {
            "enable_thinking": False,
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
        }
        for asked, answer in said
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["data", str(folder / "chats.jsonl"), str(folder / "chats"), "--tokenizer", str(tokenizer), *words]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    return folder / "chats"


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_prints_every_value_with_its_source(name: str) -> None:
    printed = json.loads(CliRunner().invoke(app, ["recipes", name, "--json"]).stdout)
    chosen = choose(name)
    assert printed["values"].keys() == values(chosen.recipe).keys()
    for key, value in values(chosen.recipe).items():
        found = printed["values"][key]
        assert found["value"] == (list(value) if isinstance(value, tuple) else value)
        assert found["source"] and found["source"] == chosen.sources[key]


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe_survives_yaml(name: str, tmp_path: Path) -> None:
    chosen = choose(name, ["optimizer.lr=3e-6", "data.train=0.3 a 0.7 b", "losses.mtp_late=null"]).recipe
    (tmp_path / "own.yaml").write_text(dump(chosen))
    assert load(tmp_path / "own.yaml").recipe == chosen == choose(str(tmp_path / "own.yaml")).recipe
    assert chosen.optimizer.lr == 3e-6 and chosen.data.train == ("0.3", "a", "0.7", "b")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizr.lr=1"], r"no 'optimizr\.lr' \(nearest: optimizer\.lr\)"),
        (["warmup=1"], r"nearest: schedule\.warmup"),
        (["batch.size=many"], "batch.size is 'many', expected a whole number"),
        (["batch.size=1.5"], "expected a whole number"),
        (["model.mtp=3"], "expected true or false"),
        (["parallel.ep=0"], "expected 1 or more"),
        (["optimizer.lr=-1"], "expected 0 or more"),
        (["optimizer.lr=nan"], "optimizer.lr is nan"),
        (["optimizer.lr=inf"], "expected 0 or more, below"),
        (["optimizer.beta1=1"], "optimizer.beta1 is 1.0, expected 0 or more, below 1"),
        (["data.seed=99999999999"], "data.seed is 99999999999, expected 0 or more, below 4294967296"),
        (["batch.size=" + "9" * 30], "batch.size is a huge integer, expected 1 or more, below"),
        (["optimizer.name=sgd"], "expected one of adamw, muon"),
        (["lr"], "expected key=value"),
    ],
)
def test_words_that_fit_no_recipe(words: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=told):
        choose("flash-pretrain", words)
    with pytest.raises(BridgeError, match=r"nearest: flash-pretrain\)"):
        choose("flash-pretrian")
    (tmp_path / "own.yaml").write_text("name: a\nbatch: {sise: 3}\n")
    with pytest.raises(BridgeError, match=r"nearest: batch\.size"):
        choose(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: a\noptimizer: {lr: 1.0e-4}\noptimizer: {beta1: 0.5}\n", "'optimizer' is said twice"),
        ("name: a\noptimizer: {lr: 1.0e-4, lr: 1.0e-5}\n", "'lr' is said twice"),
        ("name: " + "[" * 5000, "nested too deep"),
    ],
)
def test_a_recipe_says_everything_once(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(BridgeError, match=told):
        load(tmp_path / "own.yaml")


def test_dry_run_plans_the_published_layout() -> None:
    args = ["train", "flash-finetune", "--dry-run", "--gpu-memory", "80"]
    done = CliRunner().invoke(app, [*args, "--json"])
    plan = json.loads(done.stdout)
    assert done.exit_code == 0 and plan["plan"]["fits"] is True and plan["recipe"]["name"] == "flash-finetune"
    assert CliRunner().invoke(app, ["train", "flash-finetune", "--dry-run", "--gpu-memory", "40"]).exit_code == 1
    assert "GiB" in CliRunner().invoke(app, args, env={"COLUMNS": "200"}).stdout


# ---------------------------------------------------------------- in the smallest


# Those of Pro and the longest differ from others by numbers alone, which are small here.
LIKE_OTHERS = ("pro-pretrain", "pro-pretrain-muon", "flash-pretrain-full")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LIKE_OTHERS)) for n in RECIPES])
def test_every_recipe_makes_two_steps_in_the_smallest(name: str, text: Path, tmp_path: Path) -> None:
    args = ["train", name, "--tiny", f"data.train={text}", "data.kind=text", f"out={tmp_path / 'run'}", "--json"]
    more = ["data.seq_length=40", "log.tensorboard=false"]
    gc.freeze()  # see training.run
    done = CliRunner().invoke(app, [*args, *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["step"] == 2
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2] and all(math.isfinite(line["loss"]) for line in lines)
    recipe = choose(name).recipe
    assert ("mtp_loss" in lines[0]) == ((recipe.model.mtp and recipe.losses.mtp > 0) or recipe.model.mtp)
    assert ("indexer_loss" in lines[0]) == (recipe.losses.indexer != "frozen")
    assert ("balance_loss" in lines[0]) == (recipe.losses.balance > 0)


def test_chats_are_learned_packed_as_one_by_one(start: Path, tmp_path: Path) -> None:
    """Losses of packed chats and of the chats one by one, draft block included."""
    from dsv4_bridge.data.chat.store import open_chat_data
    from dsv4_bridge.train.feed import chat_row

    (tmp_path / "packed").mkdir()
    (tmp_path / "alone").mkdir()
    packed = make_chats(tmp_path / "packed", start, "--seq-length", "160")
    alone = make_chats(tmp_path / "alone", start, "--seq-length", "160", "--no-pack")
    data, singles = open_chat_data(packed), open_chat_data(alone)
    assert len(data) < len(singles) == 12
    row = chat_row(data[0].tokens, data[0].loss_mask, data[0].cu_seqlens, 160, 1)
    learned = [t for t, w in zip(row.labels.tolist(), row.loss_mask.tolist(), strict=True) if w]
    kept = [t for t, m in zip(data[0].tokens.tolist(), data[0].loss_mask.tolist(), strict=True) if m]
    assert learned == kept
    common = [
        f"start={start}",
        "data.kind=chat",
        "data.seq_length=160",
        "schedule.steps=2",
        "schedule.warmup=0",
    ]
    runs = [
        run("flash-finetune", *common, f"data.train={folder}", f"out={folder}-run", f"batch.size={count}", micro)
        for folder, count, micro in (
            (packed, len(data), "batch.micro=1"),
            (alone, len(singles), "batch.micro=4"),
        )
    ]
    # All of the data is one step: the second step's loss shows that the gradients were the same.
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=2e-5)
    assert runs[0].losses[1] != pytest.approx(runs[0].losses[0], rel=1e-2)


def test_chats_of_another_tokenizer_are_refused(start: Path, tmp_path: Path) -> None:
    chats = make_chats(tmp_path, start, "--seq-length", "64")
    facts = json.loads((chats / "chat_data.json").read_text())
    (chats / "chat_data.json").write_text(json.dumps(facts | {"tokenizer_sha256": "0" * 64}))
    words = [f"start={start}", "data.kind=chat", f"data.train={chats}", f"out={tmp_path / 'run'}"]
    with pytest.raises(BridgeError, match="tokens are of another tokenizer"):
        run("flash-finetune", *words)
    (chats / "chat_data.json").write_text(json.dumps(facts))
    with pytest.raises(BridgeError, match=r"packs of up to 64 tokens, data\.seq_length is 48"):
        run("flash-finetune", *words)
    with pytest.raises(BridgeError, match="cross from one to another"):
        run("flash-finetune", *words, "data.seq_length=64", "data.documents_apart=false")


def test_command_trains_and_goes_on(start: Path, text: Path, tmp_path: Path) -> None:
    args = ["train", "flash-pretrain", *SMALL, f"start={start}", f"data.train={text}", f"out={tmp_path / 'run'}"]
    first = fresh_dsv4(*args, "schedule.steps=3", "log.every=1")  # in a process of its own, imports and all
    assert first.returncode == 0, first.stderr
    assert "step 3/3  loss " in first.stdout and "tok/s" in first.stdout and "Traceback" not in first.stderr
    second = CliRunner().invoke(app, [*args, "schedule.steps=4", "log.every=1"], catch_exceptions=False)
    assert "goes on from" in second.stdout and "schedule.steps 3 -> 4" in second.stdout
    assert "step 4/4" in second.stdout and "step 3/4" not in second.stdout
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3, 4]


def test_json_has_stdout_to_itself(start: Path, text: Path, tmp_path: Path) -> None:
    """What a run says goes where other verbs show their progress; --quiet is quiet there too."""
    args = [
        "train",
        "flash-pretrain",
        "--tiny",
        f"data.train={text}",
        f"out={tmp_path / 'run'}",
        "log.tensorboard=false",
    ]
    done = CliRunner().invoke(app, [*args, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["step"] == 2 and "step 2/2  loss " in done.stderr
    assert "no tokenizer: from its checkpoints text is made by ids alone; tokenizer=CKPT" in done.stderr
    more = [f"tokenizer={start}", "schedule.steps=3", "--json"]
    assert "no tokenizer" not in CliRunner().invoke(app, [*args, *more], catch_exceptions=False).stderr
    again = CliRunner().invoke(app, [*args, "schedule.steps=4", "--json", "--quiet"], catch_exceptions=False)
    assert json.loads(again.stdout)["step"] == 4 and not again.stderr
    os.environ.pop("DSV4_QUIET", None)
    # The same without --tiny is another model, and says what may be missing.
    with pytest.raises(BridgeError, match="--tiny, if it was"):
        CliRunner().invoke(app, ["train", str(tmp_path / "run/recipe.yaml")], catch_exceptions=False)


def test_out_is_no_data(start: Path, tmp_path: Path) -> None:
    chats = make_chats(tmp_path, start, "--seq-length", "64")
    there = sorted(path.name for path in chats.iterdir())
    with pytest.raises(BridgeError, match="is training data that dsv4 data made; name a folder of its own"):
        run("flash-finetune", f"start={start}", "data.kind=chat", f"data.train={chats}", f"out={chats}")
    assert sorted(path.name for path in chats.iterdir()) == there
