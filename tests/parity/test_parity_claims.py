"""What parity claims: no choice that was not made, every position in bf16, no flip of a table."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dsv4_bridge import make_toy
from dsv4_bridge.parity import Inputs, parity
from dsv4_bridge.store.hf import open_hf

pytestmark = [pytest.mark.megatron, pytest.mark.hf]


def test_what_was_not_looked_at_is_said(tmp_path: Path) -> None:
    """A choice that was never made is not one that is the same."""
    toy = make_toy(tmp_path / "toy", "Flash", 3)
    short = parity(toy, inputs=Inputs(seq_length=20, batch=1))
    assert short.passed and short.inputs["chosen"] == 0 and short.inputs["ids"] <= 20
    assert "the indexers' choice, for no query had more than index_topk 8 blocks (--seq-length 36 and more)" in (
        short.verdict.text
    )
    assert "of 512 rows of the embedding and of the hash tables" in short.verdict.text
    whole = parity(toy, inputs=Inputs(prompt_ids=tuple(range(512))))
    assert whole.passed and whole.inputs["chosen"] == 512 - 36 + 1
    assert "Not looked at" not in whole.verdict.text


@pytest.mark.parametrize("how", ["table", "scale"])
def test_trap63_bf16_is_judged_at_every_position_and_forgives_no_table(how: str, tmp_path: Path) -> None:
    good = make_toy(tmp_path / "good", "Flash", 3)
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    folder = open_hf(bad).folder
    ids = tuple(range(40, 200))
    if how == "table":  # one token, in the middle of the sample, goes to another expert
        info, offset, width = folder.tensors["layers.1.ffn.gate.tid2eid"], 100 * 2 * 8, 16
        new = np.array([6, 7], "<i8")
    else:  # a group of 32 weights of one expert is twice as large
        info, offset, width = folder.tensors["layers.3.ffn.shared_experts.w2.scale"], 0, 1
        new = None
    path = bad / info.file
    raw = bytearray(path.read_bytes())
    at = info.start + offset
    old = bytes(raw[at : at + width])
    raw[at : at + width] = bytes([old[0] + 3]) if new is None else new.tobytes()
    if bytes(raw[at : at + width]) == old:
        raw[at : at + width] = np.array([4, 5], "<i8").tobytes()
    path.write_bytes(raw)
    report = parity(bad, reference_checkpoint=good, inputs=Inputs(prompt_ids=ids), dtype="bf16")
    assert not report.passed, report.verdict.text
    assert parity(good, inputs=Inputs(prompt_ids=ids), dtype="bf16").passed
