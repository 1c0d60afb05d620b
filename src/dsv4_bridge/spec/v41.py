"""DeepSeek-V4.1 as an architecture: which rows each of its blocks has, and which shard holds them."""

from collections.abc import Mapping

from .architecture import Architecture, Block, plain_sizes
from .spec_v41 import V41Spec
from .table import Row
from .table_v41 import ROWS_V41

WHY_NOT = (
    "its arithmetic has no oracle to hold a model against: the official reference has a known defect and differs from "
    "itself (docs/concepts/v41.md). Its checkpoints are inspected, planned, verified, repacked, imported and exported"
)


def _blocks(spec: V41Spec, own_mtp_head: bool) -> tuple[Block, ...]:
    count, experts, last = spec.num_hidden_layers, spec.n_routed_experts, spec.draft_blocks - 1

    def traits(layer: int) -> frozenset[str]:
        source = layer in spec.kv_source_layer_ids
        found = {
            "kv_source": source,
            "pooled": source and spec.ratio(layer) > 1,
            "index_source": layer in spec.index_source_layer_ids,
            "engram": layer in spec.engram.layer_ids,
        }
        return frozenset({"always", "routed", *(name for name, here in found.items() if here)})

    def scopes(k: int) -> frozenset[str]:
        ends = {"dspark_first": k == 0, "dspark_last": k == last}
        return frozenset({"block", *(name for name, here in ends.items() if here)})

    def aside(kind: str, i: int, prefix: str, *scopes: str) -> Block:
        return Block(kind, i, 0, False, prefix, frozenset(scopes), frozenset({"always"}), 0)

    return (
        aside("vision", 0, "", "vision"),
        *(
            aside("vision_layer", i, f"vision.blocks.{i}.", "vision_layer")
            for i in range(spec.vision.num_hidden_layers)
        ),
        aside("model", 0, "", "first", "last"),
        *(
            Block("layer", i, spec.ratio(i), False, f"layers.{i}.", frozenset({"block"}), traits(i), experts)
            for i in range(count)
        ),
        *(
            Block(
                "dspark",
                k,
                spec.ratio(count + k),
                False,
                f"mtp.{k}.",
                scopes(k),
                frozenset({"always", "routed"}),
                spec.dspark_n_routed_experts,
            )
            for k in range(spec.draft_blocks)
        ),
    )


def _symbols(spec: V41Spec, block: Block) -> Mapping[str, int]:
    engram, vision = spec.engram, spec.vision
    rows = dict(zip(engram.layer_ids, engram.num_embeddings, strict=True))
    return plain_sizes(spec) | {
        "n_routed_experts": block.experts,
        "compress_width": 1,
        "engram_rows": rows.get(block.index, 0),
        "engram_head_dim": engram.head_dim,
        "engram_width": engram.width,
        "engram_out": (spec.hc_mult + 1) * spec.hidden_size,
        "vision_size": vision.hidden_size,
        "vision_intermediate": vision.intermediate_size,
        "patch_size": vision.patch_size,
        "downsample_ratio": vision.downsample_ratio,
    }


def _kinds(spec: V41Spec) -> dict[str, int]:
    ratios = spec.compress_ratios[: spec.num_hidden_layers]
    return {
        "window": ratios.count(0),
        "CSA2 of ratio 2": ratios.count(2),
        "CSA2 of ratio 1": ratios.count(1),
        "sources of keys": len(spec.kv_source_layer_ids),
        "sources of indices": len(spec.index_source_layer_ids),
        "Engram": len(spec.engram.layer_ids),
        "DSpark": spec.draft_blocks,
        "vision": spec.vision.num_hidden_layers,
    }


def _shard(row: Row, block: Block, spec: V41Spec) -> int:
    """Vision, embed and the marks of images, layers, head, draft blocks, then each Engram by itself."""
    layers = spec.num_hidden_layers
    if row.when == "engram":
        return layers + 4 + spec.draft_blocks + spec.engram.layer_ids.index(block.index)
    if block.kind == "layer":
        return block.index + 3
    if block.kind == "dspark":
        return layers + 4 + block.index
    return {"first": 2, "last": layers + 3}.get(row.scope, 1)


V41 = Architecture(
    name="DeepSeek-V4.1",
    rows=ROWS_V41,
    blocks=_blocks,
    symbols=_symbols,
    kinds=_kinds,
    shard=_shard,
    shards=lambda spec: spec.num_hidden_layers + 3 + spec.draft_blocks + len(spec.engram.layer_ids),
    namings=("hybrid",),
    schemes=("released",),
    unsorted=frozenset({"engram"}),
    why_not=WHY_NOT,
)
