"""Weights decoded and encoded by the model's device: the same values, the same bytes, the same refusals.

On a CPU the device's way is asked for by hand; with a CUDA device, models lie there and take it by themselves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4_bridge import BridgeError, make_toy
from dsv4_bridge.mcore import DeepSeekV4Model, build_model, load_weights, stream_weights
from dsv4_bridge.mcore.weights import gather, load
from dsv4_bridge.store.hf import open_hf

pytestmark = pytest.mark.megatron

# The second is for machines with a CUDA device, where the model lies there: chosen by `-m gpu`.
WHERE = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextmanager
def device_computes(yes: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "computes", lambda device: yes)
        patch.setattr(gather, "computes", lambda device: yes)
        yield


def loaded(folder: Path, by_device: bool, dtype: torch.dtype = torch.bfloat16) -> DeepSeekV4Model:
    model = build_model(open_hf(folder).spec, dtype=dtype, initialize_weights=False)
    with device_computes(by_device):
        load_weights(model, folder)
    return model


def streamed(model: DeepSeekV4Model, by_device: bool, *how: object, **more: object) -> dict[str, torch.Tensor]:
    with device_computes(by_device):
        return {name: t.contiguous().view(torch.uint8) for name, t in stream_weights(model, *how, **more)}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("variant", "payload"), [("Flash", "extreme"), ("Flash-Base", "natural"), ("Flash-FP8", "extreme")]
)
def test_loads_and_streams_the_same_bits(tmp_path: Path, variant: str, payload: str, where: str) -> None:
    toy = make_toy(tmp_path / "toy", variant, 5, payload=payload, ragged=payload == "extreme")
    one, other = loaded(toy, False), loaded(toy, True)
    states = (
        {name: t.contiguous().view(torch.uint8) for name, t in model.state_dict().items() if t is not None}
        for model in (one, other)
    )
    assert_same(*states)
    assert_same(streamed(other, True, "source", like=toy), streamed(one, False, "source", like=toy))
    # Trained: some blocks keep their scales, others do not.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.ndim == 2 and parameter.dtype == torch.bfloat16:
                moved = torch.rand(parameter.shape, generator=generator).to(parameter.device) < 0.003
                parameter.mul_(torch.where(moved, 1.0625, 1.0).to(parameter.dtype))
    assert_same(streamed(one, True, "source", like=toy), streamed(one, False, "source", like=toy))
    assert_same(streamed(one, True, "fp8", allow_lossy=True), streamed(one, False, "fp8", allow_lossy=True))


@pytest.mark.parametrize("where", WHERE)
def test_float32_models_too(tmp_path: Path, where: str) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 6)
    one, other = loaded(toy, False, torch.float32), loaded(toy, True, torch.float32)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert_same(streamed(one, True, "fp8", like=toy), streamed(one, False, "fp8", like=toy))
    with torch.no_grad():
        one.decoder.layers[1].self_attention.linear_q_down_proj.weight.mul_(1.0001)
    for by_device in (False, True):
        with pytest.raises(BridgeError, match=r"writing layers.1.attn.wq_a.weight as bf16 would round \d+ float32"):
            streamed(one, by_device, "fp8")
    assert_same(streamed(one, True, "fp8", allow_lossy=True), streamed(one, False, "fp8", allow_lossy=True))


def said(call: object, *how: object, **more: object) -> str:
    with pytest.raises(BridgeError) as error:
        call(*how, **more)  # type: ignore[operator]
    return str(error.value)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("ending", "byte"), [("attn.wq_a.weight", 0x7F), ("attn.wq_a.scale", 1), ("w1.scale", 254)])
def test_what_is_illegal_is_told_in_the_same_words(tmp_path: Path, ending: str, byte: int, where: str) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 7)
    for file in sorted(toy.glob("*.safetensors")):
        stored = load_file(file)
        names = [name for name in stored if name.endswith(ending)]
        if names:
            stored[names[-1]].view(torch.uint8).flatten()[-1] = byte
            save_file(stored, file)
    assert said(loaded, toy, True) == said(loaded, toy, False)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_cannot_be_encoded_is_told_in_the_same_words(tmp_path: Path, dtype: torch.dtype, where: str) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 8)
    model = loaded(toy, True, dtype)
    with torch.no_grad():
        model.decoder.layers[2].self_attention.linear_kv_proj.weight[-1, -1] = float("inf")
    words = [said(streamed, model, by_device, "fp8", like=toy) for by_device in (True, False)]
    assert words[0] == words[1] and "layers.2.attn.wkv" in words[0]
