"""A folder of another kind than is wanted: said what it is and what to do; links that lead out are not followed."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import one_message, refuses
from safetensors.numpy import save_file

from conftest import dsv4, same_files
from dsv4_bridge import Options, export_hf, import_hf, inspect, repack, verify
from dsv4_bridge.store.small_files import small_files


def test_a_megatron_checkpoint_where_a_folder_is_wanted(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    refuses(lambda: import_hf(toy_megatron, tmp_path / "x"), "is a Megatron checkpoint.*`dsv4 export` makes one of it")
    refuses(lambda: export_hf(toy_flash, tmp_path / "x", toy_megatron), "is a Megatron checkpoint")
    refuses(lambda: export_hf(toy_flash, tmp_path / "x"), "a Hugging Face folder, .*`dsv4 import` makes one of it")
    refuses(lambda: export_hf(toy_flash, tmp_path / "x", toy_flash), "a Hugging Face folder")


def test_a_megatron_root_without_its_tracker(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_megatron, tmp_path / "m", copy_function=os.link)
    (folder / "latest_checkpointed_iteration.txt").unlink()
    message = "it has iterations and no latest_checkpointed_iteration.txt; write the number of one"
    refuses(lambda: inspect(folder), message)
    refuses(lambda: verify(toy_flash, folder), message)
    refuses(lambda: export_hf(folder, tmp_path / "x", toy_flash), message)
    assert verify(toy_flash, folder / "iter_0000000").same


@pytest.mark.parametrize("method", ["awq", "modelopt", "compressed-tensors", "gptq", "bitsandbytes", 7])
def test_other_quantisations_are_refused_by_name(method: object, toy_flash: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_flash, tmp_path / "hf", copy_function=os.link)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    for act in (lambda: inspect(folder), lambda: import_hf(folder, tmp_path / "x")):
        refuses(act, f"quant_method is {method!r}")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer.*git lfs pull"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "a GGUF file"),
    ],
)
def test_what_stands_in_a_shards_place_is_named(content: bytes, message: str, toy_flash: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_flash, tmp_path / "hf", copy_function=os.link)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    shard.write_bytes(content)
    refuses(lambda: inspect(folder), message)


def test_folders_that_are_nearly_one(tmp_path: Path, toy_flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_flash, tmp_path / "data" / "flash", copy_function=os.link)
    offline = {"HF_HUB_OFFLINE": "1"}
    said = one_message(dsv4("import", "data/flsh", "out", **offline))
    assert "there is no such folder; data/flash is there. As a repository on the Hub" in said
    said = one_message(dsv4("import", "DeepSeek-V4-Flash", "out", **offline))
    assert "on the Hub it is deepseek-ai/DeepSeek-V4-Flash" in said
    assert "addresses are neither read" in one_message(dsv4("inspect", "https://example.com/x/y", **offline))
    assert "addresses are neither read" in one_message(dsv4("import", "s3://bucket/x", "out", **offline))
    (tmp_path / "models--a--b" / "snapshots" / "c").mkdir(parents=True)
    assert "name the folder below" in one_message(dsv4("inspect", "models--a--b", **offline))
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "x.gguf").write_bytes(b"GGUF")
    assert "GGUF files are not read" in one_message(dsv4("inspect", "gguf", **offline))


def test_adapters_and_data_are_no_models(toy_flash: Path, tmp_path: Path) -> None:
    for name, message in (
        ("adapter_config.json", "holds adapters, and a whole model is wanted; `dsv4 merge HF .* OUT`"),
        ("chat_data.json", "is training data that `dsv4 data` made, and a model is wanted"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        for act in (lambda: inspect(folder), lambda: import_hf(folder, tmp_path / "x"), lambda: verify(folder, folder)):  # noqa: B023
            refuses(act, message)
    assert "holds adapters" in one_message(dsv4("merge", tmp_path / "adapter_config", toy_flash, tmp_path / "x"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_pointers_in_place_of_small_files(name: str, toy_flash: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_flash, tmp_path / "hf", copy_function=os.link)
    (folder / name).unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    (tmp_path / "t.txt").write_text("text")
    verb = ["data", tmp_path / "t.txt", tmp_path / "out", "--tokenizer"] if "tok" in name else ["inspect"]
    assert "Git LFS pointer in place of the file; run `git lfs pull`" in one_message(dsv4(*verb, folder))


@pytest.mark.parametrize(
    ("endings", "whose"),
    [
        ((".weight", ".weight_scale", ".weight_scale_2", ".input_scale"), "as ModelOpt saves NVFP4"),
        ((".qweight", ".qzeros", ".scales"), "as AWQ and GPTQ save"),
        ((".weight_packed", ".weight_scale", ".weight_shape"), "as compressed-tensors saves"),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_tensors_of_other_encodings_are_named(
    endings: tuple[str, ...], whose: str, beside: bool, toy_flash: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(toy_flash / "config.json", folder)
    tensors = {f"layers.0.ffn.experts.0.w1{ending}": np.zeros((64, 16), np.uint8) for ending in endings}
    tensors |= {"embed.weight": np.zeros((4, 4), np.float32)} if beside else {}
    save_file(tensors, folder / "model.safetensors")
    refuses(lambda: import_hf(folder, tmp_path / "x"), f"{whose}.*, which is not read: take the release")


def test_overwrite_keeps_to_the_kind(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    released = shutil.copytree(toy_flash, tmp_path / "released", copy_function=os.link)
    megatron = shutil.copytree(toy_megatron, tmp_path / "megatron", copy_function=os.link)
    over = Options(overwrite=True)
    refuses(lambda: import_hf(toy_flash, released, over), "a Hugging Face folder is there, and this makes a Megatron")
    refuses(lambda: repack(toy_flash, megatron, "bf16", over), "a Megatron checkpoint is there")
    assert same_files(released, toy_flash) == [] and same_files(megatron, toy_megatron) == []


def test_a_link_that_leads_out_does_not_travel(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not yours")
    folder = shutil.copytree(toy_flash, tmp_path / "hf", copy_function=os.link)
    (folder / "LICENSE-2").symlink_to(tmp_path / "secret")
    message = "LICENSE-2: a link to .*secret, which is no file of a checkpoint"
    refuses(lambda: import_hf(folder, tmp_path / "x"), message)
    refuses(lambda: export_hf(toy_megatron, tmp_path / "x", folder), message)
    refuses(lambda: repack(folder, tmp_path / "x", "bf16"), message)
    assert not (tmp_path / "x").exists()
    (folder / "LICENSE-2").unlink()
    (folder / "encoding").mkdir(exist_ok=True)
    (folder / "encoding" / "more.py").symlink_to(tmp_path / "secret")
    refuses(lambda: small_files(folder), "no file of a checkpoint")
    (folder / "encoding" / "more.py").unlink()
    (folder / "LICENSE-3").symlink_to("LICENSE-3")  # round in a circle: no file
    assert "LICENSE-3" not in small_files(folder)


def test_links_that_hold_a_checkpoint_together_are_followed(toy_flash: Path, tmp_path: Path) -> None:
    """Within the folder, into the Hub's cache, and to another checkpoint's file of the same name."""
    other = tmp_path / "links"
    other.mkdir()
    for path in toy_flash.iterdir():
        (other / path.name).symlink_to(path)
    assert small_files(other).keys() >= {"tokenizer.json", "generation_config.json"}
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / ("0" * 40)
    shutil.copytree(toy_flash, snapshot, copy_function=os.link)
    shutil.move(snapshot / "tokenizer.json", cache / "blobs" / "abc")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    assert small_files(snapshot).keys() == small_files(toy_flash).keys()
    folder = shutil.copytree(toy_flash, tmp_path / "inside", copy_function=os.link)
    (folder / "LICENSE-2").symlink_to("tokenizer.json")
    assert "LICENSE-2" in small_files(folder)
