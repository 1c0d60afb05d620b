"""A Megatron checkpoint folder, bound to the plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BridgeError
from ..files import AnyPath
from ..spec.encodings import ALLOWED, ENCODINGS
from ..spec.lora import ALPHA
from ..spec.megatron import Naming, hash_layers, naming_of, of_model, regions, strange
from ..spec.plan import Plan, expand
from ..spec.spec import ASIDE, ModelSpec, differing, replace_spec
from .hf import Finding, HFCheckpoint, finding_lines, open_hf
from .run_config import FILE, contradictions, read_model_section, read_run_config
from .torch_dist.reader import TorchDistReader, find_iteration, open_torch_dist

TRACKER = "latest_checkpointed_iteration.txt"
# What a released checkpoint has and Megatron's model has no place for, and the small files beside it.
ALONG = "hf"
PASSENGERS = "passengers.safetensors"


@dataclass(frozen=True)
class MegatronCheckpoint:
    """An opened torch_dist checkpoint.

    Attributes:
        path: the iteration folder.
        reader: its tensors.
        spec: the model's numbers.
        source: facts of the import, empty for checkpoints written by others.
        plan: the items it holds (no MTP where it has none), passengers included.
        along: the folder of passengers and small files that travels with it.
        findings: disagreements with the plan.
        naming: how Megatron-LM calls its tensors.
        contradictions: where its run_config.yaml tells Megatron's users other numbers than `spec`.
    """

    path: Path
    reader: TorchDistReader
    spec: ModelSpec
    source: Mapping[str, Any]
    plan: Plan
    along: Path
    findings: tuple[Finding, ...]
    naming: Naming = "gpt"
    contradictions: tuple[str, ...] = ()

    def close(self) -> None:
        """Close its files."""
        self.reader.close()


def looks_megatron(path: Path) -> bool:
    """Whether a path is a Megatron checkpoint root or iteration folder."""
    named = (path / TRACKER).exists() or (path / ".metadata").exists()
    return named or (not (path / "config.json").exists() and any(path.glob("iter_*/.metadata")))


def open_megatron(path: AnyPath, like: HFCheckpoint | None = None, strict: bool = True) -> MegatronCheckpoint:
    """Open a checkpoint folder (root or iteration).

    Args:
        path: the folder.
        like: released checkpoint that gives the model's numbers where the folder has no
            run_config.yaml of ours.
        strict: raise on any disagreement with the plan.

    Raises:
        BridgeError: unreadable, not a DeepSeek-V4 of these numbers, or (strict) any finding.
    """
    path = Path(path)
    reader = open_torch_dist(path)
    try:
        folder = Path(reader.path)
        if ALPHA in reader.tensors:
            raise BridgeError(
                f"opening {path}: it holds adapters and not the model they adapt; `dsv4 lora {path} OUT` writes them "
                f"for peft, `dsv4 merge HF {path} OUT` merges them into a released folder"
            )
        known = read_run_config(config_file(folder)) or _of_megatron_bridge(
            path, config_file(folder), like, hash_layers(reader.tensors)
        )
        if known is None and like is None:
            raise BridgeError(
                f"opening {path}: it has no {FILE} of this tool, nor one of Megatron-Bridge for such a model; "
                "`dsv4 export --like HF` takes the model's numbers from the config.json of the release it came from"
            )
        spec, source = known or (like.spec, {})  # type: ignore[union-attr]
        if like is not None and known is not None:
            _check_like(path, spec, like)
            spec = replace_spec(spec, **{name: getattr(like.spec, name) for name in ASIDE})
        if not any(k.startswith("mtp.") for k in reader.tensors) and spec.mtp_layers:
            spec = spec.without_draft()
        own = bool(source.get("own_mtp_head")) if known else bool(like and like.plan.own_mtp_head)
        plan = expand(spec, own and spec.mtp_layers > 0)
        said = () if known is None else contradictions(config_file(folder), spec)
        if said and known and spec != known[0]:  # the file may tell of a draft that is not there
            said = contradictions(config_file(folder), known[0])
        naming = naming_of(reader.tensors)
        findings = _findings(reader, plan, naming)
        found = MegatronCheckpoint(folder, reader, spec, source, plan, folder / ALONG, findings, naming, said)
        if strict and said:
            raise BridgeError(
                f"opening {path}: its {FILE} contradicts itself, section `model:` against section `hf_config:` "
                f"({'; '.join(said[:8])}); correct the one that is wrong"
            )
        if strict and found.findings:
            lines = finding_lines(found.findings)
            raise BridgeError(f"opening {path}: its tensors are not those of this model:\n{lines}")
    except BaseException:
        reader.close()
        raise
    return found


def _of_megatron_bridge(
    path: Path, file: Path, like: HFCheckpoint | None, tables: int
) -> tuple[ModelSpec, dict[str, Any]] | None:
    """What a run_config.yaml of Megatron-Bridge says; with a release to be like, that one says it, and more.

    `tables` counts the layers that the checkpoint has a table of experts for.
    """
    found = read_model_section(file)
    if found and found[0].num_hash_layers == 2 * tables:
        # dev's HybridModel counts layers under moe_n_hash_layers, Megatron-Bridge those with experts.
        found = replace_spec(found[0], num_hash_layers=tables), found[1]
    if found is None or like is None:
        return found and (found[0], {"variant": found[1] or "unknown"})
    _check_like(path, found[0], like)
    return None


def _check_like(path: Path, spec: ModelSpec, like: HFCheckpoint) -> None:
    """What no computation follows from may differ; it is then that of `like`."""
    if others := differing(spec.without_draft(), like.spec.without_draft()):
        raise BridgeError(
            f"opening {path}: its {FILE} and {like.folder.path / 'config.json'} describe two models "
            f"({'; '.join(others[:8])}); name the release that it came from"
        )


def has_config(path: Path) -> bool:
    """Whether a checkpoint, root or iteration folder, says its model's numbers itself."""
    file = config_file(find_iteration(path)[0])
    return read_run_config(file) is not None or read_model_section(file) is not None


