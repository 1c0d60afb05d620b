"""Are two checkpoints the same? By names, by values, by bytes; streamed, every tensor.

*names*: the same tensors with the same shapes and encodings. *values*: every decoded value equal,
bit for bit (a -0 is not a +0), and float32 scales too. *bytes*: the stored bytes equal; between a Megatron checkpoint
and a released one, the bytes that an export would write against those that are there. At every level the numbers of
the configuration that the model computes with must be the same.
"""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BridgeError, files_named
from ..files import AnyPath
from ..progress import in_background
from ..spec.plan import Item, stored
from ..spec.spec import differing
from ..store.checkpoint import Checkpoint, open_checkpoint
from ..store.hf import finding_lines
from ..store.hub import resolve
from ..store.megatron import MegatronCheckpoint, looks_megatron
from ..store.safetensors import SafetensorsFolder, TensorInfo
from ..store.small_files import small_files
from ..store.stream import Bytes, as_bytes
from ..store.values import HFValues, Scratch, Values, cuts, stripe_rows, to_plain
from .emitter import Emitter
from .run import Progress, Silent
from .segments import Scale, Weight

LEVELS = ("names", "values", "bytes")
_MAX_DIFFERENCES = 1000  # named one by one in a report; the rest is counted


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same: its released name and how it differs."""

    name: str
    row: str
    what: str


@dataclass
class RowTally:
    """What was compared in one row of the table."""

    tensors: int = 0
    bytes: int = 0
    identical: int = 0
    identical_bytes: int = 0


@dataclass
class VerifyReport:
    """Outcome of a comparison.

    Attributes:
        a: first checkpoint.
        b: second checkpoint.
        level: names, values or bytes.
        rows: row key -> tally.
        differences: the tensors that differ, the first thousand by name.
        differing: how many there are.
        config: numbers of the model that differ, as `name: value against value`; they count as differences.
        notes: what else the reader should know.
    """

    a: str
    b: str
    level: str
    rows: dict[str, RowTally] = field(default_factory=dict, repr=False)
    differences: list[Difference] = field(default_factory=list)
    differing: int = 0
    config: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return self.differing == 0 and not self.config

    def total(self) -> RowTally:
        """Tally over all rows."""
        values = [list(vars(t).values()) for t in self.rows.values()]
        return RowTally(*(sum(column) for column in zip(*values, strict=True))) if values else RowTally()

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self) | {"same": self.same, "total": asdict(self.total())}

    def differ(self, item: Item, what: str) -> None:
        """Record a difference."""
        self.differing += 1
        if len(self.differences) < _MAX_DIFFERENCES:
            self.differences.append(Difference(item.name, item.row.key, what))


@files_named("verifying")
def verify(a: AnyPath, b: AnyPath, level: str = "values", progress: Progress | None = None) -> VerifyReport:
    """Compare two checkpoints, each a Hugging Face folder, a Megatron checkpoint or `owner/name` on the Hub.

    Raises:
        BridgeError: one cannot be read, or is not sound in itself.
    """
    if level not in LEVELS:
        raise BridgeError(f"verifying: level {level!r} is not one of {', '.join(LEVELS)}")
    a, b = resolve(os.fspath(a)), resolve(os.fspath(b))
    progress = in_background(progress or Silent())
    one = other = None
    try:
        one = _open(a, b)
        other = _open(b, a)
        if one.kind == "megatron" and other.kind == "huggingface":
            one, other = other, one
        return _compare(one, other, level, progress)
    finally:
        progress.stop()
        for side in (one, other):
            if side:
                side.close()


def _open(path: Path, beside: Path) -> Checkpoint:
    opened = open_checkpoint(path, strict=not looks_megatron(path), like=beside)
    if opened.opened.findings:
        opened.close()
        lines = finding_lines(opened.opened.findings)
        raise BridgeError(f"opening {path}: its tensors are not those of this model:\n{lines}")
    return opened


def _source(side: Checkpoint, item: Item) -> Values:
    source = side.source_of(item)
    assert source is not None, "what a side holds has a source"
    return source


def _released(side: Checkpoint, item: Item) -> HFValues | None:
    """The item's released form, if this side has one."""
    source = side.source_of(item)
    return source if isinstance(source, HFValues) else None


def _compare(a: Checkpoint, b: Checkpoint, level: str, progress: Progress) -> VerifyReport:
    report = VerifyReport(str(a.path), str(b.path), level)
    report.config += [f"{what} ({a.path}, {b.path})" for what in differing(a.spec, b.spec)]
    report.notes += [f"{what}: no computation follows from it" for what in differing(a.spec, b.spec, aside=True)]
    for side in (a, b):
        if isinstance(side.opened, MegatronCheckpoint):
            report.config += [f"{what} (run_config.yaml of {side.path})" for what in side.opened.contradictions]
    if a.kind == b.kind == "huggingface":
        report.notes += _files(a.path, b.path)
    both = [i for n, i in a.items.items() if n in b.items]
    for name, item in (*a.items.items(), *b.items.items()):
        if name not in a.items or name not in b.items:
            report.rows.setdefault(item.row.key, RowTally()).tensors += 1
            report.differ(item, f"only in {a.path if name in a.items else b.path}")
    progress.start(f"verify {level}", sum(_size(a, i) for i in both), 0)
    scratch = Scratch(), Scratch()
    for item in both:
        tally = report.rows.setdefault(item.row.key, RowTally())
        size = _size(a, item)
        tally.tensors += 1
        tally.bytes += size
        what = _difference(a, b, item, level, scratch)
        progress.advance(size)
        if what:
            report.differ(item, what)
        else:
            tally.identical += 1
            tally.identical_bytes += size
    return report


