"""ROWS: every kind of tensor in a DeepSeek-V4 checkpoint, one row each. Data, no logic.

`plan.py` expands the rows to exact names; nothing else in the package knows a tensor name.

Columns
    released    name in the released checkpoints, behind the block's prefix
    transformers  module name in transformers, behind `model.layers.{i}.` (block rows)
    saved       name that transformers' save_pretrained writes, where it is not `model.` + released
    resaved     name that save_pretrained writes of a model in those names, where it is another
    megatron    parameter name in the Megatron-LM dev GPT model, behind the block's prefix, as the
                torch_dist checkpoint spells it; None: no place for it, a passenger. Several names:
                the released tensor is cut into that many equal parts along its first axis
    hybrid      the same in Megatron-LM main's HybridModel, where a block is two layers, each within its
                hyper-connection
    half        which of these two: 0 attention, 1 MoE
    scope       first | last (of the model: in front of its layers, behind them) |
                block (decoder layers and draft blocks) | mtp (MTP blocks of any depth) |
                mtp_own (Base's copies) | dspark_first | dspark_last
    role        what its values are: matrix (a linear map) | groups (o_groups linear maps, one above another) |
                table (a vector a row, looked up or compared with) | norm | scale (both begin at 1) |
                bias (begins at 0) | ids (of experts). Who initialises, adapts or orthogonalises asks this
    when        always | compressed (ratio 4 or 128) | csa (ratio 4) | hash | routed
    shape       dimensions by their config.json names; `*` multiplies, `/` divides
    cut         how tensor parallelism cuts it: whole | columns (first axis) | rows (second axis) |
                vocabulary | heads
    part        (index, count): this is part `index` of a Megatron tensor stacked from `count`
    encoding    class that a variant maps to an encoding: linear | expert | plain | f32 | int
    lora        may carry an adapter: attention | expert | ""
    state       the Megatron module keeps an `_extra_state` object beside it

Sources: released names and shapes, the shard headers; Megatron names, Megatron-LM `dev`
d48bd6be0a, GPT model with experimental_attention_variant "dsv4_hybrid"; hybrid names, Megatron-LM main
089b33b8 (models/hybrid) and Megatron-Bridge pull request 5860.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Row:
    """One fact of the table; see the module's docstring for the columns."""

    key: str
    released: str
    transformers: str | None
    megatron: str | tuple[str, ...] | None
    shape: tuple[str, ...]
    encoding: str
    role: str
    scope: str = "block"
    when: str = "always"
    cut: str = "whole"
    part: tuple[int, int] = (0, 1)
    lora: str = ""
    state: bool = False
    hybrid: str | tuple[str, ...] | None = None
    half: int = 0
    saved: str | None = None
    resaved: str | None = None

    @property
    def per_expert(self) -> bool:
        """Whether there is one such tensor an expert."""
        return "{expert}" in self.released

    @property
    def matrix(self) -> bool:
        """Whether it is one linear map or several: a released matrix."""
        return self.role in ("matrix", "groups")


# fmt: off
_H, _ML = "hidden_size", "moe_intermediate_size"
_Q, _O, _HEADS = "q_lora_rank", "o_groups*o_lora_rank", "num_attention_heads"
_HD, _C = "head_dim", "compress_width*head_dim"
_IW = "2*index_head_dim"
_STREAMS = "hc_mult*hidden_size"
_ATT = "self_attention"
_CORE = "self_attention.core_attention"
_TF = "self_attn.compressor"


