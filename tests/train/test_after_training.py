"""What comes out of training: a released checkpoint again, that transformers loads, with the trained model's logits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from training import make_start, make_text, run, small_spec

from dsv4_bridge import export_hf
from dsv4_bridge.mcore import build_model, load_weights

pytestmark = [pytest.mark.megatron, pytest.mark.hf]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("after"))


@pytest.fixture(scope="module")
def trained(start: Path) -> Path:
    """An iteration of full fine-tuning in bf16, the draft block included."""
    words = [f"start={start}", f"out={start.parent / 'run'}", f"data.train={make_text(start.parent, start)}"]
    outcome = run("flash-finetune", *words, "data.kind=text", "model.dtype=bf16", "schedule.steps=4")
    assert outcome.checkpoint is not None
    return outcome.checkpoint


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def transformers_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(ids).logits


def our_logits(checkpoint: Path, ids: torch.Tensor) -> torch.Tensor:
    model = build_model(small_spec().without_draft()).eval()
    load_weights(model, checkpoint)
    with torch.no_grad():
        return model(ids)


def test_bf16_export_has_the_trained_models_logits_in_transformers(start: Path, trained: Path, tmp_path: Path) -> None:
    export_hf(trained, tmp_path / "bf16", start, "bf16")
    ids = torch.randint(0, 512, (2, 70), generator=torch.Generator().manual_seed(3))
    ours, before = our_logits(trained, ids), our_logits(start, ids)
    assert (ours - before).abs().max() > 0.05 * ours.abs().max()  # it has learned something
    theirs = transformers_logits(tmp_path / "bf16", ids)
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()


def test_source_export_keeps_what_training_did_not_touch(start: Path, trained: Path, tmp_path: Path) -> None:
    export_hf(trained, tmp_path / "source", start, "source")
    before, after = tensors(start), tensors(tmp_path / "source")
    assert before.keys() == after.keys()
    assert all(after[n].dtype == t.dtype and after[n].shape == t.shape for n, t in before.items())
    same = {n for n, t in before.items() if raw(t) == raw(after[n])}
    # Tables, the biases of the experts and the indexers rest; everything that is a matrix moved.
    frozen = {n for n in before if ".indexer." in n or n.endswith(("tid2eid", "gate.bias"))}
    assert len(frozen) > 10 and frozen <= same
    ends = ("wq_a.weight", "wo_b.weight", "embed.weight", "head.weight", "attn_norm.weight")
    moved = {name for name in before if name.endswith(ends)} - frozen
    assert len(moved) > 12 and moved & same == set()
    ids = torch.randint(0, 512, (2, 70), generator=torch.Generator().manual_seed(4))
    ours, theirs = our_logits(trained, ids), our_logits(tmp_path / "source", ids)
    # Matrices were rounded to E4M3 and E2M1: half a step of these is 1/16 and 1/4 of a value at most.
    assert 0 < (theirs - ours).norm() < 0.25 * ours.norm()
    assert json.loads((tmp_path / "source" / "config.json").read_text())["num_hidden_layers"] == 4
