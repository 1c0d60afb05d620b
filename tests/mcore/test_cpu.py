"""What stands in for CUDA leaves the rest of torch, and whoever uses it, alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import small_spec
from transformers import AutoConfig, DeepseekV4ForCausalLM
from warm import Warm

from dsv4_bridge.mcore import initialize
from dsv4_bridge.store.hf_config import released_config

pytestmark = pytest.mark.megatron


def test_a_device_context_still_places_new_tensors() -> None:
    with torch.device("meta"):
        made = [torch.empty(3), torch.zeros(3), torch.tensor([1.0]), torch.arange(3), torch.nn.Linear(2, 2).weight]
    assert {t.device.type for t in made} == {"meta"}
    assert torch.zeros(3, device="meta").device.type == "meta"
    assert torch.zeros(3).device.type == "cpu"


def test_transformers_loads_a_model_whole(tmp_path: Path) -> None:
    """Rotations are buffers that no checkpoint holds; they come from the config, under a device context."""
    (tmp_path / "config.json").write_text(json.dumps(released_config(small_spec(), None, False)))
    made = DeepseekV4ForCausalLM(AutoConfig.from_pretrained(tmp_path))
    made.save_pretrained(tmp_path / "saved")
    loaded = dict(DeepseekV4ForCausalLM.from_pretrained(tmp_path / "saved").named_buffers())
    for name, buffer in made.named_buffers():
        assert torch.equal(loaded[name], buffer), name


def test_what_one_rank_gathers_from_elsewhere_is_copied() -> None:
    """What is in its place already is not sent; that is a matter of time alone."""
    from megatron.core.distributed import param_and_grad_buffer as megatron

    initialize()
    group, values = torch.distributed.group.WORLD, torch.randn(8)
    for collective in (megatron.dist_all_gather_func, megatron.dist_reduce_scatter_func):
        elsewhere = torch.zeros(8)
        collective(elsewhere, values, group=group)
        assert torch.equal(elsewhere, values)


UNCOMPILED = """
import torch
from dsv4_bridge import mcore
from megatron.core import jit
def plain(x): return x
assert jit.jit_fuser(plain) is plain and jit.jit_fuser()(plain) is plain
assert torch.compile.__module__ == "torch" and torch.compile.__name__ == "compile"
"""


def test_megatron_keeps_no_compiler_and_others_do(tmp_path: Path) -> None:
    """To load it takes longer than all else of a start; nothing that runs here is compiled."""
    assert Warm("-c", UNCOMPILED, out=tmp_path / "said").wait(60) == 0, (tmp_path / "said").read_text()


LARGE_PAGES = """
import re
import torch
from dsv4_bridge import mcore
assert mcore.initialize
tensor = torch.ones(64 << 20, dtype=torch.uint8)
inside, address = False, tensor.data_ptr() + (32 << 20)
for line in open("/proc/self/smaps"):
    if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = int(found[1], 16) <= address < int(found[2], 16)
    elif inside and line.startswith("AnonHugePages:"):
        print(line.split()[1])
"""
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(torch.cuda.is_available(), reason="megatron-core computes on the GPU here")
@pytest.mark.skipif(not _PAGES.exists() or "[never]" in _PAGES.read_text(), reason="a system without large pages")
def test_large_tensors_lie_in_large_pages() -> None:
    """In a process of its own: torch reads the setting once, at its first tensor."""
    command = [sys.executable, "-W", "ignore", "-c", LARGE_PAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert int(done.stdout) > 10_000, done.stderr
