"""import_hf, export_hf, repack: from opened checkpoints to a job for the loop in run.py."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import BridgeError, counted, files_named
from ..files import AnyPath, local
from ..spec.encodings import ENCODINGS, QUANTISED, TARGETS, TILE
from ..spec.megatron import Naming, check_naming, naming_for
from ..spec.plan import Item, Plan, expand, target_encoding
from ..spec.spec import ModelSpec, differing
from ..store.hf import HFCheckpoint, open_hf
from ..store.hf_config import dialect_of, released_config, requantised
from ..store.hub import resolve
from ..store.megatron import ALONG, PASSENGERS, TRACKER, MegatronCheckpoint, looks_megatron, open_along, open_megatron
from ..store.run_config import FILE as RUN_CONFIG
from ..store.run_config import run_config
from ..store.safetensors import INDEX
from ..store.small_files import small_files
from ..store.torch_dist.frames import METADATA_JSON, metadata_bytes
from ..store.values import HFValues, MegatronValues, Values
from .emitter import Emitter, Report
from .outputs import HFLayout, hf_layout, hf_layout_like, megatron_layout, passengers_file
from .run import Job, Options, run

ITERATION = "iter_0000000"


@files_named("importing")
def import_hf(
    source: AnyPath,
    out: AnyPath,
    options: Options | None = None,
    *,
    naming: Naming | None = None,
    drop_passengers: bool = False,
    allow_lossy: bool = False,
) -> Report:
    """Convert a Hugging Face folder into a Megatron torch_dist checkpoint.

    Args:
        source: the folder, in any naming scheme and encoding, or `owner/name` on the Hub.
        out: the new checkpoint root.
        options: workers, resume, overwrite, progress.
        naming: `gpt`, as the model here and Megatron-LM dev have it, or `hybrid`, as Megatron-LM main; by default
            `gpt`, of V4.1 `hybrid`, which alone has it.
        drop_passengers: leave out what Megatron has no place for, instead of carrying it along.
        allow_lossy: permit float32 weights that bf16 cannot hold.

    Raises:
        BridgeError: see `convert.run`.
    """
    check_naming(naming, f"importing {source}")
    source, out = resolve(os.fspath(source)), local(out, "writing")
    checkpoint = open_hf(source)
    try:
        job = import_job(checkpoint, naming=naming, drop_passengers=drop_passengers, allow_lossy=allow_lossy)
        apart(source, out)
        return run(job, out, options or Options())
    finally:
        checkpoint.close()


def import_job(
    checkpoint: HFCheckpoint,
    *,
    naming: Naming | None = None,
    drop_passengers: bool = False,
    allow_lossy: bool = False,
) -> Job:
    """The job that `import_hf` runs."""
    naming = naming_for(checkpoint.spec, naming, f"importing {checkpoint.folder.path}")
    common_state = {"iteration": 0, "checkpoint_version": 3.0}
    layout = megatron_layout(checkpoint.plan, common_state, f"{ITERATION}/", naming)
    along = None if drop_passengers else passengers_file(checkpoint, f"{ITERATION}/{ALONG}/{PASSENGERS}")
    folder = checkpoint.folder.path
    source = {
        "variant": checkpoint.variant,
        "naming": checkpoint.scheme,
        "encodings": dict(checkpoint.encodings),
        "own_mtp_head": checkpoint.plan.own_mtp_head and not drop_passengers,
        "passengers": along is not None,
    }
    markers = {f"{ITERATION}/{ALONG}/config.json": (folder / "config.json").read_bytes()}
    markers |= {
        f"{ITERATION}/{RUN_CONFIG}": run_config(_kept(checkpoint.spec, drop_passengers), source, naming=naming),
        f"{ITERATION}/.metadata": metadata_bytes(layout.tensors, layout.objects),
        f"{ITERATION}/metadata.json": METADATA_JSON,
        TRACKER: b"0",
    }
    return Job(
        label=f"import {_shown(folder)}",
        files=(*layout.files, *([along] if along else [])),
        emitter=lambda: Emitter(HFValues(checkpoint), allow_lossy=allow_lossy),
        identity={"kind": "import", "source": hf_identity(checkpoint)},
        copies={f"{ITERATION}/{ALONG}/{name}": path for name, path in small_files(folder).items()},
        markers=markers,
    )


def _kept(spec: ModelSpec, drop: bool) -> ModelSpec:
    return spec.without_draft() if drop and spec.dspark else spec


@files_named("exporting")
def export_hf(
    source: AnyPath,
    out: AnyPath,
    like: AnyPath | None = None,
    encoding: str = "source",
    options: Options | None = None,
    *,
    drop_passengers: bool = False,
    allow_lossy: bool = False,
) -> Report:
    """Convert a Megatron checkpoint into a Hugging Face folder in released names.

    Args:
        source: Megatron checkpoint, root or iteration folder.
        out: the new folder.
        like: released folder the checkpoint came from, or `owner/name` on the Hub: its scales, files and config are
            kept.
        encoding: `source` (that of `like`), `fp8` or `bf16`.
        options: workers, resume, overwrite, progress.
        drop_passengers: leave out what Megatron has no place for.
        allow_lossy: permit an encoding other than the source's to round values.

    Raises:
        BridgeError: see `convert.run`.
    """
    source, out = local(source, "opening"), local(out, "writing")
    like = resolve(os.fspath(like)) if like is not None else None
    if like and looks_megatron(like) and (source / "config.json").is_file():
        raise BridgeError(
            f"exporting {source}: a Hugging Face folder, and --like {like} is a Megatron checkpoint: they look "
            f"swapped; dsv4 export {like} {out} --like {source}"
        )
    if encoding not in TARGETS:
        raise BridgeError(f"exporting {source}: encoding {encoding!r} is not one of {', '.join(TARGETS)}")
    if encoding == "source" and like is None and looks_megatron(source):
        raise BridgeError(
            f"exporting {source} in the source's encoding needs the source: --like HF (or --encoding bf16)"
        )
    released = open_hf(like) if like else None
    megatron, along = None, None
    try:
        megatron = open_megatron(source, released)
        along = None if drop_passengers else open_along(megatron)
        apart(source, out)
        if like:
            apart(like, out)
        job = export_job(megatron, released, along, encoding, drop_passengers=drop_passengers, allow_lossy=allow_lossy)
        return run(job, out, options or Options())
    finally:
        for opened in (released, megatron, along):
            if opened:
                opened.close()


def model_job(
    values: Values, plan: Plan, like: HFCheckpoint | None, encoding: str, *, allow_lossy: bool = False
) -> Job:
    """The job that writes the items of `plan` from any source of values, and what it lacks from `like`.

    Raises:
        BridgeError: `source` without `like`, or two models.
    """
    if encoding not in TARGETS or (encoding == "source" and like is None):
        raise BridgeError(f"saving a model: encoding {encoding!r} needs like=, or is not one of {', '.join(TARGETS)}")
    if like and (others := differing(plan.spec.without_draft(), like.spec.without_draft())):
        raise BridgeError(f"saving a model like {like.folder.path}: they are two models ({'; '.join(others[:8])})")
    held = {i.name for i in plan.items if not i.passenger}
    whole = like.plan if like else plan
    kept = whole if like else replace(plan, items=tuple(i for i in plan.items if not i.passenger))
    lacking = frozenset(i.name for i in kept.items if i.name not in held)

    def encode(item: Item) -> str:
        own = like.bound[item.name].encoding if like else None
        return own if own and item.name in lacking else target_encoding(item, encoding, own)

    exact = like is not None and encoding == "source" and like.scheme == "released"
    layout = hf_layout_like(like) if exact and like else hf_layout(kept, encode)
    return Job(
        label="save model",
        files=layout.files,
        emitter=lambda: Emitter(values, HFValues(like) if like else None, like, allow_lossy, lacking=lacking),
        identity={"kind": "model"},
        copies=small_files(like.folder.path) if like else {},
        markers=_markers(layout, _config_bytes(kept, like, encoding, encode, unchanged=exact)),
        resumable=False,
    )


def export_job(
    megatron: MegatronCheckpoint,
    like: HFCheckpoint | None,
    along: HFCheckpoint | None,
    encoding: str,
    *,
    drop_passengers: bool = False,
    allow_lossy: bool = False,
) -> Job:
    """The job that `export_hf` runs."""
    plan, lacking = _export_plan(megatron, like, along, drop_passengers)
    riders = like if lacking else along or (like if any(i.passenger for i in plan.items) else None)

    def encode(item: Item) -> str:
        own = like.bound[item.name].encoding if like and item.name in like.bound else None
        if item.passenger and riders:
            own = riders.bound[item.name].encoding
        return target_encoding(item, encoding, own)

    whole = (
        like is not None and encoding == "source" and like.scheme == "released" and len(plan.items) == len(like.bound)
    )
    layout = hf_layout_like(like) if whole and like else hf_layout(plan, encode)
    files_from = like.folder.path if like else megatron.along
    return Job(
        label=f"export {megatron.path.parent.name}",
        files=layout.files,
        emitter=lambda: Emitter(
            MegatronValues(megatron.reader, plan.spec, megatron.naming),
            HFValues(riders) if riders else None,
            like,
            allow_lossy,
            lacking=lacking,
        ),
        identity={
            "kind": "export",
            "encoding": encoding,
            "source": file_stamps(megatron.path),
            "like": hf_identity(like) if like else None,
            "lossy": allow_lossy,
        },
        copies=small_files(files_from),
        markers=_markers(layout, _config_bytes(plan, like, encoding, encode, unchanged=whole)),
    )


def _export_plan(
    megatron: MegatronCheckpoint, like: HFCheckpoint | None, along: HFCheckpoint | None, drop: bool
) -> tuple[Plan, frozenset[str]]:
    """What is written, and the names of the draft's tensors that only `like` has."""
    spec = megatron.spec
    if like and like.spec.draft_blocks and not spec.draft_blocks and not drop:
        held = {i.name for i in megatron.plan.items}
        return like.plan, frozenset(i.name for i in like.plan.items if i.name not in held)
    has_own = megatron.plan.own_mtp_head or bool(like and like.plan.own_mtp_head)
    plan = expand(_kept(spec, drop), has_own and not drop and spec.mtp_layers > 0)
    riders = along or like
    lost = [i.name for i in plan.items if i.passenger and not (riders and i.name in riders.bound)]
    if lost:
        raise BridgeError(
            f"exporting {megatron.path}: {counted(len(lost), 'tensor')} that Megatron has no place for ({lost[0]} …) "
            "did not travel with it; name the released folder with --like, or leave them out with --drop-passengers"
        )
    return plan, frozenset()


