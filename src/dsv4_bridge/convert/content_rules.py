"""What a measured tensor cannot hold, and what likely happened to it: rules over facts, no file is read.

A rule speaks only where no sound checkpoint of this model would be caught; what merely looks odd is left to parity.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Self

from ..spec.plan import Item
from ..spec.spec import ModelSpec

# A root mean square 16 times that of its siblings over layers and experts is no training's doing, and neither is one
# eight times as far from them as they are from one another.
_FAR, _SPREADS = 4.0, 8.0
_SIBLINGS = 4  # fewer say nothing
_MANY = 64  # values without low bits, of a row, that are no accident
_SHARE = 0.01  # of a tensor's blocks off the rule


@dataclass(frozen=True)
class Scales:
    """Of a quantised tensor's scales: NaN or infinite, out of range, mean log2, all powers of two, all whole numbers
    that a byte holds (E8M0 codes copied as numbers).
    """

    nonfinite: int
    outside: int
    level: float
    powers: bool
    bytes_: bool


@dataclass(frozen=True)
class Ids:
    """Of a table of expert ids: the range, rows with an id twice, ids above 256 and the odd ones of them."""

    least: int = 0
    most: int = 0
    repeated_rows: int = 0
    above_256: int = 0
    odd_above_256: int = 0
    refused: str = ""


@dataclass(frozen=True)
class TensorFacts:
    """What one pass over a tensor found.

    Attributes:
        item: the tensor.
        encoding: how it is stored.
        zeros: values that are 0.
        nonfinite: NaN or infinite values and scales.
        level: log2 of the root mean square; None: all zero, or ids.
        constant: the value that all have, if they do.
        wide: float32 values that bf16 does not hold.
        checksum: CRC-32C of its bytes, scales included.
        scales: of quantised tensors.
        ids: of tables of ids.
        blocks: of quantised tensors, that hold a value.
        weak_blocks: of those, with a scale larger than the released rule gives.
        negative_zeros: MXFP4 codes of -0.
    """

    item: Item
    encoding: str
    zeros: int = 0
    nonfinite: int = 0
    level: float | None = None
    constant: float | None = None
    wide: int = 0
    checksum: int = 0
    scales: Scales | None = None
    ids: Ids | None = None
    blocks: int = 0
    weak_blocks: int = 0
    negative_zeros: int = 0

    @classmethod
    def of(cls, item: Item, encoding: str, **more: Any) -> Self:
        """With the other facts by name."""
        return cls(item, encoding, **more)

    def with_blocks(self, blocks: int, weak: int, negative_zeros: int) -> "TensorFacts":
        """And what its codes say."""
        return replace(self, blocks=blocks, weak_blocks=weak, negative_zeros=negative_zeros)


@dataclass(frozen=True)
class ContentFinding:
    """One kind of fault, in the tensors of one row of the table.

    Attributes:
        kind: a word for it.
        row: row of the table of tensors.
        names: released names of the tensors.
        what: what was found in the first of them, and what likely happened.
    """

    kind: str
    row: str
    names: tuple[str, ...]
    what: str

    def __str__(self) -> str:
        more = f" and {len(self.names) - 2} more" if len(self.names) > 2 else ""
        return f"{self.kind:10} {', '.join(self.names[:2])}{more}: {self.what}"


Found = Iterator[tuple[str, TensorFacts, str]]


def findings(facts: Sequence[TensorFacts], spec: ModelSpec) -> tuple[ContentFinding, ...]:
    """All that the rules say, one finding a kind and row."""
    grouped: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for rule in _RULES:
        for kind, fact, what in rule(facts, spec):
            grouped[kind, fact.item.row.key].append((fact.item.name, what))
    return tuple(
        ContentFinding(kind, row, tuple(name for name, _ in told), told[0][1]) for (kind, row), told in grouped.items()
    )


def _not_numbers(facts: Sequence[TensorFacts], spec: ModelSpec) -> Found:
    for f in facts:
        if f.nonfinite:
            yield (
                "NaN",
                f,
                f"{f.nonfinite:,} values or scales are NaN or infinite: the file is damaged, or wrongly cast",
            )


def _scale_words(facts: Sequence[TensorFacts], spec: ModelSpec) -> Found:
    for f in facts:
        if f.scales is None:
            continue
        if f.scales.bytes_:
            yield (
                "scale",
                f,
                "every float32 scale is a whole number that a byte holds: E8M0 codes were copied as numbers; code E "
                "stands for 2^(E - 127)",
            )
        elif f.scales.outside:
            yield "scale", f, f"{f.scales.outside:,} scales are out of the range in which bf16 holds the values"


def _table_of_ids(facts: Sequence[TensorFacts], spec: ModelSpec) -> Found:
    experts = spec.n_routed_experts
    for f in facts:
        if f.ids is None:
            continue
        ids = f.ids
        if ids.refused:
            yield "ids", f, ids.refused
        elif f.item.shape[0] > 1 and ids.least == ids.most == 0:
            yield "ids", f, "every id is 0: the table was never loaded"
        elif ids.least < 0 or ids.most >= experts:
            rounded = " (ids above 256 lost their last bit: it went through bf16)" if ids.most == experts else ""
            yield "ids", f, f"ids from {ids.least} to {ids.most}, expected 0 to {experts - 1}{rounded}"
        elif ids.above_256 >= _MANY and not ids.odd_above_256:
            yield "ids", f, f"none of {ids.above_256:,} ids above 256 is odd: it went through bf16"
        elif ids.repeated_rows:
            yield "ids", f, f"{ids.repeated_rows:,} rows name an expert twice"


def _never_loaded(facts: Sequence[TensorFacts], spec: ModelSpec) -> Found:
    for f in facts:
        role = f.item.row.role
        if f.ids is not None or f.nonfinite or f.item.numel < 2:
            continue
        if role in ("matrix", "groups", "table", "norm") and f.constant == 0:
            yield "zeros", f, "all values are 0: it was never loaded, or its file is sparse"
        elif role == "norm" and f.constant == 1:
            yield "initial", f, "all weights are 1, as a new model has them: it was never loaded"


def _repeated(facts: Sequence[TensorFacts], spec: ModelSpec) -> Found:
    first: dict[tuple[str, int], TensorFacts] = {}
    for f in facts:
        if f.constant is not None or f.item.row.role not in ("matrix", "groups", "table"):
            continue
        other = first.setdefault((f.item.row.key, f.checksum), f)
        if other is not f:
            yield "repeated", f, f"the same bytes as {other.item.name}: one was copied over the other"


def _signs(facts: Sequence[TensorFacts], spec: ModelSpec) -> Found:
    packed = [f for f in facts if f.encoding == "mxfp4"]
    zeros, negative = sum(f.zeros for f in packed), sum(f.negative_zeros for f in packed)
    if zeros >= 1000 and not negative:
        what = (
            f"none of {zeros:,} zeros in all MXFP4 tensors is negative: another tool encoded them, signs by value < 0"
        )
        yield from (("signs", f, what) for f in packed if f.zeros)


def _rounded(facts: Sequence[TensorFacts], spec: ModelSpec) -> Found:
    for group in _by_row(f for f in facts if f.item.row.encoding == "f32" and f.encoding == "f32"):
        told = [f for f in group if f.level is not None]
        values = sum(f.item.numel - f.zeros for f in told)
        if values >= _MANY and not any(f.wide for f in told):
            what = f"none of {values:,} float32 values needs more than bf16: another tool rounded them"
            yield from (("rounded", f, what) for f in told)


def _off_the_rule(facts: Sequence[TensorFacts], spec: ModelSpec) -> Found:
    for f in facts:
        if f.weak_blocks > _SHARE * f.blocks:
            yield (
                "coarse",
                f,
                f"{f.weak_blocks:,} of {f.blocks:,} blocks have a larger scale than the released rule gives: encoded "
                "by another rule",
            )


def _apart(facts: Sequence[TensorFacts], spec: ModelSpec) -> Found:
    matrices = (f for f in facts if f.item.row.role in ("matrix", "groups", "table") and f.level is not None)
    for group in _by_row(matrices):
        levels = [f.level for f in group if f.level is not None]
        if len(levels) < _SIBLINGS:
            continue
        middle = median(levels)
        far = max(_FAR, _SPREADS * median(abs(x - middle) for x in levels))
        for f in group:
            if f.level is not None and abs(f.level - middle) > far:
                yield (
                    "apart",
                    f,
                    f"its root mean square is 2^{f.level:.1f}, that of its {len(levels) - 1} siblings about "
                    f"2^{middle:.1f}: wrong scales, or another tensor's values",
                )


def _by_row(facts: Iterable[TensorFacts]) -> Iterable[list[TensorFacts]]:
    grouped: dict[str, list[TensorFacts]] = defaultdict(list)
    for f in facts:
        grouped[f.item.row.key].append(f)
    return grouped.values()


_RULES: tuple[Callable[[Sequence[TensorFacts], ModelSpec], Found], ...] = (
    _not_numbers,
    _scale_words,
    _table_of_ids,
    _never_loaded,
    _repeated,
    _signs,
    _rounded,
    _off_the_rule,
    _apart,
)
