"""What goes where, before anything starts: the plan of a checkpoint as data, text and JSON."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BridgeError, files_named
from ..files import AnyPath
from ..spec.dtypes import DTYPES
from ..spec.megatron import (
    Naming,
    check_naming,
    megatron_dtype,
    megatron_keys,
    megatron_names,
    megatron_prefix,
    naming_for,
)
from ..spec.megatron_config import layer_pattern
from ..spec.plan import Item, Plan, expand, shard_name, shard_of, stored
from ..spec.variants import VARIANTS, Variant, guess, known_variant, nearest_variant
from ..store.hf import Finding, open_hf
from ..store.hf_config import read_config, spec_from_config
from ..store.hub import describe
from ..store.safetensors import INDEX, SINGLE, Shard


@dataclass(frozen=True)
class PlanRow:
    """One row of the table, over all its tensors.

    Attributes:
        key: row key.
        tensors: weights.
        shape: logical shape of one, of the first layer that has it.
        encoding: how it is stored in the released format.
        released_bytes: on disk in the released format, scales included.
        megatron: on-disk Megatron name of the first in the naming asked for, `-` for a passenger.
        dtype: what Megatron holds.
        megatron_bytes: on disk in the Megatron checkpoint.
    """

    key: str
    tensors: int
    shape: tuple[int, ...]
    encoding: str
    released_bytes: int
    megatron: str
    dtype: str
    megatron_bytes: int


@dataclass(frozen=True)
class PlanReport:
    """The plan of one checkpoint.

    Attributes:
        what: the checkpoint or variant.
        variant: its kind.
        rows: per row.
        tensors: released tensors, scales included.
        released_bytes: all of them.
        megatron_bytes: the Megatron checkpoint (data; frames and index add less than 1 %).
        passenger_bytes: what travels along as it is.
        shards: released shard -> bytes.
        findings: disagreements with the headers, where there are any to compare.
        compared: whether headers were compared.
        naming: of the Megatron names.
        pattern: the layers of a HybridModel, as `WEWECEHE/WE`.
    """

    what: str
    variant: str
    rows: tuple[PlanRow, ...] = field(repr=False)
    tensors: int
    released_bytes: int
    megatron_bytes: int
    passenger_bytes: int
    shards: dict[str, int] = field(repr=False)
    findings: tuple[Finding, ...]
    compared: bool
    naming: Naming
    pattern: str

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


@files_named("planning")
def plan(what: AnyPath, headers: Mapping[str, Shard] | None = None, *, naming: Naming | None = None) -> PlanReport:
    """Plan a checkpoint: a folder with config.json (and shards, then compared), a repository, or a variant's name.

    Args:
        what: folder, `owner/name` on the Hub, or name.
        headers: headers of its shards, where they are not in the folder (see `hub.describe`).
        naming: of the Megatron names: `gpt` or `hybrid`; by default the first that the model has.

    Raises:
        BridgeError: neither, or unusable.
    """
    check_naming(naming, f"planning {what}")
    path, variant, headers = _found(what, headers)
    if variant:
        planned = expand(variant.spec, variant.own_mtp_head)
        return _report(str(what), variant.name, planned, dict(variant.encodings), naming)
    config = read_config(path / "config.json")
    if headers or (path / INDEX).exists() or (path / SINGLE).exists():
        checkpoint = open_hf(path, strict=False, headers=headers)
        checkpoint.close()
        encodings = {name: b.encoding for name, b in checkpoint.bound.items()}
        by_class = dict(guess(config).encodings) | dict(checkpoint.encodings)
        return _report(
            str(path),
            checkpoint.variant,
            checkpoint.plan,
            by_class,
            naming,
            encodings,
            checkpoint.findings,
            compared=True,
        )
    spec = spec_from_config(config, str(path / "config.json"))
    assumed = guess(config, spec)
    planned = expand(spec, assumed.own_mtp_head)
    return _report(str(path), f"{assumed.name} by config.json", planned, dict(assumed.encodings), naming)


def _found(
    what: AnyPath, headers: Mapping[str, Shard] | None
) -> tuple[Path, Variant | None, Mapping[str, Shard] | None]:
    path, variant = Path(what), None if Path(what).exists() else known_variant(os.fspath(what))
    if variant is None and not path.exists():
        if "/" not in os.fspath(what):
            raise BridgeError(
                f"planning {what}: no such folder, and no variant of that name ({', '.join(VARIANTS)})"
                + nearest_variant(os.fspath(what))
            )
        path, headers = describe(os.fspath(what))
    return path, variant, headers


@files_named("planning")
def megatron_names_of(what: AnyPath, *, naming: Naming | None = None) -> dict[str, tuple[str, ...]]:
    """Released name of every weight -> keys of the Megatron tensors that hold it, on disk; none for a passenger.

    Args:
        what: folder, `owner/name` on the Hub, or a variant's name.
        naming: `gpt` or `hybrid`; by default the first that the model has.

    Raises:
        BridgeError: there is none, or its config.json is unusable.
    """
    check_naming(naming, f"planning {what}")
    path, variant, _ = _found(what, None)
    if variant:
        planned = expand(variant.spec, variant.own_mtp_head)
    else:
        spec = spec_from_config(config := read_config(path / "config.json"), str(path / "config.json"))
        planned = expand(spec, guess(config, spec).own_mtp_head)
    chosen = naming_for(planned.spec, naming, f"planning {what}")
    return {item.name: megatron_keys(item, chosen) for item in planned.items}


def _report(
    what: str,
    variant: str,
    plan: Plan,
    by_class: dict[str, str],
    asked: Naming | None,
    encodings: dict[str, str] | None = None,
    findings: tuple[Finding, ...] = (),
    *,
    compared: bool = False,
) -> PlanReport:
    naming = naming_for(plan.spec, asked, f"planning {what}")
    # All items of a row in a block are alike but for their names: each kind is looked at once.
    alike: dict[tuple[str, str, int, str], list[Item]] = {}
    for item in plan.items:
        encoding = (encodings or {}).get(item.name) or by_class[item.row.encoding]
        alike.setdefault((item.row.key, item.block.kind, item.block.index, encoding), []).append(item)
    rows: dict[tuple[str, bool], list[Any]] = {}
    shards: dict[int, int] = {}
    tensors = passengers = 0
    for (key, _, _, encoding), items in alike.items():
        item, count = items[0], len(items)
        facts = stored(item, encoding)
        size = count * sum(f.nbytes for f in facts)
        dtype = "-" if item.passenger else megatron_dtype(item)
        row = rows.get((key, item.passenger))
        if row is None:
            shown = _shown(item, naming)
            row = rows[key, item.passenger] = [key, 0, item.shape, encoding, 0, shown, dtype, 0]
        row[1] += count
        row[4] += size
        row[7] += 0 if item.passenger else count * item.numel * DTYPES[dtype].itemsize
        shard = shard_of(item, plan.spec)
        shards[shard] = shards.get(shard, 0) + size
        tensors += count * len(facts)
        passengers += size if item.passenger else 0
    done = tuple(PlanRow(*row) for row in rows.values())
    return PlanReport(
        what,
        variant,
        done,
        tensors,
        sum(r.released_bytes for r in done),
        sum(r.megatron_bytes for r in done),
        passengers,
        {shard_name(n, plan.spec): size for n, size in sorted(shards.items())},
        findings,
        compared,
        naming,
        layer_pattern(plan.spec),
    )


def _shown(item: Item, naming: Naming) -> str:
    """Its Megatron names in one: the first, and how the others end; they are of one module."""
    names = megatron_names(item, naming)
    if not names:
        return "-"
    return megatron_prefix(item, naming) + ", ".join((names[0], *(name.rpartition(".")[2] for name in names[1:])))
