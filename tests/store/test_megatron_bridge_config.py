"""A checkpoint whose run_config.yaml Megatron-Bridge wrote: its `model:` section says the model's numbers."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import dsv4, same_files
from dsv4_bridge import BridgeError, export_hf, inspect, make_toy, verify
from dsv4_bridge.store.hf import open_hf
from dsv4_bridge.store.megatron import open_megatron
from dsv4_bridge.store.run_config import FILE

# What its provider leaves at megatron's defaults, or sets otherwise than we state it (0.6.2).
_THEIRS = {
    "_target_": "megatron.bridge.models.mla_provider.MLAModelProvider",
    "apply_rope_fusion": True,
    "attention_backend": {"_target_": "megatron.core.transformer.enums.AttnBackend", "_call_": True, "_args_": [5]},
    "hf_model_id": "deepseek-ai/DeepSeek-V4-Flash",
    "init_method": None,
    "init_method_std": 0.02,
    "kv_lora_rank": 512,
    "moe_layer_freq": [1, 1],
    "moe_router_load_balancing_type": "noaux_tc",
    "mscale": 1.0,
    "norm_topk_prob": True,
    "params_dtype": {"_target_": "torch.bfloat16", "_call_": False},
    "qk_head_dim": 128,
    "rope_type": "yarn",
    "seq_length": 4096,
    "vocab_size": None,
}


def theirs(folder: Path, target: Path, change: Callable[[dict[str, Any]], Any] = lambda model: None) -> Path:
    """A copy of our Megatron folder with the file as Megatron-Bridge writes it, and nothing that travelled along."""
    shutil.copytree(folder, target)
    iteration = target / "iter_0000000"
    model = yaml.safe_load((iteration / FILE).read_text())["model"] | _THEIRS
    change(model)
    body = {"checkpoint": {"save": "/x"}, "model": model, "optimizer": {"lr": 1e-4}, "train": {"train_iters": 10}}
    (iteration / FILE).write_text(yaml.safe_dump(body))
    shutil.rmtree(iteration / "hf")
    return target


def test_its_numbers_are_the_releases(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    folder = theirs(toy_megatron, tmp_path / "bridge")
    megatron, hf = open_megatron(folder), open_hf(toy_flash)
    assert megatron.spec == hf.spec
    megatron.close()
    hf.close()
    report = inspect(folder)
    assert report.sound and report.variant == "deepseek-ai/DeepSeek-V4-Flash" and not report.notes
    assert verify(folder, toy_flash, "bytes").same and verify(toy_megatron, folder).same


def test_it_is_exported(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    folder = theirs(toy_megatron, tmp_path / "bridge")
    export_hf(folder, tmp_path / "same", like=toy_flash)
    assert same_files(toy_flash, tmp_path / "same") == []
    export_hf(folder, tmp_path / "bf16", encoding="bf16")
    assert verify(toy_flash, tmp_path / "bf16").same


def test_a_release_with_other_numbers_is_refused(toy_megatron: Path, tmp_path: Path) -> None:
    folder = theirs(toy_megatron, tmp_path / "bridge")
    other = make_toy(tmp_path / "pro", "Pro", 3)
    with pytest.raises(BridgeError, match="describe two models"):
        export_hf(folder, tmp_path / "out", like=other)


def test_a_drafter_comes_from_the_release_that_has_one(tmp_path: Path) -> None:
    """The file knows nothing of DSpark."""
    from dsv4_bridge import import_hf

    source = make_toy(tmp_path / "hf", "Flash-0731", 4)
    import_hf(source, tmp_path / "ours")
    folder = theirs(tmp_path / "ours", tmp_path / "bridge")
    export_hf(folder, tmp_path / "same", like=source)
    assert same_files(source, tmp_path / "same") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("o_groups"), "o_groups is missing"),
        (lambda m: m.update(actual_vocab_size=None), "vocab_size is missing"),
        (lambda m: m.update(hidden_size="wide"), "hidden_size"),
        (lambda m: m.update(moe_shared_expert_intermediate_size=7), "no multiple"),
        (lambda m: m.update(moe_ffn_hidden_size=0), "no multiple"),
        (lambda m: m.update(csa_compress_ratios=[4]), "compress_ratios"),
        (lambda m: m.update(moe_router_score_function="sigmoid"), "scoring_func"),
        (lambda m: m.update(share_embeddings_and_output_weights=True), "tie_word_embeddings"),
        (lambda m: m.update(hidden_size=m["hidden_size"] * 2), "its tensors are not those of this model"),
        (lambda m: m.update(num_layers=[[[[1]]]]), "num_hidden_layers"),
        (lambda m: m.update(experimental_attention_variant="dsa"), "nor one of Megatron-Bridge"),
    ],
)
def test_numbers_that_make_no_model(
    change: Callable[[dict[str, Any]], Any], words: str, toy_megatron: Path, tmp_path: Path
) -> None:
    folder = theirs(toy_megatron, tmp_path / "bridge", change)
    with pytest.raises(BridgeError, match=words):
        open_megatron(folder)


def test_the_command(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    folder = theirs(toy_megatron, tmp_path / "bridge")
    done = dsv4("export", folder, tmp_path / "out", "--like", toy_flash)
    assert done.returncode == 0, done.stderr
    assert dsv4("verify", folder, toy_flash).returncode == 0
    (folder / "iter_0000000" / FILE).unlink()
    done = dsv4("inspect", folder)
    assert done.returncode == 2 and "--like" in done.stderr and "Traceback" not in done.stderr
