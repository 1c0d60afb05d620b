"""Several real processes share a conversion: the same bytes as one, and no half of it looks whole."""

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from warm import Warm

from conftest import same_files
from dsv4_bridge import BridgeError, Options, export_hf, import_hf, make_toy, repack
from dsv4_bridge.ranks import Ranks, read, shares
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.store.hf import open_hf


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that a process can be caught at work."""
    spec = replace_spec(tiny(VARIANTS["Flash"]), hidden_size=512, moe_intermediate_size=512, n_routed_experts=16)
    return make_toy(tmp_path_factory.mktemp("ranks") / "hf", "Flash", 23, spec=spec, payload="random")


@pytest.fixture(scope="module")
def megatron(source: Path) -> Path:
    import_hf(source, source.parent / "megatron")
    return source.parent / "megatron"


def start(rank: int, world: int, *args: str | Path, timeout: int = 60) -> Warm:
    env = {"RANK": str(rank), "WORLD_SIZE": str(world), "DSV4_RANK_TIMEOUT": str(timeout)}
    said = Path(tempfile.mkdtemp(dir=_SAID.name))
    return Warm("-m", "dsv4_bridge", *args, out=said / "out", err=said / "err", **env)


_SAID = tempfile.TemporaryDirectory()


@contextmanager
def running(*processes: Warm) -> Iterator[None]:
    """Nobody stays behind, whatever a test finds."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def end(process: Warm) -> tuple[int, str, str]:
    code = process.wait(timeout=120)
    return code, process.out.read_text(), process.err.read_text()


def run_all(world: int, *args: str | Path) -> list[tuple[int, str, str]]:
    processes = [start(rank, world, *args) for rank in range(world)]
    with running(*processes):
        return [end(p) for p in processes]


def looks_complete(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / "latest_checkpointed_iteration.txt").exists()


def stop_at_work(out: Path, rank: int, begin: Callable[[Path], list[Warm]]) -> tuple[Path, list[Warm]]:
    """Stop (SIGSTOP) a rank of a run in the midst of its share; the folder and the processes of that run."""
    for attempt in range(20):
        folder = out.with_name(f"{out.name}-{attempt}")
        processes = begin(folder)
        file = folder / ".dsv4-partial" / "ranks" / f"{rank}.json"
        while processes[rank].poll() is None:
            if (read(file) or {}).get("state") == "working":
                processes[rank].send_signal(signal.SIGSTOP)
                time.sleep(0.05)
                if (read(file) or {}).get("state") == "working" and not looks_complete(folder):
                    return folder, processes
                processes[rank].send_signal(signal.SIGCONT)
                break
            time.sleep(0.002)
        for process in processes:
            process.kill()
    raise AssertionError("no run could be caught at work")


# ---------------------------------------------------------------- the same bytes


