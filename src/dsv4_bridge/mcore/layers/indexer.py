"""The lightning indexer: which compressed blocks a query of a CSA layer attends to.

score(t, i) = sum over heads of w[t, head] * relu(q[t, head] . k[i]), on entries of its own compressor;
the best `index_topk` visible blocks are chosen. The choice has no gradient: the indexer is frozen by
construction, as in transformers, unless it is trained by an objective of its own (`indexer_loss`;
technical report 2.3.1). The Hadamard rotation of the released inference code is orthonormal, applied to both
sides, and cancels.
"""

from collections.abc import Sequence

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from ...planning.index_queries import Run
from ..config import DeepSeekV4Config
from ..kernels.index import IndexTerms, best_blocks, choose_blocks, every_block, index_scores
from ..kernels.rotary import rotate
from .basics import Linear
from .cache import CompressorCache, Positions
from .compressor import Compressor
from .context import Scored, Share, exchanged
from .rope import turns

# Queries whose heads are made at a time, a quarter of a GB of them in bf16 at the released widths.
_MADE = 1 << 14


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
                return self._chosen(qr, self._weights(x), turn, keys)
        return every_block(x.shape[0], x.shape[1], keys.shape[1], x.device)

    def of_share(self, x: Tensor, qr: Tensor, turn: Tensor, share: Share) -> list["IndexTerms"]:
        """What scores of each of a rank's segments are made of, with gradients; arguments as in `forward`."""
        sizes = share.sizes()
        queries = self._queries(qr, turn[:, None, None]).transpose(0, 1).split(sizes, 1)
        keys = self.compressor.of_share(x, share).split(share.blocks[4].counts, 1)
        weights = self._weights(x).transpose(0, 1).split(sizes, 1)
        return [IndexTerms(*parts) for parts in zip(queries, keys, weights, strict=True)]

    @torch.no_grad()
    def choose_of_share(self, x: Tensor, qr: Tensor, share: Share) -> list[Tensor]:
        """Blocks of every query of a rank's segments, scored on the ranks that `share.scored` says.

        Others' queries are under way while a rank scores its own.

        Args:
            x: [s, b, hidden], this rank's.
            qr: [s, b, q_lora_rank].
            share: what it has of the row.

        Returns:
            [b, size, k] int64 of every segment, as `forward`'s.
        """
        scored, rank = share.scored, share.group.rank()
        keys = self.compressor.of_share(x, share, scored.rows)
        whole = torch.cat([qr, self.linear_weights_proj(x)], -1)  # [s, b, q_lora_rank + heads]
        own = [run for run in scored.runs if run.home == rank]
        parts = {run: whole[run.first : run.first + run.size] for run in own}
        given, taken = _by_peer(own, rank), _by_peer([run for run in scored.runs if run.at == rank], rank)
        sent = {peer: torch.cat([parts[run] for run in runs]) for peer, runs in given.items()}
        got = {peer: whole.new_empty((_count(runs), *whole.shape[1:])) for peer, runs in taken.items()}
        under_way = exchanged(sent, got, share.group)
        chosen = {run: self._best(parts[run], keys, run, scored) for run in own if run.at == rank}
        for work in under_way:
            work.wait()
        answers, asked = {}, {}
        for peer, runs in taken.items():
            each = zip(got[peer].split([run.size for run in runs]), runs, strict=True)
            answers[peer] = torch.cat([self._best(part, keys, run, scored) for part, run in each], 1).int()
        for peer, runs in given.items():
            asked[peer] = whole.new_empty((x.shape[1], _count(runs), self.topk), dtype=torch.int32)
        for work in exchanged(answers, asked, share.group):
            work.wait()
        for peer, runs in given.items():
            chosen |= zip(runs, asked[peer].long().split([run.size for run in runs], 1), strict=True)
        found: dict[int, list[Tensor]] = {}
        for run in own:  # in the order of their tokens
            found.setdefault(run.segment, []).append(chosen[run])
        return [
            torch.cat(found[number], 1)
            if number in found
            else every_block(segment.size, x.shape[1], count, x.device, segment.start)
            for number, (segment, count) in enumerate(zip(share.segments, share.blocks[4].counts, strict=True))
        ]

    def _best(self, part: Tensor, keys: Tensor, run: Run, scored: Scored) -> Tensor:
        """Blocks of the queries of a run: [n, b, q_lora_rank + heads], keys [b, m, width] -> [b, n, topk]."""
        qr, weights = part.split([part.shape[-1] - self.heads, self.heads], -1)
        begin = scored.begins[scored.documents[run.home][run.segment]]
        turn = turns(self.config, 4, torch.arange(run.place, run.place + run.size, device=part.device))
        found = self._chosen(qr, self._scaled(weights), turn, keys[:, begin : begin + run.blocks], run.place)
        return torch.nn.functional.pad(found, (0, self.topk - found.shape[-1]), value=-1)

    def _chosen(self, qr: Tensor, weights: Tensor, turn: Tensor, keys: Tensor, first: int = 0) -> Tensor:
        """Blocks of queries from place `first` on, so many at a time as are made at once."""
        found = []
        for part in zip(qr.split(_MADE), weights.split(_MADE), turn.split(_MADE), strict=True):
            low, scales, angles = part
            queries = self._queries(low, angles[:, None, None]).transpose(0, 1)
            found.append(self.choose(IndexTerms(queries, keys, scales.transpose(0, 1)), first))
            first += len(low)
        return torch.cat(found, 1)

    def terms(self, x: Tensor, qr: Tensor, turn: Tensor) -> "IndexTerms":
        """What scores are made of, with gradients: x, qr and turn as in `forward`."""
        queries = self._queries(qr, turn[:, None, None]).transpose(0, 1)
        return IndexTerms(queries, self.compressor(x), self._weights(x).transpose(0, 1))

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
        return self._scaled(self.linear_weights_proj(x))

    def _scaled(self, weights: Tensor) -> Tensor:
        return weights.float() * self.heads**-0.5


def _by_peer(runs: Sequence[Run], rank: int) -> dict[int, list[Run]]:
    """Runs by the other rank that has to do with them, in order; those that stay are left out."""
    found: dict[int, list[Run]] = {}
    for run in runs:
        if run.at != run.home:
            found.setdefault(run.at if run.home == rank else run.home, []).append(run)
    return found


def _count(runs: Sequence[Run]) -> int:
    return sum(run.size for run in runs)
