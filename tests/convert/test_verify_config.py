"""Two checkpoints with the same tensors are not the same model where their numbers differ."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from damage import refuses

from conftest import dsv4
from dsv4_bridge import export_hf, import_hf, inspect, make_toy, verify
from dsv4_bridge.store.hf import open_hf
from dsv4_bridge.store.hf_config import read_config, released_config, spec_from_config
from dsv4_bridge.store.safetensors import SafetensorsFolder

RUN_CONFIG = "iter_0000000/run_config.yaml"
COMPUTED: dict[str, Any] = {
    "compress_rope_theta": 40000,
    "rope_theta": 10001,
    "rms_norm_eps": 1e-5,
    "hc_eps": 1e-5,
    "swiglu_limit": 7.0,
    "routed_scaling_factor": 2.5,
    "index_topk": 16,
    "hc_sinkhorn_iters": 5,
    "sliding_window": 64,
}
ASIDE: dict[str, Any] = {
    "initializer_range": 0.006,
    "max_position_embeddings": 131072,
    "eos_token_id": 2,
    "bos_token_id": 3,
    "attention_dropout": 0.1,
}


def edited(source: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("level", ["names", "values", "bytes"])
def test_every_number_that_is_computed_with_is_compared(level: str, toy_flash: Path, tmp_path: Path) -> None:
    other = edited(toy_flash, tmp_path / "all", lambda c: c.update(COMPUTED))
    config = json.loads((other / "config.json").read_text())
    config["rope_scaling"] |= {"factor": 8, "beta_fast": 31, "original_max_position_embeddings": 4096}
    (other / "config.json").write_text(json.dumps(config))
    report = verify(toy_flash, other, level)
    assert not report.same and report.differing == 0
    named = {what.partition(":")[0] for what in report.config}
    assert named == {*COMPUTED, "rope_factor", "rope_beta_fast", "rope_original_max_position_embeddings"}


@pytest.mark.parametrize("name", COMPUTED)
def test_one_number_is_enough(name: str, toy_flash: Path, tmp_path: Path) -> None:
    other = edited(toy_flash, tmp_path / "one", lambda c: c.update({name: COMPUTED[name]}))
    report = verify(toy_flash, other, "names")
    assert [what.partition(":")[0] for what in report.config] == [name] and not report.same


def test_what_no_computation_follows_from_is_a_note(toy_flash: Path, tmp_path: Path) -> None:
    other = edited(toy_flash, tmp_path / "aside", lambda c: c.update(ASIDE))
    (other / "tokenizer.json").write_text("{}")
    (other / "LICENSE").unlink(missing_ok=True)
    report = verify(toy_flash, other, "names")
    assert report.same and report.config == []
    assert {n.partition(":")[0] for n in report.notes} >= {*ASIDE, "tokenizer.json"}


def test_the_dialect_does_not_matter(toy_flash: Path, tmp_path: Path) -> None:
    other = shutil.copytree(toy_flash, tmp_path / "other")
    spec = open_hf(toy_flash).spec
    (other / "config.json").write_text(json.dumps(released_config(spec, "fp4", True)))
    assert verify(toy_flash, other, "names").config == []


def test_the_command_says_which_and_exits_with_1(toy_flash: Path, tmp_path: Path) -> None:
    other = edited(toy_flash, tmp_path / "other", lambda c: c.update(index_topk=16))
    done = dsv4("verify", toy_flash, other, "--level", "bytes")
    assert done.returncode == 1 and "index_topk: 8 against 16" in done.stdout
    assert "1 number of the model differs" in done.stdout
    done = dsv4("verify", toy_flash, other, "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["config"][0].startswith("index_topk")


def test_hf_and_megatron_are_compared_too(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    other = edited(toy_flash, tmp_path / "other", lambda c: c.update(swiglu_limit=7.0))
    for pair in ((other, toy_megatron), (toy_megatron, other)):
        report = verify(*pair)
        assert not report.same and [c.partition(":")[0] for c in report.config] == ["swiglu_limit"]
    assert verify(toy_flash, toy_megatron).same


@pytest.mark.parametrize("key", ["rotary_scaling_factor", "csa_compress_rotary_base", "dsa_indexer_topk", "vocab_size"])
def test_what_megatrons_users_read_is_compared(key: str, toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_megatron, tmp_path / "m")
    body = yaml.safe_load((folder / RUN_CONFIG).read_text())
    body["model"][key] += 1
    (folder / RUN_CONFIG).write_text(yaml.safe_dump(body))
    for pair in ((toy_flash, folder), (toy_megatron, folder)):
        report = verify(*pair, "names")
        assert not report.same and len(report.config) == 1 and f"model.{key}: " in report.config[0]
    assert any(f"model.{key}" in note for note in inspect(folder).notes)
    refuses(
        lambda: export_hf(folder, tmp_path / "out", toy_flash), rf"run_config\.yaml contradicts itself.*model\.{key}"
    )


def test_one_unit_in_the_last_place_of_a_float32_scale_is_seen(tmp_path: Path) -> None:
    base = make_toy(tmp_path / "base", "Flash-Base", 5)
    other = shutil.copytree(base, tmp_path / "other")
    folder = SafetensorsFolder(other)
    info = folder.tensors["layers.2.attn.wq_a.scale"]
    path, start = other / info.file, info.start
    folder.close()
    raw = bytearray(path.read_bytes())
    raw[start : start + 4] = (np.frombuffer(raw[start : start + 4], "<u4") + 1).astype("<u4").tobytes()
    path.write_bytes(raw)
    report = verify(base, other, "values")
    assert [d.name for d in report.differences] == ["layers.2.attn.wq_a.weight"]
    assert "float32 scales" in report.differences[0].what or "values" in report.differences[0].what
    assert verify(base, base, "values").same


def test_a_like_of_other_numbers_is_refused_by_their_names(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    other = edited(toy_flash, tmp_path / "other", lambda c: c.update(index_topk=16, swiglu_limit=7.0))
    message = r"describe two models \(swiglu_limit: 10\.0 against 7\.0; index_topk|describe two models \(index_topk: 8"
    refuses(lambda: export_hf(toy_megatron, tmp_path / "out", other), message)


def test_a_like_with_other_marks_keeps_its_own(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    like = edited(
        toy_flash, tmp_path / "like", lambda c: c.update(ASIDE | {"eos_token_id": [1, 2], "bos_token_id": None})
    )
    export_hf(toy_megatron, tmp_path / "out", like)
    assert (tmp_path / "out/config.json").read_bytes() == (like / "config.json").read_bytes()
    export_hf(toy_megatron, tmp_path / "bf16", like, "bf16")
    assert read_config(tmp_path / "bf16/config.json")["max_position_embeddings"] == 131072
    assert verify(tmp_path / "out", tmp_path / "bf16", "values").same


def test_several_ends_and_no_beginning_are_read(toy_flash: Path, tmp_path: Path) -> None:
    from dsv4_bridge.text.tokenizer import end_tokens, open_tokenizer

    folder = edited(toy_flash, tmp_path / "marks", lambda c: c.update(eos_token_id=[1, 7], bos_token_id=None))
    spec = spec_from_config(read_config(folder / "config.json"))
    assert (spec.bos_token_id, spec.eos_token_id) == (None, 1) and {1, 7} <= end_tokens(folder, spec)
    tokenizer = open_tokenizer(folder, spec)
    assert tokenizer and 0 not in tokenizer.encode("abc")
    import_hf(folder, tmp_path / "m")
    assert verify(folder, tmp_path / "m").same
    for bad in ("x", True, [1, "x"], [], None, 1.5):
        other = edited(toy_flash, tmp_path / f"bad{bad}".replace("/", ""), lambda c, b=bad: c.update(eos_token_id=b))
        refuses(lambda other=other: inspect(other), "'eos_token_id' is")
