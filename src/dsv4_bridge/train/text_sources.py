"""Documents from text files, folders of them, and JSONL: cut into units that workers read by themselves.

Units depend on the sources only, never on the number of workers, so what is made of them in order is the
same for any.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import BridgeError
from ..spec import short

JSONL = (".jsonl", ".ndjson")
_UNIT = 4 << 20  # bytes of a unit, about
_BOM = b"\xef\xbb\xbf"


class BadSource(Exception):
    """A document that cannot be read: its file, the byte it begins at, and what is wrong.

    Workers raise it; `explained` counts the lines before it, which a worker does not see.
    """

    def __init__(self, path: Path, offset: int, what: str):
        super().__init__(path, offset, what)
        self.path, self.offset, self.what = path, offset, what


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        path: where it is.
        nbytes: its size.
    """

    path: Path
    nbytes: int

    @property
    def lines(self) -> bool:
        """Whether every line is a document; else the whole file is one."""
        return self.path.suffix.lower() in JSONL


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


def find_sources(named: Sequence[Path], suffixes: Sequence[str] = ()) -> list[Source]:
    """The files that were named, and those of folders in the order of their names; hidden ones are left out.

    Args:
        named: files and folders.
        suffixes: of the files of folders, as `.py`; none takes all.

    Raises:
        BridgeError: not there, nothing in it, or a file named twice.
    """
    found: list[Source] = []
    for path in named:
        if path.is_file():
            found.append(Source(path, path.stat().st_size))
            continue
        if not path.is_dir():
            raise BridgeError(f"looking for text in {path}: no such file or folder")
        inside = [p.relative_to(path) for p in path.rglob("*") if p.is_file()]
        inside = [p for p in inside if not any(part.startswith(".") for part in p.parts)]
        taken = sorted((p for p in inside if not suffixes or p.suffix in suffixes), key=lambda p: p.parts)
        if not taken:
            said = f"{len(inside)} files, none with {', '.join(suffixes)}" if suffixes else "no files"
            raise BridgeError(f"looking for text in {path}: {said}")
        found += [Source(path / p, (path / p).stat().st_size) for p in taken]
    seen: set[Path] = set()
    for source in found:
        where = source.path.resolve()
        if where in seen:
            raise BridgeError(f"looking for text: {source.path} is named twice; its documents would count double")
        seen.add(where)
    return found


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


def texts(unit: Unit, key: str) -> Iterator[tuple[Path, int, str]]:
    """Every document of a unit: its file, the byte it begins at, its text.

    Raises:
        BadSource: not UTF-8, or a line that is no JSON object with a text under `key`.
    """
    if unit.lines is None:
        for path in unit.paths:
            yield path, 0, _decoded(_read(path), path, 0)
        return
    path = unit.paths[0]
    for offset, line in _lines(path, *unit.lines):
        yield path, offset, _text_of(line, key, path, offset)


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
        raise BadSource(path, offset, f"no {key!r}, only {short(list(value))}; name the text's with --key")
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
        wrong = f"byte {offset + error.start} is not UTF-8 ({error.reason}); convert it, or choose files with --suffix"
        raise BadSource(path, offset, wrong) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSource(path, 0, error.strerror or str(error)) from None


def explained(bad: BadSource) -> BridgeError:
    """The message for a user, with the number of the line, from 1, in a JSONL."""
    where = str(bad.path)
    if bad.path.suffix.lower() in JSONL and bad.path.is_file():
        number, left = 1, bad.offset
        with bad.path.open("rb") as file:
            while left and (piece := file.read(min(left, 1 << 24))):
                number += piece.count(b"\n")
                left -= len(piece)
        where += f", line {number}"
    return BridgeError(f"reading {where}: {bad.what}")


def holds_chat(path: Path) -> bool:
    """Whether a JSONL's first object is a conversation: it has `messages`."""
    if path.suffix.lower() not in JSONL or not path.is_file():
        return False
    for _, line in _lines(path, 0, path.stat().st_size):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # told with its line where it is read
            return False
        return isinstance(value, dict) and "messages" in value
    return False
