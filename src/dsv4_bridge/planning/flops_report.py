"""What `dsv4 flops` answers: ours and the published convention side by side, as data, text and JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import BridgeError
from ..spec.flops import FlopCount, Terms, count_flops, published
from ..spec.lora import Lora
from ..spec.spec import ModelSpec
from .activations import LOSS_CHUNK
from .peaks import mfu, peak_named

SCHEMA = 1

# Why a term of ours is another number than the published convention's.
WHY = {
    "projections": "the convention counts norm weights too",
    "window": "the first tokens see no whole window",
    "compressed": "the blocks that each token sees, not their mean",
    "indexer": "past blocks only; no gradient unless trained",
    "router": "the convention leaves it out",
    "hyper_connections": "the convention leaves them out",
    "mtp": "h_proj maps every stream, the convention counts one",
    "adapters": "the convention trains every weight",
}
_FROZEN = "frozen weights have no gradients"


@dataclass(frozen=True)
class FlopReport:
    """FLOPs of one model on sequences of given lengths.

    Attributes:
        what: checkpoint or variant.
        lengths: tokens of each document.
        seq_length: tokens of a row.
        lora: adapters, or None.
        train_indexer: whether the indexer has gradients.
        recompute: what is computed twice, or None; beside the logits of a loss in chunks.
        loss_chunk: tokens whose logits are there at a time; 0: all of a row.
        count: ours, of all tokens.
        convention: the published formula, training, a token.
        tokens_per_second: of one device, where it was given.
        gpu: name of the device, where it was given.
    """

    what: str
    lengths: tuple[int, ...]
    seq_length: int
    lora: Lora | None
    train_indexer: bool
    recompute: str | None
    loss_chunk: int
    count: FlopCount
    convention: Terms
    tokens_per_second: float | None = None
    gpu: str | None = None

    @property
    def again(self) -> list[str]:
        """What the backward computes again, in words."""
        logits = ["logits"] if self.count.recomputed.logits else []
        return ([self.recompute] if self.recompute else []) + logits

    def speed(self) -> dict[str, float]:
        """TFLOP/s and, with a device, MFU and HFU (recompute counted) of the given speed, in both conventions."""
        if self.tokens_per_second is None:
            return {}
        training = self.count.training.over(self.count.tokens).total
        done = training + self.count.recomputed.over(self.count.tokens).total
        per_token = {"exact": training, "published": self.convention.total, "executed": done}
        found = {f"tflops_{k}": v * self.tokens_per_second / 1e12 for k, v in per_token.items()}
        if self.gpu is not None:
            peak = peak_named(self.gpu)
            found["peak_tflops"] = peak
            names = {"exact": "mfu_exact", "published": "mfu_published", "executed": "hfu"}
            found |= {names[k]: mfu(v, self.tokens_per_second, peak) for k, v in per_token.items()}
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain types; FLOPs a token."""
        count, tokens = self.count, self.count.tokens
        parts = {
            "forward": count.forward,
            "input_gradients": count.input_gradients,
            "weight_gradients": count.weight_gradients,
            "training": count.training,
            "recomputed": count.recomputed,
        }
        return {
            "schema": SCHEMA,
            "what": self.what,
            "seq_length": self.seq_length,
            "lengths": list(self.lengths),
            "tokens": tokens,
            "lora": {"rank": self.lora.rank, "targets": self.lora.keys} if self.lora else None,
            "train_indexer": self.train_indexer,
            "recompute": self.recompute,
            "loss_chunk": self.loss_chunk,
            "flops_per_token": {
                name: (terms := part.over(tokens)).items() | {"total": terms.total} for name, part in parts.items()
            },
            "published_flops_per_token": self.convention.items() | {"total": self.convention.total},
            "differences": self.differing(),
            **self.speed(),
        }

    def differing(self) -> dict[str, str]:
        """Terms where ours is another number than the convention's, and why."""
        ours, theirs = self.count.training.over(self.count.tokens).items(), self.convention.items()
        frozen = ("projections", "compressor", "experts", "mtp", "logits") if self.lora else ()
        return {
            name: _FROZEN if name in frozen else WHY[name]
            for name in ours
            if abs(ours[name] - theirs[name]) > 1e-9 * max(ours[name], theirs[name])
        }


def flop_report(
    what: str,
    spec: ModelSpec,
    lengths: Sequence[int],
    *,
    packed: bool = False,
    lora: Lora | None = None,
    train_indexer: bool = False,
    recompute: str | None = None,
    loss_chunk: int = LOSS_CHUNK,
    tokens_per_second: float | None = None,
    gpu: str | None = None,
) -> FlopReport:
    """Count both ways.

    Args:
        what: name for the report.
        spec: the model.
        lengths: of one sequence, or of documents.
        packed: whether the documents make one row together; else each is a row.
        lora: see `count_flops`.
        train_indexer: see `count_flops`.
        recompute: see `count_flops`.
        loss_chunk: tokens whose logits are there at a time; of a longer row the backward makes them again. 0: all.
        tokens_per_second: of one device.
        gpu: its name; needs a speed.

    Raises:
        BridgeError: see `count_flops`; a device without a speed, or an unknown one.
    """
    if gpu is not None:
        peak_named(gpu)
        if tokens_per_second is None:
            raise BridgeError("counting FLOPs: --gpu without --tokens-per-second says nothing; give both")
    row = sum(lengths) if packed else max(lengths)
    again = {"recompute": recompute, "logits_again": 0 < loss_chunk < row}
    count = count_flops(spec, lengths, lora=lora, train_indexer=train_indexer, **again)
    convention = published(spec, row, lengths)
    settings = (lora, train_indexer, recompute, loss_chunk, count, convention, tokens_per_second, gpu)
    return FlopReport(what, tuple(lengths), row, *settings)