@pytest.mark.parametrize(("kind", "world"), [("export", 3), ("repack", 2)])
def test_ranks_write_what_one_process_writes(
    kind: str, world: int, source: Path, megatron: Path, tmp_path: Path
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    if kind == "export":
        report, args = export_hf(megatron, alone, source), (megatron, together, "--like", source)
    else:
        report, args = repack(source, alone, "bf16"), (source, together, "--encoding", "bf16")
    ended = run_all(world, kind, *args, "--json", "--workers", "2")
    assert [code for code, _, _ in ended] == [0] * world, ended
    assert same_files(alone, together) == []
    facts = json.loads(ended[0][1])
    assert {n: facts[n] for n in ("tensors", "bytes_written")} == {
        "tensors": report.tensors,
        "bytes_written": report.bytes_written,
    }
    assert all(out == "" for _, out, _ in ended[1:])  # rank 0 prints what all did


def test_torchrun_starts_them(source: Path, megatron: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["-m", "dsv4_bridge.cli", "import", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert same_files(megatron, tmp_path / "out") == []


def test_shares_are_even_and_cover_every_file_once() -> None:
    rng = random.Random(5)
    for _ in range(50):
        world = rng.randint(1, 9)
        sizes = [(f"f{n}", rng.randint(1, 4 << 30)) for n in range(rng.randint(0, 60))]
        found = shares(sizes, world)
        assert sorted(n for share in found for n in share) == sorted(n for n, _ in sizes)
        shuffled = rng.sample(sizes, len(sizes))
        assert shares(shuffled, world) == found  # every rank comes to the same
        loads = [sum(dict(sizes)[n] for n in share) for share in found]
        assert max(loads) - min(loads) <= max((s for _, s in sizes), default=0)


def test_the_converter_needs_no_torch(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom dsv4_bridge.cli import main\ntry:\n    main()\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "import", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.split()[-1]) == (0, "False")


# ---------------------------------------------------------------- a rank that goes


@pytest.mark.parametrize(("victim", "then"), [(1, 1), (0, 3)])
def test_a_killed_rank_stops_the_others_and_resume_goes_on(
    victim: int, then: int, source: Path, megatron: Path, tmp_path: Path
) -> None:
    def begin(folder: Path) -> list[Warm]:
        return [start(rank, 3, "import", source, folder) for rank in range(3)]

    out, processes = stop_at_work(tmp_path / "out", victim, begin)
    with running(*processes):
        processes[victim].kill()
        for rank in {0, 1, 2} - {victim}:
            code, said, error = end(processes[rank])
            assert (code, said) == (2, "")
            assert f"rank {victim} (process {processes[victim].pid} on " in error and "died" in error
            assert "--resume" in error and "Traceback" not in error and len(error.splitlines()) == 1
    assert [p.name for p in out.iterdir()] == [".dsv4-partial"]
    with pytest.raises(BridgeError, match="half way"):
        import_hf(source, out)
    if then == 1:
        import_hf(source, out, Options(resume=True))
    else:
        ended = run_all(then, "import", source, out, "--resume")
        assert [code for code, _, _ in ended] == [0] * then, ended
    assert same_files(megatron, out) == []


def test_a_silent_rank_is_given_up_and_may_not_meddle_later(source: Path, megatron: Path, tmp_path: Path) -> None:
    def begin(folder: Path) -> list[Warm]:
        return [start(rank, 2, "import", source, folder, timeout=2) for rank in range(2)]

    out, processes = stop_at_work(tmp_path / "out", 1, begin)
    with running(*processes):
        code, _, error = end(processes[0])
        assert code == 2 and f"rank 1 (process {processes[1].pid} on " in error and "said nothing for 2 s" in error
        import_hf(source, out, Options(resume=True))
        processes[1].send_signal(signal.SIGCONT)
        code, _, error = end(processes[1])
        assert code == 2 and "Traceback" not in error and len(error.splitlines()) == 1
    assert same_files(megatron, out) == []


def test_input_that_one_rank_cannot_convert_ends_all_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in source.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    opened = open_hf(broken)
    name = next(n for n in opened.bound if "experts.7" in n)
    scale = opened.bound[name].scale
    assert scale is not None
    opened.close()
    with (broken / scale.file).open("r+b") as file:
        file.seek(scale.start + scale.nbytes // 2)
        file.write(b"\xff")  # E8M0's NaN
    ended = run_all(2, "import", broken, tmp_path / "out")
    for code, _, error in ended:
        assert code == 2 and name in error and "Traceback" not in error
    assert sum("failed: " in error for _, _, error in ended) == 1  # the other one names who
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("case", ["options", "input", "world"])
def test_other_arguments_on_a_rank_are_refused(case: str, source: Path, tmp_path: Path) -> None:
    src = make_toy(tmp_path / "other", "Flash", 99) if case == "input" else source
    other = start(1, 3 if case == "world" else 2, "import", src, tmp_path / "out", *["--resume"][: case == "options"])
    told = {
        "options": "--resume: True, rank 0: False",
        "input": r"job: import other \(.*\), rank 0: ",
        "world": "WORLD_SIZE: 3",
    }
    with running(other):
        with pytest.raises(BridgeError, match=rf"rank 1 \(process {other.pid} on .*other arguments \({told[case]}"):
            import_hf(source, tmp_path / "out", Options(ranks=Ranks(0, 2)))
        code, _, error = end(other)
        assert code == 2 and "other arguments" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_second_start_is_refused_while_one_runs(source: Path, megatron: Path, tmp_path: Path) -> None:
    out, processes = stop_at_work(tmp_path / "out", 0, lambda folder: [start(0, 1, "import", source, folder)])
    with running(*processes):
        for options in (Options(), Options(resume=True), Options(overwrite=True), Options(ranks=Ranks(0, 2, 5))):
            with pytest.raises(BridgeError, match=rf"another run is writing.*process {processes[0].pid} on "):
                import_hf(source, out, options)
        with pytest.raises(BridgeError, match="under way without this rank"):
            import_hf(source, out, Options(ranks=Ranks(1, 2, 5)))
        processes[0].send_signal(signal.SIGCONT)
        assert end(processes[0])[0] == 0
    assert same_files(megatron, out) == []


def test_a_rank_that_never_comes_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=r"rank 1, 2 of 3 did not come within 1 s.*WORLD_SIZE"):
        import_hf(source, tmp_path / "out", Options(ranks=Ranks(0, 3, 1)))
    with pytest.raises(BridgeError, match=r"rank 0 did not come"):
        import_hf(source, tmp_path / "out", Options(ranks=Ranks(2, 3, 1)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "expected less than WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'"),
        ({"DSV4_RANK_TIMEOUT": "0"}, "from 1 on"),
    ],
)
def test_an_environment_that_makes_no_sense(env: dict[str, str], told: str) -> None:
    with pytest.raises(BridgeError, match=told):
        Ranks.from_environment(env)
    assert Ranks.from_environment({"RANK": "0"}) == Ranks()
