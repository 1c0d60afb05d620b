"""A few hundred mutated inputs of each loader; benchmarks/fuzz.py runs as many as you like."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz
from dsv4_bridge import BridgeError
from fuzz_checkpoints import TARGETS, Fuzzer, Outcome
from fuzz_loaders import LOADERS

# Those that leave this process as it was; the others run in children alone.
HERE = ("recipe", "npy", "tokenizer", "args", "journal", "state", "chat", "text")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"), 20261123).run(range(400))


def test_a_mutated_checkpoint_is_read_or_refused_in_one_message(outcome: Outcome) -> None:
    assert outcome.failures == []
    assert outcome.inputs == 400
    assert outcome.slowest < 5


def test_the_mutations_reach_every_reader_and_do_harm(outcome: Outcome) -> None:
    assert set(outcome.targets) == {target.name for target in TARGETS}
    assert outcome.refused > 200
    assert outcome.calls > 1.1 * outcome.inputs  # some were converted, too


@pytest.mark.parametrize("name", HERE)
def test_a_mutated_file_is_read_or_refused_in_one_message(name: str, tmp_path: Path) -> None:
    loader, refused, taken = LOADERS[name](tmp_path, 20261123), 0, 0
    for number in range(80):
        try:
            loader.run(number)
            taken += 1
        except BridgeError as error:
            assert fuzz.wrong_message(str(error)) == ""
            refused += 1
    assert taken and refused > 10


def test_the_fuzzer_counts_what_it_is_there_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 4.0)
    counts, _, peak, failures = fuzz.fuzz("broken", 0, range(len(fuzz.KINDS)))
    assert counts == dict.fromkeys(fuzz.KINDS, 1)
    assert peak > fuzz.MEGABYTES
    assert [failure.splitlines()[0].rpartition(" ")[2] for failure in failures] == list(fuzz.KINDS[2:])


def test_the_benchmarks_find_what_they_import_without_the_tests_paths() -> None:
    names = sorted(path.stem for path in Path(fuzz.__file__).parent.glob("*.py"))
    code = f"import sys, importlib; [importlib.import_module(name) for name in {names}]"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(fuzz.__file__).parent,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1000:]
