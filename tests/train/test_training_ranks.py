"""Training over real processes: any layout makes the steps of one rank, and goes on where another stopped."""

import json
import shutil
from pathlib import Path

import pytest
from training import TIMED, contents, log, make_start, make_text
from warm import run_world

pytestmark = pytest.mark.megatron

WORKER = Path(__file__).with_name("train_worker.py")
Run = tuple[str, list[str]]

# Of some the optimizer is not saved: others save the same.
LAYOUTS: dict[str, list[str]] = {
    "one": ["checkpoint.optimizer=false"],
    "tp2": ["parallel.tp=2"],
    "ep2": ["parallel.ep=2"],
    "pp2": ["parallel.pp=2"],
    "pp2vp2": ["parallel.pp=2", "parallel.vp=2", "batch.micro=1", "log.valid_steps=2"],
    "dp2": [],
    "dp2apart": ["parallel.overlap=false", "checkpoint.optimizer=false"],
    "dp2buckets": ["parallel.bucket=20000", "checkpoint.optimizer=false"],
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("ranks"), layers=4)


@pytest.fixture(scope="module")
def text(start: Path) -> Path:
    return make_text(start.parent, start)


def run_ranks(folder: Path, tag: str, world: int, runs: list[Run]) -> list[list[float]]:
    """The losses of each run, of `world` processes."""
    told, result = folder / f"{tag}.json", folder / f"{tag}.result.json"
    told.write_text(json.dumps({"runs": runs, "result": str(result)}))
    run_world(world, WORKER, told, said=folder / tag, timeout=300 + 60 * len(runs))
    return json.loads(result.read_text())


def test_every_layout_makes_the_steps_of_one_rank(start: Path, text: Path) -> None:
    folder = start.parent
    common = [f"start={start}", f"data.train={text}", "schedule.steps=3"]
    lora = ["data.kind=text", "lora.rank=4"]
    recipes: dict[str, tuple[list[str], tuple[str, ...]]] = {
        "flash-pretrain": (
            ["log.valid_every=2", "log.valid_steps=1"],
            ("tp2", "ep2", "pp2", "pp2vp2", "dp2", "dp2apart", "dp2buckets"),
        ),
        "flash-pretrain-muon": ([], ("tp2", "ep2")),
        "flash-lora": (lora, ("tp2", "pp2vp2")),
    }

    def told(name: str, layout: str) -> Run:
        return name, [*common, *recipes[name][0], *LAYOUTS[layout], f"out={folder / f'{name}-{layout}'}"]

    one = dict(zip(recipes, run_ranks(folder, "one", 1, [told(name, "one") for name in recipes]), strict=True))
    cut = [(name, layout) for name, (_, layouts) in recipes.items() for layout in layouts]
    found = run_ranks(folder, "two", 2, [told(name, layout) for name, layout in cut])
    for (name, layout), losses in zip(cut, found, strict=True):
        # The first is the same model; each step moves it by gradients that agree to 1e-4.
        assert losses[0] == pytest.approx(one[name][0], rel=1e-5), (name, layout)
        assert losses == pytest.approx(one[name], rel=2e-4), (name, layout)
    by = dict(zip(cut, found, strict=True))
    assert by["flash-pretrain", "dp2"] == by["flash-pretrain", "dp2apart"]
    written = [folder / "flash-pretrain-dp2" / "iter_0000003" / f"__{rank}_0.distcp" for rank in (0, 1)]
    assert min(sizes := [path.stat().st_size for path in written]) > 0.9 * max(sizes)


def test_rows_cut_over_ranks_and_resumed_where_they_are_not(start: Path, text: Path) -> None:
    """Rows of 262 tokens, two a micro-batch, laid behind one another with their documents; validated along."""
    folder = start.parent / "rows"
    folder.mkdir()
    words = [f"start={start}", f"data.train={text}", "data.seq_length=262", "batch.size=2", "schedule.steps=2"]
    words += ["log.valid_every=1", "log.valid_steps=1", "checkpoint.save_every=1", "schedule.warmup=0"]

    def told(name: str, *more: str) -> Run:
        return "flash-pretrain", [*words, f"out={folder / name}", *more]

    def begun(name: str, copy: str) -> str:
        """A run of one step, where another left it behind its first."""
        shutil.copytree(folder / name, folder / copy)
        shutil.rmtree(folder / copy / "iter_0000002")
        (folder / copy / "latest_checkpointed_iteration.txt").write_text("1")
        return copy

    (one,) = run_ranks(folder, "one", 1, [told("one")])
    cut, goes_on = run_ranks(
        folder, "two", 2, [told("cut", "parallel.cp=2"), told(begun("one", "on"), "parallel.cp=2")]
    )
    assert cut == pytest.approx(one, rel=1e-5)
    assert goes_on == pytest.approx(one[1:], rel=1e-5)
    (whole,) = run_ranks(folder, "whole", 1, [told(begun("cut", "whole"))])
    assert whole == pytest.approx(cut[1:], rel=1e-5)
    for mine, theirs in zip(log(folder / "cut"), log(folder / "one"), strict=True):
        assert mine.keys() == theirs.keys()
        assert {k: v for k, v in mine.items() if k not in TIMED} == pytest.approx(
            {k: v for k, v in theirs.items() if k not in TIMED}, rel=1e-5
        )


