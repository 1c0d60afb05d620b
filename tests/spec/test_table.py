"""The table reproduces every released tensor, exactly."""

import json
import subprocess
import sys

import pytest

from conftest import inventory, of_release
from dsv4_bridge.codec import CODECS, RECODERS
from dsv4_bridge.spec.encodings import ENCODINGS, QUANTISED
from dsv4_bridge.spec.megatron import extra_state_keys, naming_for, regions
from dsv4_bridge.spec.plan import expand
from dsv4_bridge.spec.table import ROWS
from dsv4_bridge.spec.variants import VARIANTS

# What DeepSeek published has its inventory in tests/files: a new release brings one.
ALL = [v.name for v in VARIANTS.values() if v.hub_id.startswith("deepseek-ai/")]
RELEASED = [name for name in ALL if not name.startswith("V4.1")]


@pytest.mark.parametrize("name", ALL)
def test_plan_reproduces_the_inventory(name: str) -> None:
    variant = VARIANTS[name]
    found = list(expand(variant.spec, variant.own_mtp_head).stored(variant.encodings))
    stated = json.loads(of_release(name, "tensors").read_text())
    assert {f.name: (f.dtype, f.shape) for f in found} == inventory(name)
    assert len(found) == stated["tensor_count"]  # no name twice
    assert sum(f.nbytes for f in found) == stated["total_size"]


def test_trap49_base_ships_its_own_mtp_embedding_and_head() -> None:
    flash, base = (inventory(n) for n in ("Flash", "Flash-Base"))
    assert {n.removesuffix(".scale") for n in set(base) - set(flash)} == {
        "mtp.0.emb.tok_emb.weight",
        "mtp.0.head.weight",
    }


def test_trap54_total_counts_match_the_published_index() -> None:
    assert (len(inventory("Flash")), len(inventory("Pro")), len(inventory("Flash-0731"))) == (69187, 145116, 72317)


def test_trap20_names_are_looked_up_exactly() -> None:
    plan = expand(VARIANTS["Flash"].spec)
    assert plan.by_name["layers.2.attn.wq_b.weight"].row.key == "attn.wq_b"
    assert plan.by_name["layers.2.attn.indexer.wq_b.weight"].row.key == "attn.indexer.wq_b"
    assert plan.by_name["head.weight"].row.key == "head"
    assert plan.by_name["hc_head_fn"].row.key == "hc_head_fn"


def test_trap31_hash_layers_have_a_table_and_no_bias() -> None:
    names = expand(VARIANTS["Flash"].spec).by_name
    for layer in range(43):
        assert (f"layers.{layer}.ffn.gate.tid2eid" in names) == (layer < 3)
        assert (f"layers.{layer}.ffn.gate.bias" in names) == (layer >= 3)
    assert "mtp.0.ffn.gate.bias" in names


@pytest.mark.parametrize("name", ALL)
def test_regions_tile_every_megatron_tensor_once(name: str) -> None:
    variant = VARIANTS[name]
    plan = expand(variant.spec, variant.own_mtp_head)
    naming = naming_for(plan.spec, None, "")
    volume: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    boxes = set()
    for item in plan.items:
        for region in regions(item, plan.spec, naming):
            size = 1
            for n in region.sizes:
                size *= n
            volume[region.key] = volume.get(region.key, 0) + size
            assert shapes.setdefault(region.key, region.global_shape) == region.global_shape
            assert (region.key, region.offsets) not in boxes
            boxes.add((region.key, region.offsets))
    for key, shape in shapes.items():
        whole = 1
        for n in shape:
            whole *= n
        assert volume[key] == whole, key


def test_passengers_are_dspark_and_base_copies_only() -> None:
    for name in RELEASED:
        variant = VARIANTS[name]
        passengers = [i.name for i in expand(variant.spec, variant.own_mtp_head).items if i.passenger]
        if variant.spec.dspark:  # trap 47: never half-mapped onto MTP
            assert passengers and all(n.startswith("mtp.") for n in passengers)
            assert len([n for n in inventory(name) if n.startswith("mtp.")]) in (4705, 7009)
        else:
            assert passengers == (["mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"] if variant.own_mtp_head else [])


def test_extra_state_for_every_linear_and_norm() -> None:
    spec = VARIANTS["Flash"].spec
    keys = extra_state_keys(expand(spec))
    assert len(keys) == len(set(keys))
    assert "decoder.layers.5.mlp.experts.experts.linear_fc1._extra_state/shard_255_256" in keys
    assert "mtp.layers.0.e_proj._extra_state/shard_0_1" in keys
    assert "decoder.final_layernorm._extra_state/shard_0_1" in keys
    assert not any("router" in k or "hyper_connection" in k or "embedding" in k for k in keys)


def test_rows_are_unique_and_float32_rows_stay_float32() -> None:
    keys = [r.key for r in ROWS]
    assert len(keys) == len(set(keys))
    floats = {r.key for r in ROWS if r.encoding == "f32"}  # trap 4
    assert {
        "attn.attn_sink",
        "ffn.gate.bias",
        "attn.compressor.ape",
        "hc_attn_fn",
        "hc_ffn_scale",
        "hc_head_fn",
    } <= floats


def test_core_imports_no_megatron_transformers_or_torch_to_plan() -> None:
    code = (
        "import sys, dsv4_bridge; dsv4_bridge.plan('Pro');"
        "bad = {'megatron', 'transformers', 'torch'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_row_says_what_its_values_are() -> None:
    """Weights are made, orthogonalised and adapted by the role: nobody guesses it from a name or a shape."""
    assert {r.role for r in ROWS} == {"matrix", "groups", "table", "norm", "scale", "bias", "ids"}
    for row in ROWS:
        assert (row.role == "ids") == (row.encoding == "int")
        assert (row.role == "groups") == row.shape[0].startswith("o_groups*")
        # Biases of positions in a block are the one bias of two dimensions.
        assert (len(row.shape) == 2) == (row.role in ("matrix", "groups", "table", "ids") or row.shape[0] == "ratio")
        assert row.encoding not in ("linear", "expert") or row.matrix
        assert not row.lora or row.matrix
        assert row.cut != "vocabulary" or row.role == "table"
        assert row.resaved is None or row.transformers


def test_scopes_of_the_model_say_where_it_begins_and_ends() -> None:
    assert [r.key for r in ROWS if r.scope == "first"] == ["embed"]
    assert {r.key for r in ROWS if r.scope == "last"} == {
        "head",
        "norm",
        *(f"hc_head_{x}" for x in ("fn", "base", "scale")),
    }


def test_every_quantised_encoding_has_a_codec() -> None:
    assert set(CODECS) == set(QUANTISED)
    for name in QUANTISED:
        rows, columns = ENCODINGS[name].block
        assert ENCODINGS[name].scale_shape((rows * 3, columns * 5)) == (3, 5)
        assert ENCODINGS[name].scale_rows(rows * 2, rows * 2 + 1) == (2, 3)
    assert all({source, target} <= set(QUANTISED) for source, target in RECODERS)
