"""The checksums of a checkpoint's files, in a small file beside its folder, and the files held against them.

Beside, not inside: a folder that was exported stays the very folder that was imported. `FOLDER.checksums.json`
is written when everything else is at its place, and goes before anything of the folder is replaced.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..errors import BridgeError, files_named
from ..files import every_file, put, sync
from ..progress import Progress, Silent, in_background
from ..store.checksum import Checksum
from ..store.digests import pieces
from ..strict_json import parse_json

_SUFFIX = ".checksums.json"
_FORMAT = "dsv4-checksums-1"
_MOST_BYTES = 64 << 20


class Sum(NamedTuple):
    """What is kept of a file: its size in bytes and its CRC-32C."""

    size: int
    crc32c: int


@dataclass(frozen=True)
class FilesReport:
    """Outcome of holding a folder against its checksums.

    Attributes:
        folder: the checkpoint.
        checksums: the file that says what was written.
        made: the conversion that wrote it.
        files: how many files it names.
        bytes: their bytes.
        wrong: name -> what is not as it was written.
        others: files of the folder that it does not name; they are not looked at.
    """

    folder: str
    checksums: str
    made: str
    files: int
    bytes: int
    wrong: Mapping[str, str]
    others: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether every file is as it was written."""
        return not self.wrong

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self) | {"same": self.same}


def checksums_path(folder: Path) -> Path:
    """The file beside `folder` that its checksums are in."""
    folder = Path(os.path.realpath(folder))
    return folder.with_name(folder.name + _SUFFIX)


def write_checksums(folder: Path, made: str, sums: Mapping[str, Sum]) -> None:
    """Write them beside `folder`, durably.

    Raises:
        OSError: the folder above cannot be written.
    """
    files = {name: {"bytes": s.size, "crc32c": f"{s.crc32c:08x}"} for name, s in sorted(sums.items())}
    data = json.dumps({"format": _FORMAT, "made": made, "files": files}, indent=1)
    put(checksums_path(folder), data.encode() + b"\n")


def remove_checksums(folder: Path) -> None:
    """Remove those of an earlier output; what is there speaks of files that are about to be replaced."""
    path = checksums_path(folder)
    if path.is_file():
        path.unlink()
        sync(path.parent)


@files_named("verifying files")
def verify_files(
    folder: str | os.PathLike[str],
    checksums: str | os.PathLike[str] | None = None,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> FilesReport:
    """Whether the files of a checkpoint are still those that a conversion wrote, by size and CRC-32C.

    Args:
        folder: output folder of `import`, `export`, `rename`, `repack` or `merge`, or a copy of it.
        checksums: the file that was beside it; by default the one beside `folder`.
        workers: files read at a time.
        progress: told of what is read.

    Raises:
        BridgeError: there are no checksums, or a file cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise BridgeError(f"verifying {root}: not a folder on this machine; checksums are of folders that a verb wrote")
    path = Path(checksums) if checksums else checksums_path(root)
    made, sums = _read(root, path, named=checksums is not None)
    progress, wrong = in_background(progress or Silent()), dict[str, str]()

    def look(name: str) -> str:
        return _difference(root / name, sums[name], progress)

    progress.start("verify files", sum(s.size for s in sums.values()), 0)
    try:
        with ThreadPoolExecutor(workers) as pool:
            for name, what in zip(sums, pool.map(look, sums), strict=True):
                if what:
                    wrong[name] = what
    finally:
        progress.stop()
    there = sorted(str(p.relative_to(root)) for p in every_file(root))
    others = tuple(name for name in there if name not in sums)
    return FilesReport(str(root), str(path), made, len(sums), sum(s.size for s in sums.values()), wrong, others)


def _difference(path: Path, kept: Sum, progress: Progress) -> str:
    try:
        size = path.stat().st_size
        if size != kept.size:
            return f"{size:,} bytes, {kept.size:,} were written"
        found = file_sum(path, progress)
    except FileNotFoundError:
        return "not there"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if found.crc32c != kept.crc32c:
        return f"other bytes: CRC-32C {found.crc32c:08x}, {kept.crc32c:08x} was written"
    return ""


def file_sum(path: Path, progress: Progress | None = None) -> Sum:
    """Read a file for its size and CRC-32C.

    Raises:
        OSError: it cannot be read.
    """
    total = Checksum()
    for piece in pieces(path):
        total.add(piece)
        if progress:
            progress.advance(len(piece))
    return Sum(total.size, total.value())


def _read(folder: Path, path: Path, *, named: bool) -> tuple[str, dict[str, Sum]]:
    """What made the folder, and name -> what is kept of each file."""
    doing = f"reading the checksums {path}"
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise BridgeError(f"{doing}: larger than {_MOST_BYTES >> 20} MiB; this is no such file")
        raw = path.read_bytes()
    except OSError as error:
        advice = (
            ""
            if named
            else (
                f"; conversions write one beside their output ({folder.name}{_SUFFIX}). Name it with --checksums, or a "
                "second checkpoint to compare with"
            )
        )
        raise BridgeError(f"{doing}: {error.strerror or error}{advice}") from None
    data = parse_json(raw, str(path))
    if data.get("format") != _FORMAT or not isinstance(data.get("files"), dict) or not data["files"]:
        raise BridgeError(f'{doing}: not what a conversion writes there, which has "format": "{_FORMAT}" and "files"')
    return str(data.get("made", "")), {name: _sum(doing, name, entry) for name, entry in data["files"].items()}


def _sum(doing: str, name: str, entry: Any) -> Sum:
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
        raise BridgeError(f"{doing}: {name!r} is no file inside the folder")
    with contextlib.suppress(KeyError, TypeError, ValueError):
        size, crc = entry["bytes"], entry["crc32c"]
        if type(size) is int and size >= 0 and re.fullmatch(r"[0-9a-f]{8}", crc):
            return Sum(size, int(crc, 16))
    raise BridgeError(f'{doing}: {name!r} has no {{"bytes": N, "crc32c": 8 hexadecimal digits}}')
