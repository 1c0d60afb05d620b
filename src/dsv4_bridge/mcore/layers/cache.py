"""What decoding remembers of the tokens before: windows, unfinished blocks, compressed entries.

Rows of a batch may have different lengths. Token p of a row lies in slot p modulo the ring's size,
so a row's position alone says what every slot holds.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import DeepSeekV4Config


class Positions:
    """The position of every row's token in a step, and what every layer asks about it, found once.

    Args:
        here: [b] int64, on the device.
        known: the same numbers: what the host decides by them waits for no device.
    """

    def __init__(self, here: Tensor, known: tuple[int, ...]):
        self.here, self.known = here, known
        self.rows = torch.arange(len(here), device=here.device)
        self._slots: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}

    def slot(self, slots: int) -> Tensor:
        """Where the tokens lie in a ring of so many slots: [b] int64."""
        if slots not in self._slots:
            self._slots[slots] = self.here % slots
        return self._slots[slots]

    def seen(self, slots: int) -> Tensor:
        """Which slots of a ring hold a token, these among them: [b, slots] bool."""
        if slots not in self._seen:
            self._seen[slots] = slot_positions(self.here + 1, slots) >= 0
        return self._seen[slots]


def slot_positions(lengths: Tensor, slots: int) -> Tensor:
    """Position that each slot of a ring holds after `lengths` tokens; negative: nothing yet.

    Args:
        lengths: [b] int64.
        slots: size of the ring.

    Returns:
        [b, slots] int64.
    """
    last = lengths[:, None] - 1
    slot = torch.arange(slots, device=lengths.device)
    return last - (last - slot) % slots


class Ring:
    """The last tokens' values of every row: [b, slots, width]."""

    def __init__(self, slots: int):
        self.slots = slots
        self.values: Tensor | None = None

    def fill(self, values: Tensor, lengths: Tensor) -> None:
        """Keep the last tokens of [b, s, width]; row i has `lengths[i]` of them, the rest is padding."""
        at = slot_positions(lengths, self.slots).clamp(min=0)
        self.values = values.detach().gather(1, at.unsqueeze(-1).expand(-1, -1, values.shape[-1]))

    def put(self, values: Tensor, positions: Positions) -> Tensor:
        """Store one token a row, [b, width]; returns all slots."""
        assert self.values is not None
        self.values[positions.rows, positions.slot(self.slots)] = values.detach()
        return self.values

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, [kept] int64."""
        if self.values is not None:
            self.values = self.values[rows]

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [] if self.values is None else [self.values]


class CompressorCache:
    """One compressor's memory: raw projections of its unfinished (and previous) block, and its entries."""

    def __init__(self, ratio: int, capacity: int):
        self.ratio = ratio
        slots = 2 * ratio if ratio == 4 else ratio
        self.kv, self.gate = Ring(slots), Ring(slots)
        self.capacity = max(1, capacity // ratio)
        self.entries: Tensor | None = None  # [b, capacity, width]

    def fill(self, kv: Tensor, gate: Tensor, entries: Tensor, lengths: Tensor) -> None:
        """Take over a prompt: projections [b, s, …] and entries [b, n, width]; later ones than a row has are unused."""
        self.kv.fill(kv, lengths)
        self.gate.fill(gate, lengths)
        count = min(entries.shape[1], self.capacity)
        self.entries = entries.new_zeros((len(entries), self.capacity, entries.shape[-1]))
        self.entries[:, :count] = entries[:, :count].detach()

    def add(self, entry: Tensor, block: Tensor, rows: Tensor) -> None:
        """Store entry [b, width] as number `block` [b], of these rows [closed] int64."""
        assert self.entries is not None
        self.entries[rows, block[rows]] = entry[rows].detach()

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, [kept] int64."""
        self.kv.keep(rows)
        self.gate.keep(rows)
        if self.entries is not None:
            self.entries = self.entries[rows]

    def tensors(self) -> list[Tensor]:
        """What it holds."""
        entries = [] if self.entries is None else [self.entries]
        return self.kv.tensors() + self.gate.tensors() + entries


class LayerCache:
    """One attention layer's memory."""

    def __init__(self, config: DeepSeekV4Config, ratio: int, capacity: int):
        self.window = Ring(config.csa_window_size)
        self.compressor = CompressorCache(ratio, capacity) if ratio else None
        self.indexer = CompressorCache(ratio, capacity) if ratio == 4 else None

    def parts(self) -> list[Ring | CompressorCache]:
        """The memories that the layer has."""
        return [part for part in (self.window, self.compressor, self.indexer) if part is not None]


@dataclass
class Cache:
    """The memory of all decoder layers.

    Attributes:
        layers: one an attention layer.
        lengths: tokens remembered of each row, [b] int64.
        capacity: tokens a row at most.
        filled: whether a prompt was taken over.
        known: the lengths, on the host.
    """

    layers: list[LayerCache]
    lengths: Tensor
    capacity: int
    filled: bool = False
    known: tuple[int, ...] = field(init=False)
    _positions: Positions | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.known = tuple(self.lengths.tolist())

    @property
    def positions(self) -> Positions:
        """Where the next tokens go: the same object for all layers of a step."""
        if self._positions is None or self._positions.here is not self.lengths:
            self._positions = Positions(self.lengths, self.known)
        return self._positions

    def advance(self) -> None:
        """One token a row was taken."""
        self.lengths = self.lengths + 1
        self.known = tuple(n + 1 for n in self.known)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, [kept] int64: the others are finished."""
        self.lengths = self.lengths[rows]
        self.known = tuple(self.known[row] for row in rows.tolist())
        for layer in self.layers:
            for part in layer.parts():
                part.keep(rows)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds: rings and entries, whatever the length of the prompts was."""
        held = (tensor for layer in self.layers for part in layer.parts() for tensor in part.tensors())
        return sum(tensor.untyped_storage().nbytes() for tensor in held)


def new_cache(config: DeepSeekV4Config, lengths: Tensor, capacity: int) -> Cache:
    """An empty memory for prompts of `lengths` tokens, [b] int64, with room for `capacity` tokens a row."""
    ratios = config.csa_compress_ratios[: config.num_layers]
    return Cache([LayerCache(config, r, capacity) for r in ratios], lengths, capacity)
