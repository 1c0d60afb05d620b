"""Compressed keys: every `ratio` tokens become one entry, a gated mean of their projections.

Ratio 128 (HCA) means non-overlapping blocks; ratio 4 (CSA, and the indexer) means blocks whose entry
also draws on the block before: the projections are twice as wide, first half for the block as
*previous*, second half as *current* (technical report 2.3.1-2.3.2; transformers' compressors).
"""

import math

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from ..config import DeepSeekV4Config
from ..kernels.pool import gated_mean, pool
from ..kernels.rotary import rotate
from .basics import Linear, RMSNorm, new_parameter
from .cache import CompressorCache, Positions
from .context import Share, of_all_ranks, with_tail
from .floats import KeepsFloat32
from .rope import turns


class Compressor(KeepsFloat32, MegatronModule):
    """One compressor.

    Args:
        config: the model's.
        ratio: tokens a block, 4 or 128.
        width: channels of an entry: head_dim, or the indexer's.
    """

    float32_names = ("ape",)

    def __init__(self, config: DeepSeekV4Config, ratio: int, width: int):
        super().__init__(config)
        self.config: DeepSeekV4Config = config
        self.ratio, self.width, self.overlaps = ratio, width, ratio == 4
        wide = 2 * width if self.overlaps else width
        self.ape = new_parameter((ratio, wide), config, torch.float32)
        torch.nn.init.zeros_(self.ape)
        self.linear_wkv = Linear(config.hidden_size, wide, config)
        self.linear_wgate = Linear(config.hidden_size, wide, config)
        self.norm = RMSNorm(config, width, config.layernorm_epsilon, whole=True)

    def forward(self, x: Tensor, cache: CompressorCache | None = None, lengths: Tensor | None = None) -> Tensor:
        """Entries of all whole blocks.

        Args:
            x: [s, b, hidden].
            cache: memory to hand the tail to.
            lengths: [b], tokens of each row that are no padding; with a cache.

        Returns:
            [b, s // ratio, width].
        """
        kv = self.linear_wkv(x).transpose(0, 1)  # [b, s, wide]
        gate = self.linear_wgate(x).transpose(0, 1)
        pooled = pool(kv, gate, self.ape, self.ratio, self.overlaps, self.config.kernel_choice)
        positions = torch.arange(pooled.shape[1], device=x.device) * self.ratio
        entries = self._entries(pooled, positions)
        if cache is not None and lengths is not None:
            cache.fill(kv, gate, entries, lengths)
        return entries

    def of_share(self, x: Tensor, share: Share, rows: Tensor | None = None) -> Tensor:
        """Entries of all whole blocks of documents that lie across ranks.

        Args:
            x: [s, b, hidden], this rank's.
            share: what it has of the row.
            rows: which entries of all ranks', as `Blocks.rows`; None: these.

        Returns:
            [b, m, width]; those that this rank's queries see segment by segment, as `Blocks.counts` says.
        """
        blocks = share.blocks[self.ratio]
        both = torch.cat([self.linear_wkv(x), self.linear_wgate(x)], -1).transpose(0, 1)  # [b, s, 2 * wide]
        reach = self.ratio * (1 + self.overlaps) - 1
        whole = with_tail(both, reach, share.group)
        first, *others = share.sizes()
        lead = blocks.leads[0]
        parts = whole.split([reach - lead, lead + first, *others], 1)[1:]
        pooled = []
        for part, skipped in zip(parts, blocks.skipped, strict=True):
            kv, gate = part.chunk(2, -1)
            made = pool(kv, gate, self.ape, self.ratio, self.overlaps, self.config.kernel_choice)
            pooled.append(made[:, skipped:])
        entries = self._entries(torch.cat(pooled, 1), blocks.positions)
        return of_all_ranks(entries, blocks.most, blocks.rows if rows is None else rows, share.group)

    def step(self, x: Tensor, cache: CompressorCache, positions: Positions) -> Tensor:
        """Take one token a row; a row that closes a block gets an entry.

        Args:
            x: [b, hidden].
            cache: memory, changed in place.
            positions: of each row's token.

        Returns:
            All entries of the memory, [b, capacity, width]; those a row does not have yet are unused.
        """
        kv = cache.kv.put(self.linear_wkv(x), positions)
        gate = cache.gate.put(self.linear_wgate(x), positions)
        closed = [row for row, position in enumerate(positions.known) if (position + 1) % self.ratio == 0]
        if closed:
            block = positions.here // self.ratio
            slots = torch.arange(self.ratio, device=x.device)
            now = (block[:, None] * self.ratio + slots) % cache.kv.slots
            kv_block, gate_block = _take(kv, now), _take(gate, now) + self.ape
            if self.overlaps:
                before = (now - self.ratio) % cache.kv.slots
                old_kv, old_gate = _take(kv, before), _take(gate, before) + self.ape
                none = (block == 0)[:, None, None]
                first, second = slice(None, self.width), slice(self.width, None)
                old_kv = old_kv.masked_fill(none, 0.0)
                old_gate = old_gate.masked_fill(none, -math.inf)
                kv_block = torch.cat([old_kv[..., first], kv_block[..., second]], 1)
                gate_block = torch.cat([old_gate[..., first], gate_block[..., second]], 1)
            pooled = gated_mean(kv_block.unsqueeze(1), gate_block.unsqueeze(1))
            entry = self._entries(pooled, (block * self.ratio)[:, None])
            cache.add(entry[:, 0], block, torch.tensor(closed).to(x.device, non_blocking=True))
        assert cache.entries is not None
        return cache.entries

    def _entries(self, pooled: Tensor, positions: Tensor) -> Tensor:
        """[b, n, width], positions [n] or [b, n] -> [b, n, width]: norm, rotate."""
        turn = turns(self.config, self.ratio, positions)
        return rotate(self.norm(pooled), turn, by=self.config.kernel_choice)


def _take(values: Tensor, slots: Tensor) -> Tensor:
    return values.gather(1, slots.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
