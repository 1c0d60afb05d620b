"""Text -> megatron-core's indexed dataset: `OUT.bin` with tokens, `OUT.idx` with lengths, `OUT.json` beside.

The same sources and tokenizer give the same bytes, for any number of workers.
"""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BridgeError, counted, files_named
from ..files import local, move, scratch_folder, sync
from ..lock import hold
from ..spec.spec import ModelSpec
from ..text.tokenizer import Tokenizer
from .documents import document_tokens, needed_tokenizer
from .skipped import ENDING, SkipList, report_lines
from .sources import BadSource, Explainer, Source, Unit, explained, find_sources, texts, units

FORMAT = "dsv4 pretraining data 1"
SUFFIXES = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class DataReport:
    """What `prepare_pretraining` made; also the content of `OUT.json`, the path aside.

    Attributes:
        out: the prefix.
        documents: that were written.
        empty: documents of nothing but spaces, left out.
        tokens: with an end-of-document token each.
        characters: of the documents.
        source_bytes: of the files.
        dtype: of the tokens.
        vocab_size: of the model.
        eos_token_id: the end-of-document token.
        bos_token_id: the token in front of each document, or None.
        tokenizer_sha256: of the tokenizer.json.
        idx_sha256: of `OUT.idx`.
        files: that were read.
        skipped: documents and files that were left out as unusable, listed in `OUT.skipped.jsonl`.
        skipped_first: the first few of them, with the reason.
    """

    out: str
    documents: int
    empty: int
    tokens: int
    characters: int
    source_bytes: int
    dtype: str
    vocab_size: int
    eos_token_id: int
    bos_token_id: int | None
    tokenizer_sha256: str
    idx_sha256: str
    files: int
    skipped: int = 0
    skipped_first: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people."""
        size = self.tokens * np.dtype(self.dtype).itemsize
        skipped = f", {counted(self.empty, 'empty one')} left out" if self.empty else ""
        return [
            f"{self.out}.bin, .idx: {counted(self.documents, 'document')} of {counted(self.files, 'file')}{skipped}",
            f"{counted(self.tokens, 'token')} of {counted(self.characters, 'character')} "
            f"({self.characters / self.tokens:.2f} a token), {self.dtype}, {size:,} bytes",
            *report_lines(self.skipped, self.skipped_first, self.out + ENDING),
        ]


@files_named("preparing text")
def prepare_pretraining(
    named: Sequence[Path],
    out: Path,
    tokenizer_folder: Path,
    spec: ModelSpec,
    *,
    key: str = "text",
    suffixes: Sequence[str] = (),
    bos: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    skip: bool = False,
    start: Callable[[int], object] = lambda total: None,
    advance: Callable[[int], object] = lambda nbytes: None,
) -> DataReport:
    """Tokenize documents into `out`.bin, .idx and .json.

    Args:
        named: text files, folders of them, JSON lines and arrays of objects; of any of them, gzip or zstd; Parquet.
        out: the prefix.
        tokenizer_folder: where tokenizer.json is.
        spec: the model: its vocabulary, BOS and EOS.
        key: where a JSONL's objects have their text.
        suffixes: see `find_sources`.
        bos: whether BOS stands in front of every document.
        workers: processes.
        overwrite: replace data that is in the way.
        skip: leave unusable documents and files out, and list them in `out`.skipped.jsonl; else the first is refused.
        start: called once with the bytes of all sources.
        advance: called with the bytes that are done, since the last call.

    Raises:
        BridgeError: an unusable source (by line), tokenizer or prefix; nothing but empty documents.
    """
    for place in (*named, out):
        local(place, "preparing data, at")
    _check_place(out, named, overwrite)
    tokenizer = needed_tokenizer(tokenizer_folder, spec, f"preparing {out}", "megatron,hf")
    with hold(out, f"preparing {out}"), scratch_folder(out.with_name(f"{out.name}.unpacked.part")) as unpack:
        _check_place(out, named, overwrite)  # again: another run may have ended in between
        left_out = SkipList(out)
        try:
            sources = find_sources(named, unpack, suffixes, key, skip=skip, tell=left_out.add)
            start(sum(s.nbytes for s in sources))
            encoder = _Encoder(tokenizer, spec, key, bos, skip)
            return _prepare(sources, out, encoder, left_out, workers, advance)
        finally:
            left_out.drop()


def _prepare(
    sources: Sequence[Source],
    out: Path,
    encoder: "_Encoder",
    left_out: SkipList,
    workers: int,
    advance: Callable[[int], object],
) -> DataReport:
    from ..mcore import cpu

    cpu.install()
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(encoder.spec.vocab_size)
    encoder = replace(encoder, dtype=np.dtype(dtype).str)
    explain = Explainer(sources)
    parts = {suffix: out.with_name(f"{out.name}{suffix}.part") for suffix in SUFFIXES}
    total = _Batch.none(encoder)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        builder: Any = IndexedDatasetBuilder(str(parts[".bin"]), dtype)
        try:
            for batch in _batches(sources, encoder, workers):
                # As `add_document` does for one document, for many at once.
                builder.data_file.write(batch.tokens.tobytes())
                first = len(builder.sequence_lengths)
                builder.sequence_lengths.extend(batch.lengths.tolist())
                builder.document_indices.extend(range(first + 1, len(builder.sequence_lengths) + 1))
                total = total.plus(batch)
                for bad in batch.skipped:
                    left_out.add(explain(bad))
                advance(batch.nbytes)
            if not builder.sequence_lengths and left_out.count and not total.empty:
                raise left_out.refuse_all(f"preparing {out}")
            if not builder.sequence_lengths:
                raise BridgeError(f"preparing {out}: {total.empty:,} documents, and all are empty")
            count = len(builder.sequence_lengths)
        except BaseException:
            builder.data_file.close()
            raise
        builder.finalize(str(parts[".idx"]))
        report = _report(out, count, total, sources, encoder, _sha256(parts[".idx"]), left_out)
        facts = {"format": FORMAT} | {k: v for k, v in report.to_json().items() if k != "out"}
        parts[".json"].write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
        _publish(out, parts, left_out)
    except BadSource as error:
        raise explained(error, sources) from None
    except OSError as error:
        raise BridgeError(f"preparing {out}: {error.strerror or error}") from None
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
    return report


def _check_place(out: Path, named: Sequence[Path], overwrite: bool) -> None:
    if out.suffix in SUFFIXES:
        raise BridgeError(f"preparing {out}: OUT is a prefix, {out.with_suffix('')}; its endings are added")
    try:
        _check_parent(out)
    except OSError as error:
        raise BridgeError(f"preparing {out}: {error.strerror or error}") from None
    there = [out.with_name(out.name + suffix) for suffix in SUFFIXES if out.with_name(out.name + suffix).exists()]
    if there and not overwrite:
        raise BridgeError(f"preparing {out}: {there[0]} is in the way; name another prefix, or give --overwrite")
    for path in named:
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise BridgeError(f"preparing {out}: it lies in {path}, and would be read as text; put it elsewhere")


def _check_parent(out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.exists()


def _publish(out: Path, parts: dict[str, Path], left_out: SkipList) -> None:
    """Put the files in place, the index last: without it there is no dataset, and no list beside another's."""
    for part in parts.values():
        sync(part)
    out.with_name(f"{out.name}.idx").unlink(missing_ok=True)
    sync(out.parent)
    move((parts[suffix], out.with_name(out.name + suffix)) for suffix in (".bin", ".json"))
    left_out.place()
    move([(parts[".idx"], out.with_name(f"{out.name}.idx"))])


