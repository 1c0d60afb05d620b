"""Documents from text files, folders of them, and JSONL: cut into units that workers read by themselves.

Units depend on the sources only, never on the number of workers, so what is made of them in order is the
same for any.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import BridgeError, counted, short
from ..files import every_file
from .kinds import CONVERSATIONS, choose_shape, is_array, of_no_known_kind, refuse_others, unpacked
from .packed import unwrapped
from .skipped import Skipped

_UNIT = 4 << 20  # bytes of a unit, about
_CHATS = f"; of conversations, {CONVERSATIONS} are known"
_BOM = b"\xef\xbb\xbf"


class BadSource(Exception):
    """A document that cannot be read: its file, the byte it begins at, what is wrong, and whether lines are documents.

    Workers raise it; `explained` counts the lines before it, which a worker does not see.
    """

    def __init__(self, path: Path, offset: int, what: str, lines: bool = False):
        super().__init__(path, offset, what, lines)
        self.path, self.offset, self.what, self.lines = path, offset, what, lines


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        path: where its bytes are.
        nbytes: their number.
        lines: whether every line is a document; else the whole file is one.
        shown: what the user named, where that was unpacked.
    """

    path: Path
    nbytes: int
    lines: bool
    shown: Path | None = None


@dataclass(frozen=True)
class Unit:
    """Work for one worker: whole text files, or the lines of one JSONL that begin in a range of bytes.

    Attributes:
        paths: the files.
        lines: None for text files; the range for a JSONL.
        nbytes: of the documents.
    """

    paths: tuple[Path, ...]
    lines: tuple[int, int] | None
    nbytes: int


def find_sources(
    named: Sequence[Path],
    unpack: Path,
    suffixes: Sequence[str] = (),
    key: str = "text",
    *,
    skip: bool = False,
    tell: Callable[[Skipped], object] = lambda one: None,
) -> list[Source]:
    """The files that were named, and those of folders in the order of their names; hidden ones are left out.

    Args:
        named: files and folders.
        unpack: a folder for what must be unpacked: JSON arrays, gzip, zstd, Parquet.
        suffixes: of the files of folders, as `.py`; none takes all.
        key: where objects have their text.
        skip: whether a file that cannot be read is left out rather than refused.
        tell: called with each file that is left out: those, and files of folders that are no text, as pictures.

    Raises:
        BridgeError: not there, nothing in it, a file named twice, or one that is neither text nor documents.
    """
    found: list[tuple[Path, bool]] = []
    for path in named:
        if path.is_file():
            found.append((path, True))
            continue
        if not path.is_dir():
            raise BridgeError(f"looking for text in {path}: no such file or folder")
        try:
            inside = [p.relative_to(path) for p in every_file(path)]
        except OSError as error:
            raise BridgeError(f"looking for text in {error.filename or path}: {error.strerror or error}") from None
        inside = [p for p in inside if not any(part.startswith(".") for part in p.parts)]
        taken = sorted((p for p in inside if not suffixes or p.suffix in suffixes), key=lambda p: p.parts)
        if not taken:
            said = f"{counted(len(inside), 'file')}, none with {', '.join(suffixes)}" if suffixes else "no files"
            raise BridgeError(f"looking for text in {path}: {said}")
        found += [(path / p, False) for p in taken]
    seen: set[Path] = set()
    for path, _ in found:
        where = path.resolve()
        if where in seen:
            raise BridgeError(f"looking for text: {path} is named twice; its documents would count double")
        seen.add(where)
    sources = []
    for path, alone in found:
        try:
            if not alone and (what := of_no_known_kind(path)):
                tell(Skipped(str(path), f"of no known kind: {what}"))
                continue
            sources.append(_source(path, unpack, key, named=alone))
        except BridgeError as error:
            if not skip:
                raise
            tell(Skipped(str(path), str(error).removeprefix(f"reading {path}: ")))
    return sources


def _source(path: Path, unpack: Path, key: str, *, named: bool) -> Source:
    if named:
        refuse_others(path)
    plain = unwrapped(path, unpack)
    shape = choose_shape(plain, key, named=named).shape
    lines = unpacked(plain, shape, unpack)
    return Source(lines, lines.stat().st_size, shape in ("lines", "array", "object"), None if lines == path else path)