def _behind(prefix: str, names: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    return tuple(f"{prefix}.{name}" for name in names) if isinstance(names, tuple) else names and f"{prefix}.{names}"


def _inner(half: int, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows of what a hyper-connection wraps."""
    return tuple(replace(row, hybrid=_behind("inner_layer", row.megatron), half=half) for row in rows)


def _same(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows that both namings call the same, but for those that say otherwise."""
    return tuple(row if row.hybrid else replace(row, hybrid=row.megatron) for row in rows)


def _mhc(where: str) -> tuple[Row, ...]:
    mega = {"attn": "self_attention_hyper_connection", "ffn": "mlp_hyper_connection"}[where]
    alphas = ("alpha_pre", "alpha_post", "alpha_res")
    base, tf = f"hc_{where}", f"{where}_hc"
    rows = (
        ("fn", "mapping_proj.weight", ("hc_mix", _STREAMS), "matrix"),
        ("base", "bias", ("hc_mix",), "bias"),
        ("scale", alphas, ("3",), "scale"),
    )
    return tuple(
        Row(f"{base}_{x}", f"{base}_{x}", f"{tf}.{x}", _behind(mega, name), shape, "f32", role,
            hybrid=_behind("hyper_connection", name), half=int(where == "ffn"))
        for x, name, shape, role in rows
    )


def _hc_head(scope: str, tf: str | None, mega: str | None) -> tuple[Row, ...]:
    key = "hc_head" if scope == "last" else f"{scope}.hc_head"
    parts = (("fn", ("hc_mult", _STREAMS), "matrix"), ("base", ("hc_mult",), "bias"), ("scale", ("1",), "scale"))
    return tuple(
        Row(f"{key}_{x}", f"hc_head_{x}", tf and f"{tf}.hc_{x}", mega if mega is None else f"{mega}hc_head_{x}", shape,
            "f32", role, scope, saved=tf and f"{tf}.hc_{x}")
        for x, shape, role in parts
    )


_MODEL = (
    Row("embed", "embed.weight", "model.embed_tokens.weight", "embedding.word_embeddings.weight", ("vocab_size", _H),
        "plain", "table", "first", cut="vocabulary", saved="model.embed_tokens.weight"),
    Row("head", "head.weight", "lm_head.weight", "output_layer.weight", ("vocab_size", _H), "plain", "table", "last",
        cut="vocabulary", saved="head.weight"),
    Row("norm", "norm.weight", "model.norm.weight", "decoder.final_layernorm.weight", (_H,), "plain", "norm", "last",
        state=True, hybrid="decoder.final_norm.weight"),
    *_hc_head("last", "model.hc_head", "decoder."),
)

_ATTENTION = (
    Row("attn_norm", "attn_norm.weight", "input_layernorm.weight", "input_layernorm.weight", (_H,), "plain", "norm",
        state=True),
    Row("attn.attn_sink", "attn.attn_sink", "self_attn.sinks", f"{_CORE}.attn_sink", (_HEADS,), "f32", "bias",
        cut="heads"),
    Row("attn.wq_a", "attn.wq_a.weight", "self_attn.q_a_proj.weight", f"{_ATT}.linear_q_down_proj.weight", (_Q, _H),
        "linear", "matrix", lora="attention", state=True),
    Row("attn.q_norm", "attn.q_norm.weight", "self_attn.q_a_norm.weight", f"{_ATT}.q_layernorm.weight", (_Q,),
        "plain", "norm", state=True),
    Row("attn.wq_b", "attn.wq_b.weight", "self_attn.q_b_proj.weight", f"{_ATT}.linear_q_up_proj.weight",
        (f"{_HEADS}*{_HD}", _Q), "linear", "matrix", cut="columns", lora="attention", state=True),
    Row("attn.wkv", "attn.wkv.weight", "self_attn.kv_proj.weight", f"{_ATT}.linear_kv_proj.weight", (_HD, _H),
        "linear", "matrix", lora="attention", state=True),
    Row("attn.kv_norm", "attn.kv_norm.weight", "self_attn.kv_norm.weight", f"{_ATT}.kv_layernorm.weight", (_HD,),
        "plain", "norm", state=True, saved="attn.norm.weight", resaved="self_attn.norm.weight"),
    Row("attn.wo_a", "attn.wo_a.weight", "self_attn.o_a_proj.weight", f"{_ATT}.linear_o_group_proj", (_O,
        f"{_HEADS}*{_HD}/o_groups"), "linear", "groups", cut="columns", lora="attention"),
    Row("attn.wo_b", "attn.wo_b.weight", "self_attn.o_b_proj.weight", f"{_ATT}.linear_proj.weight", (_H, _O),
        "linear", "matrix", cut="rows", lora="attention", state=True),
)


def _compressor(key: str, tf: str, mega: str, when: str, shapes: tuple[tuple[str, ...], str, str]) -> tuple[Row, ...]:
    ape, width, norm = shapes
    return (
        Row(f"{key}.ape", f"{key}.ape", f"{tf}.position_bias", f"{mega}.ape", ape, "f32", "bias", when=when),
        Row(f"{key}.wkv", f"{key}.wkv.weight", f"{tf}.kv_proj.weight", f"{mega}.linear_wkv.weight", (width, _H),
            "plain", "matrix", when=when, state=True),
        Row(f"{key}.wgate", f"{key}.wgate.weight", f"{tf}.gate_proj.weight", f"{mega}.linear_wgate.weight", (width, _H),
            "plain", "matrix", when=when, state=True),
        Row(f"{key}.norm", f"{key}.norm.weight", f"{tf}.kv_norm.weight", f"{mega}.norm.weight", (norm,), "plain",
            "norm", when=when, state=True, resaved=f"{tf}.norm.weight"),
    )


_COMPRESSED = (
    *_compressor("attn.compressor", _TF, f"{_CORE}.compressor", "compressed", (("ratio", _C), _C, _HD)),
    Row("attn.indexer.wq_b", "attn.indexer.wq_b.weight", f"{_TF}.indexer.q_b_proj.weight",
        f"{_CORE}.indexer.linear_wq_b.weight", ("index_n_heads*index_head_dim", _Q), "linear", "matrix", when="csa",
        state=True),
    Row("attn.indexer.weights_proj", "attn.indexer.weights_proj.weight", f"{_TF}.indexer.scorer.weights_proj.weight",
        f"{_CORE}.indexer.linear_weights_proj.weight", ("index_n_heads", _H), "plain", "matrix", when="csa",
        state=True),
    *_compressor(
        "attn.indexer.compressor",
        f"{_TF}.indexer",
        f"{_CORE}.indexer.compressor",
        "csa",
        (("ratio", _IW), _IW, "index_head_dim"),
    ),
)


_MLP = {  # Megatron name, shape, cut, part; transformers names of routed and shared
    "w1": ("linear_fc1", (_ML, _H), "columns", (0, 2), "gate_up_proj", "gate_proj"),
    "w3": ("linear_fc1", (_ML, _H), "columns", (1, 2), "gate_up_proj", "up_proj"),
    "w2": ("linear_fc2", (_H, _ML), "rows", (0, 1), "down_proj", "down_proj"),
}


def _experts() -> tuple[Row, ...]:
    return tuple(
        Row(f"ffn.experts.{w}", f"ffn.experts.{{expert}}.{w}.weight", f"mlp.experts.{tf}",
            f"mlp.experts.experts.{mega}.weight", shape, "expert", "matrix", cut=cut, part=part, lora="expert",
            state=True)
        for w, (mega, shape, cut, part, tf, _) in _MLP.items()
    )


def _shared_expert() -> tuple[Row, ...]:
    return tuple(
        Row(f"ffn.shared_experts.{w}", f"ffn.shared_experts.{w}.weight", f"mlp.shared_experts.{tf}.weight",
            f"mlp.shared_experts.{mega}.weight", tuple(d.replace(_ML, f"n_shared_experts*{_ML}") for d in shape),
            "linear", "matrix", cut=cut, part=part, lora="expert", state=True)
        for w, (mega, shape, cut, part, _, tf) in _MLP.items()
    )


_MOE = (
    Row("ffn_norm", "ffn_norm.weight", "post_attention_layernorm.weight", "pre_mlp_layernorm.weight", (_H,), "plain",
        "norm", state=True),
    Row("ffn.gate", "ffn.gate.weight", "mlp.gate.weight", "mlp.router.weight", ("n_routed_experts", _H), "plain",
        "matrix"),
    Row("ffn.gate.bias", "ffn.gate.bias", "mlp.gate.e_score_correction_bias", "mlp.router.expert_bias",
        ("n_routed_experts",), "f32", "bias", when="routed"),
    Row("ffn.gate.tid2eid", "ffn.gate.tid2eid", "mlp.gate.tid2eid", "mlp.router.tid2eid", ("vocab_size",
        "num_experts_per_tok"), "int", "ids", when="hash"),
    *_experts(),
    *_shared_expert(),
)

_MTP = (
    Row("mtp.enorm", "enorm.weight", None, "enorm.weight", (_H,), "plain", "norm", "mtp", state=True),
    Row("mtp.hnorm", "hnorm.weight", None, "hnorm.weight", (_H,), "plain", "norm", "mtp", state=True),
    Row("mtp.e_proj", "e_proj.weight", None, "e_proj.weight", (_H, _H), "linear", "matrix", "mtp", cut="columns",
        state=True),
    Row("mtp.h_proj", "h_proj.weight", None, "h_proj.weight", (_H, _H), "linear", "matrix", "mtp", cut="columns",
        state=True),
    Row("mtp.norm", "norm.weight", None, "final_layernorm.weight", (_H,), "plain", "norm", "mtp", state=True),
    *_hc_head("mtp", None, ""),
    Row("mtp.emb", "emb.tok_emb.weight", None, None, ("vocab_size", _H), "plain", "table", "mtp_own"),
    Row("mtp.head", "head.weight", None, None, ("vocab_size", _H), "plain", "table", "mtp_own"),
)

_DSPARK = (
    Row("dspark.main_proj", "main_proj.weight", None, None, (_H, f"dspark_stages*{_H}"), "linear", "matrix",
        "dspark_first"),
    Row("dspark.main_norm", "main_norm.weight", None, None, (_H,), "plain", "norm", "dspark_first"),
    Row("dspark.norm", "norm.weight", None, None, (_H,), "plain", "norm", "dspark_last"),
    *_hc_head("dspark_last", None, None),
    Row("dspark.markov_w1", "markov_head.markov_w1.weight", None, None, ("vocab_size", "markov_rank"), "plain", "table",
        "dspark_last"),
    Row("dspark.markov_w2", "markov_head.markov_w2.weight", None, None, ("vocab_size", "markov_rank"), "plain",
        "matrix", "dspark_last"),
    Row("dspark.confidence", "confidence_head.proj.weight", None, None, ("1", "confidence_width"), "plain", "matrix",
        "dspark_last"),
)

ROWS: tuple[Row, ...] = (
    *_same(_MODEL),
    *_inner(0, _ATTENTION),
    *_inner(0, _COMPRESSED),
    *_mhc("attn"),
    *_mhc("ffn"),
    *_inner(1, _MOE),
    *_same(_MTP),
    *_DSPARK,
)