@dataclass(frozen=True)
class _Batch:
    """Documents of a unit: tokens one behind the other in the type of the file, lengths int32 [documents]."""

    tokens: np.ndarray
    lengths: np.ndarray
    count: int
    empty: int
    characters: int
    nbytes: int
    skipped: tuple[BadSource, ...] = ()

    @staticmethod
    def none(encoder: "_Encoder") -> "_Batch":
        return _Batch(np.zeros(0, encoder.dtype), np.zeros(0, np.int32), 0, 0, 0, 0)

    def plus(self, other: "_Batch") -> "_Batch":
        """The numbers of both; no tokens."""
        mine = (self.count + other.count, self.empty + other.empty, self.characters + other.characters)
        return _Batch(self.tokens[:0], self.lengths[:0], *mine, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class _Encoder:
    """What a worker needs to know."""

    tokenizer: Tokenizer
    spec: ModelSpec
    key: str
    bos: bool
    skip: bool
    dtype: str = "<i4"

    def batch(self, unit: Unit) -> _Batch:
        """The documents of a unit as tokens.

        Raises:
            BadSource: see `texts`; a token that the model does not have.
        """
        skipped: list[BadSource] = []
        found = list(texts(unit, self.key, skipped if self.skip else None))
        kept = [(path, offset, text) for path, offset, text in found if text.strip()]
        documents = document_tokens(kept, self.tokenizer, self.spec, self.bos, unit.lines is not None)
        lengths = np.array([len(ids) for ids in documents], np.int32)
        tokens = np.concatenate([np.zeros(0, np.int64), *documents]).astype(self.dtype)
        characters = sum(len(text) for _, _, text in kept)
        return _Batch(
            tokens, lengths, int(lengths.sum()), len(found) - len(kept), characters, unit.nbytes, tuple(skipped)
        )


def _batches(sources: Sequence[Source], encoder: _Encoder, workers: int) -> Iterator[_Batch]:
    """Batches in the order of the units, whoever makes them."""
    waiting_units = units(sources)
    if workers <= 1:
        for unit in waiting_units:
            yield encoder.batch(unit)
        return
    waiting: deque[Future[_Batch]] = deque()
    told = (encoder.tokenizer.path.parent, encoder.spec, encoder.key, encoder.bos, encoder.skip, encoder.dtype)
    # Spawned, for a fork of a process with threads can hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, told)
    try:
        while True:
            while len(waiting) < 2 * workers and (unit := next(waiting_units, None)) is not None:
                waiting.append(pool.submit(_batch_here, unit))
            if not waiting:
                return
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise BridgeError("tokenizing: a worker process died (out of memory?); take fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: _Encoder  # of a worker process


def _begin(folder: Path, spec: ModelSpec, key: str, bos: bool, skip: bool, dtype: str) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallel part
    tokenizer = needed_tokenizer(folder, spec, "preparing text")
    _encoder = _Encoder(tokenizer, spec, key, bos, skip, dtype)


def _batch_here(unit: Unit) -> _Batch:
    return _encoder.batch(unit)


def _report(
    out: Path,
    documents: int,
    total: _Batch,
    sources: Sequence[Source],
    encoder: _Encoder,
    idx: str,
    left_out: SkipList,
) -> DataReport:
    spec = encoder.spec
    return DataReport(
        str(out),
        documents,
        total.empty,
        total.count,
        total.characters,
        sum(s.nbytes for s in sources),
        np.dtype(encoder.dtype).name,
        spec.vocab_size,
        spec.eos_token_id,
        encoder.tokenizer.bos if encoder.bos else None,
        _sha256(encoder.tokenizer.path),
        idx,
        len(sources),
        left_out.count,
        tuple(map(str, left_out.first)),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
