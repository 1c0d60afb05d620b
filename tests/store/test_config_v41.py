"""config.json of DeepSeek-V4.1 in both dialects: the released bytes, the same numbers, and what is refused."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from conftest import of_release
from dsv4_bridge import BridgeError, plan
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.spec_v41 import V41Spec
from dsv4_bridge.spec.variants import VARIANTS, guess, tiny
from dsv4_bridge.store.hf_config import dialect_of, read_config, released_config, spec_from_config

FLASH = VARIANTS["V4.1-Flash"]
RELEASED, FLAT = of_release("V4.1-Flash", "config"), of_release("V4.1-Flash", "inference_config")
UNSAID = {"transformers_version", "architectures", "dtype", "quantization_config"}  # of the nested one: no numbers


def nested() -> dict[str, Any]:
    return read_config(RELEASED)


def test_the_files_are_the_published_ones() -> None:
    for path, digest in ((RELEASED, "8be45ce0476004a3"), (FLAT, "2e84f45cf1dac8c7")):
        assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest)


def test_both_dialects_say_the_same_numbers() -> None:
    assert dialect_of(nested()) == "released" and dialect_of(read_config(FLAT)) == "inference"
    assert spec_from_config(nested()) == spec_from_config(read_config(FLAT)) == FLASH.spec


def test_the_released_file_is_written_byte_for_byte() -> None:
    made = released_config(FLASH.spec, "fp4", quantized=True)
    assert (json.dumps(made, indent=2) + "\n").encode() == RELEASED.read_bytes()


def test_dtype_says_how_weights_are_stored_in_the_flat_dialect_alone() -> None:
    flat = read_config(FLAT)
    assert guess(flat, FLASH.spec).encodings["linear32"] == "fp8_32x32"
    plain = {k: v for k, v in nested().items() if k != "quantization_config"}
    assert guess(plain | {"dtype": "fp8"}, FLASH.spec).encodings["linear32"] == "bf16"
    assert guess(flat | {"dtype": "bf16"}, FLASH.spec).encodings["engram"] == "bf16"
    with pytest.raises(BridgeError, match=r"dtype is 'bfloat16'; in this flat dialect it says how weights are stored"):
        spec_from_config(flat | {"dtype": "bfloat16"})


@pytest.mark.parametrize("changed", ["as released", "without draft", "other numbers", "tiny", "ragged"])
def test_written_config_reads_back(changed: str) -> None:
    spec = {
        "as released": FLASH.spec,
        "without draft": FLASH.spec.without_draft(),
        "other numbers": replace_spec(FLASH.spec, rope_theta=12345.5, index_topk=7),
        "tiny": tiny(FLASH),
        "ragged": tiny(FLASH, ragged=True),
    }[changed]
    for quantised in (False, True):
        assert spec_from_config(json.loads(json.dumps(released_config(spec, "fp4", quantised)))) == spec


def keys() -> list[tuple[str, ...]]:
    whole = nested()
    return [
        *((k,) for k in whole if k not in UNSAID),
        *(("text_config", k) for k in whole["text_config"] if k != "use_cache"),
        *(("text_config", "rope_scaling", k) for k in whole["text_config"]["rope_scaling"] if k != "rope_type"),
        *(("vision_config", k) for k in whole["vision_config"]),
    ]


def edited(path: tuple[str, ...], change: Callable[[dict[str, Any], str], None]) -> dict[str, Any]:
    config = deepcopy(nested())
    inside = config
    for key in path[:-1]:
        inside = inside[key]
    change(inside, path[-1])
    return config


def test_every_missing_field_is_named() -> None:
    for path in keys():
        with pytest.raises(BridgeError, match=path[-1]):
            spec_from_config(edited(path, lambda inside, key: inside.pop(key)))


@pytest.mark.parametrize("wrong", [None, "x", [], {}, -1, 1 << 70, True, [1.5], [1 << 70]])
def test_no_wrong_value_is_a_traceback(wrong: object) -> None:
    taken = []
    for path in keys():
        with contextlib.suppress(BridgeError):
            found = spec_from_config(edited(path, lambda inside, key: inside.update({key: wrong})))
            assert isinstance(found, V41Spec)
            taken.append(path[-1])
    # Any number does for what is a number with a point, none of the others for anything but these.
    assert (wrong == 1 << 70 and not isinstance(wrong, list)) or set(taken) <= {"max_wh_ratio", "norm_topk_prob"}, taken


def test_every_missing_key_of_the_flat_dialect_is_named() -> None:
    flat = read_config(FLAT)
    for key in flat:
        if key in ("expert_dtype", "dim"):  # no number; what tells the dialect
            continue
        with pytest.raises(BridgeError, match=key):
            spec_from_config({k: v for k, v in flat.items() if k != key})


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("text_config", "compress_ratios"), [0] * 42 + [4], "holds \\[4\\]; DeepSeek-V4.1 knows 0, 1 and 2"),
        (("text_config", "compress_ratios"), [0] * 40, "has 40 entries, expected 40 layers and a 0 for each of 3"),
        (("text_config", "num_nextn_predict_layers"), 2, "expected the 3 stages"),
        (("text_config", "kv_source_layer_ids"), [2, 2], "kv_source_layer_ids is"),
        (("text_config", "kv_source_layer_ids"), [0], "is a window layer"),
        (("text_config", "index_source_layer_ids"), [40], "index_source_layer_ids is"),
        (("text_config", "engram_num_embeddings"), [5], "expected rows for each of 2 layers"),
        (("text_config", "engram_num_embeddings"), [5, 1 << 40], "expected rows for each of 2 layers"),
        (("text_config", "dspark_num_experts_per_tok"), 129, "above dspark_n_routed_experts"),
        (("vision_config", "model_type"), "clip", "expected 'deepseek_v41_vision'"),
        (("model_type",), "deepseek_v42", "expected 'deepseek_v41'"),
    ],
)
def test_contradictions_are_said(path: tuple[str, ...], value: object, match: str) -> None:
    with pytest.raises(BridgeError, match=match):
        spec_from_config(edited(path, lambda inside, key: inside.update({key: value})))


def test_a_folder_with_the_flat_config_alone_is_planned(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_bytes(FLAT.read_bytes())
    found = plan(tmp_path)
    assert (found.tensors, found.released_bytes) == (96085, 510286023000)
    assert found.variant == "V4.1-Flash by config.json" and found.naming == "hybrid"
