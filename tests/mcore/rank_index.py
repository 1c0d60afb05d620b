"""What context-parallel indexers choose, and one rank of whole documents: run inside rank_worker.py."""

from typing import Any

import torch
from megatron.core import parallel_state

from dsv4_bridge.mcore import load_weights
from dsv4_bridge.mcore.kernels.index import index_scores
from dsv4_bridge.mcore.layers.context import share_of
from dsv4_bridge.mcore.layers.rope import turns
from dsv4_bridge.planning.index_queries import query_costs, spread


def chosen(told: dict[str, Any]) -> dict[str, Any]:
    """Of this rank's queries: how many there are, differ, and tie; how far the scores of other choices lie apart."""
    from rank_worker import build_only

    (chunk,) = build_only(told)
    load_weights(chunk, told["weights"])
    indexer = next(layer.self_attention.core_attention.indexer for layer in chunk.decoder.layers if holds(layer))
    group, ends, batch = parallel_state.get_context_parallel_group(), told["ends"], told["batch"]
    random = torch.Generator().manual_seed(told["seed"])
    kind = getattr(torch, told.get("settings", {}).get("dtype", "float32"))
    x, qr = (
        torch.randn(ends[-1], batch, width, generator=random).to(kind)
        for width in (chunk.config.hidden_size, chunk.config.q_lora_rank)
    )
    size = ends[-1] // group.size()
    here = slice(group.rank() * size, (group.rank() + 1) * size)
    costs = query_costs(chunk.spec, kind.itemsize)
    lengths = None if len(ends) == 2 else torch.tensor(ends)
    share = share_of(group, batch, size, lengths, x.device, costs, told["queries"])
    found = indexer.choose_of_share(x[here], qr[here], share)
    result = {"queries": 0, "other": 0, "ties": 0, "gap": 0.0, "sent": sum(r.at != r.home for r in share.scored.runs)}
    for segment, ours in zip(share.segments, found, strict=True):
        document = slice(ends[segment.document], ends[segment.document + 1])
        turn = turns(chunk.config, 4, torch.arange(document.stop - document.start))
        given = x[document], qr[document], turn
        part = slice(segment.start, segment.start + segment.size)
        theirs = indexer(*given)[:, part].sort(-1).values
        terms = indexer.terms(*given)
        scores = index_scores(terms.queries[:, part], terms.keys, terms.weights[:, part]).detach()
        seen = (torch.arange(part.start, part.stop) + 1) // 4
        scores = scores.masked_fill(torch.arange(scores.shape[-1]) >= seen[:, None], -torch.inf)
        count = min(indexer.topk, theirs.shape[-1])
        own = torch.nn.functional.pad(ours, (theirs.shape[-1] - ours.shape[-1], 0), value=-1).sort(-1).values
        other = (own != theirs).any(-1)
        best = scores.sort(-1, descending=True).values
        if scores.shape[-1] > count > 0:
            result["ties"] += int(((best[..., count - 1] == best[..., count]) & (seen > count)).sum())
        for a, b, row in zip(own[other], theirs[other], scores[other], strict=True):
            assert a.min() >= 0, (segment, a, b)
            result["gap"] = max(result["gap"], float((row[a].sort().values - row[b].sort().values).abs().max()))
        result["queries"] += other.numel()
        result["other"] += int(other.sum())
    return result | {"spread": spread_of(told, group.size(), size, costs)}


def holds(layer: Any) -> bool:
    """Whether it has an indexer."""
    return layer.self_attention.core_attention.indexer is not None


def spread_of(told: dict[str, Any], ranks: int, size: int, costs: Any) -> tuple[float, float]:
    """The busiest rank's work over the mean, at home and spread."""
    from itertools import pairwise

    from dsv4_bridge.parallel.rows import segments_of

    every = segments_of([slice(*ends) for ends in pairwise(told["ends"])], ranks, size)
    found = spread(every, costs, told["queries"])
    return tuple(max(each) * ranks / sum(each) for each in (found.home, found.work))
