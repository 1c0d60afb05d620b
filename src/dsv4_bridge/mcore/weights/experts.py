"""Routed experts of a checkpoint, decoded by threads while those before them are used."""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ...spec.plan import Item
from ...store.values import Scratch, Values
from .load import stripes_on
from .on_device import scratch_for

_WORKERS = 2  # one reads while another decodes, without Python's lock
Weights = tuple[Tensor, Tensor]  # gate above up [2f, h], and down [h, f]


class ExpertWeights:
    """The weights of one expert after another, in an order that is known.

    Args:
        values: of the checkpoint.
        items: gate, up and down of every expert, by the prefix of its block and its number.
        dtype: that they are rounded to.
        device: where they are used.
    """

    def __init__(
        self, values: Values, items: Mapping[tuple[str, int], Sequence[Item]], dtype: torch.dtype, device: torch.device
    ):
        self.values, self.items, self.dtype, self.device = values, items, dtype, device
        self._spare: list[Weights] = []
        self._own = threading.local()

    def each(self, prefix: str, numbers: Sequence[int]) -> Iterator[Weights]:
        """The weights of each expert of a block, in order; use them before the next."""
        waiting, coming = deque(numbers), deque[tuple[Future[None], Weights]]()
        with ThreadPoolExecutor(_WORKERS, "experts") as pool:

            def ask(into: Weights) -> None:
                if waiting:
                    coming.append((pool.submit(self._fill, self.items[prefix, waiting.popleft()], into), into))
                else:
                    self._spare.append(into)

            for _ in range(min(len(numbers), _WORKERS + 1)):
                ask(self._spare.pop() if self._spare else self._new(prefix))
            try:
                while coming:
                    filled, weights = coming.popleft()
                    filled.result()
                    yield weights
                    ask(weights)
            finally:
                waiting.clear()

    def _new(self, prefix: str) -> Weights:
        gate, down = (next(i for i in self.items[prefix, 0] if i.row.part[1] == count) for count in (2, 1))
        both = torch.empty((2 * gate.shape[0], gate.shape[1]), dtype=self.dtype, device=self.device)
        return both, torch.empty(down.shape, dtype=self.dtype, device=self.device)

    def _fill(self, items: Sequence[Item], into: Weights) -> None:
        if not hasattr(self._own, "scratch"):
            self._own.scratch = scratch_for(self.device)
        scratch: Scratch = self._own.scratch
        for item in items:
            index, count = item.row.part
            at = index * item.shape[0]
            for stripe in stripes_on(self.device, item, 0, item.shape[0], self.values, scratch):
                into[0 if count == 2 else 1][at : at + len(stripe)].copy_(stripe)
                at += len(stripe)
