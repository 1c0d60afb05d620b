"""A JSONL of conversations -> prepared chat data, in parallel."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ...chat.encode import effort_text
from ...chat.strings import EFFORTS
from ...errors import BridgeError, counted, files_named, some
from ...files import local, scratch_folder
from ...lock import hold
from ..kinds import find_chats, is_array, look, refuse_others, unpacked
from ..packed import in_shares, unwrapped
from ..skipped import ENDING, SkipList, Skipped, report_lines
from .jsonl import numbered_lines, read_line
from .masks import ChatTokenizer, open_chat_tokenizer
from .packing import plan_packs
from .samples import Sample, SampleCounts, build_samples, check_options
from .store import check_free, one_a_pack, write_chat_data

_CHUNK = 1 << 20  # bytes of JSONL that a worker takes at once
Chunk = list[tuple[int, bytes]]


@dataclass(frozen=True)
class ChatReport:
    """What `prepare_chat` made.

    Attributes:
        out: the folder.
        seq_length: most tokens of a pack.
        mask: what is learned.
        packs: their number.
        fill_rate: tokens over places of the packs.
        counts: what became of the conversations.
        skipped: lines and files that were left out, listed in `OUT.skipped.jsonl`.
        skipped_first: the first few of them, with the reason.
    """

    out: str
    seq_length: int
    mask: str
    packs: int
    fill_rate: float
    counts: SampleCounts
    skipped: int = 0
    skipped_first: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people."""
        c = self.counts
        found = [
            f"{counted(c.conversations, 'conversation')} -> {counted(c.samples, 'sample')}"
            f" in {counted(self.packs, 'pack')} of {self.seq_length:,}",
            f"{c.tokens:,} tokens, {c.learned:,} learned ({self.mask}); packs are {self.fill_rate:.1%} full",
        ]
        if c.truncated or c.dropped or c.cut_tokens:
            found.append(
                f"{counted(c.truncated, 'sample')} cut, {c.dropped:,} dropped without a learned token:"
                f" {counted(c.cut_tokens, 'token')} left out, {c.cut_learned:,} of them learned"
            )
        if c.split or c.too_long:
            found.append(f"{c.split:,} longer ones split, {c.too_long:,} left out")
        if c.lost_thoughts:
            found.append(f"{counted(c.lost_thoughts, 'thought')} left out: chat mode has none")
        if c.empty_thoughts:
            found.append(f"{c.empty_thoughts:,} answers in thinking mode have no thoughts, and learn to have none")
        if c.straddling:
            found.append(f"{c.straddling:,} tokens hold learned and other text, and are not learned")
        return found + report_lines(self.skipped, self.skipped_first, self.out + ENDING)


