"""DeepSeek-V4-Flash-Vision-Exp as far as others describe it: refused by name by every verb, whatever tells."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import add, edit, linked, listing, one_message, reconfig, refuses, several

from conftest import dsv4
from dsv4_bridge import BridgeError, examine, export_hf, import_hf, inspect, make_toy, plan, repack, verify
from dsv4_bridge.spec.spec import ModelSpec

# What NeMo AutoModel 0.7.0 and public pages name: flat keys beside V4's, a tower, an aligner, marks, biases of gates.
KEYS = {"vision_min_pixels": 147456, "vision_max_n_token": 384, "vision_max_wh_ratio": 8, "rms_norm_eps": 1e-20}
TENSORS = {
    "vision.patch_embed.proj.weight": (8, 12),
    "vision.blocks.0.attn.wqkv.weight": (24, 8),
    "aligner.w1.weight": (16, 8),
    "image_start": (16,),
    "image_pad": (16,),
    "layers.1.ffn.gate.bias_vl": (8,),
    "mtp.2.ffn.gate.bias_vl": (8,),
}
REASON = "no list of its tensors is known that a table could be held against"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("vision") / "hf", "Flash-0731", random.randrange(1 << 30))


def seeing(toy: Path, folder: Path, *names: str, keys: dict[str, Any]) -> Path:
    """A copy of the toy with these tensors and keys besides."""
    linked(toy, folder)
    if names:
        kinds = {name: "F32" if name.endswith("bias_vl") else "BF16" for name in names}
        sizes = {name: math.prod(TENSORS[name]) * (4 if kinds[name] == "F32" else 2) for name in names}
        edit(several(*(add(name, kinds[name], TENSORS[name], sizes[name]) for name in names)))(folder)
    if keys:
        reconfig(**keys)(folder)
    return folder


def verbs(folder: Path, toy: Path, megatron: Path, out: Path) -> list[Callable[[], Any]]:
    return [
        lambda: inspect(folder),
        lambda: plan(folder),
        lambda: examine(folder),
        lambda: import_hf(folder, out),
        lambda: import_hf(folder, out, drop_passengers=True),
        lambda: repack(folder, out, "bf16"),
        lambda: export_hf(megatron, out, folder),
        lambda: verify(folder, toy),
        lambda: verify(toy, folder),
        lambda: ModelSpec.from_pretrained(folder),
    ]


def test_the_folder_as_described_is_refused_by_every_verb_and_nothing_is_written(toy: Path, tmp_path: Path) -> None:
    import_hf(toy, megatron := tmp_path / "megatron")
    folder = seeing(toy, tmp_path / "hf", *TENSORS, keys=KEYS)
    before = listing(tmp_path)
    for call in verbs(folder, toy, megatron, tmp_path / "out"):
        said = refuses(call, r"this is DeepSeek-V4-Flash-Vision-Exp \(vision_max_n_token.*vision tower.*1e-20")
        assert REASON in said and "not converted in part" in said
    for words in (("inspect", folder), ("import", folder, tmp_path / "out"), ("verify", folder, toy)):
        assert REASON in " ".join(one_message(dsv4(*words)).split())
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", TENSORS)
def test_any_of_its_tensors_tells_where_config_json_does_not(name: str, toy: Path, tmp_path: Path) -> None:
    folder = seeing(toy, tmp_path / "hf", name, keys={})
    for call in (lambda: inspect(folder), lambda: import_hf(folder, tmp_path / "out")):
        assert name in refuses(call, r"tensor '.*' belongs to DeepSeek-V4-Flash-Vision-Exp\. .*" + REASON)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", [k for k in KEYS if k.startswith("vision")])
def test_any_of_its_keys_tells(key: str, toy: Path, tmp_path: Path) -> None:
    folder = seeing(toy, tmp_path / "hf", keys={key: KEYS[key]})
    with pytest.raises(BridgeError, match=rf"Vision-Exp \({key}\)"):
        inspect(folder)
    assert json.loads((folder / "config.json").read_bytes())[key] == KEYS[key]
