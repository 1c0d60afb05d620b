"""Adapters as peft saves them: what is written is what is read, and what is not understood is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_tools import random_adapters, spec_of
from safetensors.torch import load_file, save_file

from dsv4_bridge.errors import BridgeError
from dsv4_bridge.lora.adapters import Adapter, Adapters
from dsv4_bridge.lora.peft import CONFIG, WEIGHTS, export_peft, import_peft
from dsv4_bridge.spec.lora import CARRIERS, DEFAULT_TARGETS, Lora, targets

SPEC = spec_of()
KINDS = {
    "default": Lora(3, 4.5, 0.1, DEFAULT_TARGETS),
    "everything": Lora(2, 8, targets=CARRIERS),
    "dora": Lora(2, 8, targets=("attn.wkv", "ffn.shared_experts.w1"), dora=True),
    "experts": Lora(2, 8, 0.1, ("ffn.experts",)),
    "up": Lora(2, 8, targets=("ffn.experts.w1", "ffn.experts.w3")),
}


def test_targets_are_the_tables() -> None:
    """Decoder layers alone: not the compressor's and the indexer's projections, nor a draft block's."""
    assert DEFAULT_TARGETS == ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_b")
    found = targets(SPEC, DEFAULT_TARGETS)
    names = ("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj")
    assert [t.module for t in found] == [f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in names]
    (one, *_) = [t for t in targets(SPEC, CARRIERS) if t.name == "layers.1.ffn.experts.3.w1"]
    assert [i.name for i in one.items] == [f"layers.1.ffn.experts.3.{w}.weight" for w in ("w1", "w3")]
    assert one.shape == (2 * SPEC.moe_intermediate_size, SPEC.hidden_size)
    assert one.module == "model.layers.1.mlp.experts.gate_up_proj" and one.parameter


