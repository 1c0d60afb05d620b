"""Configurations that are refused: missing and wrong fields, other models, files that are none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from configs import NOT_NUMBERS, config, transformers_dialect

from conftest import DATA
from dsv4_bridge import BridgeError
from dsv4_bridge.spec.spec import ModelSpec, replace_spec
from dsv4_bridge.spec.variants import VARIANTS
from dsv4_bridge.store.hf_config import read_config, spec_from_config

# ---------------------------------------------------------------- missing and wrong fields


@pytest.mark.parametrize("key", sorted(config()))
def test_every_missing_field_is_named(key: str) -> None:
    without = config()
    del without[key]
    if key in NOT_NUMBERS:
        assert spec_from_config(without) == VARIANTS["Flash"].spec
        return
    with pytest.raises(BridgeError, match=key):
        spec_from_config(without)


@pytest.mark.parametrize("key", sorted(config()["rope_scaling"]))
def test_every_missing_rope_field_is_named(key: str) -> None:
    without = config()
    del without["rope_scaling"][key]
    with pytest.raises(BridgeError, match=f"rope_scaling.*{key}"):
        spec_from_config(without)


@pytest.mark.parametrize("key", [k for k in sorted(config("Flash-0731")) if k.startswith("dspark_")])
def test_every_missing_dspark_field_is_named(key: str) -> None:
    without = config("Flash-0731")
    del without[key]
    with pytest.raises(BridgeError, match=key):
        spec_from_config(without)


# Where transformers leaves a key out, its value is the architecture's.
LEFT_OUT = {
    "topk_method", "norm_topk_prob", "num_key_value_heads", "scoring_func", "num_nextn_predict_layers",
    "attention_bias", "attention_dropout", "hidden_act",
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(set(transformers_dialect(config())) - NOT_NUMBERS))
def test_every_missing_field_of_the_transformers_dialect_is_named(key: str) -> None:
    without = transformers_dialect(config())
    del without[key]
    if key in LEFT_OUT:
        read = spec_from_config(without)
        assert read == (
            VARIANTS["Flash"].spec.without_draft() if key.startswith("num_next") else VARIANTS["Flash"].spec
        )
        return
    if key == "partial_rotary_factor":  # it is also inside rope_parameters
        assert spec_from_config(without).qk_rope_head_dim == 64
        del without["rope_parameters"]["main"][key]
        key = "qk_rope_head_dim"
    expected = {"layer_types": "layer_types", "mlp_layer_types": "num_hash_layers", "rope_parameters": "rope_scaling"}
    with pytest.raises(BridgeError, match=expected.get(key, key)):
        spec_from_config(without)


NUMBERS = sorted(k for k, v in config().items() if isinstance(v, int | float) and k not in NOT_NUMBERS)
ODD = ["4096", None, [], {}, [1], float("nan"), float("inf"), -1, 10**400, 1 << 62, 1e308]


@pytest.mark.parametrize("value", ODD, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("key", NUMBERS)
def test_a_field_of_another_type_or_range_is_refused_by_name(key: str, value: Any) -> None:
    if isinstance(config()[key], float) or key.endswith("theta"):
        value = 1e308 if value == 1 << 62 else value  # any positive number up to 1e300 will do there
    wrong = config() | {key: value}
    if (key, value) in (("bos_token_id", None), ("eos_token_id", [1])):  # as transformers allows
        spec_from_config(wrong)
        return
    with pytest.raises(BridgeError, match=key) as caught:
        spec_from_config(wrong)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads is not 1"),
        ({"attention_bias": True}, "'attention_bias' is True"),
        ({"num_hash_layers": 44}, "num_hash_layers is above num_hidden_layers"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok is above n_routed_experts"),
        ({"qk_rope_head_dim": 513}, "qk_rope_head_dim is above head_dim"),
        ({"o_groups": 7}, "o_groups 7 does not divide"),
        ({"n_shared_experts": 0}, "n_shared_experts"),
        ({"n_routed_experts": 8192}, "n_routed_experts 8192 is too many"),
        ({"num_nextn_predict_layers": 65}, "num_nextn_predict_layers|draft blocks"),
        ({"rope_scaling": {"type": "linear"}}, "type 'linear', expected 'yarn'"),
        ({"rope_scaling": [1]}, "'rope_scaling' is .1., expected an object"),
    ],
)
def test_numbers_that_make_no_model_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        spec_from_config(config() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dspark_markov_rank": 0}, "dspark_markov_rank"),
        ({"dspark_markov_rank": -256}, "dspark_markov_rank"),
        ({"dspark_block_size": 0}, "dspark_block_size"),
        ({"dspark_noise_token_id": 129280}, "dspark_noise_token_id"),
        ({"dspark_target_layer_ids": [40, 41, 43]}, "dspark_target_layer_ids"),
        ({"dspark_target_layer_ids": []}, "dspark_target_layer_ids"),
        ({"dspark_target_layer_ids": [40, 41, "42"]}, "dspark_target_layer_ids"),
        ({"dspark_target_layer_ids": 42}, "dspark_target_layer_ids"),
    ],
)
def test_a_drafter_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        spec_from_config(config("Flash-0731") | change)


def test_validation_does_not_depend_on_the_reader() -> None:
    with pytest.raises(BridgeError, match="hidden_size"):
        replace_spec(VARIANTS["Flash"].spec, hidden_size=0)
    assert isinstance(replace(VARIANTS["Flash"].spec), ModelSpec)


# ---------------------------------------------------------------- other models


def test_half_of_a_v41_config_is_refused() -> None:
    whole = read_config(DATA / "DeepSeek-V4.1-Flash.config.json")
    with pytest.raises(BridgeError, match="'text_config' is missing"):
        spec_from_config(whole["text_config"])
    with pytest.raises(
        BridgeError, match=r"has keys of DeepSeek-V4\.1 \(engram_layer_ids\), and model_type 'deepseek_v4'"
    ):
        spec_from_config(config() | {"engram_layer_ids": [1, 14]})


def test_vision_exp_is_refused_by_name_with_what_differs() -> None:
    with pytest.raises(BridgeError, match=r"Vision-Exp \(vision_config\).*gate\.bias_vl.*1e-20"):
        spec_from_config(config() | {"vision_config": {"hidden_size": 1024}})


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama", "", None, 4, ["deepseek_v4"], "x" * 10_000])
def test_any_other_model_type_is_refused_by_name(kind: Any) -> None:
    with pytest.raises(BridgeError, match=r"model_type is .*expected 'deepseek_v4'") as caught:
        spec_from_config(config() | {"model_type": kind})
    assert len(str(caught.value)) < 300


def test_no_model_type_is_refused() -> None:
    with pytest.raises(BridgeError, match="model_type is None"):
        spec_from_config({})


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "the name 'a' is given twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the name 'b' is given twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deep"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b" " * (5 << 20), "far too many for a config"),
    ],
    ids=range(13),
)
def test_a_file_that_is_no_config_is_refused(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(BridgeError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 400
