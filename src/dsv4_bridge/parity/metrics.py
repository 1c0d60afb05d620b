"""How far two tensors, two choices, two sets of logits are apart. Identical ones give exactly 0.

Everything is computed in float64, a piece of rows at a time.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_PIECE = 1 << 22  # elements


@dataclass(frozen=True)
class Difference:
    """Of two tensors, over their vectors (the last dimension: one a token or block).

    Attributes:
        vectors: how many.
        cosine_min: of the vector that agrees least.
        cosine_mean: over all vectors.
        max_abs: largest difference.
        error: `max_abs` over the reference's largest magnitude.
        relative: norm of the difference over the reference's norm.
        not_finite: values that are infinite or NaN on either side; errors are infinite then.
    """

    vectors: int
    cosine_min: float
    cosine_mean: float
    max_abs: float
    error: float
    relative: float
    not_finite: int


@dataclass(frozen=True)
class Choice:
    """Of two choices, compared as sets.

    Attributes:
        queries: how many sets (tokens for experts, queries for blocks).
        flips: how many of them differ.
        ties: how many flips are near-ties: the reference's scores of what was swapped lie within
            tolerance, so rounding decides between them.
        gap: largest gap among the flips: best score lost minus worst gained, over the query's largest
            magnitude; infinite where no score explains it (token ids decide, or sizes differ).
        boundary: median over queries of the gap between the last chosen and the first not chosen, in the
            reference; what a near-tie is small against. None where all that there is was chosen.
    """

    queries: int
    flips: int
    ties: int
    gap: float
    boundary: float | None


@dataclass(frozen=True)
class LogitsDifference:
    """Of two sets of logits, over all positions.

    Attributes:
        positions: how many.
        error: largest difference over the reference's largest logit.
        relative: norm of the difference over the reference's norm.
        cosine_min: of the position that agrees least.
        cosine_mean: over all positions.
        last_cosine: of the last position; the smallest of the batch.
        top1: share of positions with the same largest logit.
        kl_mean: KL(reference || ours) in nats, mean over positions.
        kl_p95: 95th percentile.
        kl_max: largest.
        not_finite: values that are infinite or NaN on either side.
        kl: [b, s] float64, of every position.
    """

    positions: int
    error: float
    relative: float
    cosine_min: float
    cosine_mean: float
    last_cosine: float
    top1: float
    kl_mean: float
    kl_p95: float
    kl_max: float
    not_finite: int
    kl: np.ndarray


def compare_values(ours: Tensor, theirs: Tensor) -> Difference:
    """[…, width] against the same shape.

    Raises:
        ValueError: shapes differ.
    """
    sums = _Sums()
    sums.add(ours, theirs)
    cosines, parts = sums.found()
    return Difference(len(cosines), *_over(cosines), *parts)


def compare_choices(ours: Tensor, theirs: Tensor, scores: Tensor | None, tie: float) -> Choice:
    """Compare rows of indices as sets.

    Args:
        ours: [queries, k] int64, -1 for none.
        theirs: [queries, k'].
        scores: [queries, n], what the reference chose by (-inf: not allowed); None: nothing.
        tie: gap up to which a flip counts as a near-tie.
    """
    queries, flips, gaps, edges = len(theirs), 0, [], []
    count = 1 + max((int(x.amax()) for x in (ours, theirs) if x.numel()), default=-1)
    count = max(count, 0 if scores is None else scores.shape[1])
    if not count:  # nothing to choose from yet
        return Choice(queries, 0, 0, 0.0, None)
    for rows in _pieces(queries, count):
        mine, other = _members(ours[rows], count), _members(theirs[rows], count)
        lost, gained = other & ~mine, mine & ~other
        differ = (lost | gained).any(-1)
        flips += int(differ.sum())
        if scores is None:
            gaps.append(torch.full((int(differ.sum()),), math.inf, dtype=torch.float64))
            continue
        known = scores[rows].double()
        scale = known.abs().masked_fill(known.isinf(), 0).amax(-1).clamp(min=1e-30)
        best = known.masked_fill(~lost, -math.inf)
        worst = known.masked_fill(~gained, math.inf)
        if bool(differ.any()):
            gap = (best.amax(-1) - worst.amin(-1)) / scale
            same = lost.sum(-1) == gained.sum(-1)
            gaps.append(torch.where(same & gap.isfinite(), gap.clamp(min=0), math.inf)[differ])
        edge = known.masked_fill(~other, math.inf).amin(-1) - known.masked_fill(other, -math.inf).amax(-1)
        edges.append((edge / scale)[edge.isfinite()])
    gap = torch.cat(gaps) if gaps else torch.zeros(0)
    edge = torch.cat(edges) if edges else torch.zeros(0)
    return Choice(
        queries,
        flips,
        int((gap <= tie).sum()),
        float(gap.max()) if len(gap) else 0.0,
        float(edge.median()) if len(edge) else None,
    )


def compare_logits(ours: Tensor, theirs: Tensor) -> LogitsDifference:
    """[b, s, vocabulary] against the same shape."""
    return compare_rows_of_logits([(ours.flatten(0, 1), theirs.flatten(0, 1))], (theirs.shape[0], theirs.shape[1]))


def compare_rows_of_logits(parts: Iterable[tuple[Tensor, Tensor]], shape: tuple[int, int]) -> LogitsDifference:
    """The same of logits that are never together in memory.

    Args:
        parts: ours and theirs of some positions, [positions, vocabulary] each, batch first; every part but the last
            a multiple of `rows_at_once(vocabulary)` positions.
        shape: batch and tokens a row.
    """
    sums, same, kl = _Sums(), 0, []
    for ours, theirs in parts:
        sums.add(ours, theirs)
        for rows in _pieces(len(theirs), theirs.shape[-1]):
            same += int((ours[rows].argmax(-1) == theirs[rows].argmax(-1)).sum())
            a, b = ours[rows].double(), theirs[rows].double()
            p, q = b.log_softmax(-1), a.log_softmax(-1)
            # Rounding can leave a sum of nearly equal terms just below zero.
            kl.append((p.exp() * (p - q)).sum(-1).clamp(min=0))
    cosines, (_, error, relative, bad) = sums.found()
    found = torch.cat(kl).numpy()
    finite = found if np.isfinite(found).all() else np.where(np.isfinite(found), found, np.inf)
    return LogitsDifference(
        len(finite),
        error,
        relative,
        *_over(cosines),
        float(cosines.reshape(shape)[:, -1].min()),
        same / len(finite),
        float(finite.mean()),
        float(np.quantile(finite, 0.95, method="higher")),
        float(finite.max()),
        bad,
        finite.reshape(shape),
    )


class _Sums:
    """Of two tensors, a part at a time: cosine of every vector; largest difference, errors, what is not finite."""

    def __init__(self) -> None:
        self.cosines: list[Tensor] = []
        self.apart = self.most = self.squares = self.norm = 0.0
        self.bad = 0

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """[…, width] twice."""
        if ours.shape != theirs.shape:
            raise ValueError(f"comparing {list(ours.shape)} with {list(theirs.shape)}")
        a, b = ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, ours.shape[-1])
        for rows in _pieces(len(a), a.shape[-1]):
            x, y = a[rows].double(), b[rows].double()
            delta = x - y
            xy, xx, yy = _dots(x, y), _dots(x, x), _dots(y, y)
            if not bool((xx + yy).isfinite().all()):
                self.bad += int((~(x.isfinite() & y.isfinite())).sum())
            # sqrt(xx * xx) is xx: equal vectors give exactly 1; two zero vectors are equal.
            cosine = torch.where((xx == 0) & (yy == 0), 1.0, xy / (xx * yy).sqrt().clamp(min=1e-300))
            self.cosines.append(cosine.nan_to_num(-1.0).clamp(-1, 1))
            self.apart = max(self.apart, float(torch.linalg.vector_norm(delta, math.inf)))
            self.most = max(self.most, float(torch.linalg.vector_norm(y, math.inf)))
            self.squares += float(_dots(delta, delta).sum())
            self.norm += float(yy.sum())

    def found(self) -> tuple[Tensor, tuple[float, float, float, int]]:
        """Cosines; largest difference, the same over the largest, norm of differences over the norm, not finite."""
        cosines = torch.cat(self.cosines) if self.cosines else torch.ones(0, dtype=torch.float64)
        if self.bad:
            return cosines, (math.inf, math.inf, math.inf, self.bad)
        relative = _ratio(math.sqrt(self.squares), math.sqrt(self.norm))
        return cosines, (self.apart, _ratio(self.apart, self.most), relative, 0)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """[rows, width] twice -> [rows]; in one pass, and of equal vectors in the same order."""
    return torch.matmul(x.unsqueeze(-2), y.unsqueeze(-1)).flatten()


def _over(cosines: Tensor) -> tuple[float, float]:
    return (float(cosines.min()), float(cosines.mean())) if len(cosines) else (1.0, 1.0)


def _ratio(a: float, b: float) -> float:
    return a / b if b else (0.0 if a == 0 else math.inf)


def rows_at_once(width: int) -> int:
    """Vectors of so many values that are computed with together."""
    return max(1, _PIECE // max(1, width))


def _pieces(rows: int, width: int) -> Iterator[slice]:
    step = rows_at_once(width)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _members(indices: Tensor, count: int) -> Tensor:
    """[q, k] with -1 for none -> [q, count] bool."""
    found = torch.zeros((len(indices), count + 1), dtype=torch.bool)
    found.scatter_(1, torch.where(indices < 0, count, indices), True)
    return found[:, :count]
