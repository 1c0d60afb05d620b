"""The places where both models are compared, in the order of the computation.

Names are those of `mcore.layers.observe`; the hook that finds a site in transformers is in `reference.py`.
"""

from dataclasses import dataclass

from ..spec.plan import Item, Plan


@dataclass(frozen=True)
class Site:
    """One place.

    Attributes:
        name: as `mcore.layers.observe` calls it.
        words: for people.
        choices: whether the value is a choice (of blocks or experts) and compared as sets.
        rows: keys of the table's rows (or their beginnings) whose tensors act here first.
    """

    name: str
    words: str
    choices: bool
    rows: tuple[str, ...]


_QUERY = ("attn_norm", "attn.wq_a", "attn.q_norm")

SITES = {
    site.name: site
    for site in (
        Site("attn.mix", "mixing before attention", False, ("hc_attn_",)),
        Site("attn.compressor", "compressor entries", False, ("attn_norm", "attn.compressor.")),
        Site("attn.index", "indexer's choice of blocks", True, (*_QUERY, "attn.indexer.")),
        Site("attn", "attention output", False, (*_QUERY, "attn.attn_sink", "attn.w", "attn.kv_norm")),
        Site("ffn.mix", "mixing before the experts", False, ("hc_attn_", "hc_ffn_")),
        Site("ffn.router", "router's choice of experts", True, ("ffn_norm", "ffn.gate")),
        Site("ffn.experts", "routed experts", False, ("ffn_norm", "ffn.gate", "ffn.experts.")),
        Site("ffn", "experts with the shared one", False, ("ffn_norm", "ffn.shared_experts.")),
        Site("streams", "streams behind the layer", False, ("hc_ffn_",)),
        Site("head", "final normed hidden states", False, ("hc_head_", "norm")),
        Site("logits", "logits", False, ("head",)),
    )
}


def suspects(plan: Plan, layer: int | None, site: str) -> tuple[str, ...]:
    """Released names of the tensors that act first at a site; experts as one pattern a row.

    Args:
        plan: of the model.
        layer: decoder layer, None behind the last.
        site: name of the site.
    """
    rows = SITES[site].rows
    names: dict[str, None] = {}
    for item in plan.items:
        if layer is None:
            if item.block.kind == "model" and item.row.key.startswith(rows) and item.row.scope == "last":
                names[item.name] = None
        elif item.block.kind == "layer" and item.block.index == layer and item.row.key.startswith(rows):
            names[_shown(item)] = None
    if layer == 0 and site == "attn.mix":
        names = {item.name: None for item in plan.items if item.row.scope == "first"} | names
    return tuple(names)


def draft_suspects(plan: Plan, depth: int, site: str) -> tuple[str, ...]:
    """The same in an MTP block: its own projections act in front of its first sub-layer, its head behind the last."""
    rows = {
        "attn.mix": ("mtp.enorm", "mtp.hnorm", "mtp.e_proj", "mtp.h_proj", "hc_attn_"),
        "logits": ("mtp.norm", "mtp.hc_head_"),
    }.get(site, SITES[site].rows)
    here = (item for item in plan.items if item.block.kind == "mtp" and item.block.index == depth)
    return tuple(dict.fromkeys(_shown(item) for item in here if item.row.key.startswith(rows)))


def _shown(item: Item) -> str:
    return item.name if item.expert is None else item.block.prefix + item.row.released.replace("{expert}", "*")
