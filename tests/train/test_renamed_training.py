"""A training checkpoint under the other naming and back: the run goes on as if nothing had happened."""

import shutil
from pathlib import Path

import pytest
from training import QUICK, contents, make_start, make_text, run

from dsv4_bridge import BridgeError, rename
from dsv4_bridge.store.torch_dist.reader import open_torch_dist

pytestmark = pytest.mark.megatron


def test_a_run_renamed_both_ways_goes_on_bit_for_bit(tmp_path: Path) -> None:
    hf = make_start(tmp_path)
    text = make_text(tmp_path, hf)
    words = [f"start={hf}", f"data.train={text}", "schedule.steps=3", "schedule.warmup=1", *QUICK]
    whole = run("flash-pretrain", *words, f"out={tmp_path / 'whole'}", "checkpoint.save_every=2", "checkpoint.keep=9")
    shutil.copytree(tmp_path / "whole" / "iter_0000002", tmp_path / "parts" / "iter_0000002")
    rename(tmp_path / "parts" / "iter_0000002", tmp_path / "hybrid", "hybrid")
    keys = open_torch_dist(tmp_path / "hybrid").tensors
    assert "optimizer.state.exp_avg.decoder.layers.0.inner_layer.self_attention.linear_q_down_proj.weight" in keys
    with pytest.raises(BridgeError, match="hybrid names, and a run goes on from gpt ones"):
        run("flash-pretrain", *words, f"out={tmp_path / 'hybrid'}")
    rename(tmp_path / "hybrid", tmp_path / "again", "gpt")
    again = run("flash-pretrain", *words, f"out={tmp_path / 'again'}")
    assert again.losses == whole.losses[2:]
    assert contents(tmp_path / "whole" / "iter_0000003") == contents(tmp_path / "again" / "iter_0000003")
