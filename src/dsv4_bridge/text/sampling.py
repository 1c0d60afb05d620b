"""How the next token is chosen from logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BridgeError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; above, logits are divided by it and a token is drawn.
        top_p: draw from the fewest tokens whose probabilities reach this sum.
        top_k: draw from so many most likely tokens; 0: all. It applies before top_p.
        seed: the same seed gives the same tokens. Each prompt has its own random numbers, so its
            tokens do not depend on how many others are in the batch or when they end.

    Raises:
        BridgeError: a number out of range, or a choice that temperature 0 would ignore.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            (0 <= self.temperature < float("inf"), "temperature", "0 or more"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.top_k >= 0, "top_k", "0 (all tokens) or more"),
            (self.seed >= 0, "seed", "0 or more"),
        )
        for good, name, expected in rules:
            if not good:
                raise BridgeError(f"sampling: {name} is {getattr(self, name)}, expected {expected}")
        if not self.temperature and (self.top_p < 1 or self.top_k):
            raise BridgeError("sampling: top_p and top_k do nothing at temperature 0 (greedy); set a temperature too")


def choose(logits: Tensor, how: Sampling, draws: Tensor | None = None) -> Tensor:
    """The next tokens: logits [b, vocabulary] and numbers in [0, 1) [b] -> [b] int64.

    Drawing inverts the cumulative distribution, most likely tokens first.
    """
    if not how.temperature:
        return logits.argmax(-1)
    assert draws is not None
    chances, ids = distribution(logits, how)
    below = chances.double().cumsum(-1)
    at = torch.searchsorted(below, draws.to(below).unsqueeze(-1) * below[:, -1:], right=True)
    last = (chances > 0).sum(-1, keepdim=True) - 1  # the product may round up to the sum
    return ids.gather(1, torch.minimum(at, last)).squeeze(1)


def distribution(logits: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """What tokens are drawn from: [b, vocabulary] -> chances [b, n] in falling order, 0 for excluded ones, and ids."""
    count = min(how.top_k or logits.shape[-1], logits.shape[-1])
    best, ids = logits.float().topk(count, dim=-1)
    # The largest first goes to 0: logits over a temperature near 0 are infinite.
    chances = torch.softmax(((best - best[..., :1]).double() / how.temperature).float(), -1)
    before = chances.cumsum(-1) - chances
    chances = chances.masked_fill(before >= how.top_p, 0.0) if how.top_p < 1 else chances
    return chances / chances.sum(-1, keepdim=True), ids
