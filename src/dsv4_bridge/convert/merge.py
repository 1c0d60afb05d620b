"""Adapters into a released checkpoint: W' in float32, encoded again, and what the encoding left of each delta.

Tensors without an adapter keep their bytes. The others are decoded, updated in float32, rounded to bf16 and
encoded as an export encodes trained weights: a block that is exactly representable in its old scale keeps it, the
others get a fresh scale. An FP8 or MXFP4 grid is coarse, and a small delta can vanish in it, so each tensor is
decoded again and compared:

    delta    = W' - W in float32
    survived = decode(encode(W')) - W
    lost     = 1 - <survived, delta> / <delta, delta>, the share of the delta that is not there any more
"""

import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codec import CODECS
from ..errors import BridgeError, files_named
from ..files import AnyPath, local
from ..lora.adapters import Adapter, Adapters, check_shapes, updated
from ..lora.peft_reading import open_adapters
from ..spec.encodings import ENCODINGS, QUANTISED, TARGETS
from ..spec.plan import Item, check_computed
from ..store.hf import HFCheckpoint, open_hf
from ..store.hub import resolve
from ..store.safetensors import INDEX
from ..store.values import HFValues, Scratch, Values
from .emitter import Emitter, Report
from .job import Job
from .jobs import apart, repack_job
from .outputs import hf_layout_like
from .run import Options, run

MOST = 0.5  # of a delta; more lost than this is warned of


@dataclass(frozen=True)
class Merged:
    """What became of one tensor's delta.

    Attributes:
        name: released name.
        row: key of its row in the table.
        encoding: how it is stored now.
        delta: norm of the delta.
        survived: norm of what the stored weights changed by.
        kept: inner product of the two, over the delta's square: 1 if all is there.
        unchanged: values that are stored as before.
        values: all of them.
        rank: of its adapter; 0: a whole weight took its place.
        scale: of its adapter, alpha / rank.
    """

    name: str
    row: str
    encoding: str
    delta: float
    survived: float
    kept: float
    unchanged: int
    values: int
    rank: int = 0
    scale: float = 1.0

    @property
    def lost(self) -> float:
        """Share of the delta that rounding removed."""
        return 1 - self.kept

    @property
    def error(self) -> float:
        """Norm of survived - delta over the delta's: rounding also adds what no adapter asked for."""
        square = self.survived**2 + (1 - 2 * self.kept) * self.delta**2
        return math.sqrt(max(0.0, square)) / self.delta if self.delta else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self) | {"lost": self.lost, "error": self.error}


def summed(name: str, tensors: Iterable[Merged]) -> Merged:
    """Several tensors as if they were one."""
    several = list(tensors)
    squares = [t.delta**2 for t in several]
    whole = sum(squares)
    kept = sum(t.kept * s for t, s in zip(several, squares, strict=True)) / whole if whole else 1.0
    survived = math.sqrt(sum(t.survived**2 for t in several))
    encodings = ", ".join(sorted({t.encoding for t in several}))
    counts = (sum(t.unchanged for t in several), sum(t.values for t in several))
    return Merged(name, name, encodings, math.sqrt(whole), survived, kept, *counts)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        out: the new folder.
        encoding: that was asked for.
        tensors: with an adapter, in the plan's order.
        copied: weights without one.
        bytes_written: size of the output; in a dry run, of what it would be.
        dry_run: whether nothing was written.
        rounded: row -> values of weights without an adapter that `allow_lossy` let the encoding round.
    """

    out: str
    encoding: str
    tensors: tuple[Merged, ...]
    copied: int
    bytes_written: int
    dry_run: bool = False
    rounded: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> Merged:
        """All tensors as if they were one."""
        return summed("all", self.tensors)

    @property
    def rows(self) -> tuple[Merged, ...]:
        """The tensors of each row as if they were one."""
        keys = dict.fromkeys(t.row for t in self.tensors)
        return tuple(summed(key, (t for t in self.tensors if t.row == key)) for key in keys)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader should know before serving the result."""
        said = []
        if not self.total.delta:
            said.append("the adapters change nothing: B is zero, as before any training")
        if self.total.lost > MOST:
            said.append(
                f"{self.total.lost:.0%} of the adapters is lost to rounding: what this folder computes is nearer the "
                "base than the trained model; serve adapter and base apart"
                + ("" if self.encoding == "bf16" else ", or merge with --encoding bf16")
            )
        worst = [t for t in self.tensors if t.lost > MOST]
        if worst and len(worst) < len(self.tensors):
            said.append(f"{len(worst)} of {len(self.tensors)} tensors lost most of their delta ({worst[0].name} …)")
        if self.rounded:
            said.append(
                f"values rounded where no adapter is: {', '.join(f'{k} {n:,}' for k, n in self.rounded.items())}"
            )
        return tuple(said)

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        shown = {"tensors": [t.to_json() for t in self.tensors], "total": self.total.to_json()}
        return asdict(self) | shown | {"warnings": list(self.warnings)}


