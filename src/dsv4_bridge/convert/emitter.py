"""Items to bytes: what one segment of an output file is made of, and what making it cost.

A segment is plain data. `emit` writes it to a stream, taking values from any source and, for
quantised encodings, the scales of a checkpoint to be like.
"""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..codec import CODECS, RECODERS, Certificate, CodecError, EncodeStats
from ..errors import BridgeError
from ..spec.dtypes import DTYPES
from ..spec.encodings import ENCODINGS, QUANTISED
from ..spec.plan import Item
from ..store.hf import HFCheckpoint
from ..store.reading import Readahead
from ..store.safetensors import SafetensorsFolder, TensorInfo
from ..store.stream import Bytes, CountingStream, Stream, as_bytes
from ..store.torch_dist.boxes import Extent
from ..store.values import EncodedRows, EncodingValues, HFValues, Scratch, Values, cuts, stripe_rows, to_plain
from .report import Report
from .scales import LARGE, Made, StoredScale, mend, put, whole
from .segments import Copy, File, Frame, Literal, Rows, Scale, Segment, Weight

# Input is read ahead in bursts: a disk that reads and writes at once does both slowly.
_AHEAD_MOST, _AHEAD_LEAST = 256 << 20, 64 << 20


class Changes(Protocol):
    """New values of some items, put in as they are written; rounding these is what was asked for.

    Attributes:
        names: of those items.
    """

    @property
    def names(self) -> Container[str]: ...

    def values(self, source: Values) -> Values:
        """The new values of those items, from the source of the old ones."""
        ...

    def written(self, item: Item, encoding: str, weight: np.ndarray, scale: bytes) -> None:
        """Told of each of them, once it is written: its stored bytes and its stored scale."""


