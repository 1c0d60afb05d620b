"""A checkpoint named on the command line: a folder, or a repository on the Hugging Face Hub.

`resolve` fetches what a conversion reads; `describe` only what describes the checkpoint: config.json,
index, and by range requests the headers of the shards (a few megabytes of hundreds of gigabytes).
"""

import difflib
import glob
import re
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import BridgeError, files_named, short
from ..files import local
from ..spec.releases import Published
from ..spec.variants import known_variant
from .hf_config import read_config, refuse_other_models
from .hub_limits import limited
from .safetensors import INDEX, SINGLE, Shard, header_end, parse_header, read_index
from .small_files import FOLDERS, NAMES, STARTS, WEIGHTS

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFIG = "config.json"
_FIRST_READ = 1 << 18  # longer than most headers
_CONNECTIONS = 8


@files_named("opening")
def resolve(source: str, revision: str | None = None) -> Path:
    """A local folder for `source`.

    Args:
        source: a folder, or `owner/name` on the Hub (where no such folder exists).
        revision: branch, tag or commit on the Hub.

    Returns:
        The folder itself, or the snapshot in the Hub's cache, fetched as far as needed: config,
        index, shards that the index names and the small files, nothing else.

    Raises:
        BridgeError: no such folder or repository, it cannot be reached, or it is another model
            (said before its weights are fetched).
    """
    local = _local(source, revision)
    if local:
        return local
    folder = _description(source, revision)
    return _fetch(source, _pinned(folder, revision), [_CONFIG, INDEX, *_SMALL, *map(glob.escape, _shards(folder))])


@files_named("opening")
def describe(source: str, revision: str | None = None) -> tuple[Path, Mapping[str, Shard] | None]:
    """A local folder for `source` that may lack the shards themselves, and then their headers.

    Args:
        source: a folder, or `owner/name` on the Hub (where no such folder exists).
        revision: branch, tag or commit on the Hub.

    Returns:
        The folder, with None where the shards lie in it, else with file name -> header.

    Raises:
        BridgeError: no such folder or repository, it cannot be reached, or it is another model.
    """
    local = _local(source, revision)
    if local:
        return local, None
    folder = _description(source, revision)
    files = _shards(folder)
    if all((folder / file).is_file() for file in files):
        return folder, None
    try:
        with limited(f"reading {source} on the Hub"), ThreadPoolExecutor(_CONNECTIONS) as pool:
            headers = pool.map(lambda file: _remote_header(source, _pinned(folder, revision), file), files)
            return folder, dict(zip(files, headers, strict=True))
    except Exception as error:
        raise _explained(error, source, revision) from None


@files_named("opening")
def fetch_small(source: str, revision: str | None = None) -> Path:
    """A local folder for `source` with its config.json and small files, the tokenizer's among them; no weights.

    Args:
        source: a folder, or `owner/name` on the Hub (where no such folder exists).
        revision: branch, tag or commit on the Hub.

    Raises:
        BridgeError: no such folder or repository, it cannot be reached, or it is another model.
    """
    local = _local(source, revision)
    if local and not local.is_dir():
        raise BridgeError(
            f"opening {source}: a file, and a checkpoint's folder is wanted; name the folder that it is in"
        )
    return local or _fetch(source, _pinned(_description(source, revision), revision), [_CONFIG, *_SMALL])


@files_named("listing")
def listing(source: str, revision: str | None = None) -> tuple[str, dict[str, Published]]:
    """The files of a repository with their sizes and digests, as the Hub keeps them; none of them is fetched.

    Args:
        source: `owner/name` on the Hub.
        revision: branch, tag or commit.

    Returns:
        The commit, and relative name -> SHA-256 of a large file, Git's blob of a small one.

    Raises:
        BridgeError: no such repository, it cannot be reached, or its answer is not the Hub's.
    """
    if not _REPO.fullmatch(source):
        raise BridgeError(f"listing {source}: a repository on the Hub is named owner/name")
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with limited(f"listing {source} on the Hub"):
            api = HfApi()
            commit = str(api.model_info(source, revision=revision).sha)
            tree = api.list_repo_tree(source, recursive=True, revision=commit)
            files = [entry for entry in tree if isinstance(entry, RepoFile)]
            return commit, {_inside(source, f.path): _published(f) for f in files}
    except Exception as error:
        raise _explained(error, source, revision) from None


def _published(file: Any) -> Published:
    return Published(int(file.size), f"sha256:{file.lfs.sha256}" if file.lfs else f"blob:{file.blob_id}")


def _inside(source: str, name: str) -> str:
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
        raise BridgeError(f"listing {source} on the Hub: {short(name)} is no file inside a folder")
    return name


def _local(source: str, revision: str | None) -> Path | None:
    path = Path(source)
    if path.exists():
        if revision:
            raise BridgeError(f"opening {source}: --revision is for repositories on the Hub, and this is a local path")
        return path
    local(source, "opening")
    if not _REPO.fullmatch(source):
        known = known_variant(source)
        hint = f"; on the Hub it is {known.hub_id}" if known and known.hub_id else _near(path)
        raise BridgeError(f"opening {source}: no such file or folder{hint}")
    return None


