"""Decoding with a cache: every token is computed once.

`generate` yields each step's tokens, so that text can be shown as it comes; `complete` collects them.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BridgeError
from ..text.sampling import Sampling, choose
from .layers.cache import Cache, new_cache
from .model import DeepSeekV4Model

Stop = Callable[[int, Sequence[int]], bool]


@dataclass(frozen=True)
class Token:
    """A new token.

    Attributes:
        row: number of its prompt.
        id: the token.
        ended: why it is the prompt's last: `stop`, `length`; or None.
    """

    row: int
    id: int
    ended: str | None = None


def generate(
    model: DeepSeekV4Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    *,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    stops: Stop | None = None,
) -> Iterator[list[Token]]:
    """Continue prompts of any lengths, one token each at a time.

    The prompts run once, padded on the right; then every step runs one token of each that is not
    finished. Finished ones leave the batch and the cache.

    Args:
        model: the whole model; MTP layers are not used. Its training mode is put back after each step.
        prompts: token ids.
        max_new_tokens: tokens of each prompt at most.
        sampling: how tokens are chosen, greedily by default.
        stop_ids: a token among these is its prompt's last.
        stops: called with a prompt's number and its new tokens; True ends it.

    Yields:
        The new tokens of one step, in the order of the prompts. A stop token is among them.

    Raises:
        BridgeError: no prompts, an empty one, ids out of range, more tokens than the model can place,
            only a part of the model on this rank, or sequences cut over ranks.
    """
    how = sampling or Sampling()
    _check(model, prompts, max_new_tokens)
    return _steps(model, prompts, max_new_tokens, how, frozenset(stop_ids), stops)


@torch.no_grad()
def _steps(
    model: DeepSeekV4Model,
    prompts: Sequence[Sequence[int]],
    limit: int,
    how: Sampling,
    stop_ids: frozenset[int],
    stops: Stop | None,
) -> Iterator[list[Token]]:
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts])
    padded = torch.zeros((len(prompts), int(lengths.max())), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    cache = new_cache(model.config, lengths.to(device), int(lengths.max()) + limit)
    # On the host, so that a seed means the same numbers on every device.
    dice = [torch.Generator().manual_seed(_mixed(how.seed, row)) for row in range(len(prompts)) if how.temperature]
    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    ids = padded.to(device)
    for step in range(1, limit + 1):
        logits = _logits(model, ids, cache)  # [rows, vocabulary]
        draws = [torch.rand((), generator=dice[row], dtype=torch.float64) for row in rows] if dice else []
        chosen = choose(logits, how, torch.stack(draws).to(device) if draws else None)  # [rows]
        tokens = []
        for row, token in zip(rows, chosen.tolist(), strict=True):
            new[row].append(token)
            ended = "length" if step == limit else None
            if token in stop_ids or (stops is not None and stops(row, new[row])):
                ended = "stop"
            tokens.append(Token(row, token, ended))
        yield tokens
        going = [i for i, token in enumerate(tokens) if token.ended is None]
        if not going:
            return
        if len(going) < len(rows):
            kept = torch.tensor(going, device=device)
            cache.keep(kept)
            rows, chosen = [rows[i] for i in going], chosen[kept]
        ids = chosen.unsqueeze(1)


def complete(
    model: DeepSeekV4Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    *,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    stops: Stop | None = None,
) -> list[list[int]]:
    """The new tokens of every prompt, stop tokens included; arguments and errors as of `generate`."""
    new: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, max_new_tokens, sampling=sampling, stop_ids=stop_ids, stops=stops):
        for token in step:
            new[token.row].append(token.id)
    return new


def _logits(model: DeepSeekV4Model, ids: Tensor, cache: Cache) -> Tensor:
    """Logits of the rows' last tokens, [b, vocabulary]."""
    with _evaluating(model):
        return model(ids, cache=cache, last_only=True, runtime_gather_output=True)[:, 0]


@contextmanager
def _evaluating(model: DeepSeekV4Model) -> Iterator[None]:
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _mixed(seed: int, row: int) -> int:
    """One seed a prompt; neighbouring seeds share none of them."""
    return (seed * 0x9E3779B97F4A7C15 + row) % (1 << 63)


def _check(model: DeepSeekV4Model, prompts: Sequence[Sequence[int]], limit: int) -> None:
    if not (model.pre_process and model.post_process):
        raise BridgeError("generating: this rank holds one pipeline stage, expected the whole model")
    if model.config.sequence_parallel or model.config.context_parallel_size > 1:
        raise BridgeError("generating: sequences are cut over ranks, and one token cannot be; build the model without")
    if limit < 1:
        raise BridgeError(f"generating: {limit} new tokens, expected at least 1")
    if not prompts:
        raise BridgeError("generating: no prompts")
    words = model.spec.vocab_size
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise BridgeError(f"generating: prompt {number} has no tokens, expected at least one (a BOS, for example)")
        if bad := [t for t in prompt if not 0 <= t < words]:
            raise BridgeError(f"generating: prompt {number} holds token {bad[0]}, expected ids from 0 to {words - 1}")
        if (total := len(prompt) + limit) > model.spec.max_position_embeddings:
            raise BridgeError(
                f"generating: prompt {number} and its new tokens come to {total} positions, and the model has "
                f"{model.spec.max_position_embeddings}"
            )
