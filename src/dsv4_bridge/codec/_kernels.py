"""Compiled functions, kept between runs wherever that is possible.

numba keeps what it compiled beside the source or in the user's cache. In a container image that is read-only and run
by a user without a home neither can be written, and numba refuses to compile at all: then a folder of the user's own
below the temporary one is taken, and without that the code is compiled anew in each process.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`numba.njit` without the interpreter lock, cached where a cache can be written.

    Args:
        options: further ones of `numba.njit`.
    """

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # numba's word for having no place
            pass
        folder = _own_folder()
        if folder is not None:
            config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
            try:
                return njit(cache=True, nogil=True, **options)(function)
            except RuntimeError:
                config.CACHE_DIR = ""  # type: ignore[attr-defined]
        return njit(nogil=True, **options)(function)

    return compiled


def _own_folder() -> Path | None:
    """A folder that this user alone can write: what is in it is run."""
    folder = Path(tempfile.gettempdir()) / f"dsv4-bridge-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError:
        return None
    own = facts.st_uid == os.getuid() and not facts.st_mode & 0o077 and folder.is_dir() and not folder.is_symlink()
    return folder if own and os.access(folder, os.W_OK) else None


def cache_folder() -> str:
    """Where compiled code is kept, in words; for people."""
    from . import mxfp4

    stats = getattr(mxfp4._decode, "_cache", None)
    return getattr(stats, "cache_path", "") or "nowhere: compiled anew in each process"
