"""Power lost, or killed, at moments of an overwrite: never a mixture, and the same command ends in the new bytes.

benchmarks/power_loss.py plays every verb and every moment.
"""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import same_files
from dsv4_bridge import BridgeError, Options, import_hf, make_toy
from dsv4_bridge.convert import journal
from power_loss import Trial, examine, looks_whole


@pytest.fixture(scope="module")
def other_flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("other") / "flash", "Flash", 99)


@pytest.fixture(scope="module")
def expected(other_flash: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The new bytes."""
    out = tmp_path_factory.mktemp("expected") / "megatron"
    import_hf(other_flash, out)
    return out


def test_what_the_power_leaves_of_an_overwrite(toy_flash: Path, other_flash: Path, tmp_path: Path) -> None:
    trial = Trial(
        lambda out, on: import_hf(other_flash, out, Options(overwrite=True, resume=on)),
        lambda out: import_hf(toy_flash, out),
        looks_whole,
    )
    tally = examine(trial, tmp_path / "trial", every=9)
    assert not [verdict for verdict in tally if verdict.startswith(("WRONG", "LOST", "STUCK"))], tally
    assert tally["as before"] and tally["unfinished"] and tally["went on to the new bytes"] > 10


@pytest.fixture
def killed(toy_flash: Path, other_flash: Path, tmp_path: Path) -> Iterator[Path]:
    """A whole old checkpoint, and an overwrite of it that was killed when three files were in its journal."""
    out = tmp_path / "out"
    import_hf(toy_flash, out)
    if not (pid := os.fork()):
        real, entered = journal.enter, [0]

        def enter(*args: object) -> None:
            real(*args)  # type: ignore[arg-type]
            entered[0] += 1
            if entered[0] == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        journal.enter = enter
        import_hf(other_flash, out, Options(overwrite=True))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    yield out


def test_an_old_file_is_not_taken_for_a_finished_one(killed: Path, other_flash: Path, expected: Path) -> None:
    """The line in the journal is there and the file is not, as where a name was not on the disk yet."""
    done = [line["file"] for line in journal.lines(killed / ".dsv4-partial")]
    assert len(done) == 3
    (killed / ".dsv4-partial" / done[1]).unlink()
    assert (killed / done[1]).stat().st_size > 0  # the old one, of the same size
    import_hf(other_flash, killed, Options(resume=True))
    assert same_files(killed, expected) == []


def test_a_file_of_the_same_size_that_was_written_again_is_not_taken(
    killed: Path, other_flash: Path, expected: Path
) -> None:
    done = [line["file"] for line in journal.lines(killed / ".dsv4-partial")]
    shutil.copyfile(killed / done[0], killed / ".dsv4-partial" / done[0])
    import_hf(other_flash, killed, Options(resume=True))
    assert same_files(killed, expected) == []


def test_overwrite_with_resume_ends_in_the_new_bytes_from_any_state(
    killed: Path, toy_flash: Path, other_flash: Path, expected: Path
) -> None:
    both = Options(overwrite=True, resume=True)
    import_hf(other_flash, killed, both)
    assert same_files(killed, expected) == []
    import_hf(toy_flash, killed, both)  # nothing to resume: it replaces
    work = killed / ".dsv4-partial"
    work.mkdir()  # killed before the journal was there
    with pytest.raises(BridgeError, match=r"stopped before it had written anything.*--overwrite replaces it"):
        import_hf(other_flash, killed, Options(resume=True))
    import_hf(other_flash, killed, both)
    assert same_files(killed, expected) == []


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"7",
        b"[" * 100_000,
        b'{"file": 3, "size": 4, "written": 5, "report": {}}',
        b'{"file": "x", "size": true, "written": 5, "report": {}}',
        b'{"file": "x", "size": 4, "written": 5, "report": []}',
        b'{"file": "x", "size": 4, "written": 5, "report": {"tensors": 1}}',
        b'{"identity": "x", "label": "y"}',
        b"\xff\xfe\x00",
    ],
)
def test_lines_that_are_none_do_not_count(killed: Path, other_flash: Path, expected: Path, line: bytes) -> None:
    path = killed / ".dsv4-partial/journal.jsonl"
    before = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([before[0], line, *before[1:3], line]) + b"\n")
    import_hf(other_flash, killed, Options(resume=True))
    assert same_files(killed, expected) == []


def test_a_journal_without_its_head_is_begun_again(killed: Path, other_flash: Path, expected: Path) -> None:
    path = killed / ".dsv4-partial/journal.jsonl"
    path.write_bytes(b"\n".join([json.dumps({"identity": 7}).encode(), *path.read_bytes().splitlines()[1:]]) + b"\n")
    import_hf(other_flash, killed, Options(resume=True))
    assert same_files(killed, expected) == []
