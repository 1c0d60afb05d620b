"""A folder to a repository on the Hugging Face Hub, with a model card of what is known of it.

Only what is whole goes there: a folder whose conversion has not ended, whose files are not those that were written, or
whose tensors are not those of its model is refused. The upload is huggingface_hub's own; started again it goes on where
it was ended. The card replaces a README.md that came with the source, which goes along as README.base.md.
"""

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import BridgeError, counted, files_named, short, some
from ..files import every_file
from ..progress import Progress
from ..spec.variants import VARIANTS, known_variant
from ..store.digests import file_digest
from ..store.hub_upload import upload
from ..store.inspect import InspectReport, inspect
from ..strict_json import read_json
from .checksums import checksums_path, verify_files
from .prepare import WORK

CARD, BASE_CARD = "README.md", "README.base.md"
ADAPTER = "adapter_config.json"
_IGNORED = (".cache/*", ".git/*", "*.part", "*/__pycache__/*", ".DS_Store")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MIT = "MIT License"


@dataclass(frozen=True)
class Publication:
    """What would go to the Hub.

    Attributes:
        folder: it.
        repo: `owner/name`.
        files: name in the repository -> bytes, the card aside.
        card: its text.
        verified: what of the folder was held against what, for people.
    """

    folder: str
    repo: str
    files: Mapping[str, int]
    card: str
    verified: str

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self) | {"bytes": sum(self.files.values())}


