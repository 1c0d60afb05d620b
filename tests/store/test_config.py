"""config.json: both dialects, and the traps in them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from configs import LAYER_NAMES, RELEASED, config, transformers_dialect

from conftest import config_path
from dsv4_bridge import BridgeError, Options, export_hf, import_hf, repack
from dsv4_bridge.spec.megatron_config import megatron_model
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS
from dsv4_bridge.store.hf_config import dialect_of, read_config, released_config, spec_from_config

# ---------------------------------------------------------------- the released configs


@pytest.mark.parametrize("name", RELEASED)
def test_released_config_is_the_known_variant(name: str) -> None:
    assert dialect_of(config(name)) == "released"
    assert spec_from_config(config(name)) == VARIANTS[name].spec


def test_launch_config_without_expert_dtype_has_the_same_numbers() -> None:
    assert spec_from_config(config("Flash.launch-no-expert_dtype")) == VARIANTS["Flash"].spec


@pytest.mark.parametrize("name", VARIANTS)
def test_written_config_reads_back(name: str) -> None:
    spec = VARIANTS[name].spec
    for changed in (spec, spec.without_draft(), replace_spec(spec, rope_theta=12345.5, swiglu_limit=7.0)):
        assert spec_from_config(json.loads(json.dumps(released_config(changed, None, False)))) == changed


@pytest.mark.parametrize("name", RELEASED)
def test_trap52_both_dialects_by_hand_read_the_same(name: str) -> None:
    other = transformers_dialect(config(name))
    assert dialect_of(other) == "transformers"
    assert spec_from_config(other) == spec_from_config(config(name))


@pytest.mark.hf
@pytest.mark.parametrize("name", RELEASED)
def test_trap52_both_dialects_of_transformers_read_the_same(name: str, tmp_path: Path) -> None:
    from transformers import DeepseekV4Config

    made = DeepseekV4Config(**json.loads(config_path(name).read_text()))
    other = json.loads(json.dumps(made.to_dict()))
    assert dialect_of(other) == "transformers"
    assert spec_from_config(other) == spec_from_config(config(name))
    made.save_pretrained(tmp_path)  # only what differs from the defaults
    saved = read_config(tmp_path / "config.json")
    assert spec_from_config(saved) == spec_from_config(config(name))
    again = DeepseekV4Config.from_pretrained(tmp_path)
    assert spec_from_config(json.loads(json.dumps(again.to_dict()))) == spec_from_config(config(name))


@pytest.mark.hf
@pytest.mark.parametrize("name", RELEASED)
def test_transformers_reads_what_is_written_here(name: str) -> None:
    from transformers import DeepseekV4Config

    spec = VARIANTS[name].spec
    made = DeepseekV4Config(**released_config(spec, "fp4", True))
    assert spec_from_config(json.loads(json.dumps(made.to_dict()))) == spec


# ---------------------------------------------------------------- traps


@pytest.mark.parametrize("name", RELEASED)
def test_trap09_rotary_width_is_64_in_both_dialects(name: str) -> None:
    other = transformers_dialect(config(name))
    assert other["partial_rotary_factor"] == 0.125
    for read in (
        config(name),
        other,
        other | {"qk_rope_head_dim": 64},
        config(name) | {"partial_rotary_factor": 0.125},
    ):
        spec = spec_from_config(read)
        assert spec.qk_rope_head_dim == 64
        assert megatron_model(spec)["qk_pos_emb_head_dim"] == 64
        assert megatron_model(spec)["rotary_percent"] == 1.0


@pytest.mark.parametrize("factor", [0, -0.125, 2, 1e308, 0.1, float("nan"), "0.125", True])
def test_trap09_a_factor_that_gives_no_whole_width_is_refused(factor: Any) -> None:
    other = transformers_dialect(config()) | {"partial_rotary_factor": factor}
    with pytest.raises(BridgeError, match="partial_rotary_factor"):
        spec_from_config(other)


@pytest.mark.parametrize("name", RELEASED)
def test_trap11_compressed_layers_have_base_160000_and_no_default(name: str) -> None:
    spec = spec_from_config(config(name))
    assert (spec.rope_theta, spec.compress_rope_theta) == (10000.0, 160000.0)
    assert megatron_model(spec)["csa_compress_rotary_base"] == 160000.0
    without = config(name)
    del without["compress_rope_theta"]
    with pytest.raises(BridgeError, match="'compress_rope_theta' is missing"):
        spec_from_config(without)
    other = transformers_dialect(config(name))
    del other["rope_parameters"]["compress"]["rope_theta"]
    with pytest.raises(BridgeError, match=r"rope_parameters\.compress: the field 'rope_theta' is missing"):
        spec_from_config(other)


LENGTHS = {"Flash": 44, "Flash-Base": 44, "Flash-0731": 46, "Pro": 62, "Pro-Base": 62, "Pro-0813": 64}


@pytest.mark.parametrize("name", RELEASED)
def test_trap51_compress_ratios_are_layers_and_draft_blocks(name: str) -> None:
    spec = spec_from_config(config(name))
    assert len(spec.compress_ratios) == len(config(name)["compress_ratios"]) == LENGTHS[name]
    assert len(spec.compress_ratios) == spec.num_hidden_layers + spec.draft_blocks
    # Pro's first two layers are compressed, Flash's are dense.
    assert spec.compress_ratios[:2] == ((128, 128) if name.startswith("Pro") else (0, 0))
    # Other tools cut the entries of the draft blocks: they are known.
    cut = config(name) | {"compress_ratios": config(name)["compress_ratios"][: spec.num_hidden_layers]}
    assert spec_from_config(cut) == spec


@pytest.mark.parametrize("name", RELEASED)
def test_trap51_a_list_of_another_length_is_refused(name: str) -> None:
    ratios = config(name)["compress_ratios"]
    layers = config(name)["num_hidden_layers"]
    for wrong in (ratios[: layers - 1], [], [*ratios, 4], [*ratios, 4, 128, 4]):
        with pytest.raises(BridgeError, match="compress_ratios has"):
            spec_from_config(config(name) | {"compress_ratios": wrong})
    for wrong in ([*ratios[:-1], 2], [1] * len(ratios), [-4] * len(ratios)):
        with pytest.raises(BridgeError, match="DeepSeek-V4 knows 0, 4 and 128"):
            spec_from_config(config(name) | {"compress_ratios": wrong})
    for wrong in (None, "0,0,4", {"0": 4}, [0.0] * len(ratios), [[0]] * len(ratios), [True] * len(ratios)):
        with pytest.raises(BridgeError, match="compress_ratios"):
            spec_from_config(config(name) | {"compress_ratios": wrong})


def test_trap51_there_is_no_default_schedule() -> None:
    without = config()
    del without["compress_ratios"]
    with pytest.raises(BridgeError, match=r"'compress_ratios' \(or 'layer_types'\) is missing"):
        spec_from_config(without)


@pytest.mark.parametrize("name", RELEASED)
def test_trap52_sliding_layers_are_ratio_0_and_indexers_are_counted_alike(name: str) -> None:
    spec = spec_from_config(transformers_dialect(config(name)))
    layers = spec.compress_ratios[: spec.num_hidden_layers]
    assert layers.count(0) == (0 if name.startswith("Pro") else 2)
    assert layers.count(4) == (30 if name.startswith("Pro") else 21)  # each has an indexer


def test_trap52_the_nested_theta_wins_over_a_stale_one_beside_it() -> None:
    other = transformers_dialect(config()) | {"rope_theta": 500000.0, "compress_rope_theta": 40000.0}
    spec = spec_from_config(other)
    assert (spec.rope_theta, spec.compress_rope_theta) == (10000.0, 160000.0)


def test_trap52_dialects_that_disagree_in_one_file_are_refused() -> None:
    other = transformers_dialect(config())
    good = config()["compress_ratios"]
    assert spec_from_config(other | {"compress_ratios": good}) == spec_from_config(config())
    with pytest.raises(BridgeError, match="layer_types and compress_ratios disagree"):
        spec_from_config(other | {"compress_ratios": [128, *good[1:]]})
    with pytest.raises(BridgeError, match="num_hash_layers is 4 but mlp_layer_types has 3"):
        spec_from_config(other | {"num_hash_layers": 4})
    with pytest.raises(BridgeError, match="compress rate of heavily_compressed_attention is 64"):
        spec_from_config(other | {"compress_rates": {LAYER_NAMES[4]: 4, LAYER_NAMES[128]: 64}})


@pytest.mark.parametrize("types", [["full_attention"] * 43, [[]] * 43, [{}] * 43, [None] * 43, "sliding", 3, {}])
def test_trap52_unknown_layer_types_are_refused(types: Any) -> None:
    with pytest.raises(BridgeError, match="layer_types"):
        spec_from_config(transformers_dialect(config()) | {"layer_types": types})


def test_trap27_hash_layers_that_are_no_prefix_are_refused() -> None:
    other = transformers_dialect(config())
    kinds = other["mlp_layer_types"]
    for wrong in (kinds[::-1], ["moe", *kinds[1:]], [*kinds[:-1], "hash_moe"]):
        with pytest.raises(BridgeError, match="hash layers that are not the first"):
            spec_from_config(other | {"mlp_layer_types": wrong})
    for wrong in (kinds[:-1], ["dense"] * 43, "hash_moe", [[]] * 43):
        with pytest.raises(BridgeError, match="mlp_layer_types is"):
            spec_from_config(other | {"mlp_layer_types": wrong})


def test_trap53_a_bf16_copy_states_no_quantization(tmp_path: Path, toy_flash: Path, toy_megatron: Path) -> None:
    export_hf(toy_megatron, tmp_path / "alone", None, "bf16")
    export_hf(toy_megatron, tmp_path / "like", toy_flash, "bf16")
    repack(toy_flash, tmp_path / "repacked", "bf16")
    for name in ("alone", "like", "repacked"):
        written = read_config(tmp_path / name / "config.json")
        assert "quantization_config" not in written and "expert_dtype" not in written
        assert spec_from_config(written) == spec_from_config(read_config(toy_flash / "config.json"))
    repack(toy_flash, tmp_path / "fp8", "fp8")
    fp8 = read_config(tmp_path / "fp8" / "config.json")
    assert fp8["quantization_config"]["weight_block_size"] == [128, 128] and fp8["expert_dtype"] == "fp8"


@pytest.mark.hf
def test_trap53_transformers_finds_no_quantization_in_a_bf16_copy(tmp_path: Path, toy_megatron: Path) -> None:
    from transformers import AutoConfig

    export_hf(toy_megatron, tmp_path / "bf16", None, "bf16")
    parsed = AutoConfig.from_pretrained(tmp_path / "bf16")
    assert getattr(parsed, "quantization_config", None) is None
    again = json.loads(json.dumps(parsed.to_dict()))
    assert spec_from_config(again) == spec_from_config(read_config(tmp_path / "bf16" / "config.json"))


def test_trap53_a_stale_quantization_config_is_refused(tmp_path: Path, toy_flash: Path) -> None:
    repack(toy_flash, tmp_path / "bf16", "bf16")
    path = tmp_path / "bf16" / "config.json"
    stale = read_config(path) | {"quantization_config": read_config(toy_flash / "config.json")["quantization_config"]}
    path.write_text(json.dumps(stale))
    with pytest.raises(BridgeError, match="quantization_config, but every tensor is plain; remove that key"):
        import_hf(tmp_path / "bf16", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["absent", "inside quantization_config"])
def test_trap35_expert_dtype_absent_or_moved_is_read_from_the_headers(
    where: str, tmp_path: Path, toy_flash: Path
) -> None:
    folder = shutil.copytree(toy_flash, tmp_path / "hf")
    changed = read_config(folder / "config.json")
    stated = changed.pop("expert_dtype")
    if where != "absent":
        changed["quantization_config"]["expert_dtype"] = stated
    (folder / "config.json").write_text(json.dumps(changed))
    import_hf(folder, tmp_path / "out", Options())
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").exists()
