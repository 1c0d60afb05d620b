"""A few mutated adapters; benchmarks/fuzz_adapters.py runs as many as you like."""

from pathlib import Path

from fuzz_adapters import Fuzzer


def test_a_mutated_adapter_is_read_or_refused_in_one_message(tmp_path: Path) -> None:
    outcome = Fuzzer(tmp_path, 20261128).run(range(150))
    assert outcome.told == []
    assert outcome.inputs == 150 and len(outcome.kinds) == 6
    assert outcome.refused > 100 and outcome.merged > 0
