"""What the tensors of a checkpoint hold, measured in one pass: a doctor of contents (`dsv4 inspect --deep`).

A conversion that went wrong elsewhere leaves traces in the values: a table of ids that went through bf16, scales that
were copied as numbers, signs that were dropped, layers twice. `examine` reads every tensor once; what it takes from
them is a `TensorFacts` each, and `content_rules` says what of that cannot be.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

from ..codec import fp8, mxfp4
from ..codec.statistics import (
    bf16_values,
    count_bytes,
    count_nibbles,
    count_words,
    e2m1_values,
    e4m3_values,
    weak_blocks,
)
from ..errors import BridgeError, files_named
from ..files import AnyPath
from ..progress import Progress, Silent, in_background
from ..spec.encodings import ENCODINGS
from ..spec.plan import Item, stored
from ..store.checkpoint import Checkpoint, open_checkpoint
from ..store.checksum import Checksum
from ..store.hf import Bound
from ..store.values import HFValues, Scratch, cuts, stripe_rows
from .content_rules import ContentFinding, Ids, Scales, TensorFacts, findings

_LEAST_CODE = 32  # 2^-95: no weight has so small a scale, and none so large a one as 32


@dataclass(frozen=True)
class ContentsReport:
    """What `examine` found.

    Attributes:
        path: the checkpoint.
        tensors: how many were read.
        bytes: theirs on disk.
        findings: what cannot be, worst kinds first.
        blocks: blocks of quantised tensors that hold a value.
        weak: those of them whose scale is larger than the released rule gives.
    """

    path: str
    tensors: int
    bytes: int
    findings: tuple[ContentFinding, ...]
    blocks: int
    weak: int

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self) | {"sound": self.sound}


@files_named("examining")
def examine(name: AnyPath, *, workers: int = 2, progress: Progress | None = None) -> ContentsReport:
    """Read every tensor of a checkpoint and say what of its contents cannot be right.

    Args:
        name: a Hugging Face folder, a Megatron checkpoint, or `owner/name` on the Hub.
        workers: files, or tensors of a Megatron checkpoint, that are read at a time.
        progress: told of the bytes read.

    Raises:
        BridgeError: it cannot be read, or is another model.
    """
    shown, own = in_background(progress or Silent()), local()
    with open_checkpoint(Path(os.fspath(name)), strict=False) as checkpoint:
        items = list(checkpoint.items.values())

        def look(together: Sequence[Item]) -> list[tuple[str, TensorFacts]]:
            own.scratch = getattr(own, "scratch", None) or Scratch()
            found = []
            for item in together:
                found.append((item.name, measure(checkpoint, item, own.scratch)))
                shown.advance(_size(checkpoint, item))
            return found

        shown.start("examine contents", sum(_size(checkpoint, i) for i in items), 0)
        try:
            with ThreadPoolExecutor(workers) as pool:
                met = dict(pair for pairs in pool.map(look, _by_file(checkpoint, items)) for pair in pairs)
        finally:
            shown.stop()
        facts = [met[item.name] for item in items]
        total = sum(_size(checkpoint, i) for i in items)
        found = findings(facts, checkpoint.spec)
    return ContentsReport(
        str(name), len(facts), total, found, sum(f.blocks for f in facts), sum(f.weak_blocks for f in facts)
    )


def measure(checkpoint: Checkpoint, item: Item, scratch: Scratch) -> TensorFacts:
    """One tensor, read once."""
    source = checkpoint.source_of(item)
    assert source is not None, "what a checkpoint holds has a source"
    if isinstance(source, HFValues):
        bound = source.checkpoint.bound[item.name]
        if item.row.encoding == "int":
            return _ids(item, bound.encoding, source.raw(bound, 0, item.shape[0], scratch))
        if bound.scale is not None:
            return _quantised(item, bound, source, scratch)
    elif item.row.encoding == "int":
        try:
            ids = np.concatenate([s.copy() for s in source.stripes(item, 0, item.shape[0], scratch)])
        except BridgeError as error:
            return TensorFacts.of(item, source.encoding(item), ids=Ids(refused=str(error)))
        return _ids(item, source.encoding(item), ids)
    total = _Floats()
    for stripe in source.stripes(item, 0, item.shape[0], scratch):
        total.add(stripe)
    return total.facts(item, source.encoding(item))


def _by_file(checkpoint: Checkpoint, items: Sequence[Item]) -> list[list[Item]]:
    """Weights of one safetensors file together, front to back, the largest files first; others one by one.

    The kernel reads ahead of one reader of a file: of two, or of jumps, it loses a third of the disk's rate.
    """
    found: dict[str, list[tuple[int, Item]]] = {}
    for item in items:
        source = checkpoint.source_of(item)
        weight = source.checkpoint.bound[item.name].weight if isinstance(source, HFValues) else None
        file, start = (f"in {weight.file}", weight.start) if weight else (item.name, 0)
        found.setdefault(file, []).append((start, item))
    groups = [[item for _, item in sorted(group, key=lambda pair: pair[0])] for group in found.values()]
    return sorted(groups, key=lambda group: -sum(_size(checkpoint, item) for item in group))


def _size(checkpoint: Checkpoint, item: Item) -> int:
    source = checkpoint.source_of(item)
    return sum(f.nbytes for f in stored(item, source.encoding(item))) if source else 0


class _Floats:
    """Plain values, a stripe at a time."""

    def __init__(self) -> None:
        self.words = np.zeros(1 << 16, np.int64)
        self.checksum = Checksum()
        self.wide = self.nonfinite = self.zeros = self.count = 0
        self.squares = 0.0
        self.least, self.most = np.inf, -np.inf

    def add(self, stripe: np.ndarray) -> None:
        self.checksum.add(np.ascontiguousarray(stripe))
        if stripe.dtype == np.uint16:
            count_words(stripe.reshape(-1), self.words)
            return
        values = np.ascontiguousarray(stripe).view(np.float32).reshape(-1)
        finite = values[np.isfinite(values)]
        self.count += values.size
        self.nonfinite += values.size - finite.size
        self.zeros += int(np.count_nonzero(finite == 0))
        self.wide += int(np.count_nonzero(finite.view(np.uint32) & 0xFFFF))
        if finite.size:
            self.squares += float(np.dot(finite.astype(np.float64), finite))
            self.least, self.most = min(self.least, float(finite.min())), max(self.most, float(finite.max()))

    def facts(self, item: Item, encoding: str) -> TensorFacts:
        if self.count == 0:
            return _from_codes(item, encoding, self.words, _bf16(), self.checksum.value())
        return TensorFacts.of(
            item,
            encoding,
            zeros=self.zeros,
            nonfinite=self.nonfinite,
            level=_level(self.squares, self.count - self.nonfinite),
            constant=self.least if self.least == self.most and not self.nonfinite else None,
            wide=self.wide,
            checksum=self.checksum.value(),
        )


@cache
def _bf16() -> np.ndarray:
    return bf16_values()


def _from_codes(
    item: Item, encoding: str, counts: np.ndarray, values: np.ndarray, checksum: int, scales: Scales | None = None
) -> TensorFacts:
    finite = np.isfinite(values)
    met = np.unique(values[finite & (counts > 0)])
    squares = float(np.dot(counts[finite], values[finite] ** 2))
    level = _level(squares, int(counts[finite].sum()))
    return TensorFacts.of(
        item,
        encoding,
        zeros=int(counts[values == 0].sum()),
        nonfinite=int(counts[~finite].sum()) + (scales.nonfinite if scales else 0),
        level=None if level is None else level + (scales.level if scales else 0.0),
        constant=float(met[0]) if len(met) == 1 and finite[counts > 0].all() else None,
        checksum=checksum,
        scales=scales,
    )


def _level(squares: float, count: int) -> float | None:
    """log2 of the root mean square; None for zeros."""
    return 0.5 * float(np.log2(squares / count)) if count and squares > 0 else None


def _quantised(item: Item, bound: Bound, source: HFValues, scratch: Scratch) -> TensorFacts:
    encoding, checksum = ENCODINGS[bound.encoding], Checksum()
    codes = "mxfp4" if encoding.packed > 1 else "fp8"
    counts, count = (
        (np.zeros(16, np.int64), count_nibbles) if codes == "mxfp4" else (np.zeros(256, np.int64), count_bytes)
    )
    blocks = weak = 0
    for first, last in cuts(0, item.shape[0], stripe_rows(item.shape, 1)):
        raw = source.raw(bound, first, last, scratch).view(np.uint8)
        count(raw.reshape(-1), counts)
        checksum.add(raw)
        held, small = weak_blocks(codes, raw, encoding.block)
        blocks, weak = blocks + held, weak + small
    scales = _scales(source, bound, codes, checksum, scratch)
    negative = 0
    if codes == "mxfp4":
        values = e2m1_values()
        negative = int(counts[8])
    else:
        values = e4m3_values()
    facts = _from_codes(item, bound.encoding, counts, values, checksum.value(), scales)
    # A scale that is no power of two is of another rule (the largest value becomes 448).
    return facts.with_blocks(blocks, weak if scales.powers else 0, negative)


def _scales(source: HFValues, bound: Bound, codes: str, checksum: Checksum, scratch: Scratch) -> Scales:
    """What is known of a tensor's scales: E8M0 bytes, some at a time, or float32."""
    assert bound.scale
    rows, width = bound.scale.shape
    if bound.scale.dtype == "F8_E8M0":
        counts = np.zeros(256, np.int64)
        for first, last in cuts(0, rows, max(1, (4 << 20) // max(1, width))):
            piece = source.scale_rows(bound, first, last, scratch)
            checksum.add(piece)
            count_bytes(piece.reshape(-1), counts)
        # For which bf16 holds every value.
        low, high = (0, mxfp4.MAX_SCALE) if codes == "mxfp4" else (fp8.MIN_SCALE, fp8.MAX_SCALE)
        outside = int(counts[:low].sum() + counts[high + 1 : 255].sum())
        mean = float(counts @ np.arange(256)) / (rows * width) if rows * width else 127.0
        return Scales(int(counts[255]), outside, mean - 127.0, True, False)
    scale = source.scale_rows(bound, 0, rows, scratch)
    checksum.add(scale)
    values = scale.view(np.float32)
    good = np.isfinite(values) & (values > 0)
    level = float(np.log2(values[good].astype(np.float64)).mean()) if good.any() else 0.0
    # 1 alone is what a block of zeros may have.
    whole = bool(values.size and good.all() and (values == np.round(values)).all())
    bytes_ = whole and bool(values.min() >= _LEAST_CODE and values.max() <= 254)
    powers = bool(good.all() and (np.frexp(values)[0] == 0.5).all())
    return Scales(
        int(np.count_nonzero(~np.isfinite(values))), int(np.count_nonzero(values <= 0)), level, powers, bytes_
    )


def _ids(item: Item, encoding: str, ids: np.ndarray) -> TensorFacts:
    checksum = Checksum()
    checksum.add(np.ascontiguousarray(ids))
    ordered = np.sort(ids, axis=1)
    repeated = int(np.count_nonzero((ordered[:, 1:] == ordered[:, :-1]).any(1)))
    above = ids[ids > 256]
    return TensorFacts.of(
        item,
        encoding,
        zeros=int(np.count_nonzero(ids == 0)),
        checksum=checksum.value(),
        ids=Ids(
            least=int(ids.min()),
            most=int(ids.max()),
            repeated_rows=repeated,
            above_256=int(above.size),
            odd_above_256=int(np.count_nonzero(above & 1)),
        ),
    )
