"""DeepSeek-V4 as an architecture: which rows each of its blocks has, and which shard holds them."""

from collections.abc import Mapping

from .architecture import Architecture, Block, plain_sizes
from .spec import ModelSpec
from .table import ROWS, Row

_ATTENTION = {"window": 0, "CSA": 4, "HCA": 128}


def _blocks(spec: ModelSpec, own_mtp_head: bool) -> tuple[Block, ...]:
    count, experts = spec.num_hidden_layers, spec.n_routed_experts
    kind, last = ("dspark", spec.draft_blocks - 1) if spec.dspark else ("mtp", -1)

    def scopes(k: int) -> frozenset[str]:
        ends = {"dspark_first": k == 0, "dspark_last": k == last} if kind == "dspark" else {}
        ends |= {"mtp": True, "mtp_own": k == 0 and own_mtp_head} if kind == "mtp" else {}
        return frozenset({"block", *(name for name, here in ends.items() if here)})

    def block(kind: str, i: int, layer: int, prefix: str, scopes: frozenset[str]) -> Block:
        ratio, hashed = spec.ratio(layer), layer < spec.num_hash_layers
        traits = {"always", "hash" if hashed else "routed"}
        traits |= {"compressed"} if ratio else set()
        traits |= {"csa"} if ratio == 4 else set()
        return Block(kind, i, ratio, hashed, prefix, scopes, frozenset(traits), experts)

    whole = Block("model", 0, 0, False, "", frozenset({"first", "last"}), frozenset({"always"}), experts)
    return (
        whole,
        *(block("layer", i, i, f"layers.{i}.", frozenset({"block"})) for i in range(count)),
        *(block(kind, k, count + k, f"mtp.{k}.", scopes(k)) for k in range(spec.draft_blocks)),
    )


def _symbols(spec: ModelSpec, block: Block) -> Mapping[str, int]:
    return plain_sizes(spec) | {"ratio": block.ratio, "compress_width": 2 if block.ratio == 4 else 1}


def _kinds(spec: ModelSpec) -> dict[str, int]:
    layers = [b for b in _blocks(spec, False) if b.kind == "layer"]
    attention = {name: sum(b.ratio == ratio for b in layers) for name, ratio in _ATTENTION.items()}
    hashed = sum(b.hashed for b in layers)
    draft = {"MTP": spec.mtp_layers, "DSpark": spec.dspark.stages if spec.dspark else 0}
    return attention | {"hash": hashed, "routed": len(layers) - hashed} | draft


def _shard(row: Row, block: Block, spec: ModelSpec) -> int:
    """Embed, layers, the rest, draft blocks."""
    if block.kind == "model":
        return 1 if row.scope == "first" else spec.num_hidden_layers + 2
    return block.index + (2 if block.kind == "layer" else spec.num_hidden_layers + 3)


V4 = Architecture(
    name="DeepSeek-V4",
    rows=ROWS,
    blocks=_blocks,
    symbols=_symbols,
    kinds=_kinds,
    shard=_shard,
    shards=lambda spec: spec.num_hidden_layers + 2 + spec.draft_blocks,
    namings=("gpt", "hybrid"),
    schemes=("released", "prefixed", "saved", "modules", "resaved"),
)
