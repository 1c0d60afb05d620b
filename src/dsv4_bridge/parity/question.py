"""What is to be compared, made out before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..spec.spec import ModelSpec

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Question:
    """A comparison.

    Attributes:
        ours: checkpoint of our model.
        theirs: of transformers' model.
        spec: the numbers, with draft blocks where those are compared.
        ids: [b, s] int64, on the CPU.
        dtype: `float32` or `bf16`.
        device: where both run.
        replay: whether ours runs with the reference's choices too; None: where the free run is beyond tolerance.
        topk: blocks a query in another pass with the first row; None: without one.
    """

    ours: Path
    theirs: Path
    spec: ModelSpec
    ids: Tensor
    dtype: str
    device: torch.device
    replay: bool | None
    topk: int | None


def choosing(ids: Tensor, topk: int) -> int:
    """Queries of one layer with more blocks of 4 tokens than an indexer may choose."""
    return ids.shape[0] * max(0, ids.shape[1] - 4 * (topk + 1) + 1)
