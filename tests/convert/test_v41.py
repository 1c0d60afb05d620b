"""DeepSeek-V4.1-Flash: what is published of it reproduced, its checkpoints through every verb, and what is refused."""

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import dsv4, of_release, same_files
from dsv4_bridge import (
    BridgeError,
    ModelSpec,
    Options,
    examine,
    export_hf,
    import_hf,
    inspect,
    make_toy,
    plan,
    repack,
    verify,
)
from dsv4_bridge.convert import scales
from dsv4_bridge.convert.releases import _shards as shards_of
from dsv4_bridge.convert.rename import rename
from dsv4_bridge.spec.plan import expand, layer_kinds
from dsv4_bridge.spec.releases import RELEASES
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.store.checkpoint import open_checkpoint
from dsv4_bridge.store.safetensors import make_header
from dsv4_bridge.toy.checkpoint import toy_spec

NAME = "V4.1-Flash"
FLASH = VARIANTS[NAME]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("v41") / "hf", NAME, 11)


@pytest.fixture(scope="module")
def megatron(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import_hf(toy, out := tmp_path_factory.mktemp("v41") / "megatron")
    return out


# ---------------------------------------------------------------- what is published


def test_counts_bytes_patterns_and_layers_are_the_published_ones() -> None:
    stated = json.loads(of_release(NAME, "tensors").read_text())
    found = list(expand(FLASH.spec).stored(FLASH.encodings))
    count, size = Counter(), Counter()
    for fact in found:
        count[fact.dtype] += 1
        size[fact.dtype] += fact.nbytes
    assert dict(count) == stated["tensor_count_by_dtype"] and dict(size) == stated["bytes_by_dtype"]
    patterns = {re.sub(r"(?<=\.)\d+(?=\.)", "N", fact.name) for fact in found}
    assert len(patterns) == 114
    layers = Counter(int(f.name.split(".")[1]) for f in found if f.name.startswith("layers."))
    odd = {1: 2340, 2: 2342, 8: 2342, 14: 2348, 20: 2341} | dict.fromkeys((24, 28, 32, 36), 2337)
    assert layers == {i: odd.get(i, 2334) for i in range(40)}
    assert sum(i.numel for i in expand(FLASH.spec).items) == 763205315794


def test_plan_says_so_and_the_command_too() -> None:
    found = plan(NAME)
    assert (found.tensors, found.released_bytes, len(found.shards)) == (96085, 510286023000, 48)
    assert found.naming == "hybrid" and not found.pattern
    done = dsv4("plan", "deepseek-ai/DeepSeek-V4.1-Flash", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["released_bytes"] == 510286023000


def test_the_headers_of_the_engram_shards_are_the_published_ones() -> None:
    shards = shards_of(FLASH)
    for number, size, digest in ((47, 656, "e5c5c7fc"), (48, 664, "5d8fa469")):
        facts = shards[f"model-{number:05d}-of-00048.safetensors"]
        header = make_header(facts, {})[8:]
        assert len(header) == size and hashlib.sha256(header).hexdigest().startswith(digest)
        names = [fact.name.split(".", 3)[3] for fact in facts]
        assert names == ["embed.weight", "embed.scale", "q_weight", "k_weight", "wkv.weight", "wkv.scale"]


def test_sizes_of_all_shards_are_those_in_their_lfs_pointers() -> None:
    """Git's name of a pointer holds the digest that is pinned and the size that follows from the table."""
    blobs = """
        ed64b2e0 d04d1d34 f19f5f23 82766879 4cf131aa 33afcb93 bef0f732 c8591889 2ef42f88 2cc30c2c 806098f2 57dc0d8b
        33e6442a 35877363 44e7ccd0 a1d29a48 9b54c235 1e3f4df3 0194c113 82039c0d b0162a20 a9a16936 ccbb0d6a c81d6d5a
        0bdd7e25 da6b3db1 63e0eb6f 9aff3d05 a1fcbaf3 1bf8c338 f233648f 01735f7b 54188954 7ebf03e7 cc3e9dc7 a93ac994
        33f34ba0 13085e01 f2b5f005 2312d1cd b4565684 4136a43c 8fd7f2f6 eedbbd9f a622ff44 9c7282e3 3eb96ce6 29a0c0b4
    """
    release = RELEASES[NAME]
    for published, facts, blob in zip(release.shards, shards_of(FLASH).values(), blobs.split(), strict=True):
        size = len(make_header(facts, {})) + sum(fact.nbytes for fact in facts)
        digest = (published.digest or "").removeprefix("sha256:")
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
        assert hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest().startswith(blob)


def test_a_toy_is_not_the_release_and_verify_says_where(toy: Path) -> None:
    done = dsv4("verify", toy, "--release", NAME, "--json")
    facts = json.loads(done.stdout)
    assert done.returncode == 1 and facts["release"] == NAME
    assert facts["wrong"]["model-00047-of-00048.safetensors"] == "missing"
    assert "3,311 are published" in facts["wrong"]["config.json"]


# ---------------------------------------------------------------- through every verb


def test_a_toy_has_every_row_and_kind(toy: Path) -> None:
    whole, small = expand(FLASH.spec), expand(tiny(FLASH))
    assert {i.row.key for i in whole.items} == {i.row.key for i in small.items}
    assert all(layer_kinds(tiny(FLASH)).values())
    report = inspect(toy)
    assert report.sound and report.encodings == dict(FLASH.encodings) and report.draft == "dspark"
    assert report.variant.startswith("custom (other size, stored like V4.1-Flash")
    assert all(name.startswith("mtp.") for name in report.passengers) and len(report.passengers) == 108
    assert examine(toy).sound


def test_megatron_names_are_those_of_the_bridge(toy: Path, megatron: Path) -> None:
    with open_checkpoint(megatron) as opened:
        keys = set(opened.opened.reader.tensors)  # pyright: ignore[reportAttributeAccessIssue]
    for key in (
        "decoder.layers.2.engram.embed.tables.0.weight",
        "decoder.layers.8.engram.wkv.weight",
        "decoder.layers.2.engram.q_weight",
        "decoder.layers.3.inner_layer.mlp.router.text_balance.expert_bias",
        "decoder.layers.3.inner_layer.mlp.router.image_balance.expert_bias",
        "decoder.layers.4.inner_layer.self_attention.core_attention.indexer.linear_wk.weight",
        "decoder.layers.4.inner_layer.self_attention.core_attention.indexer.k_norm.weight",
        "decoder.layers.4.inner_layer.self_attention.core_attention.compressor.linear_wgate.weight",
        "decoder.layers.10.inner_layer.self_attention.core_attention.compressor.linear_wkv.weight",
        "decoder.layers.13.hyper_connection.alpha_res",
        "decoder.final_norm.weight",
        "vision.blocks.1.attn.wqkv.bias",
        "aligner.w2.weight",
        "image_newline",
    ):
        assert key in keys, key
    assert not any(k.startswith(("dspark", "mtp")) or ".ape" in k or "hc_head" in k for k in keys)
    assert "decoder.layers.10.inner_layer.self_attention.core_attention.compressor.linear_wgate.weight" not in keys


@pytest.mark.parametrize("ragged", [False, True])
def test_scales_too_large_to_hold_come_out_the_same(
    ragged: bool, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an Engram table's 3 GB: with the limit at nothing every scale goes that way, patched ones too."""
    monkeypatch.setattr("dsv4_bridge.convert.emitter.LARGE", 0)
    monkeypatch.setattr(scales, "_PIECE", 100)
    source = make_toy(tmp_path / "hf", NAME, 5, payload="extreme", ragged=ragged)
    import_hf(source, tmp_path / "m")
    export_hf(tmp_path / "m", tmp_path / "back", source)
    assert same_files(source, tmp_path / "back") == []
    assert verify(tmp_path / "m", source, "bytes").same
    # Values of another toy under the scales of this one: most are made anew, in front of their weights and behind.
    other = make_toy(tmp_path / "other", NAME, 6, ragged=ragged)
    import_hf(other, tmp_path / "m2")
    export_hf(tmp_path / "m2", tmp_path / "mixed", source)
    monkeypatch.undo()
    export_hf(tmp_path / "m2", tmp_path / "held", source)
    assert same_files(tmp_path / "mixed", tmp_path / "held") == [] != same_files(source, tmp_path / "held")
    assert verify(tmp_path / "mixed", other, "values").same


def test_repack_to_bf16_and_back_is_every_value(toy: Path, megatron: Path, tmp_path: Path) -> None:
    repack(toy, tmp_path / "bf16", "bf16")
    report = inspect(tmp_path / "bf16")
    assert report.sound and {report.encodings[c] for c in ("linear32", "engram", "expert")} == {"bf16"}
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert verify(toy, tmp_path / "bf16").same
    export_hf(megatron, tmp_path / "exported", None, "bf16")
    assert [f for f in same_files(tmp_path / "bf16", tmp_path / "exported") if f.endswith("safetensors")] == []


def test_repack_to_fp8_is_refused_where_a_value_would_change_and_certified_where_not(tmp_path: Path) -> None:
    natural = make_toy(tmp_path / "natural", NAME, 3)
    with pytest.raises(BridgeError, match=r"recoding .* from fp8_\w+ to fp8: the 128x128 block at row .*allow-lossy"):
        repack(natural, tmp_path / "out", "fp8")
    assert not (tmp_path / "out").exists()
    report = repack(natural, tmp_path / "lossy", "fp8", allow_lossy=True)
    assert report.recoded["ffn.experts.w1"].lossless and 0 < report.recoded["engram.embed"].rounded_values < 1000
    quantization = json.loads((tmp_path / "lossy" / "config.json").read_text())["quantization_config"]
    assert quantization["weight_block_size"] == [128, 128] and quantization["expert_dtype"] == "fp8"
    even = _flattened(natural, tmp_path / "even")
    exact = repack(even, tmp_path / "fp8", "fp8")
    assert {"attn.wq_a", "engram.embed", "engram.wkv", "dspark.main_proj"} <= set(exact.recoded)
    assert all(c.lossless for c in exact.recoded.values())
    assert verify(even, tmp_path / "fp8").same and inspect(tmp_path / "fp8").encodings["engram"] == "fp8"
    import_hf(tmp_path / "fp8", tmp_path / "m")
    export_hf(tmp_path / "m", tmp_path / "back", tmp_path / "fp8")
    assert same_files(tmp_path / "fp8", tmp_path / "back") == []


def _flattened(source: Path, out: Path) -> Path:
    """The same with every FP8 scale at 2^-8, so that what a block holds has one unit."""
    shutil.copytree(source, out)
    with open_checkpoint(out) as opened:
        found: Any = opened.opened
        places = [b.scale for b in found.bound.values() if b.scale and b.encoding.startswith("fp8")]
    for place in places:
        data = np.memmap(out / place.file, np.uint8, "r+", place.start, (place.nbytes,))
        data[:] = 119
        data.flush()
    return out


def test_passengers_travel_or_are_left_out(toy: Path, megatron: Path, tmp_path: Path) -> None:
    export_hf(megatron, tmp_path / "alone", None, "bf16")
    assert verify(toy, tmp_path / "alone").same
    import_hf(toy, tmp_path / "m", drop_passengers=True)
    assert inspect(tmp_path / "m").sound and inspect(tmp_path / "m").draft == "none"
    export_hf(tmp_path / "m", tmp_path / "dropped", toy, drop_passengers=True)
    report = inspect(tmp_path / "dropped")
    assert report.sound and not report.passengers and report.encodings == dict(FLASH.encodings)


def test_workers_and_a_dry_run_make_the_same(toy: Path, megatron: Path, tmp_path: Path) -> None:
    import_hf(toy, tmp_path / "m", Options(workers=3))
    assert same_files(megatron, tmp_path / "m") == []
    assert import_hf(toy, tmp_path / "none", Options(dry_run=True)).tensors == 381
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------- what is refused


def test_other_namings_are_refused_by_name(toy: Path, megatron: Path, tmp_path: Path) -> None:
    said = r"naming 'gpt' is not one of hybrid, by which Megatron-LM names the tensors of DeepSeek-V4\.1"
    calls: tuple[Callable[[], object], ...] = (
        lambda: import_hf(toy, tmp_path / "m", naming="gpt"),
        lambda: plan(NAME, naming="gpt"),
        lambda: rename(megatron, tmp_path / "m", "gpt"),
    )
    for call in calls:
        with pytest.raises(BridgeError, match=said):
            call()
    assert not (tmp_path / "m").exists()


def test_what_computes_is_refused_by_name_with_the_reason(toy: Path, tmp_path: Path) -> None:
    said = r"DeepSeek-V4\.1 is not computed here: .*official reference has a known defect.*docs/concepts/v41\.md"
    for words in (
        ("generate", toy, "--prompt", "a"),
        ("parity", toy),
        ("merge", toy, toy, tmp_path / "out"),
        ("flops", NAME),
        ("plan", NAME, "--gpus", "8"),
        ("train", "flash-lora", f"start={toy}"),
    ):
        done = dsv4(*words)
        assert done.returncode == 2 and re.search(said, " ".join(done.stderr.split())), (words, done.stderr)


def test_a_full_width_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="it is not shortened"):
        toy_spec(NAME, "full", 3)
    assert isinstance(ModelSpec.from_pretrained(NAME), type(FLASH.spec))


def test_two_architectures_are_two_models(toy: Path, toy_flash: Path) -> None:
    report = verify(toy, toy_flash, "names")
    assert not report.same and "architecture: V41Spec against ModelSpec" in report.config[0]


DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "another tile": (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        r"expected \[32, 32\]",
    ),
    "FP8 experts": ({"quantization_config": {"quant_method": "fp8", "expert_dtype": "fp8"}}, "stored as mxfp4"),
    "another quantisation": ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_config_that_contradicts_the_tensors_is_refused(case: str, toy: Path, tmp_path: Path) -> None:
    folder = _copied(toy, tmp_path)
    change, match = DAMAGE[case]
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    with pytest.raises(BridgeError, match=match):
        import_hf(folder, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_illegal_engram_scale_is_refused_at_its_row(toy: Path, tmp_path: Path) -> None:
    folder = _copied(toy, tmp_path)
    with open_checkpoint(folder) as opened:
        found: Any = opened.opened
        scale = found.bound["layers.1.engram.embed.weight"].scale
    data = np.memmap(folder / scale.file, np.uint8, "r+", scale.start, scale.shape)
    data[431, 1] = 255
    data.flush()
    with pytest.raises(BridgeError, match=r"layers\.1\.engram\.embed\.weight \(fp8_1x32\).*row 431, column 32.*255"):
        import_hf(folder, tmp_path / "m")


def test_other_rows_of_a_table_are_a_finding(toy: Path, tmp_path: Path) -> None:
    folder = _copied(toy, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["engram_num_embeddings"][1] += 1
    (folder / "config.json").write_text(json.dumps(config))
    report = inspect(folder)
    assert not report.sound and [f.kind for f in report.findings] == ["shape"]
    assert "engram_rows" in str(report.findings[0])


def _copied(toy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "hf"))
