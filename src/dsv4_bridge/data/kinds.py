"""What a file of training data is, told by its content: documents, conversations, or something else.

A file that looks like JSON is never taken for one long text: it is read for what it holds, or refused with what it
looks like. JSON arrays are unpacked into lines beside the output, so that everything behind reads lines; so is what
lies packed (see `packed`).
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BridgeError, counted, files_named, short
from ..files import every_file
from .chat.others import PREFERENCES, is_chat
from .packed import opened, packing

JSONL = (".jsonl", ".ndjson")
CONVERSATIONS = "messages, conversations, instruction and output, prompt and completion"
_HEAD = 1 << 20  # bytes in which the first object of a file ends, nearly always
_MOST = 1 << 26  # and always
_PIECE = 1 << 22
_MAGIC = {
    b"PK\x03\x04": "a zip archive",
    b"ARROW1": "an Arrow file",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
}
_MORE_MAGIC = {b"%PDF-": "a PDF document"}
_TABLES = (".csv", ".tsv", ".xlsx")


@dataclass(frozen=True)
class Look:
    """What a file is.

    Attributes:
        shape: `text`, `lines` (an object a line), `array` (of objects) or `object` (one, over many lines).
        first: the (first) object; None for text, and where it cannot be read.
    """

    shape: str
    first: Mapping[str, Any] | None

    @property
    def chat(self) -> bool:
        """Whether it holds conversations, in our form or another tool's."""
        return self.first is not None and is_chat(self.first)


def look(path: Path) -> Look:
    """Read the beginning of a file.

    Raises:
        BridgeError: unreadable.
    """
    head = _head(path, _HEAD)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.suffix.lower() in JSONL or packing(path) == "Parquet":
        return Look("lines", _first_line(path, text, len(head)))
    if text[:1] == b"{":
        line = _first_line(path, text, len(head))
        return Look("lines", line) if line is not None else Look("object", _object(_head(path, _MOST)))
    if text[:1] == b"[" and text[1:].lstrip()[:1] == b"{":
        return Look("array", _first_element(path))
    return Look("text", None)


def choose_shape(path: Path, key: str | None, *, named: bool) -> Look:
    """What a file is to be read as.

    Args:
        path: the file.
        key: where objects have their text; None for `text`.
        named: whether the user named the file itself, rather than a folder it is in.

    Raises:
        BridgeError: it is no text, and nothing that can be read; with what to do.
    """
    found = look(path)
    known = found.first is not None and (found.chat or (key or "text") in found.first)
    pairs = found.first is not None and found.first.keys() >= PREFERENCES
    if known or (path.suffix.lower() in JSONL and not (pairs and named)):
        return found
    if pairs and named:
        raise BridgeError(
            f"reading {path}: pairs of chosen and rejected answers; nothing here trains on preferences. "
            "Give `prompt` and `completion`, or `messages`"
        )
    if found.shape != "text" and (named and path.suffix.lower() == ".json"):
        keys = f"objects with {short(list(found.first))}" if found.first is not None else "JSON"
        raise BridgeError(
            f"reading {path}: it holds {keys}, and no conversations ({CONVERSATIONS}) nor texts under "
            f"{short(key or 'text')}; name the text's with --key. To take its brackets "
            "and quotes as a text, give the file another ending, as .txt"
        )
    return Look("text", None)


def refuse_others(path: Path) -> None:
    """Refuse, by name, a file that the user named and that is neither text nor JSON.

    Raises:
        BridgeError: with what it is and what to make of it.
    """
    head = _head(path, 16)
    what = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if what is None and path.suffix.lower() in _TABLES:
        what = "a table"
    if what:
        raise BridgeError(
            f"reading {path}: {what}; write it as JSON, an object a line, and name that (gzip, zstd and Parquet are "
            "read too)"
        )


def of_no_known_kind(path: Path) -> str:
    """What a file is that is neither text nor JSON nor packed, as a picture; "" where it may be one of them.

    Raises:
        BridgeError: unreadable.
    """
    if packing(path):
        return ""
    head = _head(path, 8192)
    what = next((what for magic, what in (_MAGIC | _MORE_MAGIC).items() if head.startswith(magic)), "")
    return what or ("it holds null bytes, which no text does" if b"\0" in head else "")


