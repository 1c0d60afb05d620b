"""What is this checkpoint: variant, encodings, coverage, sizes, what is missing or unknown."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import files_named
from ..files import AnyPath
from ..spec.encodings import of_dtype
from ..spec.megatron import regions
from ..spec.plan import stored
from .checkpoint import open_checkpoint
from .hf import Finding, HFCheckpoint, mixed_encodings
from .hub import describe
from .megatron import MegatronCheckpoint
from .safetensors import Shard


@dataclass
class RowSummary:
    """The tensors of one row of the table."""

    tensors: int = 0
    values: int = 0
    bytes: int = 0
    encodings: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class InspectReport:
    """What `inspect` found.

    Attributes:
        path: the checkpoint, or `owner/name` on the Hub.
        format: `huggingface` or `megatron`.
        variant: name of the variant, `custom (…)` for other sizes.
        naming: naming scheme of its tensors; of a Megatron checkpoint `gpt` or `hybrid`.
        tensors: tensors on disk.
        bytes: their bytes.
        parameters: weights, scales and integer tables not counted.
        draft: what `mtp.*` holds: `none`, `mtp` or `dspark`.
        encodings: encoding class -> encoding of most of its tensors.
        rows: row key -> summary.
        passengers: tensors that Megatron's model has no place for.
        findings: what is missing, unknown or of another shape or type.
        notes: oddities that are allowed.
    """

    path: str
    format: str
    variant: str
    naming: str
    tensors: int
    bytes: int
    parameters: int
    draft: str
    encodings: dict[str, str]
    rows: dict[str, RowSummary] = field(repr=False)
    passengers: tuple[str, ...] = field(repr=False)
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is missing, unknown or wrong."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self) | {"sound": self.sound}


@files_named("inspecting")
def inspect(path: AnyPath, headers: Mapping[str, Shard] | None = None) -> InspectReport:
    """Describe a Hugging Face folder or Megatron checkpoint by its headers alone.

    Args:
        path: the checkpoint, or `owner/name` on the Hub.
        headers: headers of its shards, where they are not in the folder (see `hub.describe`).

    Raises:
        BridgeError: it cannot be read, or is another model.
    """
    path = Path(path)
    if not path.exists():  # on the Hub, headers are enough
        path, headers = describe(os.fspath(path))
    with open_checkpoint(path, strict=False, headers=headers) as checkpoint:
        opened = checkpoint.opened
        return _hf(opened, path) if isinstance(opened, HFCheckpoint) else _megatron(opened, checkpoint.along, path)


def _hf(checkpoint: HFCheckpoint, path: Path) -> InspectReport:
    rows: dict[str, RowSummary] = {}
    parameters = 0
    for bound in checkpoint.bound.values():
        row = rows.setdefault(bound.item.row.key, RowSummary())
        row.tensors += 1 + (bound.scale is not None)
        row.values += bound.item.numel
        row.bytes += bound.weight.nbytes + (bound.scale.nbytes if bound.scale else 0)
        row.encodings[bound.encoding] = row.encodings.get(bound.encoding, 0) + 1
        parameters += bound.item.numel if bound.item.row.encoding != "int" else 0
    notes = [f"{key}: {count} stored as {encoding}" for key, encoding, count in mixed_encodings(checkpoint)]
    if checkpoint.encodings.get("f32") == "bf16":
        notes.append("tensors that the release keeps in float32 are stored as BF16: already rounded by another tool")
    if checkpoint.encodings.get("expert") == "fp8" and checkpoint.config.get("expert_dtype") == "fp8":
        notes.append(
            "its FP8 experts have E8M0 scales under expert_dtype fp8: vLLM copies their bytes as numbers and computes "
            "something else; dsv4 repack --encoding fp8 gives them float32 scales"
        )
    passengers = tuple(i.name for i in checkpoint.plan.items if i.passenger and i.name in checkpoint.bound)
    tensors = checkpoint.folder.tensors
    return InspectReport(
        str(path),
        "huggingface",
        checkpoint.variant,
        checkpoint.scheme,
        len(tensors),
        sum(t.nbytes for t in tensors.values()),
        parameters,
        _draft(checkpoint.spec),
        dict(checkpoint.encodings),
        rows,
        passengers,
        checkpoint.findings,
        tuple(notes),
    )


def _megatron(checkpoint: MegatronCheckpoint, along: HFCheckpoint | None, path: Path) -> InspectReport:
    rows: dict[str, RowSummary] = {}
    parameters = 0
    for item in checkpoint.plan.items:
        row = rows.setdefault(item.row.key, RowSummary())
        row.tensors += 1
        row.values += item.numel
        parameters += item.numel if item.row.encoding != "int" else 0
        if item.passenger:
            bound = along.bound.get(item.name) if along else None
            encoding = bound.encoding if bound else ""
            row.bytes += sum(f.nbytes for f in stored(item, encoding)) if bound else 0
        else:
            entry = checkpoint.reader.tensors.get(regions(item, checkpoint.spec, checkpoint.naming)[0].key)
            encoding = (of_dtype(entry.dtype, None) or "") if entry else ""
            row.bytes += sum(f.nbytes for f in stored(item, encoding)) if encoding else 0
        row.encodings[encoding] = row.encodings.get(encoding, 0) + 1
    encodings = {
        i.row.encoding: next(iter(rows[i.row.key].encodings)) for i in checkpoint.plan.items if not i.passenger
    }
    carried = tuple(along.bound) if along else ()
    return InspectReport(
        str(path),
        "megatron",
        str(checkpoint.source.get("variant", "unknown")),
        checkpoint.naming,
        len(checkpoint.reader.tensors),
        sum(r.bytes for r in rows.values()),
        parameters,
        _draft(checkpoint.spec),
        encodings,
        rows,
        carried,
        checkpoint.findings,
        tuple(f"run_config.yaml contradicts itself: {what}" for what in checkpoint.contradictions),
    )


def _draft(spec: Any) -> str:
    return "dspark" if spec.dspark else "mtp" if spec.mtp_layers else "none"