CHUNKS = ["parallel.cp=2", "parallel.tp=2", "model.loss_chunk=96"]
CUT: dict[str, tuple[int, str, list[str]]] = {
    "muon": (2, "flash-pretrain-muon", ["parallel.cp=2"]),
    "lora": (2, "flash-lora", ["parallel.cp=2", "data.kind=text", "lora.rank=4"]),
    "muon-chunks": (4, "flash-pretrain-muon", CHUNKS),
    "lora-chunks": (4, "flash-lora", [*CHUNKS, "data.kind=text", "lora.rank=4"]),
    "interleaved": (4, "flash-pretrain", ["parallel.cp=2", "parallel.pp=2", "parallel.vp=2", "batch.micro=1"]),
}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_rows_are_cut_with_other_optimizers_and_pipelines(world: int, start: Path, text: Path) -> None:
    """Muon, adapters, chunks of the head and interleaved pipelines make the steps of one rank."""
    folder = start.parent / f"cut{world}"
    folder.mkdir()
    words = [f"start={start}", f"data.train={text}", "data.seq_length=264", "batch.size=4", "schedule.steps=3"]
    words += ["schedule.warmup=0", "checkpoint.optimizer=false"]
    cases = {name: case for name, case in CUT.items() if case[0] == world}

    def told(name: str, layout: bool) -> Run:
        _, recipe, more = cases[name]
        kept = more if layout else [word for word in more if not word.startswith("parallel.")]
        return recipe, [*words, *kept, f"out={folder / f'{name}-{layout}'}"]

    one = run_ranks(folder, "one", 1, [told(name, False) for name in cases])
    several = run_ranks(folder, "several", world, [told(name, True) for name in cases])
    for name, theirs, ours in zip(cases, one, several, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5), name
        assert ours == pytest.approx(theirs, rel=2e-4), name
        assert theirs[2] != pytest.approx(theirs[0], rel=1e-3), name


INTERLEAVED = ["parallel.pp=2", "parallel.vp=2", "batch.micro=1", "batch.size=8", "log.valid_steps=2"]


@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        (2, [[], ["parallel.ep=2"]]),
        pytest.param(
            4,
            [INTERLEAVED, ["parallel.pp=2", "parallel.ep=2"], ["parallel.tp=2", "parallel.ep=2"]],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_sent_during_the_passes_changes_no_bit(
    world: int, layouts: list[list[str]], start: Path, text: Path
) -> None:
    """Many buckets; nothing is clipped, for a norm is summed bucket by bucket, and no sum is of more than two ranks."""
    folder = start.parent / f"sent{world}"
    folder.mkdir()
    if world == 2:  # nothing is interleaved
        start = make_start(folder)
    words = [f"start={start}", f"data.train={text}", "schedule.steps=4", "optimizer.clip_grad=0", "optimizer.lr=1e-3"]
    words += ["log.valid_every=2", "log.valid_steps=1", "checkpoint.save_every=2", "checkpoint.background=true"]
    ways = (["parallel.overlap=false"], ["parallel.bucket=5000"])
    told = [
        ("flash-pretrain", [*words, *layout, *way, f"out={folder / f'{n}-{m}'}"])
        for n, layout in enumerate(layouts)
        for m, way in enumerate(ways)
    ]
    losses = run_ranks(folder, "runs", world, told)
    for n, layout in enumerate(layouts):
        assert losses[2 * n] == losses[2 * n + 1], layout
        for step in (2, 4):
            apart, during = (contents(folder / f"{n}-{m}" / f"iter_{step:07d}") for m in (0, 1))
            assert apart == during, (layout, step)


@pytest.mark.slow
def test_resumed_at_ep2_pp2_bit_for_bit_and_at_another_layout_nearly(start: Path, text: Path) -> None:
    folder = start.parent
    words = [f"start={start}", f"data.train={text}", "schedule.steps=6"]
    four = [*words, "parallel.ep=2", "parallel.pp=2", "parallel.bucket=20000"]
    whole, first = folder / "whole", folder / "first"
    told = [
        ("flash-pretrain", [*four, f"out={whole}"]),
        ("flash-pretrain", [*four, f"out={first}", "checkpoint.save_every=3"]),
    ]
    losses = run_ranks(folder, "begin", 4, told)[0]
    shutil.rmtree(first / "iter_0000006")
    (first / "latest_checkpointed_iteration.txt").write_text("3")
    for name in ("again", "dp2"):
        shutil.copytree(first, folder / name)
    again = run_ranks(folder, "again", 4, [("flash-pretrain", [*four, f"out={folder / 'again'}"])])[0]
    assert again == losses[3:]
    assert contents(folder / "again" / "iter_0000006") == contents(whole / "iter_0000006")
    assert [line["step"] for line in log(folder / "again")] == [1, 2, 3, 4, 5, 6]
    other = run_ranks(folder, "resume-dp2", 2, [("flash-pretrain", [*words, f"out={folder / 'dp2'}"])])[0]
    assert other == pytest.approx(losses[3:], rel=1e-5)
