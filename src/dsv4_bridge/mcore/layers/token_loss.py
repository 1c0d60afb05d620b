"""The loss of every token, its logits made for a chunk of tokens at a time.

Whole logits are [s, vocabulary] in float32, and cross entropy keeps them for its backward: at 64 thousand tokens and a
vocabulary of 129,280 that is 34 GB a head. Here a chunk's logits live as long as the chunk is computed, and the
backward makes them again: a third more of the head's arithmetic.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class LossOf(Protocol):
    """Hidden states [n / ranks, b, h], labels [b, n], a weight in the place of the layer's own -> losses [b, n]."""

    def __call__(self, hidden: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor: ...


def token_losses(
    loss_of: LossOf, hidden: Tensor, labels: Tensor, weight: Tensor | None, chunk: int, ranks: int = 1
) -> Tensor:
    """Losses of all tokens: those of `loss_of(hidden, labels)`, and its gradients.

    Gradients of the weight are added up in float32. Where the chunk takes all tokens there is one call, and nothing is
    computed twice.

    Args:
        loss_of: output layer and cross entropy; every rank that shares the vocabulary makes the same calls.
        hidden: [s / ranks, b, h].
        labels: [b, s] int64.
        weight: [vocabulary, h], what the output layer reads; None: it has none that learns.
        chunk: tokens whose logits a rank holds at a time, of all rows; 0: all.
        ranks: that tokens are cut over by sequence parallelism.

    Returns:
        [b, s] losses.
    """
    size = max(1, chunk // (hidden.shape[1] * ranks)) if chunk else hidden.shape[0]
    if size >= hidden.shape[0]:
        return loss_of(hidden, labels)
    if not torch.is_grad_enabled() or weight is None:
        losses = [_loss(loss_of, hidden[x], _cut(labels, x, ranks)) for x in _places(hidden, size)]
        return torch.cat(losses, 2).flatten(1)
    return _Chunked.apply(loss_of, size, ranks, hidden, labels, weight)  # type: ignore[return-value]


def _places(hidden: Tensor, size: int) -> list[slice]:
    length = hidden.shape[0]
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _cut(x: Tensor, places: slice, ranks: int) -> Tensor:
    """Of [b, s], those tokens that a rank's `places` stand for once all ranks' are gathered: a view, [b, ranks, n]."""
    return x.unflatten(1, (ranks, -1))[:, :, places]


def _loss(loss_of: LossOf, part: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """[b, ranks, n] losses of a chunk, by hidden states [n, b, h] and labels [b, ranks, n]."""
    return loss_of(part, labels.flatten(1), weight).view(labels.shape)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss_of, size, ranks, hidden, labels, weight):  # type: ignore[override]
        ctx.loss_of, ctx.size, ctx.ranks = loss_of, size, ranks
        ctx.save_for_backward(hidden, labels, weight)
        return token_losses(loss_of, hidden, labels, None, size * ranks * hidden.shape[1], ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        hidden, labels, weight = ctx.saved_tensors
        learns, matrix = ctx.needs_input_grad[5], weight.detach().requires_grad_(ctx.needs_input_grad[5])
        back, total = torch.empty_like(hidden), None
        for places in _places(hidden, ctx.size):
            part = hidden[places].detach().requires_grad_()
            with torch.enable_grad():
                losses = _loss(ctx.loss_of, part, _cut(labels, places, ctx.ranks), matrix)
            found = torch.autograd.grad(losses, (part, matrix) if learns else (part,), _cut(grad, places, ctx.ranks))
            back[places] = found[0]
            if learns:
                total = found[1].float() if total is None else total.add_(found[1])
            del found  # as large as the weight, while the next chunk is computed
        return None, None, None, back, None, None if total is None else total.to(weight.dtype)