@files_named("merging")
def merge(
    source: AnyPath,
    adapter: AnyPath,
    out: AnyPath,
    encoding: str = "source",
    options: Options | None = None,
    *,
    allow_lossy: bool = False,
) -> MergeReport:
    """Merge adapters into a Hugging Face folder.

    Args:
        source: the released folder, in any naming and encoding, or `owner/name` on the Hub.
        adapter: folder of `export_peft` or peft, or a Megatron checkpoint of adapters.
        out: the new folder; in released names. With `source` and a source in those names its files, index and
            config are kept, byte for byte where no adapter is.
        encoding: `source`, as the source stores each tensor; `fp8` or `bf16` throughout.
        options: workers, overwrite, progress, dry_run (all is read, merged and encoded, and nothing written).
        allow_lossy: permit the encoding to round tensors that have no adapter.

    Raises:
        BridgeError: unreadable input, an adapter of another model, a tensor without an adapter that the encoding
            would round, or an output that is in the way.
    """
    options = options or Options()
    source, adapter, out = resolve(os.fspath(source)), local(adapter, "opening"), local(out, "writing")
    if encoding not in TARGETS:
        raise BridgeError(f"merging {adapter}: encoding {encoding!r} is not one of {', '.join(TARGETS)}")
    if options.resume:
        raise BridgeError(f"merging {adapter}: a merge is not resumed, for its report would lack what was done before")
    checkpoint = open_hf(source)
    try:
        check_computed(checkpoint.spec, f"merging into {source}")
        adapters = open_adapters(adapter, checkpoint.spec, merging=True)
        for one in (source, adapter):
            apart(one, out)
        tally = _Tally(_updates(adapters, checkpoint))
        report = run(_job(checkpoint, tally, encoding, adapter, allow_lossy), out, options)
        found = tuple(tally.found[name] for name in tally.updates)
        copied = report.tensors - len(found)
        return MergeReport(str(out), encoding, found, copied, report.bytes_written, options.dry_run, _rounded(report))
    finally:
        checkpoint.close()


def _rounded(report: Report) -> dict[str, int]:
    """Row -> values that were rounded although nothing was merged into them."""
    found = dict(report.rounded)
    for key, done in (*report.encoded.items(), *report.recoded.items()):
        if done.rounded_values:
            found[key] = found.get(key, 0) + done.rounded_values
    return found


@dataclass(frozen=True)
class _Update:
    """What becomes of one item: the rows of an adapter's B and magnitude that are its, or a whole weight, or both."""

    adapter: Adapter | None
    scale: float = 1.0
    whole: Tensor | None = None

    def __call__(self, weight: Tensor, first: int) -> Tensor:
        """New rows from `first` on: float32 [rows, in] -> the same."""
        rows = slice(first, first + len(weight))
        base = weight if self.whole is None else self.whole[rows].float()
        return base if self.adapter is None else updated(base, self.adapter, rows, self.scale)

    @property
    def rank(self) -> int:
        """Of the adapter, if there is one."""
        return 0 if self.adapter is None else len(self.adapter.a)


@dataclass
class _Tally:
    """Item name -> what is done to it, and what became of it; shared by the workers."""

    updates: Mapping[str, _Update]
    found: dict[str, Merged] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


def _updates(adapters: Adapters, checkpoint: HFCheckpoint) -> dict[str, _Update]:
    updates = {name: _Update(None, whole=whole) for name, whole in adapters.whole.items()}
    for name, target in check_shapes(adapters, checkpoint.spec, "merging adapters").items():
        of, at = adapters.values[name], 0
        for item in target.items:
            rows = slice(at, at + item.shape[0])
            magnitude = None if of.magnitude is None else of.magnitude[rows]
            part = Adapter(of.a, of.b[rows], magnitude)
            updates[item.name] = _Update(part, adapters.scale(name), adapters.whole.get(item.name))
            at = rows.stop
    return {item.name: updates[item.name] for item in checkpoint.plan.items if item.name in updates}


