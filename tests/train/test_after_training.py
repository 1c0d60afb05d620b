"""What comes out of training: a released checkpoint again, that transformers loads, with the trained model's logits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from training import QUICK, make_start, make_text, run, small_spec, small_variant
from typer.testing import CliRunner

from dsv4_bridge import export_hf, make_toy
from dsv4_bridge.cli.app import app
from dsv4_bridge.convert.merge import merge
from dsv4_bridge.errors import BridgeError
from dsv4_bridge.generate.generate import Ask, generate
from dsv4_bridge.lora.adapters import Adapters
from dsv4_bridge.lora.checkpoint import read_adapters
from dsv4_bridge.lora.peft import export_peft
from dsv4_bridge.mcore import build_model, load_weights
from dsv4_bridge.store.small_files import small_files

pytestmark = [pytest.mark.megatron, pytest.mark.hf]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_start(tmp_path_factory.mktemp("after"))


@pytest.fixture(scope="module")
def trained(start: Path) -> Path:
    """An iteration of full fine-tuning in bf16, the draft block included."""
    words = [f"start={start}", f"out={start.parent / 'run'}", f"data.train={make_text(start.parent, start)}"]
    outcome = run("flash-finetune", *words, "data.kind=text", "model.dtype=bf16", "schedule.steps=4", *QUICK)
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
    assert json.loads((tmp_path / "source" / "config.json").read_text())["num_hidden_layers"] == 3


@pytest.mark.parametrize("variant", ["Flash", "Flash-0731"])
def test_a_draft_that_was_not_trained_is_the_source_s(variant: str, tmp_path: Path) -> None:
    """MTP left out of training, or a DSpark drafter, which has no place in Megatron's model."""
    start = make_toy(tmp_path / "hf", variant, 23, spec=small_variant(variant))
    words = [f"start={start}", f"out={tmp_path / 'run'}", f"data.train={make_text(tmp_path, start)}"]
    words += ["data.kind=text", "model.dtype=bf16", "schedule.steps=3", *QUICK]
    outcome = run("flash-finetune-no-mtp", *words)
    assert outcome.checkpoint is not None
    report = export_hf(outcome.checkpoint, tmp_path / "out", start, "source")
    before, after = tensors(start), tensors(tmp_path / "out")
    draft = {name for name in before if name.startswith("mtp.")}
    assert before.keys() == after.keys() and len(draft) > 20
    assert {n: raw(before[n]) for n in draft} == {n: raw(after[n]) for n in draft}
    assert report.lacking == sum(not n.endswith(".scale") for n in draft)
    assert raw(before["layers.1.attn.wq_a.weight"]) != raw(after["layers.1.attn.wq_a.weight"])
    assert (start / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    export_hf(outcome.checkpoint, tmp_path / "plain", start, "bf16")
    assert {n for n in tensors(tmp_path / "plain") if n.startswith("mtp.")} == {
        n for n in draft if not n.endswith(".scale")
    }
    assert export_hf(outcome.checkpoint, tmp_path / "less", start, "source", drop_passengers=True).lacking == 0
    assert tensors(tmp_path / "less").keys() == before.keys() - draft
    assert json.loads((tmp_path / "less" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_run_s_checkpoint_has_the_tokenizer_of_its_start(start: Path, trained: Path) -> None:
    """So that a text can be continued with it, and an export has it without --like."""
    small = small_files(start)
    assert "tokenizer.json" in small
    assert {name: path.read_bytes() for name, path in small_files(trained / "hf").items()} == {
        name: path.read_bytes() for name, path in small.items()
    }
    (said,) = generate(trained, Ask(texts=["import"], max_new_tokens=3)).continuations
    assert len(said.ids) == 3 and said.text is not None


def test_a_run_from_fresh_weights_carries_the_tokenizer_it_names(start: Path, tmp_path: Path) -> None:
    words = [
        f"variant={start}",
        "model.dtype=bf16",
        f"data.train={make_text(tmp_path, start)}",
        f"out={tmp_path / 'run'}",
        *QUICK,
    ]
    (tmp_path / "none").mkdir()
    with pytest.raises(BridgeError, match=r"tokenizer=.*none: it has no tokenizer.json"):
        run("flash-pretrain", *words, f"tokenizer={tmp_path / 'none'}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_bytes((start / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(BridgeError, match="tokenizer_sha256"):
        run("flash-pretrain", *words, f"tokenizer={tmp_path / 'other'}")
    for steps in (2, 4):  # the second goes on from the first, and need not say it again
        named = [f"tokenizer={start}"] if steps == 2 else []
        made = run("flash-pretrain", *words, *named, f"schedule.steps={steps}", "schedule.warmup=1").checkpoint
        assert made is not None
        small = {name: path.read_bytes() for name, path in small_files(made / "hf").items()}
        assert small == {name: path.read_bytes() for name, path in small_files(start).items()}
    export_hf(made, tmp_path / "out", None, "bf16")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()


def test_adapters_go_on_from_adapters(start: Path, trained: Path, tmp_path: Path) -> None:
    """Of a folder of peft, and of a run; what is no whole model says where adapters go."""
    text = make_text(tmp_path, start)
    same = [f"start={trained}", f"data.train={text}", "data.kind=text", "lora.rank=3", "lora.targets=[attn]", *QUICK]
    first = run("flash-lora", *same, "schedule.steps=3", f"out={tmp_path / 'first'}").checkpoint
    assert first is not None
    adapters, spec = read_adapters(first)
    export_peft(adapters, spec, tmp_path / "peft")
    still = ["schedule.steps=1", "schedule.warmup=0", "optimizer.lr=1e-35", "optimizer.min_lr=1e-35"]
    for number, source in enumerate((tmp_path / "peft", first)):
        out = tmp_path / f"next{number}"
        again = run("flash-lora", *same, *still, f"lora.start={source}", f"out={out}").checkpoint
        assert again is not None
        found = read_adapters(again)[0].values
        assert found.keys() == adapters.values.keys()
        assert all(raw(a) == raw(b) for name, one in found.items() for a, b in zip(one[:2], adapters.values[name][:2]))
        assert all(bool(one.b.any()) for one in found.values())
    one = {name: adapter for name, adapter in adapters.values.items() if name.startswith("layers.1.")}
    export_peft(Adapters(adapters.lora, one), spec, tmp_path / "one layer")
    out = tmp_path / "from one layer"
    again = run("flash-lora", *same, *still, f"lora.start={tmp_path / 'one layer'}", f"out={out}").checkpoint
    assert again is not None
    for name, adapter in read_adapters(again)[0].values.items():
        assert raw(adapter.b) == raw(adapters.values[name].b) if name in one else float(adapter.b.abs().max()) < 1e-30
    for full in (
        lambda: run("flash-lora", *same, f"lora.start={trained}", f"out={tmp_path / 'full'}"),
        lambda: merge(start, trained, tmp_path / "full"),
    ):
        with pytest.raises(BridgeError, match=r"run of full training.* use dsv4 export: `dsv4 export"):
            full()
    refused = CliRunner().invoke(app, ["lora", str(first), str(tmp_path / "peft")])
    assert isinstance(refused.exception, BridgeError) and "--overwrite replaces adapters" in str(refused.exception)
    assert CliRunner().invoke(app, ["lora", str(first), str(tmp_path / "peft"), "--overwrite"]).exit_code == 0
    with pytest.raises(BridgeError, match=r"theirs have rank 3, the model's 5"):
        run("flash-lora", *same, "lora.rank=5", f"lora.start={first}", f"out={tmp_path / 'other'}")
    with pytest.raises(BridgeError, match=r"without lora\.rank"):
        run("flash-finetune", *same[:3], f"lora.start={first}", f"out={tmp_path / 'none'}")
    with pytest.raises(BridgeError, match=r"holds adapters and not the model they adapt; `dsv4 lora .* `dsv4 merge"):
        export_hf(first, tmp_path / "hf", start)
