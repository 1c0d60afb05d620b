"""The same model on a CUDA device. Runs where there is one; elsewhere these tests are not collected."""

from pathlib import Path

import pytest
import torch
from reference import gradients_of, our_model, reference_model, small_spec

from dsv4_bridge import make_toy
from dsv4_bridge.mcore import build_model, load_weights, stream_weights
from dsv4_bridge.mcore.layers.cache import new_cache
from dsv4_bridge.store.hf import open_hf

pytestmark = [pytest.mark.megatron, pytest.mark.gpu]


def test_float32_logits_and_gradients_equal_transformers(tmp_path: Path) -> None:
    spec = small_spec(swiglu_limit=3.0)
    reference = reference_model(spec, tmp_path)
    model = our_model(reference, spec, tmp_path)
    reference.cuda()
    ids = torch.randint(0, spec.vocab_size, (3, 301), generator=torch.Generator().manual_seed(1)).cuda()
    theirs, ours = reference(ids).logits, model(ids)
    assert (theirs - ours).abs().max() <= 1e-5 * theirs.abs().max()
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
    weights = torch.randn_like(theirs)
    (theirs * weights).sum().backward()
    (ours * weights).sum().backward()
    for name, (wanted, got) in gradients_of(reference, model).items():
        assert (wanted - got).norm() <= 1e-4 * wanted.norm(), name


def test_stream_gives_the_source_back_byte_for_byte(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 5, payload="extreme")
    checkpoint = open_hf(toy)
    model = build_model(checkpoint.spec, dtype=torch.bfloat16, initialize_weights=False)
    load_weights(model, toy)
    streamed = dict(stream_weights(model, "source", like=toy))
    from safetensors import safe_open

    for file in sorted({info.file for info in checkpoint.folder.tensors.values()}):
        with safe_open(toy / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                wanted = opened.get_tensor(name).contiguous().view(torch.uint8)
                assert torch.equal(streamed.pop(name).contiguous().view(torch.uint8), wanted), name
    assert not streamed


def test_cached_decoding_equals_the_full_forward(tmp_path: Path) -> None:
    spec = small_spec()
    model = our_model(reference_model(spec, tmp_path), spec, tmp_path)
    ids = torch.randint(0, spec.vocab_size, (2, 160)).cuda()
    with torch.no_grad():
        full = model(ids)
        cache = new_cache(model.config, torch.tensor([120, 120]).cuda(), 160)
        steps = [model(ids[:, :120], cache=cache, last_only=True)]
        steps += [model(ids[:, t : t + 1], cache=cache) for t in range(120, 160)]
    assert (torch.cat(steps, 1) - full[:, 119:]).abs().max() <= 1e-5 * full.abs().max()