def _near(path: Path) -> str:
    """What lies beside a path that is not there, and is called about the same."""
    try:
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, beside[:1000], 1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _description(source: str, revision: str | None) -> Path:
    """The snapshot of a repository with config.json and index, checked to be our model."""
    folder = _fetch(source, revision, [_CONFIG, INDEX])
    if not (folder / _CONFIG).is_file():
        raise BridgeError(f"fetching {source} from the Hub: the repository has no config.json")
    refuse_other_models(read_config(folder / _CONFIG), f"{source}: config.json")
    return folder


def _pinned(folder: Path, revision: str | None) -> str | None:
    """The commit that a snapshot is of: a branch may move on between two requests."""
    return folder.name if _COMMIT.fullmatch(folder.name) else revision


def _shards(folder: Path) -> list[str]:
    _, weight_map = read_index(folder)
    return sorted(set(weight_map.values())) or [SINGLE]


def _fetch(source: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars, logging

        if not sys.stderr.isatty():  # there only our own messages
            disable_progress_bars()
            logging.set_verbosity_error()
        # Its type says that it may also return what a dry run would do.
        with limited(f"fetching {source} from the Hub"):
            folder: Any = snapshot_download(
                source, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED
            )
        return Path(folder)
    except Exception as error:
        raise _explained(error, source, revision) from None


def _remote_header(source: str, revision: str | None, file: str) -> Shard:
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(source, file, revision=revision)
    label = Path(f"{source}/{file}")
    raw, size = _read_range(url, 0, _FIRST_READ)
    end = header_end(label, raw[:8], size)
    if end > len(raw):
        raw += _read_range(url, len(raw), end)[0]
    return parse_header(label, raw[:end], size)


def _read_range(url: str, start: int, stop: int) -> tuple[bytes, int]:
    """Bytes `start` to `stop` of a file, fewer where it ends, and the size of the whole file."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    # Streamed, because a server that knows no ranges would send the whole shard.
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as response:
        hf_raise_for_status(response)
        partial = response.status_code == 206
        skip, wanted = 0 if partial else start, bytearray()
        for piece in response.iter_bytes():
            wanted += piece
            if len(wanted) >= skip + stop - start:
                break
        told = response.headers.get("Content-Range", "").rpartition("/")[2] if partial else ""
        size = told or response.headers.get("Content-Length", "")
    if not size.isdecimal():
        raise BridgeError(f"fetching {url}: the server does not say how long the file is")
    return bytes(wanted[skip : skip + stop - start]), int(size)


def _explained(error: Exception, source: str, revision: str | None) -> BridgeError:
    """One sentence for the Hub client's errors, which come from several libraries and span paragraphs."""
    from huggingface_hub import errors

    if isinstance(error, BridgeError):
        return error
    login = "log in with `hf auth login` or set HF_TOKEN"
    at = f"fetching {source} from the Hub"
    if Path(source).parent.is_dir():  # data/flsh, where data/flash was meant
        there = [p.name for p in Path(source).parent.iterdir()]
        near = difflib.get_close_matches(Path(source).name, there, 1)
        folder = f"; {Path(source).parent / near[0]} is there" if near else ""
        at = f"opening {source}: there is no such folder{folder}. As a repository on the Hub"
    if isinstance(error, errors.GatedRepoError):
        return BridgeError(f"{at}: the repository is gated; accept its terms on its page, then {login}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return BridgeError(f"{at}: no such repository, or a private one ({login}); no such local folder either")
    if isinstance(error, errors.RevisionNotFoundError):
        return BridgeError(f"{at}: the repository has no revision {revision or 'main'!r}")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return BridgeError(f"{at}: a file that its index names is not in the repository ({_line(error, -1)})")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return BridgeError(
            f"{at}: the Hub cannot be reached, and the cache does not hold all that is needed ({_line(error)})"
        )
    # What is raised where the client takes an answer apart that is of another form: Python's words, not its own.
    if isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError | RecursionError | MemoryError) or (
        isinstance(error, ValueError) and not isinstance(error, errors.HFValidationError | OSError)
    ):
        return BridgeError(
            f"{at}: the server's answers are not the Hub's ({type(error).__name__}: {short(_line(error))}); is its "
            "address (HF_ENDPOINT) right, or a proxy in between?"
        )
    return BridgeError(f"{at}: {_line(error)}")


def _line(error: Exception, which: int = 0) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[which][:300] if lines else type(error).__name__


def _any_case(text: str) -> str:
    return "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else glob.escape(c) for c in text)


# The Hub's patterns know no folders: `*` crosses slashes.
_SMALL = [*map(_any_case, NAMES), *(f"{_any_case(s)}*" for s in STARTS), *(f"{_any_case(f)}/*" for f in FOLDERS)]
_IGNORED = [
    *(f"{_any_case(s)}*/*" for s in STARTS),
    *(f"*{_any_case(ending)}" for ending in WEIGHTS if ending != ".safetensors"),
    "*/*.safetensors",
]
