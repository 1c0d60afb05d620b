"""The codecs on torch tensors equal the compiled ones, byte for byte, on any device."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from dsv4_bridge.codec import CODECS, CodecError, tensors
from dsv4_bridge.spec.dtypes import DTYPES
from dsv4_bridge.spec.encodings import ALLOWED, ENCODINGS, QUANTISED

# What the linear maps of a model that is computed may be stored as.
NAMES = tuple(name for name in ENCODINGS if name in QUANTISED and name in (*ALLOWED["linear"], *ALLOWED["expert"]))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = ((128, 128), (300, 416), (7, 32), (256, 1024))
LEGAL = {"mxfp4": (0, 252), "fp8": (3, 246), "fp8_f32": (12, 240)}


def random_codes(name: str, shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Every kind of byte, and scales from end to end."""
    how = ENCODINGS[name]
    codes = rng.integers(0, 256, how.weight_shape(shape), dtype=np.uint8)
    if name != "mxfp4":
        codes[(codes & 0x7F) == 0x7F] = 0x80
    low, high = LEGAL[name]
    scale = rng.integers(low, high + 1, how.scale_shape(shape)).astype(np.uint8)
    scale.flat[0], scale.flat[-1] = low, high
    if name == "fp8_f32":
        return codes, (np.ldexp(rng.uniform(1, 2, scale.shape), scale.astype(int) - 127)).astype(np.float32)
    return codes, scale


def compiled(name: str, values: np.ndarray, like: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, Any]:
    how = ENCODINGS[name]
    codes = np.full(how.weight_shape(values.shape), 0xAA, np.uint8)
    scale = np.ones(how.scale_shape(values.shape), DTYPES[how.scale_dtype or ""].numpy)
    return codes, scale, CODECS[name].encode(values, like, codes, scale)