def find_chats(named: Sequence[Path], skip: bool = False) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Files of conversations: those that are named, and those in folders, in the order of their names.

    Args:
        named: files and folders.
        skip: whether files of folders that cannot be read are among the others rather than refused.

    Returns:
        The files, and the others that lie in folders with what they are; hidden ones are left out.

    Raises:
        BridgeError: unreadable, or a folder without conversations.
    """
    files: list[Path] = []
    others: list[tuple[Path, str]] = []
    for path in named:
        if not path.is_dir():
            files.append(path)
            continue
        before = len(files)
        with files_named(f"looking for conversations in {path}"):
            inside = [p for p in every_file(path) if not any(s.startswith(".") for s in p.relative_to(path).parts)]
        for file in sorted(inside, key=lambda p: p.relative_to(path).parts):
            try:
                what = of_no_known_kind(file)
                if what:
                    others.append((file, f"of no known kind: {what}"))
                elif look(file).chat:
                    files.append(file)
                else:
                    others.append((file, "its first object is no conversation"))
            except BridgeError as error:
                if not skip:
                    raise
                others.append((file, str(error).removeprefix(f"reading {file}: ")))
        if len(files) == before:
            raise BridgeError(f"looking for conversations in {path}: none in {counted(len(inside), 'file')}")
    return files, others


def is_array(path: Path) -> bool:
    """Whether a file begins like a JSON array."""
    return _head(path, 64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def elements(path: Path) -> Iterator[Any]:
    """The elements of a JSON array, one after the other; memory holds one of them.

    Raises:
        BridgeError: no array, or no valid JSON, with the number of the element.
    """
    decoder, number, text, at = json.JSONDecoder(), 0, "", 0
    with opened(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", errors="strict") as file:

        def more() -> bool:
            nonlocal text, at
            piece = file.read(_PIECE)
            text, at = text[at:] + piece, 0
            return bool(piece)

        def skip(extra: str = "") -> str:
            nonlocal at
            while True:
                while at < len(text) and text[at] in " \t\r\n" + extra:
                    at += 1
                if at < len(text) or not more():
                    return text[at : at + 1]

        try:
            if skip() != "[":
                raise BridgeError(f"reading {path}: expected a JSON array")
            at += 1
            while (sign := skip("," if number else "")) != "]":
                if not sign:
                    raise BridgeError(f"reading {path}, element {number + 1}: the array does not end; the file is cut")
                number += 1
                while True:
                    try:
                        value, end = decoder.raw_decode(text, at)
                        length = end - at
                        if end < len(text) or not more():  # else a number may go on
                            at += length
                            break
                    except ValueError as error:
                        if len(text) - at > _MOST or not more():
                            raise BridgeError(
                                f"reading {path}, element {number}: no valid JSON ({error.args[0].split(':')[0]})"
                            ) from None
                yield value
        except RecursionError:
            raise BridgeError(f"reading {path}, element {number}: nested too deep") from None
        except UnicodeDecodeError as error:
            raise BridgeError(f"reading {path}, element {number + 1}: not UTF-8 ({error.reason})") from None
        except OSError as error:
            raise BridgeError(f"reading {path}: {error.strerror or error}") from None


def unpacked(path: Path, shape: str, folder: Path) -> Path:
    """The file as lines or text: itself, or for a JSON array or object a copy in `folder`, an element a line.

    Raises:
        BridgeError: see `elements`.
    """
    if shape not in ("array", "object"):
        return path
    lines = folder / f"{_free(folder)}-{path.stem}.jsonl"
    with lines.open("w", encoding="utf-8") as file:
        for element in elements(path) if shape == "array" else [_object(_head(path, _MOST))]:
            file.write(json.dumps(element, ensure_ascii=True) + "\n")
    return lines


def _free(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir())


def _head(path: Path, size: int) -> bytes:
    """The first bytes of what a file holds."""
    with opened(path) as file:
        return file.read(size)


def _first_line(path: Path, text: bytes, read: int) -> Mapping[str, Any] | None:
    line, newline, _ = text.partition(b"\n")
    if not newline and read == _HEAD:
        line = _head(path, _MOST).removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0]
    return _object(line)


def _object(raw: bytes) -> Mapping[str, Any] | None:
    try:
        value = json.loads(raw.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):  # told with its line where it is read
        return None
    return value if isinstance(value, dict) else None


def _first_element(path: Path) -> Mapping[str, Any] | None:
    try:
        value = next(elements(path), None)
    except BridgeError:  # brackets of something else, or told where it is read
        return None
    return value if isinstance(value, dict) else None