@dataclass
class Emitter:
    """Writes segments; one a worker.

    Attributes:
        values: where decoded items come from.
        passengers: where the items come from that Megatron has no place for.
        like: checkpoint whose scales are kept where they fit, or None for fresh scales.
        allow_lossy: permit recoding that changes values.
        keep_rounding: whether encoding new values into the encoding of `like` may round them (that
            is what exporting a trained model means); recoding to another encoding may not.
        lacking: names of further items that come from where the passengers are.
        changes: new values of some items; these are not part of the report.
    """

    values: Values
    passengers: HFValues | None = None
    like: HFCheckpoint | None = None
    allow_lossy: bool = False
    keep_rounding: bool = True
    lacking: frozenset[str] = frozenset()
    changes: Changes | None = None
    scratch: Scratch = field(default_factory=Scratch)
    readahead: Readahead = field(default_factory=Readahead)

    def close(self) -> None:
        """End the thread that reads ahead."""
        self.readahead.close()

    def emit(self, segments: tuple[Segment, ...], stream: Stream) -> Report:
        """Write the segments of one file in order.

        Raises:
            BridgeError: a tensor that cannot be represented, by name.
        """
        report = Report()
        offset = 0
        scales: dict[str, Made] = {}  # made, and not yet at their place
        waiting: dict[str, tuple[int, Made]] = {}  # written as in `like`: offset and bytes
        here = {s.item.name for s in segments if isinstance(s, Weight)}
        ahead = Ahead(self, segments)
        for segment in segments:
            ahead.before(segment)
            match segment:
                case Literal(data):
                    stream.write(data)
                case Frame(make, _):
                    stream.write(make())
                case Copy(folder, info):
                    self._copy(folder, info, stream)
                case File():
                    self._file(segment, stream)
                    report.tensors += segment.tensors
                case Rows(item, encoding, start, stop, _):
                    report.tensors += start == 0
                    report.lacking += start == 0 and item.name in self.lacking
                    self._plain(item, encoding, start, stop, stream, report)
                case Weight(item, encoding, _):
                    report.tensors += 1
                    report.lacking += item.name in self.lacking
                    scale = self._weight(item, encoding, stream, report)
                    if item.name in waiting:
                        mend(stream, *waiting.pop(item.name), scale)
                    elif encoding in QUANTISED:
                        scales[item.name] = scale
                case Scale(item, encoding, _):
                    if item.name in scales:
                        put(scales.pop(item.name), stream)
                    elif item.name not in here:  # its weight is in another shard
                        put(self._weight(item, encoding, CountingStream(), Report()), stream)
                    else:
                        provisional = self._expected_scale(item, encoding) or bytes(segment.nbytes)
                        waiting[item.name] = (offset, provisional)
                        put(provisional, stream)
            offset += segment.nbytes
        report.bytes_written = offset
        return report

    def _copy(self, folder: SafetensorsFolder, info: TensorInfo, stream: Stream) -> None:
        for start, stop in cuts(0, info.nbytes, 4 << 20):
            raw = self.scratch.take("copy", "u1", (stop - start,))
            folder.read_into(info, start, raw)
            stream.write(raw)

    def _file(self, file: File, stream: Stream) -> None:
        with file.files.borrow(file.name) as fd:
            extent = Extent(fd, 0, f"copying {file.files.path(file.name)}")
            self.readahead.ask(fd, 0, min(file.nbytes, _AHEAD_MOST))
            for start, stop in cuts(0, file.nbytes, 4 << 20):
                raw = self.scratch.take("copy", "u1", (stop - start,))
                extent.into(start, raw)
                stream.write(raw)

    def _plain(self, item: Item, encoding: str, start: int, stop: int, stream: Stream, report: Report) -> None:
        for stripe in self.source(item).stripes(item, start, stop, self.scratch):
            if item.row.encoding == "int":
                # Never through a float: bf16 turns 383 into 384.
                stream.write(stripe.astype("<i4" if encoding == "i32" else "<i8"))
                continue
            plain, rounded = to_plain(item, stripe, encoding, self.scratch)
            if rounded:
                self._count_rounding(item, rounded, report)
            stream.write(plain)

    def source(self, item: Item) -> Values:
        """Where an item's values come from."""
        aside = item.passenger or item.name in self.lacking
        source = self.passengers if self.passengers and aside else self.values
        return self.changes.values(source) if self.changes and item.name in self.changes.names else source

    def _may_round(self, item: Item) -> bool:
        return self.allow_lossy or (self.changes is not None and item.name in self.changes.names)

    def _weight(self, item: Item, encoding: str, stream: Stream, report: Report) -> Made:
        """Write a weight; its scale is returned."""
        if self.changes is None or item.name not in self.changes.names:
            return self._stored(item, encoding, stream, report)
        how = ENCODINGS[encoding]
        kept = _Kept(stream, math.prod(how.weight_shape(item.shape)) * DTYPES[how.dtype].itemsize)
        scale = whole(self._stored(item, encoding, kept, Report()))
        self.changes.written(item, encoding, kept.data, scale)
        return scale

    def _stored(self, item: Item, encoding: str, stream: Stream, report: Report) -> Made:
        """Write a weight the shortest exact way: copied, recoded, or decoded and encoded."""
        if narrow := ENCODINGS[encoding].widened:
            return as_float32(whole(self._stored(item, narrow, stream, report)))
        source = self.source(item)
        stored = source.encoding(item)
        if isinstance(source, HFValues):
            bound = source.checkpoint.bound[item.name]
            if stored == encoding:
                self._copy(source.checkpoint.folder, bound.weight, stream)
                return self._own_scale(source, item) if bound.scale else b""
            if (stored, encoding) in RECODERS:
                return self._recode(item, encoding, source, stream, report)
            if ENCODINGS[stored].scale_dtype == "F32":
                self._count_f32_decode(item, source, report)
        if encoding in QUANTISED:
            return self._encode(item, encoding, source, stream, report)
        self._plain(item, encoding, 0, item.shape[0], stream, report)
        return b""

    def _encode(self, item: Item, encoding: str, source: Values, stream: Stream, report: Report) -> Made:
        like = self._like(item, encoding)
        own = self._own_scale(like, item) if like else b""
        scales: list[bytes] = []
        total, first = EncodeStats(), 0

        def old_scale(first: int, last: int) -> np.ndarray | None:
            bound = like.checkpoint.bound[item.name] if like else None
            return like.scale(bound, first, last, self.scratch, "old_scale") if like and bound else None

        def on_host(first: int, stripe: np.ndarray) -> EncodedRows:
            return self._encode_stripe(item, encoding, first, stripe, old_scale(first, first + len(stripe)), report)

        if isinstance(source, EncodingValues):
            parts = source.encoded(item, encoding, old_scale, on_host)
        else:
            parts = self._host_parts(item, source, on_host)
        for part in parts:
            if part.rounded:
                self._count_rounding(item, part.rounded, report)
            total = total + part.stats
            stream.write(part.codes)
            if isinstance(own, StoredScale):
                own.note(ENCODINGS[encoding].scale_rows(first, first)[0], part.scale)
            else:
                scales.append(part.scale.tobytes())
            first += len(part.codes)
        _add(report.encoded, item.row.key, total)
        if total.rounded_values and not self._may_round(item) and (like is None or not self.keep_rounding):
            raise BridgeError(
                f"encoding {item.name} as {encoding} would change {total.rounded_values} of {item.numel} values "
                f"(largest error {total.max_abs_error:.3g}); --allow-lossy accepts that and reports the error"
            )
        return own if isinstance(own, StoredScale) else b"".join(scales)

    def _host_parts(
        self, item: Item, source: Values, on_host: Callable[[int, np.ndarray], EncodedRows]
    ) -> Iterator[EncodedRows]:
        first = 0
        for stripe in source.stripes(item, 0, item.shape[0], self.scratch):
            yield on_host(first, stripe)
            first += len(stripe)

    def _encode_stripe(
        self, item: Item, encoding: str, first: int, stripe: np.ndarray, old: np.ndarray | None, report: Report
    ) -> EncodedRows:
        how = ENCODINGS[encoding]
        values, rounded = to_plain(item, stripe, "bf16", self.scratch)
        if rounded:
            self._count_rounding(item, rounded, report)
        out = self.scratch.take("codes", "u1", how.weight_shape(values.shape))
        scale = self.scratch.take("new_scale", _scale_type(encoding), how.scale_shape(values.shape))
        try:
            return EncodedRows(out, scale, CODECS[encoding].encode(values, old, out, scale))
        except CodecError as error:
            raise BridgeError(f"encoding {item.name} as {encoding}: {error.problem.shifted(first)}") from None

    def _recode(self, item: Item, encoding: str, source: HFValues, stream: Stream, report: Report) -> bytes:
        how, recode = ENCODINGS[encoding], RECODERS[source.encoding(item), encoding]
        bound = source.checkpoint.bound[item.name]
        scales: list[bytes] = []
        total = Certificate()
        for first, last in cuts(0, item.shape[0], stripe_rows(item.shape)):
            raw = source.raw(bound, first, last, self.scratch)
            old = source.scale(bound, first, last, self.scratch, "old_scale")
            shape = (last - first, item.shape[1])
            out = self.scratch.take("codes", "u1", how.weight_shape(shape))
            scale = self.scratch.take("new_scale", _scale_type(encoding), how.scale_shape(shape))
            what = f"recoding {bound.weight_name} from {bound.encoding} to {encoding}"
            try:
                part = recode(raw, old, out, scale, allow_lossy=self.allow_lossy)
            except CodecError as error:
                raise BridgeError(f"{what}: {error.problem.shifted(first)}") from None
            if part.first_failing_block is not None and not self.allow_lossy:
                (row, column), (height, width) = part.first_failing_block, how.block
                raise BridgeError(
                    f"{what}: the {height}x{width} block at row {first + row * height}, "
                    f"column {column * width} holds values too far apart for one FP8 scale; "
                    "--allow-lossy rounds them and reports the error"
                )
            total = total + part.shifted(first)
            stream.write(out)
            scales.append(scale.tobytes())
        _add(report.recoded, item.row.key, total)
        return b"".join(scales)

    def _like(self, item: Item, encoding: str) -> HFValues | None:
        bound = self.like.bound.get(item.name) if self.like else None
        return HFValues(self.like) if self.like and bound and bound.encoding == encoding else None

    def _expected_scale(self, item: Item, encoding: str) -> Made | None:
        """The scale an item will most likely have: its own if it is copied, else that of `like`."""
        source = self.source(item)
        if isinstance(source, HFValues) and source.encoding(item) == encoding:
            return self._own_scale(source, item)
        like = self._like(item, encoding)
        return self._own_scale(like, item) if like else None

    def _own_scale(self, source: HFValues, item: Item) -> Made:
        bound = source.checkpoint.bound[item.name]
        large = bound.scale is not None and bound.scale.nbytes > LARGE
        return StoredScale(source, bound) if large else self._whole_scale(source, item)

    def _whole_scale(self, source: HFValues, item: Item) -> bytes:
        bound = source.checkpoint.bound[item.name]
        return source.scale(bound, 0, item.shape[0], self.scratch, "whole_scale").tobytes()

    def _count_rounding(self, item: Item, rounded: int, report: Report) -> None:
        if not self._may_round(item):
            raise BridgeError(
                f"writing {item.name} as bf16 would round {rounded} float32 values; "
                "--allow-lossy accepts that and reports the count"
            )
        report.rounded[item.row.key] = report.rounded.get(item.row.key, 0) + rounded

    def _count_f32_decode(self, item: Item, source: HFValues, report: Report) -> None:
        # A float32 scale of at most five significant bits times a code of four is exact in bf16.
        scale = np.frombuffer(self._whole_scale(source, item), "<u4")
        inexact = int(np.count_nonzero(scale & 0x7FFFF))
        if not inexact:
            return
        if not self.allow_lossy:
            raise BridgeError(
                f"writing {item.name} as bf16: {inexact} of {scale.size} float32 scales have too many digits, so its "
                "values would be rounded (relative error up to 2^-9); --allow-lossy accepts that and reports it"
            )
        report.rounded[item.row.key] = report.rounded.get(item.row.key, 0) + inexact * 128 * 128