@files_named("repacking")
def repack(
    source: AnyPath, out: AnyPath, encoding: str, options: Options | None = None, *, allow_lossy: bool = False
) -> Report:
    """Re-encode a Hugging Face folder as FP8 (128x128 scales, float32 ones for experts) or BF16 throughout.

    Args:
        source: the folder, or `owner/name` on the Hub.
        out: the new folder, in released names.
        encoding: `fp8` or `bf16`; tensors that are FP8 already stay as they are under `fp8`.
        options: workers, resume, overwrite, progress.
        allow_lossy: permit values to be rounded; otherwise the first such tensor is refused.

    Raises:
        BridgeError: see `convert.run`.
    """
    if encoding not in ("fp8", "bf16"):
        raise BridgeError(f"repacking {source}: encoding {encoding!r} is not fp8 or bf16")
    source, out = resolve(os.fspath(source)), local(out, "writing")
    checkpoint = open_hf(source)
    try:
        apart(source, out)
        return run(repack_job(checkpoint, encoding, allow_lossy=allow_lossy), out, options or Options())
    finally:
        checkpoint.close()


def repack_job(checkpoint: HFCheckpoint, encoding: str, *, allow_lossy: bool = False) -> Job:
    """The job that `repack` runs."""

    def encode(item: Item) -> str:
        return target_encoding(item, encoding, checkpoint.bound[item.name].encoding)

    layout = hf_layout(checkpoint.plan, encode)
    return Job(
        label=f"repack {_shown(checkpoint.folder.path)} as {encoding}",
        files=layout.files,
        emitter=lambda: Emitter(HFValues(checkpoint), allow_lossy=allow_lossy, keep_rounding=False),
        identity={
            "kind": "repack",
            "encoding": encoding,
            "source": hf_identity(checkpoint),
            "lossy": allow_lossy,
        },
        copies=small_files(checkpoint.folder.path),
        markers=_markers(layout, _config_bytes(checkpoint.plan, checkpoint, encoding, encode, unchanged=False)),
    )


