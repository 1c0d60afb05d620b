"""A few hundred mutated checkpoints; benchmarks/fuzz.py runs as many as you like."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from fuzz_checkpoints import TARGETS, Fuzzer, Outcome


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
