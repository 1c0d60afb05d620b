"""The indexer's choice among very many blocks on a CPU: one compiled loop over them, in which no score is stored.

By torch a pair of query and block costs ten passes over memory and a part of a selection: at a million tokens, whose
queries meet 137 thousand million blocks, hours. Here a tile of keys stays in the first cache while queries go over
it, and a score is compared with the least of the query's best so far. Scores are float32, and may differ from torch's
in the last bits.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...codec._kernels import kernel

if TYPE_CHECKING:
    from .index import IndexTerms

# Queries that go over a tile of keys one behind another, and keys of a tile.
_QUERIES, _TILE = 64, 256


@kernel(fastmath={"reassoc", "nsz", "contract"})
def _choose(queries, keys, weights, visible, chosen) -> None:  # type: ignore[no-untyped-def]
    """Queries [t, heads, width] with weights [t, heads] choose among keys [width, n]; `chosen` [t, k] is -1."""
    count, heads, width = queries.shape
    most = chosen.shape[1]
    best = np.empty((count, most), np.float32)
    filled = np.zeros(count, np.int64)
    weakest = np.zeros(count, np.int64)  # place of the least of the best, and of equal ones of the one behind
    dots, scores = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for start in range(0, visible[count - 1], _TILE):
        for t in range(count):
            size = min(_TILE, visible[t] - start)
            if size <= 0:
                continue
            scores[:] = 0
            for h in range(heads):
                dots[:] = 0
                for w in range(width):
                    x, column = queries[t, h, w], keys[w, start : start + size]
                    for j in range(size):
                        dots[j] += x * column[j]
                x = weights[t, h]
                for j in range(size):
                    scores[j] += x * max(dots[j], np.float32(0))
            if filled[t] == most:  # few tiles have a better one
                least, better = best[t, weakest[t]], 0
                for j in range(size):
                    better += not scores[j] <= least
                if not better:
                    continue
            for j in range(size):
                score = np.float32(np.inf) if np.isnan(scores[j]) else scores[j]
                full = filled[t] == most
                if full and score <= best[t, weakest[t]]:
                    continue
                at = weakest[t] if full else filled[t]
                best[t, at], chosen[t, at] = score, start + j
                filled[t] += not full
                if filled[t] == most:
                    weakest[t] = _weakest(best[t], chosen[t])


@kernel()
def _weakest(best, chosen) -> int:  # type: ignore[no-untyped-def]
    least = 0
    for i in range(1, len(best)):
        if best[i] < best[least] or (best[i] == best[least] and chosen[i] > chosen[least]):
            least = i
    return least


def choose(terms: "IndexTerms", topk: int, first: int) -> Tensor:
    """`index.choose_blocks` of floats on the CPU; arguments and result as there."""
    queries, keys, weights = terms
    batch, length = queries.shape[:2]
    visible = ((torch.arange(length) + first + 1) // 4).clamp(max=keys.shape[1]).numpy()
    scale = queries.shape[-1] ** -0.5
    chosen = torch.full((batch, length, topk), -1)
    for row in range(batch):
        columns = _array(keys[row].mT)
        for start in range(0, length, _QUERIES):
            here = slice(start, start + _QUERIES)
            each = _array(queries[row, here]), columns, _array(weights[row, here] * scale)
            _choose(*each, visible[here], chosen[row, here].numpy())
    return chosen


def _array(tensor: Tensor) -> Any:
    return tensor.detach().float().contiguous().numpy()
