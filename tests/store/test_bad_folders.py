"""Bad Hugging Face folders: one clear message, exit code 2, nothing written or changed."""

import json
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import (
    INDEX,
    a_header,
    add,
    drop,
    edit,
    first_shard,
    linked,
    listing,
    one_message,
    pipe,
    put,
    reconfig,
    refuses,
    reindex,
    replace,
    several,
    spoiled,
    with_header,
)

from conftest import DATA, dsv4
from dsv4_bridge import export_hf, import_hf, inspect, repack, verify

E0 = "layers.0.ffn.experts"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensors, all of them by row": (
        edit(drop("norm.weight", *(f"{E0}.{e}.w1.weight" for e in range(5)), f"{E0}.7.w2.weight", f"{E0}.7.w2.scale")),
        r"missing +ffn\.experts\.w1: 5 \(layers\.0\.ffn\.experts\.0\.w1\.weight, .* …\).*"
        r"missing +ffn\.experts\.w2: 1 \(layers\.0\.ffn\.experts\.7\.w2\.weight\).*missing +norm: 1 \(norm\.weight\)"
        r"|missing +norm: 1.*missing +ffn\.experts\.w1: 5.*missing +ffn\.experts\.w2: 1",
    ),
    "extra tensors, all of them by name": (
        edit(several(add("layers.0.attn.extra"), add("layers.3.attn.extra"), add("bias"))),
        r"unknown +layers\.N\.attn\.extra: 2 \(layers\.0\.attn\.extra, layers\.3\.attn\.extra\)"
        r".*unknown +bias: 1 \(bias\)",
    ),
    "missing MTP block": (
        edit(lambda s: [t.pop(n) for t in s.values() for n in list(t) if n.startswith("mtp.")] and None),
        r"missing +mtp\..*num_nextn_predict_layers 0 in config\.json",
    ),
    "wrong shape": (
        edit(replace("layers.1.attn_norm.weight", shape=[255])),
        r"shape +attn_norm: 1 \(layers\.1\.attn_norm\.weight\) is \[255\], expected \[256\]",
    ),
    "wrong shape of a quantised weight": (
        edit(replace("layers.0.attn.wq_a.weight", shape=[127, 256])),
        r"shape +attn\.wq_a: 1 .* is \[127, 256\], expected \[128, 256\] = \[.*\] as fp8",
    ),
    "wrong shape of a scale": (
        edit(replace("layers.0.attn.wq_a.scale", shape=[1, 1])),
        r"attn\.wq_a: 1 .* scale is \[1, 1\], expected \[1, 2\]",
    ),
    "wrong dtype": (
        edit(replace("layers.1.attn_norm.weight", dtype="F16")),
        r"dtype +attn_norm: 1 \(layers\.1\.attn_norm\.weight\) is F16, expected BF16 or F32",
    ),
    "wrong dtype of a table": (
        edit(replace("layers.0.ffn.gate.tid2eid", dtype="F32")),
        r"dtype .*tid2eid.* is F32, expected I32 or I64",
    ),
    "weight without its scale": (
        edit(drop("layers.0.attn.wq_a.scale", "layers.1.attn.wq_a.scale")),
        r"scale +attn\.wq_a: 2 .* is F8_E4M3 and has no scale beside it",
    ),
    "scale without its weight": (
        edit(drop("layers.0.attn.wq_a.weight")),
        r"missing +attn\.wq_a: 1 .*a scale without its weight: 1 \(layers\.0\.attn\.wq_a\.scale\)",
    ),
    "scale on a tensor that has none": (
        edit(add("layers.0.attn_norm.scale", "F8_E8M0", (1,), 1)),
        r"attn_norm\.scale",
    ),
    "scale of another type": (
        edit(replace("layers.0.attn.wq_a.scale", dtype="I8")),
        r"attn\.wq_a: 1 .* is F8_E4M3 with a I8 scale, known are",
    ),
    "no tensor of this model": (
        edit(lambda s: [t.clear() for t in s.values()] and add("model.layers.0.self_attn.q_proj.weight")(s)),
        r"no tensor has a DeepSeek-V4 name \(found model\.layers\.0\.self_attn\.q_proj\.weight\)",
    ),
    "index names a tensor that no shard has": (
        reindex(lambda m: m.update({"layers.0.more": m["norm.weight"]})),
        r"index and shard headers disagree: 1 not where the index says \(layers\.0\.more\)",
    ),
    "shard holds a tensor that the index lacks": (
        reindex(lambda m: m.pop("norm.weight") and None),
        r"index and shard headers disagree: 1 in a shard but not in the index \(norm\.weight\)",
    ),
    "index names the wrong shard": (
        reindex(lambda m: m.update({"norm.weight": m["embed.weight"], "embed.weight": m["norm.weight"]})),
        r"index and shard headers disagree: 2 not where the index says",
    ),
    "the same tensor in two shards": (
        edit(lambda s: [t.update({"twice": ("U8", [1], b"x")}) for t in list(s.values())[:2]] and None),
        r"tensor 'twice' is in model-00001-.* and in model-00002-",
    ),
    "the same name twice in one header": (
        first_shard(lambda raw: with_header(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"xy")),
        r"the name 'a' is given twice",
    ),
    "missing shard": (
        lambda f: sorted(f.glob("*.safetensors"))[2].unlink(),
        r"1 of \d+ shards that the index names are missing: model-00003-.*finish the download",
    ),
    "no index beside several shards": (
        lambda f: (f / INDEX).unlink(),
        r"shards but no model\.safetensors\.index\.json; the folder is incomplete",
    ),
    "truncated shard": (
        first_shard(lambda raw: raw[:-1]),
        r"model-00001-.*the shard is truncated: its header describes \d+ bytes, it has \d+",
    ),
    "shard cut inside its header": (first_shard(lambda raw: raw[:60]), r"header claims \d+ bytes \(the file has 60\)"),
    "empty shard": (first_shard(lambda raw: b""), r"the file has 0 bytes, too few"),
    "trailing bytes": (first_shard(lambda raw: raw + b"x"), r"the shard has trailing bytes"),
    "absurdly large header": (
        first_shard(lambda raw: struct.pack("<Q", 1 << 62) + raw[8:]),
        r"its header claims 4611686018427387904 bytes .*corrupt, or no safetensors file",
    ),
    "header that is no JSON": (first_shard(lambda raw: raw[:8] + b"\0" + raw[9:]), r"not valid JSON"),
    "header that is a list": (first_shard(lambda raw: with_header([1, 2, 3, 4], b"")), r"expected a JSON object"),
    "header nested without end": (
        first_shard(lambda raw: with_header(b'{"a":' * 200_000, b"")), r"not (usable|valid) JSON",
    ),
    "header entry without a shape": (
        a_header(lambda h: h[max(h)].pop("shape") and None), r"has no usable dtype, shape and data_offsets",
    ),
    "header with a negative size": (
        a_header(lambda h: h[max(h)].update(shape=[-1, 4])), r"has no usable dtype, shape and data_offsets",
    ),
    "header with a shape beyond memory": (
        a_header(lambda h: h[max(h)].update(shape=[1 << 61] * 16)), r"spans \d+ bytes .* expected a huge integer",
    ),
    "header with an unknown dtype": (
        a_header(lambda h: h[max(h)].update(dtype="F4_E2M1FN_X2")), r"has dtype 'F4_E2M1FN_X2'; known are",
    ),
    "header with overlapping tensors": (
        a_header(lambda h: [e.update(data_offsets=[0, e["data_offsets"][1] - e["data_offsets"][0]])
                                for e in h.values()] and None),
        r"begins at byte 0 of the data, expected",
    ),
    "metadata that is no text": (a_header(lambda h: h | {"__metadata__": {"a": 1}}), r"__metadata__ is not"),
    "name with control characters": (
        edit(add("layers.0.\x1b[31m\n.x")), r"unknown +'layers\.N\.\\x1b\[31m\\n\.x': 1",
    ),
    "name with half a character": (
        first_shard(lambda raw: with_header(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"")),
        r"half of a surrogate pair",
    ),
    "index that points above its folder": (
        reindex(lambda m: m.update({"norm.weight": "../norm.safetensors"})),
        r"'norm\.weight' is said to be in '\.\./norm\.safetensors'; a shard is a \.safetensors file of the same folder",
    ),
    "index that points anywhere": (
        reindex(lambda m: m.update({"norm.weight": "/tmp/norm.safetensors"})), r"file of the same folder",
    ),
    "index that points below its folder": (
        reindex(lambda m: m.update({"norm.weight": "sub/norm.safetensors"})), r"file of the same folder",
    ),
    "index with a file name beyond the system's": (
        reindex(lambda m: m.update({"norm.weight": "x" * 5000 + ".safetensors"})), r"file of the same folder",
    ),
    "index that names a pickle": (
        reindex(lambda m: m.update({"norm.weight": "pytorch_model.bin"})), r"file of the same folder",
    ),
    "index without a weight map": (lambda f: put(f / INDEX, "{}"), r"it has no 'weight_map' object"),
    "index that is no JSON": (lambda f: put(f / INDEX, "weights"), r"not valid JSON"),
    "index that is a pipe": (lambda f: pipe(f / INDEX), r"not a regular file"),
    "zip pickle where safetensors belongs": (first_shard(lambda raw: b"PK\3\4" + raw[4:]), r"this is a pickle"),
    "pickle where safetensors belongs": (
        first_shard(lambda raw: pickle.dumps({"a": 1}) + raw), r"this is a pickle .*refusing to load code",
    ),
    "only a pickle in the folder": (
        lambda f: [p.unlink() for p in [*f.glob("*.safetensors"), f / INDEX]]
        and put(f / "pytorch_model.bin", pickle.dumps({})),
        r"pytorch_model\.bin is a pickle and may run code; only safetensors are read",
    ),
    "no weights in the folder": (
        lambda f: [p.unlink() for p in [*f.glob("*.safetensors"), f / INDEX]] and None,
        r"this is not a Hugging Face checkpoint",
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file; a checkpoint"),
    "config.json that is a folder": (
        lambda f: (f / "config.json").rename(f / "moved") and (f / "config.json").mkdir(), r"not a regular file",
    ),
    "config.json that is a pipe": (lambda f: pipe(f / "config.json"), r"not a regular file"),
    "config with a missing field": (reconfig(q_lora_rank=...), r"the field 'q_lora_rank' is missing"),
    "config of another size": (reconfig(hidden_size=512), r"not those that its config\.json implies.*expected \[.*512"),
    "config with more experts": (reconfig(n_routed_experts=9), r"missing +ffn\.experts\.w1: .*experts\.8\.w1"),
    "config that says the experts are FP8": (
        reconfig(expert_dtype="fp8"), r"contradicts the tensors: expert_dtype is 'fp8', .* stored as mxfp4",
    ),
    "config with other tiles": (
        reconfig(quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]}),
        r"contradicts the tensors: weight_block_size is \[32, 32\], expected \[128, 128\]",
    ),
    "config of a DSpark release": (
        reconfig(dspark_block_size=5, dspark_noise_token_id=1, dspark_target_layer_ids=[1], dspark_markov_rank=4,
                 compress_ratios=[0, 0, 4, 128, 4, 128, 0]),
        r"are an MTP block .* config\.json describes a DSpark drafter",
    ),
    "config of DeepSeek-V4.1": (
        lambda f: put(f / "config.json", (DATA / "DeepSeek-V4.1-Flash.config.json").read_bytes()),
        r"its mtp\.\* tensors are an MTP block .* config\.json describes a DSpark drafter",
    ),
    "Vision-Exp by its config": (reconfig(vision_config={}), r"this is DeepSeek-V4-Flash-Vision-Exp .*vision tower"),
    "Vision-Exp by its tensors": (
        edit(add("layers.3.ffn.gate.bias_vl", "F32", (8,), 32)), r"'layers\.3\.ffn\.gate\.bias_vl' belongs to .*Vision",
    ),
    "another model": (reconfig(model_type="deepseek_v3"), r"model_type is 'deepseek_v3', expected 'deepseek_v4'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_and_nothing_is_written(case: str, tmp_path: Path, toy_flash: Path) -> None:
    folder, message = spoiled(toy_flash, tmp_path / "hf", BAD[case])
    before = listing(tmp_path)
    refuses(lambda: import_hf(folder, tmp_path / "new" / "out"), message)
    refuses(lambda: repack(folder, tmp_path / "new" / "out", "bf16"), message)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("case", ["missing tensors, all of them by row", "truncated shard", "another model"])
def test_a_bad_folder_is_refused_as_like(case: str, tmp_path: Path, toy_flash: Path, toy_megatron: Path) -> None:
    folder, message = spoiled(toy_flash, tmp_path / "hf", BAD[case])
    before = listing(tmp_path)
    refuses(lambda: export_hf(toy_megatron, tmp_path / "out", folder), message)
    refuses(lambda: verify(toy_flash, folder), message)
    assert listing(tmp_path) == before


def test_inspect_lists_every_finding_instead(tmp_path: Path, toy_flash: Path) -> None:
    folder = linked(toy_flash, tmp_path / "hf")
    names = [f"{E0}.{e}.w1.weight" for e in range(5)]
    edit(several(drop(*names), add("bias"), replace("norm.weight", dtype="F16")))(folder)
    report = inspect(folder)
    found = {(f.kind, f.row): f.names for f in report.findings}
    assert not report.sound
    assert found["missing", "ffn.experts.w1"] == tuple(names)
    assert found["unknown", "bias"] == ("bias",)
    assert found["dtype", "norm"] == ("norm.weight",)
    assert len(found["scale", "a scale without its weight"]) == 5


BY_COMMAND = (
    "missing tensors, all of them by row",
    "index that points above its folder",
    "pickle where safetensors belongs",
    "truncated shard",
    "config of DeepSeek-V4.1",
    "config with a missing field",
)


@pytest.mark.parametrize("case", BY_COMMAND)
def test_the_command_says_so_once_and_exits_with_2(case: str, tmp_path: Path, toy_flash: Path) -> None:
    folder, message = spoiled(toy_flash, tmp_path / "hf", BAD[case])
    before = listing(tmp_path)
    done = dsv4("import", folder, tmp_path / "out", "--json")
    told = json.loads(done.stdout)["error"]  # a program reads it there, people on stderr
    done.stdout = ""
    said = one_message(done)
    assert re.search(message, said, re.DOTALL) and told in said
    assert listing(tmp_path) == before
