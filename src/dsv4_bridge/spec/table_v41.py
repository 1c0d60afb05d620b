"""ROWS_V41: every kind of tensor in a DeepSeek-V4.1 checkpoint. Rows that V4 has too are V4's own, by their keys.

Columns as in `table`; what is new here:

    megatron    None throughout: Megatron-LM has the model as a HybridModel only, so `hybrid` alone names it
    hybrid      names of Megatron-Bridge's draft deepseek_v41_bridge.py @58af83ad, which are those of
                megatron/core/models/deepseek_v41 (Megatron-LM pull request 7503)
    scope       also vision (tower, aligner, marks of an image) | vision_layer
    when        also kv_source (layers that keys and values come from) | pooled (of those, with a gate: ratio 2) |
                index_source | engram
    encoding    also linear32 (a linear map in tiles of 32x32) | engram (a table with a scale a row and 32 columns)
    role        also vector (one embedding)

Sources: released names, shapes and types: the published headers' totals, by type, by pattern and by layer.
"""

from dataclasses import replace

from .table import ROWS, Row

_BY_KEY = {row.key: row for row in ROWS}
_H, _V = "hidden_size", "vision_size"
_CORE = "inner_layer.self_attention.core_attention"


# fmt: off
def _shared(*keys: str) -> tuple[Row, ...]:
    """Rows of V4, without what no other tool names so far."""
    return tuple(
        replace(
            _BY_KEY[key], transformers=None, megatron=None, saved=None, resaved=None, lora="",
            encoding={"linear": "linear32"}.get(_BY_KEY[key].encoding, _BY_KEY[key].encoding),
        )
        for key in keys
    )


def _vision(name: str, shape: tuple[str, ...], role: str, scope: str = "vision") -> Row:
    key = name.removesuffix(".weight") if name.startswith(("vision", "aligner", "image")) else f"vision.blocks.{name}"
    return Row(key.removesuffix(".weight"), name, None, None, shape, "plain", role, scope, hybrid=name)


_TOWER = (
    _vision("vision.patch_embed.proj.weight", (_V, "3*patch_size*patch_size"), "matrix"),
    _vision("vision.patch_embed.proj.bias", (_V,), "bias"),
    _vision("vision.norm.weight", (_V,), "norm"),
    _vision("norm1.weight", (_V,), "norm", "vision_layer"),
    _vision("attn.wqkv.weight", (f"3*{_V}", _V), "matrix", "vision_layer"),
    _vision("attn.wqkv.bias", (f"3*{_V}",), "bias", "vision_layer"),
    _vision("attn.wo.weight", (_V, _V), "matrix", "vision_layer"),
    _vision("attn.wo.bias", (_V,), "bias", "vision_layer"),
    _vision("norm2.weight", (_V,), "norm", "vision_layer"),
    _vision("mlp.w1.weight", ("2*vision_intermediate", _V), "matrix", "vision_layer"),
    _vision("mlp.w2.weight", (_V, "vision_intermediate"), "matrix", "vision_layer"),
    _vision("aligner.w1.weight", (_H, f"downsample_ratio*downsample_ratio*{_V}"), "matrix"),
    _vision("aligner.w1.bias", (_H,), "bias"),
    _vision("aligner.w2.weight", (_H, _H), "matrix"),
    _vision("aligner.w2.bias", (_H,), "bias"),
)
_IMAGE = tuple(_vision(f"image_{mark}", (_H,), "vector", "first") for mark in ("start", "end", "newline"))

_COMPRESSED = (
    *(replace(row, when=when) for row, when in zip(
        _shared("attn.compressor.wkv", "attn.compressor.wgate", "attn.compressor.norm"),
        ("kv_source", "pooled", "kv_source"), strict=True)),
    Row("attn.indexer.wk", "attn.indexer.wk.weight", None, None, ("index_head_dim", "head_dim"), "plain", "matrix",
        when="kv_source", state=True, hybrid=f"{_CORE}.indexer.linear_wk.weight"),
    Row("attn.indexer.k_norm", "attn.indexer.k_norm.weight", None, None, ("index_head_dim",), "plain", "norm",
        when="kv_source", state=True, hybrid=f"{_CORE}.indexer.k_norm.weight"),
    *(replace(row, when="index_source") for row in _shared("attn.indexer.wq_b", "attn.indexer.weights_proj")),
)

# In the order of the released headers.
_ENGRAM = (
    Row("engram.embed", "engram.embed.weight", None, None, ("engram_rows", "engram_head_dim"), "engram", "table",
        when="engram", hybrid="engram.embed.tables.0.weight"),
    Row("engram.q_weight", "engram.q_weight", None, None, ("hc_mult", _H), "plain", "scale", when="engram",
        hybrid="engram.q_weight"),
    Row("engram.k_weight", "engram.k_weight", None, None, ("hc_mult", _H), "plain", "scale", when="engram",
        hybrid="engram.k_weight"),
    Row("engram.wkv", "engram.wkv.weight", None, None, ("engram_out", "engram_width"), "linear32", "matrix",
        when="engram", state=True, hybrid="engram.wkv.weight"),
)

_BIAS = "inner_layer.mlp.router.{}_balance.expert_bias"
_MOE = (
    *_shared("ffn_norm", "ffn.gate"),
    replace(_shared("ffn.gate.bias")[0], hybrid=_BIAS.format("text")),
    Row("ffn.gate.bias_vl", "ffn.gate.bias_vl", None, None, ("n_routed_experts",), "f32", "bias", when="routed",
        hybrid=_BIAS.format("image"), half=1),
    *_shared("ffn.experts.w1", "ffn.experts.w3", "ffn.experts.w2", "ffn.shared_experts.w1", "ffn.shared_experts.w3",
             "ffn.shared_experts.w2"),
)

_DSPARK = (
    *_shared("dspark.main_proj", "dspark.main_norm", "dspark.norm"),
    *(replace(row, released=f"markov_head.{name}.weight") for row, name in zip(
        _shared("dspark.markov_w1", "dspark.markov_w2"), ("embed", "head"), strict=True)),
    *_shared("dspark.confidence"),
)

ROWS_V41: tuple[Row, ...] = (
    *_TOWER,
    *_shared("embed"),
    *_IMAGE,
    *_shared("head", "norm", "attn_norm", "attn.attn_sink", "attn.wq_a", "attn.q_norm", "attn.wq_b", "attn.wkv",
             "attn.kv_norm", "attn.wo_a", "attn.wo_b"),
    *_COMPRESSED,
    *_ENGRAM,
    *_shared(*(f"hc_{where}_{part}" for where in ("attn", "ffn") for part in ("fn", "base", "scale"))),
    *_MOE,
    *_DSPARK,
)