@files_named("publishing")
def prepare_push(
    folder: Path,
    repo: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Publication:
    """Look at a folder, and write its card; nothing is sent.

    Args:
        folder: a checkpoint of either format, or adapters.
        repo: `owner/name` on the Hub.
        base: repository that it was made from; by default the release of its variant, or what adapters name.
        revision: commit of that repository, where it is known.
        workers: files read at a time.
        progress: told of what is read.

    Raises:
        BridgeError: unfinished, not as it was written, not sound, or nothing that this tool knows.
    """
    doing = f"publishing {folder}"
    for name in [repo, *([base] if base else [])]:
        if not _REPO.fullmatch(name):
            raise BridgeError(f"{doing}: {short(name)} is no repository; name one as owner/name")
    if revision and not _COMMIT.fullmatch(revision):
        raise BridgeError(f"{doing}: --revision {short(revision)}, expected a commit of 40 hexadecimal digits")
    if not folder.is_dir():
        raise BridgeError(f"{doing}: no such folder")
    names = [str(path.relative_to(folder)) for path in every_file(folder)]
    if any(name.split("/")[0] == WORK for name in names) or (folder / WORK).exists():
        raise BridgeError(f"{doing}: a conversion into it has not ended; the same command with --resume ends it")
    if unfinished := [name for name in names if ".part" in Path(name).suffixes or ".part/" in name]:
        raise BridgeError(f"{doing}: {some(unfinished)} is a file that was not written to its end")
    if BASE_CARD in names and CARD in names:  # of a repository that was pushed from here: its card is made anew
        names.remove(CARD)
    files = {
        _in_repo(name): (folder / name).stat().st_size
        for name in names
        if not any(fnmatch.fnmatch(name, pattern) for pattern in _IGNORED)
    }
    verified, rows = _held(folder, workers, progress)
    if (folder / ADAPTER).is_file():
        head, facts = _of_adapter(folder / ADAPTER, base)
    else:
        report = inspect(folder)
        if report.findings:
            one = report.findings[0]
            raise BridgeError(f"{doing}: {counted(len(report.findings), 'fault')}, the first: {one}")
        head, facts = _of_checkpoint(folder, report, base)
    if revision:
        facts.append(f"source revision: `{revision}`")
    return Publication(str(folder), repo, files, _card(repo, head, facts, verified, rows), verified)


@files_named("publishing")
def push(publication: Publication, *, private: bool = False) -> str:
    """Send it; the card last. Started again after an end in between, what is there already is not sent again.

    Args:
        publication: what `prepare_push` gave.
        private: whether a repository that is made now is private.

    Returns:
        The address of the repository.

    Raises:
        BridgeError: the Hub refuses, or cannot be reached.
    """
    cards, kept = dict[str, bytes](), Path(publication.folder, BASE_CARD)
    if BASE_CARD in publication.files and not kept.is_file():
        cards[BASE_CARD] = Path(publication.folder, CARD).read_bytes()
    cards[CARD] = publication.card.encode()
    return upload(Path(publication.folder), publication.repo, cards, [*_IGNORED, CARD], private=private)


def _in_repo(name: str) -> str:
    return BASE_CARD if name == CARD else name


def _held(folder: Path, workers: int, progress: Progress | None) -> tuple[str, list[str]]:
    """Hold the files against the checksums beside the folder; a sentence, and a table of digests."""
    path = checksums_path(folder)
    if not path.is_file():
        return "No checksums lie beside the folder: the files were not held against what was written.", []
    report = verify_files(folder, workers=workers, progress=progress)
    if report.wrong:
        name, what = next(iter(report.wrong.items()))
        raise BridgeError(
            f"publishing {folder}: {len(report.wrong):,} of {report.files:,} files are not as they were written; "
            f"{name}: {what}. Convert again"
        )
    sentence = (
        f"{report.files:,} files of {report.bytes:,} bytes were read and have the size and CRC-32C that were "
        "noted when they were written."
    )
    kept = read_json(path, 64 << 20)["files"]
    rows = [f"| `{name}` | {kept[name]['bytes']:,} | `{kept[name]['crc32c']}` |" for name in sorted(kept)]
    digest = file_digest(path, "sha256")
    return f"{sentence} SHA-256 of that list: `{digest.partition(':')[2]}`.", rows


def _of_checkpoint(folder: Path, report: InspectReport, base: str | None) -> tuple[dict[str, Any], list[str]]:
    known = known_variant(report.variant.partition(" ")[0]) or VARIANTS.get(report.variant)
    base = base or (known.hub_id if known else None)
    head = {"library_name": "transformers" if report.format == "huggingface" else "megatron-core"}
    head |= {"base_model": base} if base else {}
    head |= _licence(folder, base)
    encodings = ", ".join(f"{kind} {encoding}" for kind, encoding in report.encodings.items())
    names = f"names: {report.naming}" if report.naming else ""
    facts = [
        f"variant: {report.variant}",
        f"format: {report.format}{', ' * bool(names)}{names}",
        f"encodings: {encodings}",
        f"tensors: {report.tensors:,} of {report.bytes:,} bytes, {report.parameters:,} parameters",
        f"draft blocks: {report.draft}",
        "every tensor is one of the model's, of its shape and type; none is missing",
    ]
    return head, facts


def _of_adapter(path: Path, base: str | None) -> tuple[dict[str, Any], list[str]]:
    config = read_json(path, 16 << 20)
    if not any((path.parent / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise BridgeError(f"publishing {path.parent}: it has {ADAPTER} and no adapter_model.safetensors")
    named = config.get("base_model_name_or_path")
    said = named if isinstance(named, str) and _REPO.fullmatch(named) and not Path(named).exists() else None
    base = base or said
    head = {"library_name": "peft"} | ({"base_model": base} if base else {}) | {"tags": ["lora"]}
    modules = config.get("target_modules")
    count = f"{len(modules):,} names or endings" if isinstance(modules, list) else short(modules)
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    facts = [
        f"adapters: {kind} of rank {short(config.get('r'))}, alpha {short(config.get('lora_alpha'))}",
        f"modules: {count}",
    ]
    return head | _licence(path.parent, base), facts


def _licence(folder: Path, base: str | None) -> dict[str, str]:
    """A licence is named where its file says it; else linked to."""
    path = next((p for p in sorted(folder.iterdir()) if p.name.upper().startswith("LICENSE") and p.is_file()), None)
    if path is None:
        link = {"license_link": f"https://huggingface.co/{base}/blob/main/LICENSE"} if base else {}
        return {"license": "other", "license_name": "of-the-base-model"} | link if base else {}
    if path.open("rb").read(64).decode("utf-8", "replace").lstrip().startswith(_MIT):
        return {"license": "mit", "license_link": path.name}
    return {"license": "other", "license_name": "see-file", "license_link": path.name}


def _card(repo: str, head: Mapping[str, Any], facts: list[str], verified: str, rows: list[str]) -> str:
    yaml_head = yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True, width=1 << 20)
    lines = ["---", *yaml_head.splitlines(), "---", "", f"# {repo.partition('/')[2]}", ""]
    if base := head.get("base_model"):
        lines += [f"Made from [{base}](https://huggingface.co/{base}).", ""]
    lines += [*(f"- {fact}" for fact in facts), "", "## Verified", "", verified, ""]
    if rows:
        lines += ["| file | bytes | CRC-32C |", "|---|---|---|", *rows[:200], ""]
        lines += [f"… and {len(rows) - 200:,} more files.", ""] * (len(rows) > 200)
    return "\n".join([*lines, "This card was written by dsv4-bridge.", ""])