def _size(side: Checkpoint, item: Item) -> int:
    source = _source(side, item)
    return sum(f.nbytes for f in stored(item, source.encoding(item)))


def _difference(a: Checkpoint, b: Checkpoint, item: Item, level: str, scratch: tuple[Scratch, Scratch]) -> str:
    if b.items[item.name].shape != item.shape:
        return f"shape {list(item.shape)} against {list(b.items[item.name].shape)}"
    one, other = _released(a, item), _released(b, item)
    encodings = _source(a, item).encoding(item), _source(b, item).encoding(item)
    if one and other and level != "values" and encodings[0] != encodings[1]:
        return f"stored as {encodings[0]} against {encodings[1]}"
    if level == "names":
        return ""
    if level == "bytes" and one:
        return _bytes_difference(one, b, item)
    return _values_difference(_source(a, item), _source(b, item), item, scratch) or _scales_difference(one, other, item)


def _files(one: Path, other: Path) -> list[str]:
    """The small files beside the weights that differ."""
    a, b = small_files(one), small_files(other)
    found = []
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            found.append(f"{name}: only in {one if name in a else other}")
        elif a[name].read_bytes() != b[name].read_bytes():
            found.append(f"{name}: another file")
    return found


def _scales_difference(one: HFValues | None, other: HFValues | None, item: Item) -> str:
    """Float32 scales as they are: in bf16, to which values are decoded, one unit in the last place is lost."""
    bounds = [side.checkpoint.bound[item.name] for side in (one, other) if side]
    if len(bounds) < 2 or any(b.encoding != "fp8_f32" or b.scale is None for b in bounds):
        return ""
    read = [np.empty(b.scale.shape, "<u4") for b in bounds if b.scale]
    for side, bound, out in zip((one, other), bounds, read, strict=True):
        assert side and bound.scale
        side.checkpoint.folder.read_into(bound.scale, 0, out)
    wrong = int(np.count_nonzero(read[0] != read[1]))
    if not wrong:
        return ""
    a, b = (x.view("<f4").astype(np.float64) for x in read)
    largest = float(np.max(np.abs(a - b) / np.maximum(np.abs(a), np.finfo(np.float32).tiny)))
    return f"{wrong} of {read[0].size} float32 scales, by up to {largest:.3g} of them"


def _bytes_difference(reference: HFValues, side: Checkpoint, item: Item) -> str:
    bound = reference.checkpoint.bound[item.name]
    infos = [i for i in (bound.weight, bound.scale) if i is not None]
    stream = _CompareStream(reference.checkpoint.folder, infos)
    emitter = Emitter(side.source, side.passengers, reference.checkpoint, allow_lossy=True)
    segments = [Weight(item, bound.encoding, bound.weight.nbytes)]
    scales = [Scale(item, bound.encoding, bound.scale.nbytes)] if bound.scale else []
    emitter.emit((*segments, *scales), stream)
    if not stream.differing:
        return ""
    return f"{stream.differing} of {stream.size} bytes, first at byte {stream.first}"


class _CompareStream:
    """A sink that compares what it is given with tensors of a folder, in order."""

    def __init__(self, folder: SafetensorsFolder, infos: list[TensorInfo]):
        self._folder, self._infos = folder, infos
        self._tensor = self._at = 0
        self.size = self.differing = 0
        self.first = -1

    def write(self, data: Bytes) -> None:
        rest = as_bytes(data)
        while rest.size:
            info = self._infos[self._tensor]
            piece = rest[: info.nbytes - self._at]
            expected = np.empty(piece.size, np.uint8)
            self._folder.read_into(info, self._at, expected)
            if not np.array_equal(piece, expected):
                wrong = np.flatnonzero(piece != expected)
                if not self.differing:
                    self.first = self.size + int(wrong[0])
                self.differing += wrong.size
            self.size += piece.size
            self._at += piece.size
            rest = rest[piece.size :]
            if self._at == info.nbytes:
                self._tensor, self._at = self._tensor + 1, 0

    def patch(self, offset: int, old: bytes, new: bytes) -> None:
        raise AssertionError("a weight comes before its scale here")

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


def _values_difference(a: Values, b: Values, item: Item, scratch: tuple[Scratch, Scratch]) -> str:
    wrong, where, largest = 0, (), 0.0
    for first, last in cuts(0, item.shape[0], stripe_rows(item.shape, 8)):
        (one,) = a.stripes(item, first, last, scratch[0])
        (other,) = b.stripes(item, first, last, scratch[1])
        one, other = _comparable(item, one, other, scratch)
        if np.array_equal(one, other):
            continue
        same = one.view(f"<i{one.itemsize}") == other.view(f"<i{other.itemsize}")
        if not wrong:
            at = np.argwhere(~same)[0]
            where = (int(at[0]) + first, *(int(n) for n in at[1:]))
        wrong += int(same.size - np.count_nonzero(same))
        largest = max(largest, float(np.nanmax(np.abs(_float(one) - _float(other)))))
    return f"{wrong} of {item.numel} values, first at {list(where)}, largest difference {largest:.3g}" if wrong else ""


def _comparable(
    item: Item, one: np.ndarray, other: np.ndarray, scratch: tuple[Scratch, Scratch]
) -> tuple[np.ndarray, np.ndarray]:
    if one.dtype == other.dtype:
        return _bits(one), _bits(other)
    if item.row.encoding == "int":
        return one.astype(np.int64), other.astype(np.int64)
    wide = (to_plain(item, x, "f32", s)[0] for x, s in zip((one, other), scratch, strict=True))
    one, other = wide
    return _bits(one), _bits(other)


def _bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32) if values.dtype == np.float32 else values


def _float(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return (values.view(np.float32) if values.dtype == np.uint32 else values).astype(np.float64)
