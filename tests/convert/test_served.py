"""What servers make of our folders, by the rules of their published loaders: the weights that they would multiply by.

The rules are those of vLLM 0.33, SGLang 0.5.23, transformers 5.23, DeepSeek's convert.py (V4 release) and llama.cpp's
converter, written down here as far as they decide a number; docs/guides/export-and-serve.md has the table.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dsv4_bridge import Options, export_hf, import_hf, inspect, make_toy, repack, verify
from dsv4_bridge.store.hf import open_hf
from dsv4_bridge.store.hf_config import read_config

Folder = dict[str, Tensor]


class RefusedError(Exception):
    """A server's loader stops."""


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def load(folder: Path) -> Folder:
    found: Folder = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return found


def tiled(codes: Tensor, scale: Tensor) -> Tensor:
    """FP8 codes times a float32 scale a tile of 128x128."""
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return codes.float() * wide[: codes.shape[0], : codes.shape[1]]


def grouped(packed: Tensor, scale: Tensor) -> Tensor:
    """Two E2M1 codes a byte times a float32 scale a group of 32."""
    raw = packed.view(torch.uint8).long()
    values = torch.stack([E2M1[raw & 15], E2M1[raw >> 4]], -1).flatten(-2)
    return values * scale.repeat_interleave(32, 1)


def powers(scale: Tensor) -> Tensor:
    return torch.exp2(scale.view(torch.uint8).double() - 127).float()


def vllm(tensors: Folder, config: dict, name: str) -> Tensor:
    """`expert_dtype` decides for experts: fp8 has float32 scale parameters, into which E8M0 is copied as bytes."""
    weight, scale = tensors[name], tensors.get(name.removesuffix("weight") + "scale")
    if scale is None:
        return weight.float()
    if ".experts." not in name:
        return tiled(weight, scale.float())
    if "expert_dtype" not in config:
        raise RefusedError("not known without expert_dtype")
    if config["expert_dtype"] == "fp4":
        return grouped(weight, powers(scale))
    return tiled(weight, scale.view(torch.uint8).float() if scale.dtype == torch.float8_e8m0fnu else scale)


def by_dtype(tensors: Folder, config: dict, name: str) -> Tensor:
    """SGLang and transformers: the element type of the weight decides, scales are converted as numbers."""
    weight, scale = tensors[name], tensors.get(name.removesuffix("weight") + "scale")
    if scale is None:
        return weight.float()
    return grouped(weight, powers(scale)) if weight.dtype == torch.int8 else tiled(weight, scale.float())


def convert_py(tensors: Folder, config: dict, name: str) -> Tensor:
    """DeepSeek's: `wo_a` must be FP8; the rest by element type."""
    if "layers.0.attn.wo_a.scale" not in tensors:
        raise RefusedError("KeyError")
    return by_dtype(tensors, config, name)


def llama_cpp(tensors: Folder, config: dict, name: str) -> Tensor:
    """Experts must be MXFP4."""
    if ".experts." in name and tensors[name].dtype != torch.int8:
        raise RefusedError("FP4 scale shape")
    return by_dtype(tensors, config, name)


SERVERS: dict[str, Callable[[Folder, dict, str], Tensor]] = {
    "vLLM": vllm,
    "SGLang": by_dtype,
    "transformers": by_dtype,
    "convert.py": convert_py,
    "llama.cpp": llama_cpp,
}
VARIANTS = ("Flash", "Flash-Base", "Flash-0731", "Flash-FP8", "Flash-BF16")