@pytest.mark.parametrize("kind", KINDS)
def test_comes_back(kind: str, tmp_path: Path) -> None:
    adapters = random_adapters(SPEC, KINDS[kind])
    back = import_peft(export_peft(adapters, SPEC, tmp_path / "a", "some/base"), SPEC)
    assert back.lora.keys == adapters.lora.keys
    assert (back.lora.rank, back.lora.alpha, back.lora.dora) == (
        adapters.lora.rank,
        adapters.lora.alpha,
        adapters.lora.dora,
    )
    assert set(back.values) == set(adapters.values)
    for name, adapter in back.values.items():
        for ours, wanted in zip(adapter, adapters.values[name], strict=True):
            assert (ours is None and wanted is None) or torch.equal(ours, wanted), name
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["lora_dropout"] == (0.1 if kind == "default" else 0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_names_in_the_file(tmp_path: Path) -> None:
    """Qualified, so that no compressor is adapted; the first of two parameters stands inside."""
    export_peft(random_adapters(SPEC, KINDS["everything"]), SPEC, tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert "self_attn.kv_proj" in config["target_modules"] and len(config["target_modules"]) == 7
    named = ["self_attn.o_a_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert config["target_parameters"] == named
    state = load_file(tmp_path / "a" / WEIGHTS)
    experts, wide = SPEC.n_routed_experts, SPEC.moe_intermediate_size
    layer = "base_model.model.model.layers.1"
    assert state[f"{layer}.mlp.experts.base_layer.lora_A.weight"].shape == (2 * experts, SPEC.hidden_size)
    assert state[f"{layer}.mlp.experts.lora_A.weight"].shape == (2 * experts, wide)
    assert f"{layer}.self_attn.o_a_proj.lora_B.weight" in state


def test_layers_that_have_none_are_named(tmp_path: Path) -> None:
    whole = random_adapters(SPEC, Lora(2, 8, targets=("attn.wkv", "ffn.experts")))
    some = {n: a for n, a in whole.values.items() if "layers.1" in n or "ffn" in n}
    back = import_peft(export_peft(Adapters(whole.lora, some), SPEC, tmp_path / "a"), SPEC)
    assert set(back.values) == set(some)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.kv_proj"]
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def _state(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def written(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return written


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


KV = "base_model.model.model.layers.0.self_attn.kv_proj"
OTHER = "base_model.model.model.layers.1.self_attn.compressor.kv_proj.lora_A.weight"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "method": (_config(peft_type="LOHA"), "peft_type is 'LOHA'"),
    "bias": (_config(bias="all"), "bias is 'all'"),
    "ranks": (_config(rank_pattern={"kv_proj": 8}), "rank_pattern is {'kv_proj': 8}"),
    "modules": (_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "pissa": (_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "rank": (_config(r="4"), "r is '4'"),
    "other rank": (_config(r=5), r"q_a_proj.lora_A.weight is \[3, 256\], expected \[5, 256\]"),
    "alpha": (_config(lora_alpha=-1), "lora_alpha is -1"),
    "parameters": (_config(target_parameters="x"), "target_parameters is 'x'"),
    "no json": (lambda f: (f / CONFIG).write_text("{"), "not valid JSON"),
    "no config": (lambda f: (f / CONFIG).unlink(), "No such file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "not there"),
    "pickle": (_pickle, "is a pickle"),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"abc"), "no usable safetensors"),
    "unknown": (_state(lambda s: s.update({OTHER: torch.ones(3, 256)})), "compressor.kv_proj.lora_A.weight"),
    "no partner": (_state(lambda s: s.pop(f"{KV}.lora_B.weight")), "lacks .*layers.0.self_attn.kv_proj.lora_B.weight"),
    "shape": (_state(lambda s: s.update({f"{KV}.lora_B.weight": torch.ones(63, 3)})), r"is \[63, 3\], expected"),
    "nan": (_state(lambda s: s[f"{KV}.lora_B.weight"].fill_(float("nan"))), "not finite"),
    "integers": (_state(lambda s: s.update({f"{KV}.lora_B.weight": torch.ones(64, 3).long()})), "is I64, expected F32"),
    "unsigned": (
        _state(lambda s: s.update({f"{KV}.lora_B.weight": torch.ones(64, 3).to(torch.uint32)})),
        "is U32, expected F32",
    ),
    "magnitude": (_config(use_dora=True), "lacks .*lora_magnitude_vector"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, tmp_path: Path) -> None:
    change, words = BAD[name]
    folder = export_peft(random_adapters(SPEC, KINDS["default"]), SPEC, tmp_path / "a")
    change(folder)
    with pytest.raises(BridgeError, match=words):
        import_peft(folder, SPEC)


def test_of_another_model(tmp_path: Path) -> None:
    from dsv4_bridge.spec.spec import replace_spec

    folder = export_peft(random_adapters(SPEC, KINDS["default"]), SPEC, tmp_path / "a")
    with pytest.raises(BridgeError, match=r"q_a_proj.lora_A.weight is \[3, 256\], expected \[3, 512\]"):
        import_peft(folder, replace_spec(SPEC, hidden_size=512))
    with pytest.raises(BridgeError, match=r"are no adapter of this model .*layers\.1"):
        import_peft(folder, replace_spec(SPEC, num_hidden_layers=1, compress_ratios=(0, 0)))


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = random_adapters(SPEC, KINDS["default"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    with pytest.raises(BridgeError, match="taken: it exists and is not an empty folder"):
        export_peft(adapters, SPEC, tmp_path / "taken")
    wrong = {n: Adapter(a.a, a.b[:-1]) for n, a in adapters.values.items()}
    with pytest.raises(BridgeError, match=r"B of layers.0.attn.wq_a is \[127, 3\], expected \[128, 3\]"):
        export_peft(Adapters(adapters.lora, wrong), SPEC, tmp_path / "a")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BridgeError, match="No space left"):
        export_peft(adapters, SPEC, tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


# ---------------------------------------------------------------- names of servers

# What vLLM 0.33 lets an adapter of this model name, behind its mapping of w2 to down_proj.
VLLM_TARGETS = {"wq_a", "wq_b", "wkv", "wo_b", "w1", "w3", "w2"}


@pytest.mark.parametrize("kind", ["default", "dora"])
def test_released_names_are_those_that_servers_match(kind: str, tmp_path: Path) -> None:
    adapters = random_adapters(SPEC, KINDS[kind])
    export_peft(adapters, SPEC, tmp_path / "a", names="released")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert set(config["target_modules"]) <= VLLM_TARGETS and not config["target_parameters"]
    released = {i.name.removesuffix(".weight") for t in targets(SPEC, adapters.lora.keys) for i in t.items}
    for key in load_file(tmp_path / "a" / WEIGHTS):
        module, _, word = key.removeprefix("base_model.model.").partition(".lora_")
        assert module in released and word.partition(".")[0] in ("A", "B", "magnitude_vector"), key
    back = import_peft(tmp_path / "a", SPEC)
    assert set(back.values) == set(adapters.values) and back.lora.keys == adapters.lora.keys
    for name, adapter in back.values.items():
        for ours, wanted in zip(adapter, adapters.values[name], strict=True):
            assert (ours is None and wanted is None) or torch.equal(ours, wanted), name


def test_what_has_no_released_name_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=r"has no released name of its own.*dsv4 merge"):
        export_peft(random_adapters(SPEC, KINDS["experts"]), SPEC, tmp_path / "a", names="released")
    with pytest.raises(BridgeError, match="names 'vllm', expected transformers or released"):
        export_peft(random_adapters(SPEC, KINDS["default"]), SPEC, tmp_path / "a", names="vllm")
    assert not list(tmp_path.iterdir())


def test_released_names_of_other_tools_are_read(tmp_path: Path) -> None:
    """With one `model.` more, and the short names that they put into the configuration."""
    adapters = random_adapters(SPEC, KINDS["default"])
    export_peft(adapters, SPEC, tmp_path / "a", names="released")
    state = load_file(tmp_path / "a" / WEIGHTS)
    save_file(
        {k.replace("base_model.model.", "base_model.model.model.", 1): v for k, v in state.items()},
        tmp_path / "a" / WEIGHTS,
    )
    assert set(import_peft(tmp_path / "a", SPEC).values) == set(adapters.values)
