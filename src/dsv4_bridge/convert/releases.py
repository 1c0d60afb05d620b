"""Is this folder, byte for byte, the published release? Held against known facts, or against the Hub's own list.

Each file is read once. What no digest is known of is not called proven: of such shards sizes and headers are held
against what follows from the release's tensors, and the report says that their values were not looked at.
"""

import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import BridgeError, files_named, some
from ..files import AnyPath, every_file
from ..progress import Progress, Silent, in_background
from ..spec.encodings import Stored
from ..spec.plan import expand, in_row_order, shard_name, shard_of, stored
from ..spec.releases import RELEASES, Published, Release
from ..spec.spec import differing
from ..spec.variants import Variant, known_variant
from ..store.digests import file_digest
from ..store.hf_config import read_config, spec_from_config
from ..store.hub import listing
from ..store.safetensors import INDEX, make_header, read_header, read_index
from ..store.small_files import is_small

_CONFIG = "config.json"
# In this order the data of a shard lies in all releases whose sizes are known; then by name. V4.1's Engram shards are
# in the order of the rows (`in_row_order`).
_ORDER = ("I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "I8")


@dataclass(frozen=True)
class ReleaseReport:
    """Outcome of holding a folder against a release.

    Attributes:
        folder: the checkpoint.
        release: name of the release, or `owner/name` on the Hub.
        revision: commit that the facts are of.
        bytes: bytes that were read for digests.
        wrong: name -> what is not as published: other bytes, another size, missing, or no file of the release.
        proven: name -> the digest that its content has, as published.
        unproven: name -> what of it is as published, and why no more is said.
        absent: files of the Hub's list that no checkpoint needs, and the folder does not have.
        others: files of the folder that nothing is known of; they are not looked at.
        tensors: tensors of the release by their types on disk; empty where only a list of files is known.
    """

    folder: str
    release: str
    revision: str
    bytes: int
    wrong: Mapping[str, str]
    proven: Mapping[str, str]
    unproven: Mapping[str, str]
    absent: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    tensors: Mapping[str, int] | None = None

    @property
    def same(self) -> bool:
        """Whether nothing differs of what is known."""
        return not self.wrong

    @property
    def whole(self) -> bool:
        """Whether config, index and every shard are proven, byte for byte, and nothing differs."""
        return not self.wrong and not self.unproven

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self) | {"same": self.same, "whole": self.whole}


@files_named("verifying against a release")
def verify_release(
    folder: AnyPath, release: str | Release, *, workers: int = 2, progress: Progress | None = None
) -> ReleaseReport:
    """Whether a folder is a published release, by the facts of it that are known here.

    Args:
        folder: the checkpoint, on this machine.
        release: a name in `spec.releases.RELEASES`, or the facts themselves.
        workers: files read at a time.
        progress: told of what is read.

    Raises:
        BridgeError: no folder, no facts of such a release, or a file that cannot be read.
    """
    root, facts = _folder(folder), release if isinstance(release, Release) else _named(release)
    shards = _shards(facts.variant)
    known = dict(facts.files)
    for published, name in zip(facts.shards, shards, strict=True):
        size = _size(shards[name]) if facts.ordered and published.size is None else published.size
        known[name] = Published(size, published.digest)
    wrong, proven, read = _held(root, known, workers, progress or Silent())
    unproven: dict[str, str] = {}
    for name, published in known.items():
        if name in wrong and published.digest is not None:
            wrong[name] += _whose(root / name, facts.others or {})
        if name in wrong or name in proven:
            continue
        try:
            unproven[name] = _looked(root, name, facts.variant, shards, published)
        except _Other as other:
            wrong[name] = str(other)
        except BridgeError as error:
            wrong[name] = str(error)
    extra, others = _beside(root, known)
    tensors = Counter(fact.dtype for held in shards.values() for fact in held)
    return ReleaseReport(
        str(root),
        facts.name,
        facts.revision,
        read,
        wrong | dict.fromkeys(extra, "a shard that the release does not have"),
        proven,
        unproven,
        others=others,
        tensors=dict(sorted(tensors.items())),
    )


@files_named("verifying against the Hub")
def verify_hub(
    folder: AnyPath, hub_id: str, revision: str | None = None, *, workers: int = 2, progress: Progress | None = None
) -> ReleaseReport:
    """Whether a folder is what a repository on the Hub holds, by the Hub's list; nothing else is fetched.

    Args:
        folder: the checkpoint, on this machine.
        hub_id: `owner/name`.
        revision: branch, tag or commit; by default `main`.
        workers: files read at a time.
        progress: told of what is read.

    Raises:
        BridgeError: no folder, no such repository, it cannot be reached, or a file that cannot be read.
    """
    root = _folder(folder)
    commit, files = listing(hub_id, revision)
    needed = {name for name in files if name in (_CONFIG, INDEX) or is_small(name) or _is_shard(name)}
    known = {name: files[name] for name in files if name in needed or (root / name).is_file()}
    wrong, proven, read = _held(root, known, workers, progress or Silent())
    extra, others = _beside(root, known)
    return ReleaseReport(
        str(root),
        hub_id,
        commit,
        read,
        wrong | dict.fromkeys(extra, "a shard that the repository does not have"),
        proven,
        {},
        absent=tuple(sorted(set(files) - set(known))),
        others=others,
    )


class _Other(Exception):
    """A file is not that of the release; its text says what is different."""


def _folder(folder: AnyPath) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise BridgeError(f"verifying {root}: not a folder on this machine; name one that holds the release's files")
    return root


def _named(name: str) -> Release:
    variant = known_variant(name)
    if variant is None or variant.name not in RELEASES:
        raise BridgeError(f"verifying against {name!r}: facts are known of {', '.join(RELEASES)}")
    return RELEASES[variant.name]


