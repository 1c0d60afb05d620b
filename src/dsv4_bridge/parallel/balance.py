"""Pipeline stages of equal cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from ..errors import BridgeError
from ..spec.flops import forward_costs
from ..spec.plan import expand
from ..spec.spec import ModelSpec
from .layout import Chunk, Layout


@dataclass(frozen=True)
class Costs:
    """What each piece costs, in one unit (seconds, FLOP or bytes).

    Attributes:
        layers: one a decoder layer.
        embedding: the embedding.
        mtp: all MTP layers.
        head: output layer and loss.
    """

    layers: tuple[float, ...]
    embedding: float
    mtp: float
    head: float

    def of(self, chunk: Chunk) -> float:
        """Cost of a chunk."""
        return (
            sum(self.layers[chunk.start : chunk.stop])
            + chunk.embedding * self.embedding
            + bool(chunk.mtp) * self.mtp
            + chunk.loss * self.head
        )

    def worst(self, layout: Layout) -> float:
        """The largest cost of a rank."""
        return max(sum(map(self.of, layout.of_rank(r))) for r in range(layout.pp))

    def imbalance(self, layout: Layout) -> float:
        """The worst rank over the mean one, minus 1."""
        total = sum(self.of(c) for c in layout.chunks)
        return self.worst(layout) * layout.pp / total - 1


def flop_costs(spec: ModelSpec, length: int = 4096) -> Costs:
    """Forward FLOPs a token of each piece, at sequences of `length` tokens, as `spec.flops` counts them."""
    layers, draft, head = forward_costs(spec, length)
    return Costs(layers, 0.0, draft, head)


@cache
def parameter_costs(spec: ModelSpec) -> Costs:
    """Parameters of each piece, as the table lists them; passengers not counted."""
    layers = [0.0] * spec.num_hidden_layers
    embedding = mtp = head = 0.0
    for item in expand(spec).items:
        if item.passenger:
            continue
        if item.block.kind == "layer":
            layers[item.block.index] += item.numel
        elif item.block.kind == "mtp":
            mtp += item.numel
        elif item.row.scope == "first":
            embedding += item.numel
        else:
            head += item.numel
    return Costs(tuple(layers), embedding, mtp, head)


def solve(spec: ModelSpec, pp: int, vp: int = 1, costs: Costs | None = None, limit: Costs | None = None) -> Layout:
    """The layout whose slowest rank is fastest, among those whose largest rank is smallest.

    With one chunk a rank this is the optimum (dynamic programming over cut points). With several, the
    cuts of the best chunks are improved by moving runs of them until no move helps.

    Args:
        spec: the model.
        pp: pipeline ranks.
        vp: chunks a rank.
        costs: what to balance; by default FLOP a token.
        limit: what no rank may have more of than it must; by default parameters.

    Raises:
        BridgeError: more chunks than layers allow.
    """
    costs, limit = costs or flop_costs(spec), limit or parameter_costs(spec)
    count, layers = pp * vp, spec.num_hidden_layers
    most = layers - max(spec.num_hash_layers, 1) + 1
    if pp < 1 or vp < 1 or count > max(most, 1):
        raise BridgeError(
            f"cutting {layers} layers into {pp} pipeline ranks of {vp} chunks: {count} chunks, at most {most} are "
            f"possible (the {spec.num_hash_layers} hash layers stay together, and each chunk has a layer)"
        )
    smallest = _best(spec, count, limit, None, 0.0)[1]
    cuts, _ = _best(spec, count, costs, limit, smallest * (1 + 1e-9))
    layout = _layout(spec, cuts, pp)
    return layout if vp == 1 else _improved(spec, layout, costs, limit)


def _layout(spec: ModelSpec, cuts: Sequence[int], pp: int) -> Layout:
    count = len(cuts) - 1
    return Layout(tuple(_chunk(spec, a, b, count, n) for n, (a, b) in enumerate(pairwise(cuts))), pp)


def _improved(spec: ModelSpec, layout: Layout, costs: Costs, limit: Costs) -> Layout:
    def rank(cuts: Sequence[int]) -> tuple[float, ...]:
        trial = _layout(spec, cuts, layout.pp)
        times = [costs.of(c) for c in trial.chunks]
        return limit.worst(trial), costs.worst(trial), max(times), sum(t * t for t in times)

    cuts = [0, *(c.stop for c in layout.chunks)]
    found = rank(cuts)
    improving = True
    while improving:
        improving = False
        for low in range(1, len(cuts) - 1):
            for high in range(low + 1, len(cuts)):
                for step in (-1, 1):
                    moved = [c + step * (low <= n < high) for n, c in enumerate(cuts)]
                    if moved[1] < spec.num_hash_layers or any(b <= a for a, b in pairwise(moved)):
                        continue
                    if (trial := rank(moved)) < found:
                        cuts, found, improving = moved, trial, True
    return _layout(spec, cuts, layout.pp)


def _chunk(spec: ModelSpec, start: int, stop: int, count: int, number: int) -> Chunk:
    last = number == count - 1
    return Chunk(start, stop, number == 0, spec.mtp_layers if last else 0, last)


def _best(spec: ModelSpec, count: int, costs: Costs, limit: Costs | None, most: float) -> tuple[list[int], float]:
    """Cut points of the contiguous partition with the smallest largest cost, and that cost."""
    layers, first = spec.num_hidden_layers, max(spec.num_hash_layers, 1)
    # best[stop]: (largest cost so far, sum of squares as tie-break, cuts) of the first chunks up to layer `stop`.
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [0])}
    for number in range(count):
        left = count - number - 1
        grown: dict[int, tuple[float, float, list[int]]] = {}
        for start, (largest, squares, cuts) in best.items():
            stops = [layers] if left == 0 else range(max(start + 1, first), layers - left + 1)
            for stop in stops:
                if stop <= start:
                    continue
                chunk = _chunk(spec, start, stop, count, number)
                if limit is not None and limit.of(chunk) > most:
                    continue
                cost = costs.of(chunk)
                entry = (max(largest, cost), squares + cost * cost, [*cuts, stop])
                if stop not in grown or entry[:2] < grown[stop][:2]:
                    grown[stop] = entry
        best = grown
    found = best[layers]
    return found[2], found[0]
