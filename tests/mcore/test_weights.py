"""Weights in and out of a live model: bit for bit, from and to every format."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import same_files
from dsv4_bridge import BridgeError, export_hf, import_hf, make_toy, repack
from dsv4_bridge.codec import fp8
from dsv4_bridge.mcore import build_model, load_weights, stream_weights
from dsv4_bridge.mcore.checkpoints import load_checkpoint, save_checkpoint
from dsv4_bridge.store.hf import open_hf

pytestmark = pytest.mark.megatron

VARIANTS = ("Flash", "Flash-Base", "Flash-0731", "Flash-FP8", "Flash-BF16", "Pro")


def raw_tensors(folder: Path) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], bytes]]:
    """Every tensor of a folder as stored."""
    from safetensors import safe_open

    checkpoint = open_hf(folder)
    for file in sorted({info.file for info in checkpoint.folder.tensors.values()}):
        with safe_open(folder / file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                yield name, tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()
    checkpoint.close()


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
        if tensor is not None
    }


@pytest.mark.parametrize("payload", ["natural", "extreme"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stream_gives_the_source_back_byte_for_byte(tmp_path: Path, variant: str, payload: str) -> None:
    toy = make_toy(tmp_path / "toy", variant, 5, payload=payload, ragged=payload == "extreme")
    spec = open_hf(toy).spec
    model = build_model(spec, dtype=torch.bfloat16, initialize_weights=False)
    load_weights(model, toy)
    stored = {name: fact for name, *fact in raw_tensors(toy)}
    streamed = {}
    for name, tensor in stream_weights(model, "source", like=toy):
        streamed[name] = [tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()]
    assert set(streamed) == set(stored)
    assert [n for n in stored if streamed[n] != stored[n]] == []


def test_stream_as_bf16_equals_the_repacked_folder(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 6)
    repack(toy, tmp_path / "bf16", "bf16")
    model = build_model(open_hf(toy).spec, dtype=torch.bfloat16, initialize_weights=False)
    load_weights(model, toy)
    stored = {name: fact for name, *fact in raw_tensors(tmp_path / "bf16")}
    for name, tensor in stream_weights(model, "bf16"):
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert [tensor.dtype, tuple(tensor.shape), data] == stored.pop(name), name
    assert not stored


def test_stream_as_fp8_holds_the_same_values(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 6)
    model = build_model(open_hf(toy).spec, dtype=torch.bfloat16, initialize_weights=False)
    load_weights(model, toy)
    plain = dict(stream_weights(model, "bf16"))
    encoded = dict(stream_weights(model, "fp8", like=toy))
    codes = [name for name, tensor in encoded.items() if tensor.dtype == torch.float8_e4m3fn]
    assert {name.removesuffix("weight") + "scale" for name in codes} == set(encoded) - set(plain)
    assert len(codes) > 100
    for name in codes:
        out = np.empty(tuple(plain[name].shape), "<u2")
        scale = encoded[name.removesuffix("weight") + "scale"]
        assert (scale.dtype == torch.float32) == (".experts." in name), name
        raw = scale.numpy() if scale.dtype == torch.float32 else scale.view(torch.uint8).numpy()
        fp8.decode(encoded[name].view(torch.uint8).numpy(), raw, out)
        assert np.array_equal(out, plain[name].view(torch.uint16).numpy()), name
    for name in set(plain) - set(codes):
        assert torch.equal(encoded[name], plain[name]), name


def test_every_way_in_gives_the_same_bits(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 7, payload="extreme")
    import_hf(toy, tmp_path / "megatron")
    repack(toy, tmp_path / "bf16", "bf16")
    spec = open_hf(toy).spec
    loaded = []
    for source in (toy, tmp_path / "megatron", tmp_path / "bf16"):
        model = build_model(spec, dtype=torch.bfloat16)
        load_weights(model, source)
        loaded.append(bits(model))
    model = build_model(spec, dtype=torch.bfloat16)
    assert load_checkpoint(model, tmp_path / "megatron") == 0
    loaded.append(bits(model))
    assert loaded[0] == loaded[1] == loaded[2] == loaded[3]


def test_what_megatron_saves_is_exported_to_the_very_files(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 8, payload="extreme")
    spec = open_hf(toy).spec
    model = build_model(spec, dtype=torch.bfloat16)
    load_weights(model, toy)
    saved = save_checkpoint(model, tmp_path / "saved", 12)
    assert saved.name == "iter_0000012"
    export_hf(tmp_path / "saved", tmp_path / "back", toy)
    assert same_files(toy, tmp_path / "back") == []
    again = build_model(spec, dtype=torch.bfloat16)
    assert load_checkpoint(again, tmp_path / "saved") == 12
    assert bits(again) == bits(model)


def test_a_trained_weight_leaves_and_the_others_keep_their_bytes(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 9)
    model = build_model(open_hf(toy).spec, dtype=torch.bfloat16)
    load_weights(model, toy)
    trained = model.decoder.layers[2].self_attention.linear_proj.weight
    with torch.no_grad():
        trained.add_(torch.randn_like(trained) * 0.01)
    stored = {name: data for name, _, _, data in raw_tensors(toy)}
    changed = {
        name
        for name, tensor in stream_weights(model, "source", like=toy)
        if tensor.contiguous().view(torch.uint8).numpy().tobytes() != stored[name]
    }
    assert changed <= {"layers.2.attn.wo_b.weight", "layers.2.attn.wo_b.scale"}
    assert "layers.2.attn.wo_b.weight" in changed


def test_trap_25_ids_stay_integers_on_the_way(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 10)
    model = build_model(open_hf(toy).spec, dtype=torch.bfloat16)
    load_weights(model, toy)
    table = model.decoder.layers[0].mlp.router.tid2eid
    stored = {name: data for name, _, _, data in raw_tensors(toy)}
    expected = np.frombuffer(stored["layers.0.ffn.gate.tid2eid"], "<i8").reshape(table.shape)
    assert table.dtype == torch.int32
    assert np.array_equal(table.numpy(), expected)
    assert len(np.unique(expected)) > 2
    streamed = dict(stream_weights(model, "bf16"))["layers.0.ffn.gate.tid2eid"]
    assert streamed.dtype == torch.int64
    assert np.array_equal(streamed.numpy(), expected)


def test_trap_29_a_bias_that_bf16_cannot_hold_arrives_whole(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 11)
    stored = {name: data for name, _, _, data in raw_tensors(toy)}
    model = build_model(open_hf(toy).spec, dtype=torch.bfloat16)
    load_weights(model, toy)
    model.bfloat16()
    for name, tensor in stream_weights(model, "bf16"):
        if name.endswith(("gate.bias", "attn_sink", "hc_attn_base", "hc_ffn_scale", "ape", "hc_head_fn")):
            assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == stored[name], name
            assert not torch.equal(tensor.bfloat16().float(), tensor) or tensor.numel() < 4, name


def test_trap_48_a_checkpoint_without_mtp_does_not_half_load(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 12)
    spec = open_hf(toy).spec
    make_toy(tmp_path / "plain", "Flash", 12, spec=spec.without_draft())
    model = build_model(spec)
    with pytest.raises(BridgeError, match=r"lacks \d+ tensors of the model \(mtp.0"):
        load_weights(model, tmp_path / "plain")
    load_weights(build_model(spec.without_draft()), toy)


def test_bad_input_is_named(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 13)
    spec = open_hf(toy).spec
    model = build_model(spec)
    with pytest.raises(BridgeError, match="not one of source, fp8, bf16"):
        next(stream_weights(model, "int4"))
    with pytest.raises(BridgeError, match="like=FOLDER"):
        next(stream_weights(model, "source"))
    make_toy(tmp_path / "pro", "Pro", 13)
    with pytest.raises(BridgeError, match=r"other numbers than the model: .*routed_scaling_factor: 2.5"):
        load_weights(model, tmp_path / "pro")
    with pytest.raises(BridgeError, match="no such file or folder"):
        load_weights(model, tmp_path / "nowhere")
    save_checkpoint(model, tmp_path / "saved", 1)
    with pytest.raises(BridgeError, match="it exists"):
        save_checkpoint(model, tmp_path / "saved", 1)


def test_float32_weights_are_not_rounded_in_silence(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", "Flash", 14)
    spec = open_hf(toy).spec
    precise = build_model(spec)
    load_weights(precise, toy)
    with torch.no_grad():
        precise.decoder.layers[1].self_attention.linear_q_down_proj.weight.mul_(1.0001)
    save_checkpoint(precise, tmp_path / "saved")
    with pytest.raises(BridgeError, match=r"layers.1.attn.wq_a.weight into a bf16 model would round \d+"):
        load_weights(build_model(spec, dtype=torch.bfloat16), tmp_path / "saved")
    load_weights(build_model(spec, dtype=torch.bfloat16), tmp_path / "saved", allow_lossy=True)
