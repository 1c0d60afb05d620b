"""A checkpoint named on the command line: a folder, or a repository on the Hugging Face Hub."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BridgeError
from .small_files import NAMES, STARTS
from .store.safetensors import INDEX

if TYPE_CHECKING:
    from collections.abc import Callable

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WEIGHTS = ["*.safetensors"]
_DESCRIPTION = ["config.json", INDEX]
_SMALL = [*NAMES, *(f"{s}*" for s in STARTS), *(f"{s.upper()}*" for s in STARTS), "encoding/*", "inference/*"]


def resolve(source: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """A local folder for `source`.

    Args:
        source: a folder, or `owner/name` on the Hub (where no such folder exists).
        revision: branch, tag or commit on the Hub.
        weights: whether the shards are needed, or only config.json and index.

    Returns:
        The folder itself, or the snapshot in the Hub's cache, fetched as far as needed: config,
        index, shards that the index names and the small files, nothing else.

    Raises:
        BridgeError: no such folder or repository, or it cannot be reached.
    """
    path = Path(source)
    if path.exists():
        if revision:
            raise BridgeError(f"opening {source}: --revision is for repositories on the Hub, and this is a local path")
        return path
    if not _REPO.fullmatch(source) or source.startswith((".", "/")):
        raise BridgeError(f"opening {source}: no such file or folder")
    try:
        folder = _fetch(source, revision, _DESCRIPTION)
        if weights:
            index = folder / INDEX
            named = _shards(index) if index.is_file() else _WEIGHTS
            folder = _fetch(source, revision, [*_DESCRIPTION, *_SMALL, *named])
    except BridgeError:
        raise
    except Exception as error:  # the Hub client raises many kinds, from several libraries
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BridgeError(f"fetching {source} from the Hub: {first[:300]}") from None
    return folder


def _fetch(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    download: Callable[..., str] = snapshot_download
    return Path(download(repo, revision=revision, allow_patterns=patterns))


def _shards(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return sorted({str(v) for v in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BridgeError(f"reading {index}: it has no usable 'weight_map'") from None
