"""What a comparison found; plain data."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from .metrics import Choice, Difference, LogitsDifference
from .tables import Table


@dataclass(frozen=True)
class Tolerance:
    """What counts as the same.

    Attributes:
        logits: largest error of the logits, or None where the last position's cosine decides.
        top1: share of positions that must have the same largest logit, or None.
        last_cosine: smallest cosine of the last position, or None.
        least_cosine: smallest cosine of any position once choices are replayed, or None. A model that chooses for
            itself differs where rounding decides a choice, and there by far more.
        site: error above which a sub-layer is named in the verdict.
        tie: gap of scores up to which a flipped choice is a near-tie.
        far: share of a site's sets that may flip by more.
    """

    logits: float | None
    top1: float | None
    last_cosine: float | None
    least_cosine: float | None
    site: float
    tie: float
    far: float


# bf16 keeps 8 bits, and rounds at every sub-layer: values differ by percents, scores of blocks by more.
TOLERANCES = {
    "float32": Tolerance(1e-5, 1.0, None, None, 3e-5, 1e-4, 0.0),
    "bf16": Tolerance(None, None, 0.999, 0.995, 5e-2, 0.1, 0.01),
}


@dataclass(frozen=True)
class SiteResult:
    """One site of one layer.

    Attributes:
        layer: decoder layer, None for the model's head.
        site: name, see `sites.SITES`.
        found: a `Difference`, or a `Choice`.
        table: a choice that a table of token ids makes: rounding cannot flip it.
    """

    layer: int | None
    site: str
    found: Difference | Choice
    table: bool = False

    @property
    def error(self) -> float:
        """The error of values; 0 for choices."""
        return self.found.error if isinstance(self.found, Difference) else 0.0

    @property
    def flips(self) -> int:
        """Flipped choices; 0 for values."""
        return self.found.flips if isinstance(self.found, Choice) else 0

    @property
    def far(self) -> int:
        """Flipped choices that are no near-ties."""
        if not isinstance(self.found, Choice):
            return 0
        return self.found.flips - (0 if self.table else self.found.ties)

    def flipped(self, tolerance: Tolerance) -> bool:
        """Whether more choices than allowed differ by more than a near-tie."""
        share = 0.0 if self.table else tolerance.far
        return isinstance(self.found, Choice) and self.far > share * self.found.queries

    def to_json(self) -> dict[str, Any]:
        """Plain types; every key of either kind, None where it does not apply."""
        empty = dict.fromkeys((*Difference.__dataclass_fields__, *Choice.__dataclass_fields__))
        return {"layer": self.layer, "site": self.site} | empty | _plain(asdict(self.found))


@dataclass(frozen=True)
class Run:
    """One run of our model against the recorded reference.

    Attributes:
        sites: in the order of the computation.
        logits: of all positions; None where a part of the layers was compared that the last is not of.
    """

    sites: tuple[SiteResult, ...]
    logits: LogitsDifference | None

    def within(self, tolerance: Tolerance, *, everywhere: bool = True) -> bool:
        """Whether logits agree and no choice differs by more than a near-tie.

        Args:
            tolerance: what counts as the same.
            everywhere: whether every position is judged by `least_cosine`, not the last alone by `last_cosine`.
        """
        found, chosen = self.logits, not any(s.flipped(tolerance) for s in self.sites)
        if found is None:
            return chosen and all(s.error <= tolerance.site for s in self.sites)
        return (
            found.not_finite == 0
            and (tolerance.logits is None or found.error <= tolerance.logits)
            and (tolerance.top1 is None or found.top1 >= tolerance.top1)
            and (tolerance.last_cosine is None or found.last_cosine >= tolerance.last_cosine)
            and (not everywhere or tolerance.least_cosine is None or found.cosine_min >= tolerance.least_cosine)
            and chosen
        )

    def of_layer(self, layer: int | None) -> tuple[SiteResult, ...]:
        """The sites of a layer."""
        return tuple(s for s in self.sites if s.layer == layer)

    def to_json(self) -> dict[str, Any]:
        """Plain types, without the KL of single positions."""
        logits = {k: v for k, v in vars(self.logits).items() if k != "kl"} if self.logits else None
        return {"logits": logits and _plain(logits), "sites": [s.to_json() for s in self.sites]}


@dataclass(frozen=True)
class Narrow:
    """Another pass in which both models choose fewer blocks, where the sample is too short for `index_topk`.

    Attributes:
        index_topk: blocks a query in both models.
        batch: rows.
        chosen: queries of one layer that had more blocks than that.
        free: our model's own choices.
        replayed: with the reference's, or None.
    """

    index_topk: int
    batch: int
    chosen: int
    free: Run
    replayed: Run | None

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        runs = {"free": self.free.to_json(), "replayed": self.replayed.to_json() if self.replayed else None}
        return {"index_topk": self.index_topk, "batch": self.batch, "chosen": self.chosen} | runs


@dataclass(frozen=True)
class Draft:
    """An MTP block against the formula in float64; our model takes the formula's experts.

    Attributes:
        depth: its number, from 0.
        sites: in the order of the computation.
        logits: of all positions that were looked at.
    """

    depth: int
    sites: tuple[SiteResult, ...]
    logits: LogitsDifference

    def within(self, tolerance: Tolerance) -> bool:
        """Whether logits agree and no choice of experts differs by more than a near-tie."""
        return Run(self.sites, self.logits).within(replace(tolerance, last_cosine=None))

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return {"depth": self.depth} | Run(self.sites, self.logits).to_json()


@dataclass(frozen=True)
class Step:
    """A layer that was compared by itself, its weights read for it.

    Attributes:
        layer: its number.
        seconds: both models' time, with reading.
        nbytes: of the checkpoints that were read, by both.
        experts: how often an expert was read for our model.
    """

    layer: int
    seconds: float
    nbytes: int
    experts: int


@dataclass(frozen=True)
class Verdict:
    """The outcome.

    Attributes:
        passed: whether the models agree within tolerance.
        text: in words.
        layer: of the first site beyond tolerance; None for the head, or where none is.
        site: name of that site, None where there is none.
        tensors: released names of the tensors that act first there.
    """

    passed: bool
    text: str
    layer: int | None = None
    site: str | None = None
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParityReport:
    """All that `parity` found.

    Attributes:
        checkpoint: what our model holds.
        reference: what transformers' model holds.
        against: the other implementation.
        dtype: of both models.
        device: where they ran.
        inputs: batch, seq_length, where the tokens are from, and what they made the model do: distinct ids of its
            vocabulary, and queries that had more blocks than `index_topk`, so that the indexer chose.
        layers: kind of every decoder layer, as `CSA, routed`.
        versions: of the packages that computed.
        tolerance: what counts as the same.
        free: our model making its own choices.
        replayed: our model made to take the reference's choices, or None; choices in it are what it
            would have taken by itself, on the reference's way.
        tables: what is looked up by token, and the experts' biases: all rows of both models.
        narrow: another pass with fewer blocks a query; None where the sample was long enough, or was given.
        drafts: the MTP blocks.
        left_out: what was not compared, in words, or None.
        verdict: the outcome.
        bytes: memory stated before the start.
        seconds: wall time.
        steps: the layers, where they were compared one at a time with weights read for each; else empty.
    """

    checkpoint: str
    reference: str
    against: str
    dtype: str
    device: str
    inputs: dict[str, Any]
    layers: tuple[str, ...]
    versions: dict[str, str]
    tolerance: Tolerance
    free: Run
    replayed: Run | None
    tables: tuple[Table, ...]
    narrow: Narrow | None
    drafts: tuple[Draft, ...]
    left_out: str | None
    verdict: Verdict
    bytes: int
    seconds: float
    steps: tuple[Step, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the models agree within tolerance."""
        return self.verdict.passed

    def to_json(self) -> dict[str, Any]:
        """Plain types; a number that is not finite is None."""
        plain = {k: getattr(self, k) for k in ("checkpoint", "reference", "against", "dtype", "device", "inputs")}
        return plain | {
            "layers": list(self.layers),
            "versions": self.versions,
            "tolerance": asdict(self.tolerance),
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "passed": self.passed,
            "verdict": asdict(self.verdict),
            "free": self.free.to_json(),
            "replayed": self.replayed.to_json() if self.replayed else None,
            "tables": [vars(table) for table in self.tables],
            "narrow": self.narrow.to_json() if self.narrow else None,
            "drafts": [draft.to_json() for draft in self.drafts],
            "left_out": self.left_out,
            "steps": [asdict(step) for step in self.steps],
        }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
