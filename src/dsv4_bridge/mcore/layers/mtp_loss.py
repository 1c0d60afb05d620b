"""The loss of the draft depths: how micro-batches and labels count in it, and how it gets into the gradients.

Depth k at position t predicts token t + k + 2: labels and their weights are moved k + 1 places ahead, within their
document. Its loss is a weighted mean, as the main one is: over all labels of a step with
`calculate_per_token_loss`, else the mean over the micro-batches that learn anything of each one's own mean. Times
`mtp_loss_scaling_factor`, over the number of depths (technical report 2.1). megatron-core's `process_mtp_loss`
divides by a count of 1 at least, and takes the mean over micro-batches that learn nothing, too.
"""

from collections.abc import Callable, Sequence

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import Tensor

from ..config import DeepSeekV4Config
from ..metrics import Tally


def draft_losses(
    depths: Sequence[Tensor],
    labels: Tensor,
    loss_mask: Tensor | None,
    move: Callable[[Tensor], Tensor],
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """Weighted sum of the losses of every depth, and the sum of the weights; scalars in float32 or wider.

    Args:
        depths: normed hidden states, [s, b, h] each.
        labels: [b, s], the token after each.
        loss_mask: [b, s], their weights; None: all 1.
        move: takes [b, s] one place ahead, 0 beyond the end of a document.
        loss_of: hidden states, labels [b, s] -> losses [b, s].
    """
    weights = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
    found = []
    for hidden in depths:
        labels, weights = move(labels), move(weights)
        losses = loss_of(hidden, labels)
        found.append(((losses * weights).sum(), weights.sum()))
    return found


def with_draft_losses(
    hidden: Tensor,
    losses: Sequence[tuple[Tensor, Tensor]],
    config: DeepSeekV4Config,
    learned: Tensor,
    share: Sequence[float] | None,
) -> Tensor:
    """`hidden` itself; its backward adds the gradients of the depths' losses to those of the main loss.

    Args:
        hidden: anything the main loss is made of.
        losses: of `draft_losses`; where rows are cut over ranks, a rank's sums, and weights of the whole rows.
        config: the model's.
        learned: sum of the weights of the main loss.
        share: of a depth, the factor of its mean in this micro-batch, or, with `calculate_per_token_loss`, of its
            sum: see `draft_shares`. None: this micro-batch is all that there is.
    """
    factor = (config.mtp_loss_scaling_factor or 0.0) / max(1, len(losses))
    for depth, (total, count) in enumerate(losses):
        mean = total / torch.where(count > 0, count, torch.ones_like(count))
        if not config.calculate_per_token_loss:
            # Gradients are averaged over the ranks that rows are cut over, and each has a part of the mean.
            mean = mean * config.context_parallel_size
            value = mean if share is None else mean * share[depth]
        else:  # megatron divides by the sum of the main loss's weights in the end
            value = mean * learned if share is None else total * share[depth]
        scaled = MTPLossAutoScaler.apply(hidden, (factor * value).reshape(1))
        assert isinstance(scaled, Tensor)
        hidden = scaled
    return hidden


def tally_drafts(tally: Tally, losses: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add the sums of all depths: what is read is their mean over weights."""
    totals, counts = (torch.stack([pair[n].detach() for pair in losses]).sum() for n in (0, 1))
    tally.add(totals, counts)


def draft_shares(
    per_token: bool, batches: float, weight: float, learning: Sequence[float], weights: Sequence[float]
) -> tuple[float, ...]:
    """`share` of `with_draft_losses` for the micro-batches of a step of all ranks.

    Args:
        per_token: `calculate_per_token_loss`.
        batches: micro-batches.
        weight: sum of the labels' weights.
        learning: of every depth, micro-batches with any weight.
        weights: of every depth, sum of the weights.
    """
    if per_token:
        return tuple(weight / w if w else 0.0 for w in weights)
    return tuple(batches / n if n else 0.0 for n in learning)
