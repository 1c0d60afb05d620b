"""The small files beside the weights: tokenizer, generation config, chat encoding, licence."""

import os
from pathlib import Path

from ..errors import BridgeError
from ..files import every_file

NAMES = ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
STARTS = ("tokenizer", "vocab", "chat_template", "license", "notice", "readme", "third-party", "third_party")
FOLDERS = ("encoding", "inference")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".part")
_MAX_BYTES = 256 << 20


def small_files(folder: Path) -> dict[str, Path]:
    """Relative name -> path of the files of `folder` that a conversion carries over.

    Raises:
        BridgeError: a link to a file that is no checkpoint's: what a folder from elsewhere links to on this machine
            must not travel into what is published.
    """
    found: dict[str, Path] = {}
    try:
        found = _found(folder)
        for name, path in found.items():
            _check_link(folder, name, path)
    except OSError as error:
        raise BridgeError(f"reading {error.filename or folder}: {error.strerror or error}") from None
    return found


def is_small(name: str) -> bool:
    """Whether a relative name is one of those that a conversion carries over."""
    first, *inner = name.lower().split("/")
    named = first in FOLDERS if inner else first in NAMES or first.startswith(STARTS)
    return named and not name.lower().endswith(WEIGHTS)


def _check_link(folder: Path, name: str, path: Path) -> None:
    """A file is the folder's own, the Hub's cache's, or that of the same name of another checkpoint."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if real.is_relative_to(home) or (cache and real.is_relative_to(cache)):
        return
    other = Path(str(real).removesuffix("/" + name))
    if other == real or not (other / "config.json").is_file():
        raise BridgeError(
            f"reading {path}: a link to {real}, which is no file of a checkpoint; copy what is meant, or remove it"
        )


def _found(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = path.name.lower()
        if path.is_file() and (name in NAMES or name.startswith(STARTS)) and _small(path):
            found[path.name] = path
        elif path.is_dir() and name in FOLDERS and not path.is_symlink():
            inner = (p for p in every_file(path) if "__pycache__" not in p.parts)
            found |= {str(p.relative_to(folder)): p for p in inner if _small(p)}
    return found


def _small(path: Path) -> bool:
    return not path.name.lower().endswith(WEIGHTS) and path.stat().st_size <= _MAX_BYTES