def _shards(variant: Variant) -> dict[str, list[Stored]]:
    """File name -> the tensors in it, in the order of their data."""
    plan = expand(variant.spec, variant.own_mtp_head)
    found: dict[int, list[Stored]] = {}
    unsorted: set[int] = set()
    for item in plan.items:
        facts, number = stored(item, variant.encodings[item.row.encoding]), shard_of(item, plan.spec)
        found.setdefault(number, []).extend(facts)
        unsorted |= {number} if in_row_order(item, plan.spec) else set()
    return {
        shard_name(number, plan.spec): facts
        if number in unsorted
        else sorted(facts, key=lambda f: (_ORDER.index(f.dtype), f.name))
        for number, facts in sorted(found.items())
    }


def _size(facts: list[Stored]) -> int:
    return len(make_header(facts, {})) + sum(fact.nbytes for fact in facts)


def _held(
    root: Path, known: Mapping[str, Published], workers: int, progress: Progress
) -> tuple[dict[str, str], dict[str, str], int]:
    """What is wrong, what is proven, and how many bytes that took. A file of another size is not read."""
    wrong: dict[str, str] = {}
    to_read: dict[str, int] = {}
    for name, published in known.items():
        try:
            size = (root / name).stat().st_size
        except FileNotFoundError:
            wrong[name] = "missing"
            continue
        if published.size is not None and size != published.size:
            kind = "cut short" if size < published.size else "too long"
            wrong[name] = f"{size:,} bytes, {published.size:,} are published: {kind}, or another file"
        elif published.digest is not None:
            to_read[name] = size
    shown, proven = in_background(progress), dict[str, str]()
    shown.start("verify release", sum(to_read.values()), 0)
    try:
        with ThreadPoolExecutor(workers) as pool:
            found = pool.map(partial(_digest, root, known, shown), to_read)
            for name, digest in zip(to_read, found, strict=True):
                if digest == known[name].digest:
                    proven[name] = digest
                else:
                    wrong[name] = f"other bytes: {digest}, {known[name].digest} is published"
    finally:
        shown.stop()
    return wrong, proven, sum(to_read.values())


def _digest(root: Path, known: Mapping[str, Published], shown: Progress, name: str) -> str:
    kind = (known[name].digest or "").partition(":")[0]
    try:
        return file_digest(root / name, kind, shown.advance)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _whose(path: Path, others: Mapping[str, str]) -> str:
    """Words for a file that is published too, elsewhere."""
    if not others or not path.is_file() or path.stat().st_size > 1 << 20:
        return ""
    whose = others.get(file_digest(path, "sha256"))
    return f"; it is {whose}" if whose else ""


def _looked(root: Path, name: str, variant: Variant, shards: Mapping[str, list[Stored]], published: Published) -> str:
    """What can be said of a file without a digest.

    Raises:
        _Other: it is not the release's.
        BridgeError: it is no such file at all.
    """
    if name in shards:
        there = {key: Stored(key, t.dtype, t.shape) for key, t in read_header(root / name).tensors.items()}
        _same_tensors(there, {fact.name: fact for fact in shards[name]})
        sized = "size and " if published.size is not None else ""
        return f"{sized}names, types and shapes of its {len(there):,} tensors are the release's; no digest is known"
    if name == INDEX:
        _, weight_map = read_index(root)
        wanted = {fact.name: file for file, facts in shards.items() for fact in facts}
        if lost := [key for key in wanted if weight_map.get(key) != wanted[key]]:
            raise _Other(f"{len(lost):,} tensors are not in the shards that the release has them in: {some(lost)}")
        if more := [key for key in weight_map if key not in wanted]:
            raise _Other(f"{len(more):,} tensors that the release does not have: {some(more)}")
        return "every tensor is in the shard that the release has it in; no digest is known"
    if name == _CONFIG:
        config = read_config(root / name)
        if numbers := differing(variant.spec, spec_from_config(config, str(root / name))):
            raise _Other(f"other numbers (release against this): {'; '.join(numbers[:3])}")
        inside = config.get("quantization_config")
        stated = config.get("expert_dtype") or (inside.get("expert_dtype") if isinstance(inside, dict) else None)
        if stated != variant.expert_dtype:
            raise _Other(f"expert_dtype is {stated!r}, published is {variant.expert_dtype!r}")
        return "its numbers are the release's; no digest is known"
    return "no digest is known"


def _same_tensors(there: Mapping[str, Stored], wanted: Mapping[str, Stored]) -> None:
    if there == wanted:
        return
    lost, more = [n for n in wanted if n not in there], [n for n in there if n not in wanted]
    odd = [n for n in wanted if n in there and there[n] != wanted[n]]
    said = [f"{len(lost):,} tensors of the release are not in it ({some(lost)})"] if lost else []
    said += [f"{len(more):,} are not the release's ({some(more)})"] if more else []
    if odd:
        seen, published = there[odd[0]], wanted[odd[0]]
        said.append(
            f"{len(odd):,} have another type or shape ({odd[0]}: {seen.dtype} {list(seen.shape)}, published is "
            f"{published.dtype} {list(published.shape)})"
        )
    raise _Other("; ".join(said))


def _beside(root: Path, known: Mapping[str, Published]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Shards that are not published, and other files of the folder that nothing is known of."""
    there = sorted(str(p.relative_to(root)) for p in every_file(root))
    unknown = [name for name in there if name not in known]
    return tuple(n for n in unknown if _is_shard(n)), tuple(n for n in unknown if not _is_shard(n))


def _is_shard(name: str) -> bool:
    """Whether a checkpoint's reader would take it for one."""
    return name.endswith(".safetensors") and os.sep not in name and name.startswith("model")
