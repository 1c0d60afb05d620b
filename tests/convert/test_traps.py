"""Known mistakes of converters (names, dtypes, stacking), each with a test named after it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from conftest import same_files
from dsv4_bridge import BridgeError, export_hf, import_hf, inspect, make_toy
from dsv4_bridge.spec.megatron import regions
from dsv4_bridge.store.hf import open_hf
from dsv4_bridge.store.torch_dist.reader import open_torch_dist
from dsv4_bridge.store.values import HFValues, Scratch


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def test_trap04_float32_tensors_stay_float32(toy_flash: Path, toy_megatron: Path) -> None:
    source, checkpoint = tensors_of(toy_flash), open_hf(toy_flash)
    with open_torch_dist(toy_megatron) as reader:
        seen = 0
        for item in checkpoint.plan.items:
            if item.row.encoding != "f32":
                continue
            found = [reader.read(r.key, r.offsets, r.sizes).reshape(-1) for r in regions(item, checkpoint.spec)]
            assert {reader.tensors[r.key].dtype for r in regions(item, checkpoint.spec)} == {"F32"}
            assert np.array_equal(
                np.concatenate(found).view(np.uint32), source[item.name].numpy().ravel().view(np.uint32)
            )
            seen += 1
        assert seen == sum(t.dtype == torch.float32 for t in source.values()) > 50
        assert reader.tensors["decoder.layers.0.mlp.router.tid2eid"].dtype == "I32"
    checkpoint.close()


def test_trap05_the_three_scales_go_to_pre_post_and_res(toy_flash: Path, toy_megatron: Path) -> None:
    source = tensors_of(toy_flash)
    with open_torch_dist(toy_megatron) as reader:
        for name, place in (("attn", "self_attention"), ("ffn", "mlp")):
            scale = source[f"layers.3.hc_{name}_scale"].numpy()
            assert len(set(scale.tolist())) == 3
            for value, part in zip(scale, ("pre", "post", "res"), strict=True):
                assert reader.read(f"decoder.layers.3.{place}_hyper_connection.alpha_{part}")[0] == value


def test_trap32_experts_are_stacked_gate_first_by_global_id(toy_flash: Path, toy_megatron: Path) -> None:
    checkpoint, scratch = open_hf(toy_flash), Scratch()
    values, spec = HFValues(checkpoint), checkpoint.spec

    def decoded(name: str) -> np.ndarray:
        item = checkpoint.plan.by_name[name]
        return np.concatenate([s.copy() for s in values.stripes(item, 0, item.shape[0], scratch)])

    with open_torch_dist(toy_megatron) as reader:
        for place, prefix in (("decoder.layers.4", "layers.4"), ("mtp.layers.0.transformer_layer", "mtp.0")):
            fc1 = reader.read(f"{place}.mlp.experts.experts.linear_fc1.weight")
            fc2 = reader.read(f"{place}.mlp.experts.experts.linear_fc2.weight")
            assert fc1.shape == (spec.n_routed_experts, 2 * spec.moe_intermediate_size, spec.hidden_size)
            for e in range(spec.n_routed_experts):
                w1, w2, w3 = (decoded(f"{prefix}.ffn.experts.{e}.{w}.weight") for w in ("w1", "w2", "w3"))
                assert np.array_equal(fc1[e], np.concatenate([w1, w3])) and np.array_equal(fc2[e], w2)
    checkpoint.close()


def test_trap42_export_writes_exactly_the_planned_names(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    export_hf(toy_megatron, tmp_path / "out", None, "bf16")
    checkpoint = open_hf(toy_flash)
    assert set(tensors_of(tmp_path / "out")) == set(checkpoint.plan.by_name)
    checkpoint.close()


def test_trap43_a_folder_in_which_nothing_matches_is_an_error(tmp_path: Path, toy_flash: Path) -> None:
    (tmp_path / "config.json").write_bytes((toy_flash / "config.json").read_bytes())
    save_file({"transformer.h.0.attn.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(BridgeError, match="no tensor has a DeepSeek-V4 name"):
        import_hf(tmp_path, tmp_path.parent / "out")


def test_trap45_padded_vocabulary_rows_are_not_exported(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = {}
    with open_torch_dist(toy_megatron) as reader:
        for key, entry in reader.tensors.items():
            tensor = torch.from_numpy(reader.read(key))
            tensor = tensor.view(torch.bfloat16) if entry.dtype == "BF16" else tensor
            if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                tensor = torch.cat([tensor, torch.randn(96, tensor.shape[1]).to(tensor.dtype)])
            state[key] = tensor
    dcp.save(state, checkpoint_id=tmp_path / "padded" / "iter_0000007", no_dist=True)
    export_hf(tmp_path / "padded" / "iter_0000007", tmp_path / "out", toy_flash)
    assert same_files(toy_flash, tmp_path / "out") == []


@pytest.mark.parametrize("variant", ["Flash", "Flash-0731"])
def test_trap47_draft_blocks_are_told_by_content(variant: str, tmp_path: Path) -> None:
    folder = make_toy(tmp_path / "hf", variant, 1)
    assert inspect(folder).draft == ("dspark" if variant == "Flash-0731" else "mtp")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1  # in both: the count does not tell
    other = make_toy(tmp_path / "other", "Flash" if variant == "Flash-0731" else "Flash-0731", 1)
    (folder / "config.json").write_bytes((other / "config.json").read_bytes())
    with pytest.raises(BridgeError, match="DSpark drafter"):
        import_hf(folder, tmp_path / "out")


def test_trap48_a_missing_mtp_block_is_named_not_invented(tmp_path: Path) -> None:
    folder = make_toy(tmp_path / "hf", "Flash", 1)
    (folder / "model-00009-of-00009.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    body["weight_map"] = {n: f for n, f in body["weight_map"].items() if not n.startswith("mtp.")}
    index.write_text(json.dumps(body))
    with pytest.raises(BridgeError, match=r"missing  mtp\.e_proj.*\n(.*\n)*.*num_nextn_predict_layers 0"):
        import_hf(folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    import_hf(folder, tmp_path / "out")
    assert inspect(tmp_path / "out").draft == "none"


def test_trap55_run_config_holds_plain_types_only(toy_megatron: Path) -> None:
    body = yaml.safe_load((toy_megatron / "iter_0000000" / "run_config.yaml").read_text())
    assert body["model"]["pipeline_model_parallel_layout"] is None
    assert body["model"]["mtp_num_layers"] == 1 and body["model"]["rotary_percent"] == 1.0
    assert body["model"]["csa_compress_rotary_base"] == 160000
    assert body["model"]["csa_compress_ratios"] == [0, 0, 4, 128, 4, 128, 0]
