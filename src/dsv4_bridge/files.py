"""What is written stays, also where the power fails.

The order that makes it so: the bytes of a file, then its name, then the folder that holds the name, and only
then what says that it is there.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import BridgeError

AnyPath = str | os.PathLike[str]
_ADDRESS = re.compile(r"([A-Za-z][\w+.-]+):/+(.*)", re.DOTALL)  # a Path keeps one slash of two


def local(place: AnyPath, doing: str) -> Path:
    """A place on this machine's file systems.

    Args:
        place: as a user named it.
        doing: for the message.

    Raises:
        BridgeError: an address, as `s3://bucket/folder`; a folder of that name would be made without a word.
    """
    found = _ADDRESS.fullmatch(os.fspath(place))
    if found and not Path(place).exists():
        scheme, rest = found.groups()
        tool = _COPIES.get(scheme.lower())
        copy = f"copy it ({tool})" if tool else "fetch it first"
        raise BridgeError(
            f"{doing} {scheme}://{rest}: addresses are neither read nor written; name a folder: {copy}, or mount it "
            "as a file system. Of the Hub, name the repository as owner/name"
        )
    return Path(place)


_COPIES = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r", "az": "azcopy sync", "abfs": "azcopy sync"}


def sync(path: Path) -> None:
    """Bring the bytes of a file, or the names in a folder, to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def every_file(folder: Path) -> list[Path]:
    """The files in a folder and below it, sorted; links to folders are not followed.

    Raises:
        OSError: a folder cannot be listed. (`Path.rglob` leaves out what is in it.)
    """

    def refuse(error: OSError) -> None:
        raise error

    found = [Path(place, name) for place, _, names in os.walk(folder, onerror=refuse) for name in names]
    return sorted(path for path in found if path.is_file())


def put(path: Path, data: bytes, part: Path | None = None) -> None:
    """Write a file so that it is there whole or, if it was there, as before.

    Args:
        path: the file.
        data: its content.
        part: where it is written first, on the same disk; by default beside it.
    """
    part = part or path.with_name(path.name + ".part")
    part.write_bytes(data)
    sync(part)
    part.replace(path)
    sync(path.parent)


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes to the disk, and the folders that lead there."""
    make_folder(target.parent)
    shutil.copyfile(source, target)
    sync(target)
    sync(target.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, with their names on the disk."""
    new = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        with contextlib.suppress(OSError):  # of the folders above, some cannot be opened
            sync(path.parent)


def move(moves: Iterable[tuple[Path, Path]]) -> None:
    """Move files that are on the disk to their places, then bring all the names there."""
    touched = set[Path]()
    for source, target in moves:
        make_folder(target.parent)
        source.replace(target)
        touched |= {source.parent, target.parent}
    for folder in touched:
        sync(folder)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder that is gone after the block, unless it was renamed.

    Raises:
        BridgeError: an operating-system error, in the block too.
    """
    try:
        shutil.rmtree(path, ignore_errors=True)  # of a run that was killed
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise BridgeError(f"writing {path}: {error.strerror or error}") from None


def place_folder(part: Path, folder: Path) -> None:
    """Give a whole folder its name; what has that name goes when the new one is there, and stays if it cannot be."""
    sync(part)
    old = folder.with_name(f"{folder.name}.old.part")
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed
    if folder.exists() and any(folder.iterdir()):
        folder.rename(old)
    try:
        part.rename(folder)  # over an empty folder too
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
