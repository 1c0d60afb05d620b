"""The lightning indexer: which compressed blocks a query of a CSA layer attends to.

score(t, i) = sum over heads of w[t, head] * relu(q[t, head] . k[i]), on entries of its own compressor;
the best `index_topk` visible blocks are chosen. The choice has no gradient: the indexer is frozen by
construction, as in transformers, unless it is trained by an objective of its own (`indexer_loss`;
technical report 2.3.1). The Hadamard rotation of the released inference code is orthonormal, applied to both
sides, and cancels (trap 16).
"""

import math
from typing import NamedTuple

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from ..config import DeepSeekV4Config
from .basics import Linear
from .cache import CompressorCache
from .compressor import Compressor
from .rope import rotate

# Scores held and queries scored at a time: what stays in a core's cache, and more for a GPU.
_BUDGET, _CHUNK = 1 << 18, 64
_GPU_TIMES = 16


class IndexTerms(NamedTuple):
    """What scores are made of.

    Attributes:
        queries: [b, s, heads, width], rotated.
        keys: [b, n, width], entries of the indexer's own compressor.
        weights: [b, s, heads] float32, of the heads.
    """

    queries: Tensor
    keys: Tensor
    weights: Tensor


class Indexer(MegatronModule):
    """Chooses blocks for queries."""

    def __init__(self, config: DeepSeekV4Config):
        super().__init__(config)
        self.config: DeepSeekV4Config = config
        sizes = config.dsa_indexer_n_heads, config.dsa_indexer_head_dim, config.dsa_indexer_topk
        self.heads, self.width, self.topk = (int(size or 0) for size in sizes)
        self.linear_wq_b = Linear(config.q_lora_rank, self.heads * self.width, config)
        self.linear_weights_proj = Linear(config.hidden_size, self.heads, config)
        self.compressor = Compressor(config, 4, self.width)

    def forward(
        self,
        x: Tensor,
        qr: Tensor,
        turn: Tensor,
        cache: CompressorCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Blocks of every query.

        Args:
            x: [s, b, hidden].
            qr: [s, b, q_lora_rank], the normed low-rank query.
            turn: [s, pairs], rotation of the queries.
            cache: memory of its compressor.
            lengths: [b], with a cache.

        Returns:
            [b, s, k] int64, k = min(index_topk, blocks); -1 where a query sees fewer.
        """
        with torch.no_grad():
            keys = self.compressor(x, cache, lengths)  # [b, n, width]
            if keys.shape[1] > self.topk:
                return self.choose(self.terms(x, qr, turn, keys))
        return every_block(x.shape[0], x.shape[1], keys.shape[1], x.device)

    def terms(self, x: Tensor, qr: Tensor, turn: Tensor, keys: Tensor | None = None) -> "IndexTerms":
        """What scores are made of, with gradients: x, qr and turn as in `forward`; `keys` where they are known."""
        queries = self._queries(qr, turn[:, None, None]).transpose(0, 1)
        found = self.compressor(x) if keys is None else keys
        return IndexTerms(queries, found, self._weights(x).transpose(0, 1))

    @torch.no_grad()
    def choose(self, terms: "IndexTerms") -> Tensor:
        """The best visible blocks of every query: [b, s, k] int64, -1 where a query sees fewer."""
        queries, keys, weights = terms
        batch, length = queries.shape[:2]
        count = keys.shape[1]
        if count <= self.topk:
            return every_block(length, batch, count, keys.device)
        visible = (torch.arange(length, device=keys.device) + 1) // 4  # [s]
        times = 1 if keys.device.type == "cpu" else _GPU_TIMES
        chosen = queries.new_full((batch, length, self.topk), -1, dtype=torch.int64)
        start = 0
        while start < length:
            # No more blocks than the chunk's last query sees: over a sequence, half of all.
            most = min(count, (start + times * _CHUNK) // 4)
            size = times * _BUDGET // (batch * self.heads * max(1, most))
            stop = min(length, start + max(1, min(times * _CHUNK, size)))
            here, topk = slice(start, stop), min(self.topk, most)
            scores = index_scores(queries[:, here], keys[:, :most], weights[:, here])
            chosen[:, here, :topk] = best_blocks(scores, visible[here].unsqueeze(0), topk)
            start = stop
        return chosen

    @torch.no_grad()
    def step(self, x: Tensor, qr: Tensor, turn: Tensor, cache: CompressorCache, positions: Tensor) -> Tensor:
        """Blocks of one query a row: [b, hidden], [b, q_lora_rank], [b, pairs], [b] -> [b, k]."""
        keys = self.compressor.step(x, cache, positions)
        visible = (positions + 1) // 4
        used = keys[:, : max(1, int(visible.max()))]
        queries = self._queries(qr, turn[:, None]).unsqueeze(1)
        scores = index_scores(queries, used, self._weights(x).unsqueeze(1))
        return best_blocks(scores, visible[:, None], min(self.topk, used.shape[1])).squeeze(1)

    def _queries(self, qr: Tensor, turn: Tensor) -> Tensor:
        return rotate(self.linear_wq_b(qr).unflatten(-1, (self.heads, self.width)), turn)

    def _weights(self, x: Tensor) -> Tensor:
        return self.linear_weights_proj(x).float() * self.heads**-0.5


def every_block(length: int, batch: int, count: int, device: torch.device) -> Tensor:
    """All visible blocks of every query, [b, s, count] int64, -1 where a block is not complete yet."""
    visible = (torch.arange(length, device=device) + 1) // 4
    block = torch.arange(count, device=device)
    return torch.where(block < visible[:, None], block, -1).expand(batch, -1, -1)


def index_scores(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """Scores in float32: q [b, s, heads, w], keys [b, n, w], weights [b, s, heads] -> [b, s, n]."""
    dots = torch.matmul(q.float().flatten(1, 2), keys.float().mT).unflatten(1, q.shape[1:3])
    return torch.matmul(weights.unsqueeze(2) * q.shape[-1] ** -0.5, dots.relu_()).squeeze(2)


def best_blocks(scores: Tensor, visible: Tensor, topk: int) -> Tensor:
    """Indices of the best visible blocks, in any order.

    Of blocks with equal scores those in front are taken. `torch.topk` takes any, other ones for another number of
    columns: then a choice would depend on how queries are cut into chunks, on the device, and on whether a
    sequence is decoded step by step. So a block's score and its place make one integer, and no two are equal: what
    is chosen is what a stable sort has in front, without waiting for the device.

    Args:
        scores: [b, s, n], float32 or narrower; -0 equals 0, and NaN counts as +inf.
        visible: [1 or b, s], how many blocks a query sees.
        topk: of n blocks.

    Returns:
        [b, s, topk] int64, -1 where there are fewer.
    """
    column = torch.arange(scores.shape[-1], device=scores.device)
    seen = torch.nan_to_num(scores.float(), nan=math.inf, posinf=math.inf, neginf=-math.inf)
    seen = seen.add_(0.0).masked_fill_(column >= visible.unsqueeze(-1), -math.inf)  # -0 + 0 is 0
    # The bits of positive floats order them as integers do; those of negative ones the other way round.
    bits = seen.view(torch.int32)
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    last = scores.shape[-1] - 1
    keys = bits.long().bitwise_left_shift_(32).bitwise_or_(last - column)
    best = last - keys.topk(topk, dim=-1, sorted=False).values.bitwise_and_(0xFFFFFFFF)
    return best.masked_fill_(best >= visible.unsqueeze(-1), -1)
