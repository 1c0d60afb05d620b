"""What a codec tells its caller: what an encoding did to the values, and why one is refused."""

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from ..errors import BridgeError


@dataclass(frozen=True)
class Problem:
    """One thing that cannot be represented.

    Attributes:
        row: Row of the first weight it concerns, counted from the start of the given stripe.
        column: Column of that weight (for MXFP4 in weights, not in packed bytes).
        what: The value seen and what would have been legal.
    """

    row: int
    column: int
    what: str

    def shifted(self, rows: int) -> "Problem":
        """The same problem in a tensor in which the stripe starts at row `rows`."""
        return replace(self, row=self.row + rows)

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column}: {self.what}"


class CodecError(BridgeError):
    """A tensor (or stripe) that an encoding cannot represent; carries the `Problem`, not the name."""

    def __init__(self, problem: Problem):
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class EncodeStats:
    """What encoding did to the values, block by block (32 values in MXFP4, 128 x 128 in FP8).

    Stripes and tensors are added up with `+`.

    Attributes:
        blocks: All blocks; `kept + fresh`.
        kept: Blocks whose source scale was kept, because it reproduces every value bit for bit.
        fresh: Blocks that got a fresh scale by the released rule.
        fresh_exact: Those of the fresh blocks that still reproduce every value bit for bit.
        rounded_values: Values that do not decode to themselves.
        max_abs_error: Largest |decoded - value|.
        sum_sq_error: Sum of (decoded - value)^2.
        sum_sq: Sum of value^2 over the rows that hold a fresh block (a row with none has no error).
    """

    blocks: int = 0
    kept: int = 0
    fresh: int = 0
    fresh_exact: int = 0
    rounded_values: int = 0
    max_abs_error: float = 0.0
    sum_sq_error: float = 0.0
    sum_sq: float = 0.0

    @property
    def exact(self) -> bool:
        """Every value decodes to itself (the scales may still differ from the source's)."""
        return self.rounded_values == 0

    @property
    def relative_rms_error(self) -> float:
        """sqrt(sum_sq_error / sum_sq); 0 where nothing was rounded."""
        return sqrt(self.sum_sq_error / self.sum_sq) if self.sum_sq_error else 0.0

    def __add__(self, other: "EncodeStats") -> "EncodeStats":
        return EncodeStats(
            blocks=self.blocks + other.blocks,
            kept=self.kept + other.kept,
            fresh=self.fresh + other.fresh,
            fresh_exact=self.fresh_exact + other.fresh_exact,
            rounded_values=self.rounded_values + other.rounded_values,
            max_abs_error=max(self.max_abs_error, other.max_abs_error),
            sum_sq_error=self.sum_sq_error + other.sum_sq_error,
            sum_sq=self.sum_sq + other.sum_sq,
        )


def first_bad_value(values: np.ndarray) -> Problem | None:
    """The first NaN or infinity among bf16 bit patterns (uint16 [R, K])."""
    bad = np.flatnonzero((values & 0x7FFF) >= 0x7F80)
    if bad.size == 0:
        return None
    row, column = divmod(int(bad[0]), values.shape[1])
    pattern = int(values[row, column])
    name = "NaN" if pattern & 0x7F else "infinity"
    what = f"bf16 value is {name} (bits 0x{pattern:04X}); only finite values are encoded"
    return Problem(row, column, what)