class Ahead:
    """Asks for the input of coming segments, in bursts, as the ones before them are written."""

    def __init__(self, emitter: Emitter, segments: tuple[Segment, ...]):
        self._emitter = emitter
        self._coming = deque(s for s in segments if isinstance(s, Rows | Weight))
        self._asked: deque[int] = deque()  # bytes asked for, a segment each, not yet used

    def before(self, segment: Segment) -> None:
        """Call before `segment` is written."""
        if not isinstance(segment, Rows | Weight):
            return
        if sum(self._asked) < _AHEAD_LEAST:
            room = _AHEAD_MOST - sum(self._asked)
            while self._coming and room > 0:
                self._asked.append(self._ask(self._coming.popleft()))
                room -= self._asked[-1]
        self._asked.popleft()

    def _ask(self, segment: Rows | Weight) -> int:
        item = segment.item
        rows = (segment.start, segment.stop) if isinstance(segment, Rows) else (0, item.shape[0])
        asked = 0
        # Advice only: what cannot be opened is said when it is read.
        with contextlib.suppress(OSError, BridgeError):
            for extent in self._emitter.source(item).extents(item, *rows):
                self._emitter.readahead.ask(*extent)
                asked += extent[2]
        return asked


class _Kept:
    """A stream that passes on what is written, and remembers it."""

    def __init__(self, stream: Stream, size: int):
        self._stream, self.data, self._at = stream, np.empty(size, np.uint8), 0

    def write(self, data: Bytes) -> None:
        flat = as_bytes(data)
        self.data[self._at : self._at + flat.size] = flat
        self._at += flat.size
        self._stream.write(data)

    def patch(self, offset: int, old: bytes, new: bytes) -> None:
        self._stream.patch(offset, old, new)

    def close(self) -> None:
        self._stream.close()

    def abort(self) -> None:
        self._stream.abort()


def _scale_type(encoding: str) -> str:
    return DTYPES[ENCODINGS[encoding].scale_dtype or "U8"].numpy


def as_float32(scale: bytes) -> bytes:
    """E8M0 scales as float32: the same powers of two, exactly (2^-127 is a subnormal)."""
    exponents = np.frombuffer(scale, np.uint8).astype(np.uint32)
    return np.where(exponents == 0, np.uint32(1 << 22), exponents << 23).astype("<u4").tobytes()


def _add(totals: dict[str, Any], key: str, value: Any) -> None:
    totals[key] = totals[key] + value if key in totals else value
