"""Files that lie packed: gzip, zstd, and rows of a Parquet table; read as the lines that are in them.

A row of a table is the JSON object of its columns, without those that are null in it. zstd and Parquet are read by
`zstandard` and `pyarrow`, which the extra `data` brings.
"""

import gzip
import io
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import BridgeError

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "Parquet"}
_NEEDS = {"zstd": "zstandard", "Parquet": "pyarrow"}
_ROWS = 256  # read at a time: a row may be a long conversation
_PIECE = 1 << 13  # of a packed file; what it unpacks to, thousands of times as much at most, is held


def packing(path: Path) -> str:
    """`gzip`, `zstd` or `Parquet`, by the file's first bytes; "" where it is plain.

    Raises:
        BridgeError: unreadable.
    """
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise BridgeError(f"reading {path}: {error.strerror or error}") from None
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """What a file holds, packed or plain, as a stream of bytes.

    Raises:
        BridgeError: unreadable, damaged, or of a kind whose library is not installed.
    """
    kind = packing(path)
    try:
        with _stream(path, kind) as stream:
            yield stream
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _NEEDS.values():
            raise
        raise BridgeError(
            f"reading {path}: a {kind} file, which needs {_NEEDS[kind]}; pip install 'dsv4-bridge[data]'"
        ) from None
    except Exception as error:
        of_library = type(error).__module__.partition(".")[0] in _NEEDS.values()
        if not (of_library or isinstance(error, OSError | EOFError | zlib.error)):
            raise
        said = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise BridgeError(f"reading {path}: {said or 'damaged'} ({kind or 'plain'})") from None


def unwrapped(path: Path, folder: Path) -> Path:
    """The file itself, or what it holds as a copy in `folder`.

    Raises:
        BridgeError: see `opened`; or the disk is full.
    """
    kind = packing(path)
    if not kind:
        return path
    number = sum(1 for _ in folder.iterdir())
    plain = folder / f"{number}-{path.stem}{'.jsonl' if kind == 'Parquet' else ''}"
    with opened(path) as source, plain.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    return plain


def in_shares(packed: int, plain: int, advance: Callable[[int], object]) -> Callable[[int], None]:
    """`advance` in bytes of a packed file, told of the bytes that it holds.

    Args:
        packed: size of the file; all told together comes to it.
        plain: size of what it holds.
        advance: called with bytes that are done, since the last call.
    """
    done = said = 0

    def step(nbytes: int) -> None:
        nonlocal done, said
        done = min(plain, done + nbytes)
        now = packed * done // plain if plain else packed
        advance(now - said)
        said = now

    return step


def _stream(path: Path, kind: str) -> Any:
    if kind == "gzip":
        return gzip.open(path)
    if kind == "zstd":
        import zstandard

        return io.BufferedReader(_Frames(path.open("rb"), zstandard.ZstdDecompressor().decompressobj), 1 << 20)
    if kind == "Parquet":
        import pyarrow.parquet

        return io.BufferedReader(_Table(pyarrow.parquet.ParquetFile(path)))
    return path.open("rb")


class _Frames(io.RawIOBase):
    """What the frames of a zstd file hold; the library's own reader takes a file that was cut for one that ends."""

    def __init__(self, file: BinaryIO, new_frame: Callable[[], Any]):
        self._file, self._new = file, new_frame
        self._frame: Any = None
        self._left, self._packed = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            packed = self._packed or self._file.read(_PIECE)
            if not packed:
                if self._frame is not None:
                    raise OSError("it ends within a frame; the file is cut")
                return 0
            self._frame = self._frame or self._new()
            self._left, self._packed = self._frame.decompress(packed), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Table(io.RawIOBase):
    """The rows of a table as lines of JSON; memory holds a few of them."""

    def __init__(self, table: Any):
        self._table, self._left = table, b""
        self._lines = (
            json.dumps(_present(row), default=lambda value: None).encode() + b"\n"
            for batch in table.iter_batches(batch_size=_ROWS)
            for row in batch.to_pylist()
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            line = next(self._lines, None)
            if line is None:
                return 0
            self._left = line
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        self._table.close()
        super().close()


def _present(value: Any) -> Any:
    """Without the keys that a table has for rows that lack them."""
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value
