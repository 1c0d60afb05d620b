"""Folders as other people's Megatron leaves them, made from their documented layout: what opens, what is refused."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import dsv4, same_files
from dsv4_bridge import BridgeError, export_hf, import_hf, inspect, rename, verify
from dsv4_bridge.spec.megatron import Naming
from dsv4_bridge.store.run_config import FILE
from dsv4_bridge.store.torch_dist.frames import ObjectRecord, TensorRecord, extra_state_item, metadata_bytes
from dsv4_bridge.store.torch_dist.reader import open_torch_dist

ITERATION = "iter_0000000"
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "megatron.md"


@pytest.fixture(scope="module")
def checkpoints(toy_flash: Path, toy_megatron: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    hybrid = tmp_path_factory.mktemp("hybrid") / "m"
    import_hf(toy_flash, hybrid, naming="hybrid")
    return {"gpt": toy_megatron, "hybrid": hybrid}


def rewritten(folder: Path, key: Callable[[str], str], more: dict[str, bytes] | None = None) -> None:
    """Give an iteration's tensors and objects other keys, and further objects."""
    with open_torch_dist(folder) as reader:
        tensors = [TensorRecord(key(k), t.dtype, t.shape, t.chunks) for k, t in reader.tensors.items()]
        objects = [ObjectRecord(key(k), o.file, o.offset, o.length) for k, o in reader.objects.items()]
    for number, (name, item) in enumerate((more or {}).items()):
        (folder / f"state_{number}.distcp").write_bytes(item)
        objects.append(ObjectRecord(name, f"state_{number}.distcp", 0, len(item)))
    (folder / ".metadata").write_bytes(metadata_bytes(tensors, objects))


def megatron_lm(source: Path, out: Path) -> Path:
    """As `--save` of Megatron-LM leaves it: arguments in common.pt, states of every module, an iteration of its own."""
    torch = pytest.importorskip("torch")
    iteration = out / "iter_0000500"
    shutil.copytree(source / ITERATION, iteration)
    (iteration / FILE).unlink()
    shutil.rmtree(iteration / "hf")
    more = {"rng_state/shard_0_1": extra_state_item(), "decoder.layers.0.mlp._extra_state/shard_0_1.0": b""}
    rewritten(iteration, lambda k: k, {k: v or extra_state_item() for k, v in more.items()})
    state = {"args": argparse.Namespace(num_layers=6, hidden_size=256), "checkpoint_version": 3.0, "iteration": 500}
    torch.save(state, iteration / "common.pt")
    (out / "latest_checkpointed_iteration.txt").write_text("500")
    return out


@pytest.mark.parametrize("naming", ["gpt", "hybrid"])
def test_megatron_lm(naming: Naming, checkpoints: dict[str, Path], toy_flash: Path, tmp_path: Path) -> None:
    saved = megatron_lm(checkpoints[naming], tmp_path / "saved")
    export_hf(saved, tmp_path / "back", like=toy_flash)
    assert same_files(toy_flash, tmp_path / "back") == []
    done = dsv4("inspect", saved)
    assert done.returncode == 2 and "--like" in done.stderr and "Traceback" not in done.stderr
    if naming == "gpt":
        with pytest.raises(BridgeError, match="--like"):
            rename(saved, tmp_path / "hybrid", "hybrid")
        rename(saved, tmp_path / "hybrid", "hybrid", like=toy_flash)
        keys = open_torch_dist(tmp_path / "hybrid").objects
        assert {"decoder.layers.1.inner_layer.mlp._extra_state/shard_0_1.0", "rng_state/shard_0_1"} <= set(keys)
        assert "output_layer._extra_state/shard_0_1" in keys
        export_hf(tmp_path / "hybrid", tmp_path / "again", like=toy_flash)
        assert same_files(toy_flash, tmp_path / "again") == []