def decoded(name: str, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    out = np.empty((len(codes), codes.shape[1] * ENCODINGS[name].packed), np.uint16)
    CODECS[name].decode(codes, scale, out)
    return out


def on(device: str, array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array).to(device)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def back(tensor: torch.Tensor) -> np.ndarray:
    host = tensor.cpu()
    return host.view(torch.uint16).numpy() if host.dtype == torch.bfloat16 else host.numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_the_codec(name: str, shape: tuple[int, int], device: str) -> None:
    codes, scale = random_codes(name, shape, np.random.default_rng(sum(shape)))
    found = tensors.decode(name, on(device, codes), on(device, scale))
    assert np.array_equal(back(found), decoded(name, codes, scale))
    assert not bool(tensors.illegal(name, on(device, codes), on(device, scale)))


@pytest.mark.parametrize("device", DEVICES)
def test_every_pair_of_code_and_scale_is_decoded(device: str) -> None:
    bytes_ = np.tile(np.arange(256, dtype=np.uint8), (253, 1))
    scale = np.repeat(np.arange(253, dtype=np.uint8)[:, None], 16, 1)
    found = tensors.decode("mxfp4", on(device, bytes_), on(device, scale))
    assert np.array_equal(back(found), decoded("mxfp4", bytes_, scale))
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    codes = np.tile(np.concatenate([codes, codes[:2]]), 244)[None]
    scale = np.repeat(np.arange(3, 247, dtype=np.uint8), 2)[None]
    found = tensors.decode("fp8", on(device, codes), on(device, scale))
    assert np.array_equal(back(found), decoded("fp8", codes, scale))


def changed(values: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Some values moved by a step, or made any finite number."""
    moved = values + rng.integers(-1, 2, values.shape).astype(np.uint16)
    anything = rng.integers(0, 1 << 16, values.shape, dtype=np.uint16)
    new = np.where(rng.random(values.shape) < 0.5, moved, anything)
    new[(new & 0x7F80) == 0x7F80] &= 0xBFFF
    return np.where(rng.random(values.shape) < share, new, values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ["kept", "some fresh", "all fresh", "no source"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_encoding_equals_the_codec(name: str, shape: tuple[int, int], case: str, device: str) -> None:
    rng = np.random.default_rng(len(case) + sum(shape))
    codes, scale = random_codes(name, shape, rng)
    values = decoded(name, codes, scale)
    share = {"kept": 0.0, "some fresh": 1.0 / (64 if name == "mxfp4" else 8192)}.get(case, 1.0)
    values = changed(values, share, rng) if share else values
    if case == "all fresh":  # a trained weight
        values = (rng.normal(0, 0.02, shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        values[0, :32] = 0
    like = None if case == "no source" else scale
    wanted = compiled(name, values, like)
    found = tensors.encode(name, on(device, values), None if like is None else on(device, like))
    assert found is not None
    assert np.array_equal(back(found[0]), wanted[0]) and np.array_equal(back(found[1]), wanted[1])
    assert vars(found[2]) == pytest.approx(vars(wanted[2]), rel=1e-9)
    if case == "some fresh":
        assert wanted[2].blocks < 8 or (wanted[2].fresh and wanted[2].kept)
    elif case != "kept":
        assert wanted[2].fresh


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_ties_go_to_even_and_large_values_saturate(name: str, device: str) -> None:
    """Every bf16 of eleven exponents around the codes, under fresh scales of known size."""
    bits = np.arange(0x3B00, 0x4080, dtype=np.uint16)
    values = np.zeros((128, 128 * -(-bits.size // 127)), np.uint16)
    values[0].reshape(-1, 128)[:, :127].flat[: bits.size] = bits
    values[0, 127::128] = 0x40C0 if name == "mxfp4" else 0x43E0  # 6 and 448: scale 1
    values[1] = values[0] | 0x8000
    if name == "mxfp4":
        values[:2, 31::32] = 0x40C0
    wanted = compiled(name, values, None)
    found = tensors.encode(name, on(device, values))
    assert found is not None and wanted[2].rounded_values > 1000
    assert np.array_equal(back(found[0]), wanted[0]) and np.array_equal(back(found[1]), wanted[1])


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_illegal_is_told(device: str) -> None:
    rng = np.random.default_rng(3)
    nan, infinite = np.float32("nan"), np.float32("inf")
    bad_scales: dict[str, list[Any]] = {
        "mxfp4": [253, 255],
        "fp8": [0, 2, 247, 255],
        "fp8_f32": [0.0, -1.0, nan, infinite, 2.0**-118, 7.6e35],
    }
    for name, wrong in bad_scales.items():
        codes, scale = random_codes(name, (256, 256), rng)
        values = decoded(name, codes, scale)
        for bad in wrong:
            broken = scale.copy()
            broken[1, 1] = bad
            with pytest.raises(CodecError):
                decoded(name, codes, broken)
            assert bool(tensors.illegal(name, on(device, codes), on(device, broken))), (name, bad)
            assert tensors.encode(name, on(device, values), on(device, broken)) is None
        for bad in (0x7F80, 0xFF80, 0x7FC1):
            broken = values.copy()
            broken[200, 3] = bad
            for like in (None, on(device, scale)):
                assert tensors.encode(name, on(device, broken), like) is None
        if name != "mxfp4":
            for bad in (0x7F, 0xFF):
                broken = codes.copy()
                broken[255, 255] = bad
                assert bool(tensors.illegal(name, on(device, broken), on(device, scale)))


# In a process of its own: where megatron runs without CUDA, `device="cuda"` means the CPU (mcore/cpu.py).
_SHAPES_ONLY = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from dsv4_bridge.codec import tensors
from dsv4_bridge.spec.encodings import ENCODINGS

for name in ("mxfp4", "fp8", "fp8_f32"):
    how = ENCODINGS[name]
    with FakeTensorMode():
        codes = torch.empty(how.weight_shape((300, 416)), dtype=torch.uint8, device="cuda:0")
        kind = torch.float32 if name == "fp8_f32" else torch.uint8
        scale = torch.empty(how.scale_shape((300, 416)), dtype=kind, device="cuda:0")
        values = tensors.decode(name, codes, scale)
        wrong = tensors.illegal(name, codes, scale)
        again = tensors.nearest(name, values, scale)
        fresh, finite = tensors.fresh_scale(name, values)
        lost = tensors.per_block(name, tensors.differing(name, values, again, fresh))
        assert {t.device.type for t in (values, wrong, again, fresh, finite, lost)} == {"cuda"}
        assert values.shape == (300, 416) and again.shape == codes.shape
        assert lost.shape == fresh.shape == scale.shape and fresh.dtype == kind
        try:
            tensors.encode(name, values, scale)
        except Exception as error:
            print(type(error).__name__)
"""


def test_nothing_leaves_the_device() -> None:
    """On a device that only remembers shapes, an operation that meets the CPU is refused, and so is one that waits."""
    done = subprocess.run([sys.executable, "-c", _SHAPES_ONLY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DataDependentOutputException"] * 3, "encoding reads its counts"