def _config_bytes(plan: Plan, like: HFCheckpoint | None, encoding: str, encode: Any, *, unchanged: bool) -> bytes:
    if unchanged and like:
        return (like.folder.path / "config.json").read_bytes()
    used = {item.row.encoding: encode(item) for item in plan.items if not item.passenger}
    expert = ENCODINGS[used["expert"]].expert_dtype
    linear = next((ENCODINGS[e] for e in used.values() if e in QUANTISED and e != used["expert"]), None)
    tile = linear.block if linear else (TILE, TILE) if used["expert"] in QUANTISED else None
    if like is None or dialect_of(like.config) != "released" or plan.spec != like.spec:
        config = released_config(plan.spec, expert, tile is not None, tile)
    elif encoding == "source":
        config = dict(like.config)
    else:
        config = requantised(like.config, plan.spec, expert, tile)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _markers(layout: HFLayout, config: bytes) -> dict[str, bytes]:
    return ({INDEX: layout.index} if layout.index else {}) | {"config.json": config}


def hf_identity(checkpoint: HFCheckpoint) -> str:
    """Digest of a folder's headers, sizes and times: whether it is still the same input."""
    digest = hashlib.sha256(json.dumps(dict(checkpoint.config), sort_keys=True, default=str).encode())
    for file, shard in sorted(checkpoint.folder.shards.items()):
        stamp = (checkpoint.folder.path / file).stat().st_mtime_ns
        digest.update(f"{file} {shard.size} {stamp}".encode() + shard.header)
    return digest.hexdigest()


def file_stamps(folder: Path) -> Mapping[str, tuple[int, int]]:
    """Size and time of each file of a folder: whether it is still the same input."""
    stats = {p.name: p.stat() for p in folder.iterdir() if p.is_file()}
    return {name: (s.st_size, s.st_mtime_ns) for name, s in stats.items()}


def _shown(folder: Path) -> str:
    """A folder's name; the repository's where it is a snapshot in the Hub's cache."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def apart(source: Path, out: Path) -> None:
    """Refuse an output that overlaps an input."""
    one, other = source.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise BridgeError(f"writing {out}: it overlaps the input {source}; choose another folder")