def config_file(folder: Path) -> Path:
    """Where an iteration's configuration is: in it, or in the root above."""
    return folder / FILE if (folder / FILE).is_file() else folder.parent / FILE


def open_along(checkpoint: MegatronCheckpoint) -> HFCheckpoint | None:
    """The passengers that travel with a checkpoint, None if it has none."""
    if not (checkpoint.along / PASSENGERS).is_file():
        return None
    return open_hf(checkpoint.along, partial=True)


def _findings(reader: TorchDistReader, plan: Plan, naming: Naming) -> tuple[Finding, ...]:
    wrong: dict[tuple[str, str, str], list[str]] = {}
    claimed: set[str] = set()
    for item in plan.items:
        for region in regions(item, plan.spec, naming):
            key, seen = region.key, region.key in claimed
            claimed.add(key)
            entry = reader.tensors.get(key)
            if entry is None:
                if not seen:
                    wrong.setdefault(("missing", item.row.key, ""), []).append(key)
                continue
            shape = tuple(entry.shape)
            padded = item.row.cut == "vocabulary" and shape[1:] == region.global_shape[1:]
            if shape != region.global_shape and not (padded and shape[0] >= region.global_shape[0]):
                detail = f"is {list(shape)}, expected {list(region.global_shape)}"
                if not seen:
                    wrong.setdefault(("shape", item.row.key, detail), []).append(key)
            allowed = [ENCODINGS[e].dtype for e in ALLOWED[item.row.encoding] if ENCODINGS[e].scale_dtype is None]
            if entry.dtype not in allowed and not seen:
                detail = f"is {entry.dtype}, expected {' or '.join(allowed)}"
                wrong.setdefault(("dtype", item.row.key, detail), []).append(key)
    for key in reader.tensors:
        if key not in claimed and of_model(key):
            wrong.setdefault(("unknown", strange(key), ""), []).append(key)
    return tuple(Finding(kind, row, tuple(names), detail) for (kind, row, detail), names in wrong.items())