def bridge(source: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """As Megatron-Bridge leaves it: `run_config.yaml` with sections of its own, nothing that travelled along."""
    shutil.copytree(source, out)
    file = out / ITERATION / FILE
    model = yaml.safe_load(file.read_text())["model"] | {"moe_layer_freq": [1] * 6, "norm_topk_prob": True}
    change(model)
    file.write_text(yaml.safe_dump({"checkpoint": {"save": "/x"}, "model": model, "train": {"train_iters": 10}}))
    shutil.rmtree(out / ITERATION / "hf")
    return out


def _by_layers(model: dict[str, Any]) -> None:
    """Dev's HybridModel counts both halves of a block, under the old names."""
    model["moe_n_hash_layers"] = 2 * model.pop("moe_num_hash_layers")
    model["actual_vocab_size"] = model.pop("hash_moe_vocab_size")


def _pull_request(model: dict[str, Any]) -> None:
    """Megatron-Bridge 5860: the old name, counted in blocks."""
    model["moe_n_hash_layers"] = model.pop("moe_num_hash_layers")
    model["hybrid_layer_pattern"] += "/WE"


@pytest.mark.parametrize("change", [lambda model: None, _by_layers, _pull_request])
def test_megatron_bridge_hybrid(
    change: Callable[[dict[str, Any]], Any], checkpoints: dict[str, Path], toy_flash: Path, tmp_path: Path
) -> None:
    folder = bridge(checkpoints["hybrid"], tmp_path / "bridge", change)
    report = inspect(folder)
    assert report.sound and report.naming == "hybrid"
    assert verify(toy_flash, folder, "values").same
    rename(folder, tmp_path / "gpt", "gpt")
    model = yaml.safe_load((tmp_path / "gpt" / ITERATION / FILE).read_text())["model"]
    assert model["num_layers"] == 6 and model["o_groups"] and "hybrid_layer_pattern" not in model
    assert model["moe_layer_freq"] == 1  # a list of the other model's layers would be of the wrong length
    assert model["_target_"].endswith("MLAModelProvider") and model["norm_topk_prob"] is True
    assert verify(toy_flash, tmp_path / "gpt", "values").same
    export_hf(tmp_path / "gpt", tmp_path / "back", like=toy_flash)
    assert same_files(toy_flash, tmp_path / "back") == []


def test_ms_swift(toy_megatron: Path, toy_flash: Path, tmp_path: Path) -> None:
    """mcore-bridge leaves `args.json` beside the iterations, and no run_config.yaml."""
    saved = megatron_lm(toy_megatron, tmp_path / "swift")
    (saved / "args.json").write_text(json.dumps({"model_type": "deepseek_v4", "torch_dtype": "bfloat16"}))
    export_hf(saved, tmp_path / "back", like=toy_flash)
    assert same_files(toy_flash, tmp_path / "back") == []
    for call in (lambda: inspect(saved), lambda: export_hf(saved, tmp_path / "none", None, "bf16")):
        with pytest.raises(BridgeError, match=r"no run_config\.yaml of this tool, nor one of Megatron-Bridge .*--like"):
            call()
    group = "self_attention.linear_o_group_proj"
    rewritten(saved / "iter_0000500", lambda k: f"{k}.weight0" if k.endswith(group) else k)
    with pytest.raises(BridgeError, match=r"one weight a group \(mcore-bridge with fp8_param\)"):
        export_hf(saved, tmp_path / "none", like=toy_flash)


def test_nemo_is_refused_with_the_reason(toy_megatron: Path, toy_flash: Path, tmp_path: Path) -> None:
    weights = tmp_path / "nemo" / "weights"
    shutil.copytree(toy_megatron / ITERATION, weights)
    (weights / FILE).unlink()
    rewritten(weights, lambda k: f"module.{k}")
    with pytest.raises(BridgeError, match="as NeMo 2 saves its models"):
        export_hf(weights, tmp_path / "back", like=toy_flash)
    root, out = weights.parent, tmp_path / "back"
    (root / "context").mkdir()
    (root / "context" / "model.yaml").write_text("_target_: x\n")
    calls = (
        lambda: export_hf(root, out, like=toy_flash),
        lambda: import_hf(root, out),
        lambda: inspect(root),
        lambda: verify(toy_flash, root),
        lambda: rename(root, out, "hybrid"),
    )
    for call in calls:
        with pytest.raises(BridgeError, match=r"a checkpoint of NeMo 2 .* has no DeepSeek-V4"):
            call()


def test_tensors_behind_a_prefix_are_told_of_not_a_contradiction(toy_megatron: Path, tmp_path: Path) -> None:
    """Without an `mtp.` key the spec has no draft, which is no contradiction of its run_config.yaml."""
    shutil.copytree(toy_megatron, tmp_path / "m")
    rewritten(tmp_path / "m" / ITERATION, lambda k: f"model.{k}")
    found = inspect(tmp_path / "m")
    assert not found.notes and {f.kind for f in found.findings} == {"missing", "unknown"}
    with pytest.raises(BridgeError, match="its tensors are not those of this model"):
        export_hf(tmp_path / "m", tmp_path / "out", None, "bf16")


def test_a_body_under_its_live_name_is_told(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["gpt"], tmp_path / "m")
    rewritten(tmp_path / "m" / ITERATION, lambda k: k.replace(".transformer_layer.", ".mtp_model_layer."))
    report = inspect(tmp_path / "m")
    assert any("live name of an MTP layer" in str(f) for f in report.findings)
    with pytest.raises(BridgeError, match="transformer_layer"):
        rename(tmp_path / "m", tmp_path / "out", "hybrid")


# Row of the page's table of refusals -> how such a folder's keys differ.
OTHER_KEYS: dict[str, Callable[[str], str]] = {
    "NeMo 2, its `weights/`": lambda k: f"module.{k}",
    "mcore-bridge with `fp8_param`": lambda k: f"{k}.weight3" if k.endswith("linear_o_group_proj") else k,
    "`hetereogenous_dist_checkpoint` off": lambda k: k.replace("decoder.layers.0.", "decoder.layers."),
    "`singleton_local_shards` on": lambda k: f"{k}_w" if k.endswith("linear_fc1.weight") else k,
    "the live name of an MTP layer's body": lambda k: k.replace(".transformer_layer.", ".mtp_model_layer."),
}


@pytest.mark.parametrize("what", OTHER_KEYS)
def test_the_page_has_the_words_that_refuse(what: str, toy_megatron: Path, toy_flash: Path, tmp_path: Path) -> None:
    rows = (line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("|"))
    words = next(row[1] for row in rows if row[0] == what).strip("`").removeprefix("unknown  ")
    shutil.copytree(toy_megatron, tmp_path / "m")
    rewritten(tmp_path / "m" / ITERATION, OTHER_KEYS[what])
    with pytest.raises(BridgeError) as caught:
        export_hf(tmp_path / "m", tmp_path / "out", like=toy_flash)
    assert words in str(caught.value).replace("`", "") and not (tmp_path / "out").exists()