@files_named("preparing conversations")
def prepare_chat(
    src: Path | Sequence[Path],
    out: Path,
    tokenizer_folder: Path,
    *,
    seq_length: int,
    mask: str = "assistant",
    too_long: str = "cut",
    thinking: bool | str | None = None,
    pack: bool = True,
    workers: int = 1,
    generation: str | None = None,
    overwrite: bool = False,
    skip: bool = False,
    start: Callable[[int], object] = lambda total: None,
    advance: Callable[[int], object] = lambda nbytes: None,
) -> ChatReport:
    """Tokenize, mask, cut and pack a file of conversations; the same input gives the same bytes.

    Args:
        src: one file or several, in their order: an object a line or an array of them, see `jsonl.read_chat_jsonl`;
            gzip, zstd and Parquet too. Of folders, the files of conversations in them; the others are listed.
        out: a folder that is empty or does not exist; see `store` for what is in it.
        tokenizer_folder: a checkpoint, for its tokenizer.json.
        seq_length: most tokens of a sample and of a pack.
        mask: `assistant`, `last_turn`, `each_turn` or `full`, see `samples.build_samples`.
        too_long: what becomes of more than `seq_length` tokens: `cut`, `split`, `skip` (then they are listed as what is
            skipped for other reasons) or `refuse`, see `samples.build_samples`.
        thinking: mode of lines that do not say it, or `auto`: thinking where an answer has thoughts; None refuses
            those.
        pack: whether several samples share a pack.
        workers: processes.
        generation: which releases' reasoning efforts lines mean, `april` or `0731`; None looks at the
            encoding that lies beside the tokenizer.
        overwrite: replace chat data that is in the way.
        skip: leave unusable lines and files out, and list them in `out`.skipped.jsonl; else the first is refused.
        start: called once with the bytes of all files, packed as they are.
        advance: called with the bytes of these that are done, since the last call.

    Raises:
        BridgeError: an unusable line (by number), tokenizer or argument; nothing to learn in the whole file;
            `out` exists, or the disk is full.
    """
    check_options(seq_length, mask, too_long)
    named = [src] if isinstance(src, Path) else list(src)
    for place in (*named, out):
        local(place, "preparing data, at")
    sources, others = find_chats(named, skip)
    start(sum(path.stat().st_size for path in sources))
    tokenizer = open_chat_tokenizer(tokenizer_folder)
    generation = generation or find_generation(tokenizer_folder)
    effort_text(None, generation)
    check_free(out, overwrite)
    options: dict[str, Any] = {"seq_length": seq_length, "mask": mask, "too_long": too_long}
    options |= {"thinking": thinking, "generation": generation}
    # The order of the packs is known once all lengths are: until then samples lie beside it.
    with hold(out, f"preparing {out}"), scratch_folder(out.with_name(out.name + ".samples.part")) as part:
        left_out = SkipList(out)
        try:
            for path, what in others:
                left_out.add(Skipped(str(path), what))
            batches = _of_all(sources, part, tokenizer, options, skip, left_out, workers, advance)
            samples, counts = _spill(batches, part, sources, left_out)
            lengths = np.diff(samples.offsets).tolist()
            packing = plan_packs(lengths, seq_length) if pack else one_a_pack(lengths, seq_length)
            facts = {
                "tokenizer_sha256": tokenizer.sha256,
                "mask": mask,
                "too_long": too_long,
                "thinking": thinking,
                "generation": generation,
                "packed": pack,
                "source": ", ".join(path.name for path in sources),
                "counts": asdict(counts),
                "skipped": left_out.count,
            }
            write_chat_data(out, samples, packing, facts, overwrite=overwrite, beside=left_out.place)
        finally:
            left_out.drop()
    first = tuple(map(str, left_out.first))
    return ChatReport(str(out), seq_length, mask, len(packing.packs), packing.fill_rate, counts, left_out.count, first)


def _of_all(
    sources: Sequence[Path],
    part: Path,
    tokenizer: ChatTokenizer,
    options: dict[str, Any],
    skip: bool,
    left_out: SkipList,
    workers: int,
    advance: Callable[[int], object],
) -> Iterator["_Batch"]:
    """Batches of one file behind the other."""
    for src in sources:
        packed = src.stat().st_size
        try:
            lines = _as_lines(src, part)
        except BridgeError as error:
            if not skip:
                raise
            left_out.add(Skipped(str(src), str(error).removeprefix(f"reading {src}: ")))
            advance(packed)
            continue
        unit = "element" if lines != src and is_array(src) else "line"
        plain = lines.stat().st_size
        step = in_shares(packed, plain, advance)
        with _shown(src, lines, unit):
            for batch in _batches(lines, tokenizer, options, skip, workers, step):
                for number, reason in batch.skipped:
                    what = reason.removeprefix(f"reading {lines}, line {number}").lstrip(":, ")
                    left_out.add(Skipped(str(src), what.replace(str(lines), str(src)), number, unit))
                yield batch
        step(plain)  # blank lines are in no batch
        if lines != src:
            lines.unlink()


def _as_lines(src: Path, part: Path) -> Path:
    """The conversations an object a line, unpacked where they are not."""
    refuse_others(src)
    plain = unwrapped(src, part)
    return unpacked(plain, look(plain).shape, part)


@contextmanager
def _shown(src: Path, lines: Path, unit: str) -> Iterator[None]:
    """Messages name what the user named."""
    try:
        yield
    except BridgeError as error:
        raise BridgeError(
            str(error).replace(f"{lines}, line", f"{src}, {unit}").replace(str(lines), str(src))
        ) from None


def find_generation(folder: Path) -> str | None:
    """Which reasoning efforts a checkpoint knows, by the encoding that it carries; None where it carries none."""
    found = b""
    for path in sorted((folder / "encoding").glob("*.py")) if folder.is_dir() else ():
        found += path.read_bytes()
    known = [name for name, efforts in EFFORTS.items() if efforts["max"].partition("\n")[0].encode() in found]
    # The text of April's max is 0731's high: both are found there.
    return known[-1] if known else None