@pytest.fixture(scope="module", params=VARIANTS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    base = tmp_path_factory.mktemp("served")
    source = make_toy(base / "source", request.param, 41)
    lossy = request.param in ("Flash-Base", "Flash-BF16")
    made = {"source": source}
    for encoding in ("fp8", "bf16"):
        repack(source, base / encoding, encoding, Options(), allow_lossy=lossy)
        made[encoding] = base / encoding
    import_hf(source, base / "megatron", allow_lossy=lossy)
    export_hf(base / "megatron", base / "exported", source, "fp8", allow_lossy=lossy)
    made["exported fp8"] = base / "exported"
    yield made | {"variant": Path(request.param)}
    meant.cache_clear()


@cache
def meant(folder: Path) -> tuple[Folder, dict[str, Any], dict[str, Tensor]]:
    """What a folder holds, its config.json, and the matrices that it means, by the names of their weights."""
    tensors, checkpoint = load(folder), open_hf(folder)
    coded = [item for item in checkpoint.plan.items if item.row.encoding in ("linear", "expert")]
    names = [checkpoint.bound[item.name].weight_name for item in coded]
    checkpoint.close()
    return tensors, read_config(folder / "config.json"), {name: decoded(tensors, name) for name in names}


def right(folder: Path, server: str) -> str:
    """What a server makes of a folder: `right`, or the first thing that is wrong."""
    tensors, config, matrices = meant(folder)
    for name, matrix in matrices.items():
        try:
            served = SERVERS[server](tensors, config, name)
        except RefusedError as error:
            return f"refused: {error}"
        if not torch.equal(served, matrix):
            return f"wrong: {name}"
    return "right"


def decoded(tensors: Folder, name: str) -> Tensor:
    """The readable definition of codec/reference.py, in float32."""
    weight, scale = tensors[name], tensors.get(name.removesuffix("weight") + "scale")
    if scale is None:
        return weight.float()
    factor = powers(scale) if scale.dtype == torch.float8_e8m0fnu else scale
    return grouped(weight, factor) if weight.dtype == torch.int8 else tiled(weight, factor)


# encoding -> server -> what it makes of the variants that are not "right"
EXPECTED = {
    ("source", "vLLM"): {"Flash-FP8": "refused: not known without expert_dtype"},
    ("source", "convert.py"): {"Flash-BF16": "refused: KeyError"},
    ("bf16", "convert.py"): dict.fromkeys(VARIANTS, "refused: KeyError"),
    ("source", "llama.cpp"): dict.fromkeys(("Flash-Base", "Flash-FP8", "Flash-BF16"), "refused: FP4 scale shape"),
    ("bf16", "llama.cpp"): dict.fromkeys(VARIANTS, "refused: FP4 scale shape"),
    ("fp8", "llama.cpp"): dict.fromkeys(VARIANTS, "refused: FP4 scale shape"),
    ("exported fp8", "llama.cpp"): dict.fromkeys(VARIANTS, "refused: FP4 scale shape"),
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("encoding", ["source", "fp8", "bf16", "exported fp8"])
def test_trap33_a_server_multiplies_by_what_we_mean(encoding: str, server: str, folders: dict[str, Path]) -> None:
    variant = str(folders["variant"])
    assert right(folders[encoding], server) == EXPECTED.get((encoding, server), {}).get(variant, "right")


def test_fp8_keeps_every_value_and_says_what_it_is(folders: dict[str, Path]) -> None:
    if str(folders["variant"]) in ("Flash-Base", "Flash-BF16"):  # those are rounded, or copied
        return
    for name in ("fp8", "exported fp8"):
        assert verify(folders["source"], folders[name], "values").same
        report = inspect(folders[name])
        assert report.sound and report.notes == ()
        assert report.encodings["expert"] == "fp8_f32" and report.encodings["linear"] == "fp8"
        assert read_config(folders[name] / "config.json")["expert_dtype"] == "fp8"
        for key, scale in load(folders[name]).items():
            if ".experts." in key and key.endswith(".scale"):
                mantissa, _ = np.frexp(scale.numpy())
                assert scale.dtype == torch.float32 and set(np.unique(mantissa)) == {0.5}, key


def test_e8m0_expert_scales_under_expert_dtype_fp8_are_told_and_mended(tmp_path: Path) -> None:
    """What earlier versions of this tool wrote."""
    import json

    old = make_toy(tmp_path / "old", "Flash-FP8", 43)
    config = read_config(old / "config.json") | {"expert_dtype": "fp8"}
    (old / "config.json").write_text(json.dumps(config))
    assert right(old, "vLLM").startswith("wrong")
    assert any("vLLM copies their bytes as numbers" in note for note in inspect(old).notes)
    repack(old, tmp_path / "new", "fp8")
    assert verify(old, tmp_path / "new").same
    assert right(tmp_path / "new", "vLLM") == "right" and inspect(tmp_path / "new").notes == ()


def test_every_e8m0_scale_has_a_float32() -> None:
    from dsv4_bridge.convert.emitter import as_float32

    wide = np.frombuffer(as_float32(bytes(range(255))), "<f4").astype(np.float64)
    assert np.array_equal(wide, np.exp2(np.arange(255) - 127.0))