def _job(checkpoint: HFCheckpoint, tally: _Tally, encoding: str, adapter: Path, allow_lossy: bool) -> Job:
    job = repack_job(checkpoint, encoding)
    if encoding == "source" and checkpoint.scheme == "released":
        folder = checkpoint.folder
        markers = ({INDEX: folder.index} if folder.index else {}) | {
            "config.json": (folder.path / "config.json").read_bytes()
        }
        job = replace(job, files=hf_layout_like(checkpoint).files, markers=markers)
    return replace(
        job,
        label=f"merge {adapter.name} into {checkpoint.folder.path.name}",
        emitter=lambda: Emitter(
            HFValues(checkpoint), like=checkpoint, allow_lossy=allow_lossy, changes=_Merging(checkpoint, tally)
        ),
        identity=dict(job.identity) | {"kind": "merge", "adapter": str(adapter), "lossy": allow_lossy},
        resumable=False,
    )


class _MergedValues:
    """Items with adapters: float32 stripes of W'."""

    def __init__(self, source: Values, updates: Mapping[str, _Update]):
        self._source, self._updates = source, updates

    def encoding(self, item: Item) -> str:
        return "f32"

    def stripes(self, item: Item, start: int, stop: int, scratch: Scratch) -> Iterator[np.ndarray]:
        for stripe in self._source.stripes(item, start, stop, scratch):
            new = self._updates[item.name](wide(stripe), start)
            if not bool(torch.isfinite(new).all()):
                raise BridgeError(
                    f"merging into {item.name}: the sum is not finite in rows {start} to {start + len(new)}; the "
                    f"adapter is not of this model, or its scale {self._updates[item.name].scale:g} is not meant"
                )
            yield new.numpy()
            start += len(stripe)

    def extents(self, item: Item, start: int, stop: int) -> Any:
        return self._source.extents(item, start, stop)


def wide(stripe: np.ndarray) -> Tensor:
    """A stripe of bf16 bits or float32 as float32."""
    if stripe.dtype == np.uint16:
        return torch.from_numpy((stripe.astype(np.uint32) << 16).view(np.float32))
    return torch.from_numpy(stripe.astype(np.float32))


class _Merging:
    """The changes of a merge, measured: what was asked for against what the stored bytes hold. One a worker."""

    def __init__(self, checkpoint: HFCheckpoint, tally: _Tally):
        self._old, self._tally, self._scratch = HFValues(checkpoint), tally, Scratch()

    @property
    def names(self) -> Mapping[str, _Update]:
        return self._tally.updates

    def values(self, source: Values) -> Values:
        return _MergedValues(source, self._tally.updates)

    def written(self, item: Item, encoding: str, weight: np.ndarray, scale: bytes) -> None:
        found = self._compare(item, encoding, weight, scale)
        with self._tally.lock:
            self._tally.found[item.name] = found

    def _compare(self, item: Item, encoding: str, written: np.ndarray, scale: bytes) -> Merged:
        """Decode what was written, next to the old values and the new ones."""
        update = self._tally.updates[item.name]
        sums, unchanged, first = np.zeros(3), 0, 0
        for stripe in self._old.stripes(item, 0, item.shape[0], self._scratch):
            old = wide(stripe)
            last = first + len(old)
            new = self._decoded(item, encoding, written, scale, first, last)
            delta, survived = (update(old, first) - old).double(), (new - old).double()
            sums += [float((x * y).sum()) for x, y in ((delta, delta), (survived, survived), (survived, delta))]
            unchanged += int((new == old).sum())
            first = last
        kept = sums[2] / sums[0] if sums[0] else 1.0
        norms = math.sqrt(sums[0]), math.sqrt(sums[1])
        counts = unchanged, item.numel, update.rank, update.scale
        return Merged(item.name, item.row.key, encoding, *norms, kept, *counts)

    def _decoded(self, item: Item, encoding: str, written: np.ndarray, scale: bytes, first: int, last: int) -> Tensor:
        """Rows of the written weight as float32."""
        width = written.size // item.shape[0]
        raw = written[first * width : last * width]
        if encoding not in QUANTISED:
            plain = raw.view(np.float32 if encoding == "f32" else np.uint16)
            return wide(plain.reshape(last - first, item.shape[1]))
        how = ENCODINGS[encoding]
        low, high = how.scale_rows(first, last)
        of = np.frombuffer(scale, np.float32 if how.scale_dtype == "F32" else np.uint8)
        out = self._scratch.take("merged", "<u2", (last - first, item.shape[1]))
        raw = raw.reshape(how.weight_shape((last - first, item.shape[1])))
        CODECS[encoding].decode(raw, of.reshape(how.scale_shape(item.shape))[low:high], out)
        return wide(out)