@dataclass(frozen=True)
class _Batch:
    """Samples of a chunk, one behind the other: int32 and bool [tokens], int64 [samples] twice."""

    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    counts: SampleCounts
    nbytes: int
    skipped: tuple[tuple[int, str], ...] = ()


class _Spilled(Sequence[Sample]):
    """Samples that lie in files."""

    def __init__(self, part: Path, offsets: np.ndarray, lines: np.ndarray):
        self.offsets, self._lines = offsets, lines
        self._tokens = np.memmap(part / "tokens", np.int32, "r")
        self._mask = np.memmap(part / "mask", np.uint8, "r")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: Any) -> Any:
        begun, end = self.offsets[i], self.offsets[i + 1]
        return Sample(self._tokens[begun:end], self._mask[begun:end], int(self._lines[i]))


def _spill(
    batches: Iterator[_Batch], part: Path, sources: Sequence[Path], left_out: SkipList
) -> tuple[_Spilled, SampleCounts]:
    lengths, lines, counts = [np.zeros(1, np.int64)], [], SampleCounts()
    with (part / "tokens").open("wb") as tokens, (part / "mask").open("wb") as mask:
        for batch in batches:
            tokens.write(batch.tokens.data)
            mask.write(batch.mask.view(np.uint8).data)
            lengths.append(batch.lengths)
            lines.append(batch.lines)
            counts.add(batch.counts)
    if not counts.conversations and left_out.count:
        raise left_out.refuse_all(f"preparing {some(map(str, sources))}")
    if not counts.samples:
        raise BridgeError(
            f"preparing {some(map(str, sources))}: none of {counts.conversations} conversations has a learned token "
            "within the length; give a larger seq_length or another mask"
        )
    return _Spilled(part, np.cumsum(np.concatenate(lengths)), np.concatenate(lines)), counts


def _batches(
    src: Path,
    tokenizer: ChatTokenizer,
    options: dict[str, Any],
    skip: bool,
    workers: int,
    advance: Callable[[int], object],
) -> Iterator[_Batch]:
    """Batches in the order of the file, whoever made them."""
    if workers <= 1:
        for chunk in _chunks(src):
            batch = _batch(chunk, tokenizer, str(src), options, skip)
            advance(batch.nbytes)
            yield batch
        return
    waiting: deque[Future[_Batch]] = deque()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (tokenizer.path, str(src), options, skip))
    try:
        chunks = _chunks(src)
        while True:
            while len(waiting) < 2 * workers and (chunk := next(chunks, None)) is not None:
                waiting.append(pool.submit(_batch_here, chunk))
            if not waiting:
                return
            batch = waiting.popleft().result()
            advance(batch.nbytes)
            yield batch
    except BrokenProcessPool:
        raise BridgeError(f"preparing {src}: a worker process died (out of memory?); take fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(src: Path) -> Iterator[Chunk]:
    chunk: Chunk = []
    size = 0
    for number, raw in numbered_lines(src):
        chunk.append((number, raw))
        size += len(raw)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _batch(chunk: Chunk, tokenizer: ChatTokenizer, where: str, options: dict[str, Any], skip: bool) -> _Batch:
    counts, samples = SampleCounts(), list[Sample]()
    skipped = list[tuple[int, str]]()
    for number, raw in chunk:
        own = SampleCounts()
        try:
            conversation = read_line(raw, where, number)
            given = {"counts": own, "where": where, "left_out": skipped}
            made = list(build_samples([conversation], tokenizer, **given, **options))
        except BridgeError as error:
            if not skip:
                raise
            skipped.append((number, str(error)))
            continue
        samples += made
        counts.add(own)
    return _Batch(
        np.concatenate([np.zeros(0, np.int32), *(s.tokens for s in samples)]),
        np.concatenate([np.zeros(0, bool), *(s.loss_mask for s in samples)]),
        np.array([len(s.tokens) for s in samples], np.int64),
        np.array([s.line for s in samples], np.int64),
        counts,
        sum(len(raw) for _, raw in chunk),
        tuple(skipped),
    )


# A worker process opens the tokenizer once.
_STATE: tuple[ChatTokenizer, str, dict[str, Any], bool]


def _start(path: Path, where: str, options: dict[str, Any], skip: bool) -> None:
    global _STATE
    _STATE = (open_chat_tokenizer(path), where, options, skip)


def _batch_here(chunk: Chunk) -> _Batch:
    tokenizer, where, options, skip = _STATE
    return _batch(chunk, tokenizer, where, options, skip)