def units(sources: Sequence[Source]) -> Iterator[Unit]:
    """Units in the order of the sources; neighbouring small text files are one."""
    files: list[Path] = []
    size = 0
    for source in sources:
        if files and (source.lines or size + source.nbytes > _UNIT):
            yield Unit(tuple(files), None, size)
            files, size = [], 0
        if source.lines:
            for start in range(0, source.nbytes, _UNIT):
                stop = min(start + _UNIT, source.nbytes)
                yield Unit((source.path,), (start, stop), stop - start)
        else:
            files.append(source.path)
            size += source.nbytes
    if files:
        yield Unit(tuple(files), None, size)


def texts(unit: Unit, key: str, skipped: list[BadSource] | None = None) -> Iterator[tuple[Path, int, str]]:
    """Every document of a unit: its file, the byte it begins at, its text.

    Args:
        unit: it.
        key: where objects have their text.
        skipped: where unusable documents go; None raises the first.

    Raises:
        BadSource: not UTF-8, or a line that is no JSON object with a text under `key`.
    """
    if unit.lines is None:
        for path in unit.paths:
            try:
                text = _decoded(_read(path), path, 0)
            except BadSource as bad:
                if skipped is None:
                    raise
                skipped.append(bad)
                continue
            yield path, 0, text
        return
    path = unit.paths[0]
    for offset, line in _lines(path, *unit.lines):
        try:
            text = _text_of(line, key, path, offset)
        except BadSource as bad:
            bad = BadSource(path, offset, bad.what, lines=True)
            if skipped is None:
                raise bad from None
            skipped.append(bad)
            continue
        yield path, offset, text


def _lines(path: Path, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in a range, blank ones left out."""
    try:
        with path.open("rb") as file:
            # A line that begins before the range belongs to the unit before.
            file.seek(max(0, start - 1))
            if start:
                file.readline()
            while (offset := file.tell()) < stop and (line := file.readline()):
                line = line.removeprefix(_BOM) if offset == 0 else line
                if line.strip():
                    yield offset, line
    except OSError as error:
        raise BadSource(path, 0, error.strerror or str(error)) from None


def _text_of(line: bytes, key: str, path: Path, offset: int) -> str:
    try:
        value = json.loads(_decoded(line, path, offset))
    except RecursionError:
        raise BadSource(path, offset, "no usable JSON (nested too deep)") from None
    except ValueError as error:
        raise BadSource(path, offset, f"no valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadSource(path, offset, f"expected a JSON object, got {short(value)}")
    if key not in value:
        raise BadSource(path, offset, f"no {key!r}, only {short(list(value))}; name the text's with --key{_CHATS}")
    text = value[key]
    if not isinstance(text, str):
        raise BadSource(path, offset, f"{key!r} is {short(text)}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSource(path, offset, f"{key!r} holds half of a surrogate pair, which is no text") from None
    return text


def _decoded(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.removeprefix(_BOM).decode() if offset == 0 else raw.decode()
    except UnicodeDecodeError as error:
        raise BadSource(
            path,
            offset,
            f"byte {offset + error.start} is not UTF-8 ({error.reason}); convert it, choose files with --suffix, or "
            "leave such out with --on-error skip",
        ) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSource(path, 0, error.strerror or str(error)) from None


class Explainer:
    """Bad documents in a user's words; asked in the order of the sources, each file is read once.

    Args:
        sources: what the files stand for.
    """

    def __init__(self, sources: Sequence[Source] = ()):
        self._shown = {source.path: source.shown for source in sources if source.shown}
        self._path, self._offset, self._number = Path(), 0, 1

    def __call__(self, bad: BadSource) -> Skipped:
        """With the number of the line, from 1, or of the element of an array."""
        shown = self._shown.get(bad.path)
        file = str(shown or bad.path)
        if not (bad.lines and bad.path.is_file()):
            return Skipped(file, bad.what)
        unit = "element" if shown and is_array(shown) else "line"
        return Skipped(file, bad.what, self._line(bad.path, bad.offset), unit)

    def _line(self, path: Path, offset: int) -> int:
        if path != self._path or offset < self._offset:
            self._path, self._offset, self._number = path, 0, 1
        with path.open("rb") as file:
            file.seek(self._offset)
            left = offset - self._offset
            while left and (piece := file.read(min(left, 1 << 24))):
                self._number += piece.count(b"\n")
                left -= len(piece)
        self._offset = offset
        return self._number


def explained(bad: BadSource, sources: Sequence[Source] = ()) -> BridgeError:
    """The message for a user."""
    return BridgeError(f"reading {Explainer(sources)(bad)}")
