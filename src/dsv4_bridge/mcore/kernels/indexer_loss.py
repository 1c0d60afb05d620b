"""The indexer's own objective: choose what the attention looks at.

For every query t, p_t is the attention's probability of the compressed blocks, summed over heads and
divided by its sum, and s_t the indexer's scores of the same blocks. The loss is the mean over queries of
KL(p_t || softmax(s_t)). p_t is a constant, and so is what the indexer reads: only its own parameters move
(DeepSeek-V3.2 report 2.1, equations 3 and 4, on the blocks of the V4 report 2.3.1; megatron-core's
`dsa_indexer_loss`). Over all visible blocks it is the dense warm-up, over the chosen ones the sparse stage.

The gradient with respect to the scores is softmax(s_t) - p_t. It is formed chunk by chunk along with the
loss, so that nothing of the size of queries x blocks is kept, nor computed twice.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import OnBlocks, Reach, weights_on_blocks
from .choice import AUTO, Choice
from .direct import applied
from .index import IndexTerms


def indexer_loss(
    terms: IndexTerms,
    q: Tensor,
    kv: Tensor,
    blocks: Tensor,
    chosen: Tensor | None,
    sink: Tensor,
    reach: Reach,
    counted: Tensor | None = None,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
    by: Choice = AUTO,
) -> Tensor:
    """Sum over queries of KL(attention || indexer), a float32 scalar; queries that see no block add nothing.

    Args:
        terms: the indexer's queries, keys and weights; they alone get gradients.
        q: [b, s, h, d], as `attend` gets it (this rank's heads), and so:
        kv: [b, l + s, d].
        blocks: [b, n, d].
        chosen: [b, s, k] blocks to compare, -1 for none; None: all visible.
        sink: [h].
        reach: what queries may see.
        counted: [b, s] bool, queries that count; None: all.
        over_ranks: sums a tensor over the ranks that the heads are cut over; None: all heads are here.
        by: torch or Triton.
    """
    return applied(_IndexerLoss, *terms, q, kv, blocks, chosen, sink, reach, counted, over_ranks, by)


class _IndexerLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, weights, q, kv, blocks, chosen, sink, reach, counted, over_ranks, by):  # type: ignore[override]
        given = IndexTerms(queries, keys, weights), q, kv, blocks, chosen, sink, reach, counted, over_ranks
        if by.fused(queries, keys, weights, q, kv, blocks, sink):
            from . import indexer_loss_triton

            total, grads = indexer_loss_triton.loss_and_gradients(*given, by.deterministic)
        else:
            total, grads = _loss_and_gradients(*given)
        ctx.save_for_backward(*(grad.to(t.dtype) for grad, t in zip(grads, (queries, keys, weights), strict=True)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        return *((saved * grad).to(saved.dtype) for saved in ctx.saved_tensors), *(None,) * 9


def _loss_and_gradients(
    terms: IndexTerms,
    q: Tensor,
    kv: Tensor,
    blocks: Tensor,
    chosen: Tensor | None,
    sink: Tensor,
    reach: Reach,
    counted: Tensor | None,
    over_ranks: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, IndexTerms]:
    """The loss, and its gradients in types wide enough to add up in."""
    queries, keys, weights = terms
    total = torch.zeros((), dtype=torch.promote_types(weights.dtype, torch.float32), device=q.device)
    grads = IndexTerms(torch.zeros_like(queries), torch.zeros_like(keys, dtype=total.dtype), torch.zeros_like(weights))
    for chunk in weights_on_blocks(q, kv, blocks, chosen, sink, reach):
        if chunk.weights.shape[-1] == 0:
            continue
        target = _target(chunk, over_ranks)
        if counted is not None:
            target = target * counted[:, chunk.here].unsqueeze(-1)
        total += _chunk_loss(terms, chunk, target, grads)
    return total, grads


def _target(chunk: OnBlocks, over_ranks: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Attention on blocks over all heads of all ranks, summing to 1: [b, c, m]; 0 for a query that sees none."""
    target = chunk.weights.sum(2)
    if over_ranks is not None:
        target = over_ranks(target.contiguous())
    return target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)


def _chunk_loss(terms: IndexTerms, chunk: OnBlocks, target: Tensor, grads: IndexTerms) -> Tensor:
    """The chunk's sum of KL; adds to `grads`. b batch, c queries, i indexer heads, m blocks, w width."""
    wide, scale = target.dtype, terms.queries.shape[-1] ** -0.5
    queries = terms.queries[:, chunk.here].to(wide)  # [b, c, i, w]
    weights = terms.weights[:, chunk.here].unsqueeze(-1) * scale  # [b, c, i, 1]
    every = terms.keys[:, : target.shape[-1]] if chunk.picked is None else terms.keys
    keys = _own(every, chunk.picked).to(wide)  # [b, m, w] or, where each query has its own, [b, c, m, w]
    dots = _times(queries, keys.mT).relu_()  # [b, c, i, m]
    scores = (weights * dots).sum(2).masked_fill(~chunk.seen, torch.finfo(wide).min)  # [b, c, m]
    logs = scores.log_softmax(-1)
    loss = (torch.special.xlogy(target, target) - target * logs).sum()
    pull = logs.exp().mul_(target.sum(-1, keepdim=True)).sub_(target).mul_(chunk.seen).unsqueeze(2)  # [b, c, 1, m]
    grads.weights[:, chunk.here] += (dots * pull).sum(-1) * scale
    back = (dots > 0) * pull * weights  # [b, c, i, m]
    grads.queries[:, chunk.here] += _times(back, keys).to(grads.queries.dtype)
    if chunk.picked is None:
        grads.keys[:, : target.shape[-1]] += torch.matmul(back.flatten(1, 2).mT, queries.flatten(1, 2))
    else:
        mine = torch.matmul(back.mT, queries)  # [b, c, m, w]
        at = chunk.picked.flatten(1, 2).unsqueeze(-1).expand(-1, -1, mine.shape[-1])
        grads.keys.scatter_add_(1, at, mine.flatten(1, 2))
    return loss


def _own(keys: Tensor, picked: Tensor | None) -> Tensor:
    """[b, n, w] as it is, or gathered by [b, c, m]: [b, c, m, w]."""
    if picked is None:
        return keys
    at = picked.flatten(1, 2).unsqueeze(-1).expand(-1, -1, keys.shape[-1])
    return keys.gather(1, at).unflatten(1, picked.shape[1:])


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """[b, c, i, p] times [b, p, r], or times [b, c, p, r] of each query: [b, c, i, r]."""
    if matrix.ndim == 4:
        return torch.matmul(x, matrix)
    return torch.matmul(x.flatten(1, 2), matrix).unflatten(1, x.shape[1:3])
