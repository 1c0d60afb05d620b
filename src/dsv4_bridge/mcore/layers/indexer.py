"""The lightning indexer: which compressed blocks a query of a CSA layer attends to.

score(t, i) = sum over heads of w[t, head] * relu(q[t, head] . k[i]), on entries of its own compressor;
the best `index_topk` visible blocks are chosen. The choice has no gradient: the indexer is frozen by
construction, as in transformers, unless it is trained by an objective of its own (`indexer_loss`;
technical report 2.3.1). The Hadamard rotation of the released inference code is orthonormal, applied to both
sides, and cancels.
"""

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from ..config import DeepSeekV4Config
from ..kernels.index import IndexTerms, best_blocks, choose_blocks, every_block, index_scores
from ..kernels.rotary import rotate
from .basics import Linear
from .cache import CompressorCache, Positions
from .compressor import Compressor
from .context import Share


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

    def of_share(self, x: Tensor, qr: Tensor, turn: Tensor, share: Share) -> list["IndexTerms"]:
        """What scores of each of a rank's segments are made of, with gradients; arguments as in `forward`."""
        sizes = share.sizes()
        queries = self._queries(qr, turn[:, None, None]).transpose(0, 1).split(sizes, 1)
        keys = self.compressor.of_share(x, share).split(share.blocks[4].counts, 1)
        weights = self._weights(x).transpose(0, 1).split(sizes, 1)
        return [IndexTerms(*parts) for parts in zip(queries, keys, weights, strict=True)]

    def terms(self, x: Tensor, qr: Tensor, turn: Tensor, keys: Tensor | None = None) -> "IndexTerms":
        """What scores are made of, with gradients: x, qr and turn as in `forward`; `keys` where they are known."""
        queries = self._queries(qr, turn[:, None, None]).transpose(0, 1)
        found = self.compressor(x) if keys is None else keys
        return IndexTerms(queries, found, self._weights(x).transpose(0, 1))

    @torch.no_grad()
    def choose(self, terms: "IndexTerms", first: int = 0) -> Tensor:
        """The best visible blocks of queries from place `first` on: [b, s, k] int64, -1 where one sees fewer."""
        return choose_blocks(terms, self.topk, self.config.kernel_choice, first)

    @torch.no_grad()
    def step(self, x: Tensor, qr: Tensor, turn: Tensor, cache: CompressorCache, positions: Positions) -> Tensor:
        """Blocks of one query a row: [b, hidden], [b, q_lora_rank], [b, pairs] -> [b, k], -1 where it sees fewer."""
        keys = self.compressor.step(x, cache, positions)
        visible = (positions.here + 1) // 4
        used = keys[:, : max(1, (max(positions.known) + 1) // 4)]
        if used.shape[1] <= self.topk:
            block = torch.arange(used.shape[1], device=x.device)
            return torch.where(block < visible[:, None], block, -1)
        queries = self._queries(qr, turn[:, None]).unsqueeze(1)
        scores = index_scores(queries, used, self._weights(x).unsqueeze(1))
        return best_blocks(scores, visible[:, None], self.topk).squeeze(1)

    def _queries(self, qr: Tensor, turn: Tensor) -> Tensor:
        queries = self.linear_wq_b(qr).unflatten(-1, (self.heads, self.width))
        return rotate(queries, turn, by=self.config.kernel_choice)

    def _weights(self, x: Tensor) -> Tensor:
        return self.linear_weights_proj(x).float() * self.heads**-0.5
