"""A Megatron checkpoint under the other naming of its tensors: the same bytes, another index.

An item of a torch_dist folder does not say what it is called; `.metadata` does, and the configuration beside it. So
files are copied as they are, and these two are written anew.
"""

import os
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path

from ..errors import BridgeError, files_named, short
from ..files import AnyPath, every_file, local
from ..spec.megatron import STATES_OF, Naming, check_naming, naming_for, renamed
from ..store.checkpoint import open_megatron_beside
from ..store.hub import resolve
from ..store.megatron import TRACKER, MegatronCheckpoint, config_file
from ..store.run_config import FILE as RUN_CONFIG
from ..store.run_config import renamed_run_config
from ..store.torch_dist.boxes import Files
from ..store.torch_dist.common_state import LEGACY_FILE, MOST_BYTES, renamed_common_state
from ..store.torch_dist.frames import (
    COMMON_STATE_KEY,
    METADATA_JSON,
    ObjectRecord,
    TensorRecord,
    extra_state_item,
    metadata_bytes,
)
from ..store.values import MegatronValues
from .emitter import Emitter, Report
from .jobs import apart, file_stamps
from .outputs import OutFile
from .run import Job, Options, run
from .segments import File, Literal

_INDEX, _BACKEND = ".metadata", "metadata.json"


@files_named("renaming")
def rename(
    source: AnyPath,
    out: AnyPath,
    naming: Naming,
    options: Options | None = None,
    *,
    like: AnyPath | None = None,
) -> Report:
    """Write a Megatron checkpoint as the other of Megatron's models names its tensors; no value changes.

    A training state goes along where it is stored by the names of parameters. The configuration beside the tensors
    and the arguments stored with them are translated; other files are copied.

    Args:
        source: Megatron checkpoint, root or iteration folder.
        out: the new checkpoint root.
        naming: `gpt` (GPTModel, Megatron-LM dev, and the model here) or `hybrid` (HybridModel, Megatron-LM main).
        options: workers, resume, overwrite, progress.
        like: released folder, or `owner/name` on the Hub, with the model's numbers where the checkpoint has none.

    Raises:
        BridgeError: it has these names already, is none of this model, or holds a training state of which names alone
            do not say whose it is; and see `convert.run`.
    """
    source, out = local(source, "opening"), local(out, "writing")
    check_naming(naming, f"renaming {source}")
    beside = resolve(os.fspath(like)) if like is not None else None
    checkpoint = open_megatron_beside(source, beside)
    try:
        naming_for(checkpoint.spec, naming, f"renaming {source}")
        if checkpoint.naming == naming:
            raise BridgeError(f"renaming {source}: its tensors have {naming} names already")
        apart(source, out)
        return run(rename_job(checkpoint, naming), out, options or Options())
    finally:
        checkpoint.close()


def rename_job(checkpoint: MegatronCheckpoint, naming: Naming) -> Job:
    """The job that `rename` runs."""
    folder, reader = checkpoint.path, checkpoint.reader
    if reader.flattened:
        raise BridgeError(
            f"renaming {folder}: {len(reader.flattened)} tensors ({short(reader.flattened[0])} …) are stored "
            "flattened, as optimizer states of megatron-core before 0.15; load and save it there once with a newer one"
        )
    config = renamed_run_config(config_file(folder), naming)
    files, iteration = _files(checkpoint, {_INDEX, _BACKEND, *([RUN_CONFIG] if config else [])}), folder.name
    objects, written = _objects(checkpoint, naming), list[bytes]()
    name = next(n for i in range(len(files) + 1) if (n := f"__0_{i}.distcp") not in files)

    def add(keys: Iterable[str], item: bytes) -> None:
        objects.update((k, ObjectRecord(k, name, sum(map(len, written)), len(item))) for k in keys)
        written.append(item)

    changed, left, new = _common_state(checkpoint, naming), set(files), list[OutFile]()
    if changed and LEGACY_FILE in files:
        left.discard(LEGACY_FILE)
        new.append(OutFile(f"{iteration}/{LEGACY_FILE}", (Literal(changed),)))
    elif changed:
        add([COMMON_STATE_KEY], changed)
    if lacking := [s for m in STATES_OF[naming] if (s := f"{m}/shard_0_1") not in objects]:
        empty = extra_state_item()
        there = next((o for o in reader.objects.values() if o.length == len(empty) and reader.item(o) == empty), None)
        if there:
            objects.update((key, there) for key in lacking)
        else:
            add(lacking, empty)
    if written:
        new.append(OutFile(f"{iteration}/{name}", tuple(map(Literal, written))))
    tensors = [TensorRecord(renamed(k, naming), t.dtype, t.shape, t.chunks) for k, t in reader.tensors.items()]
    index = metadata_bytes(tensors, [ObjectRecord(k, o.file, o.offset, o.length) for k, o in objects.items()])
    markers = {f"{iteration}/{RUN_CONFIG}": config} if config else {}
    markers[f"{iteration}/{_INDEX}"] = index
    markers[f"{iteration}/{_BACKEND}"] = _backend(folder)
    markers[TRACKER] = iteration.encode() if reader.iteration is None else str(reader.iteration).encode()
    return Job(
        label=f"rename {folder.parent.resolve().name} as {naming}",
        files=(*(OutFile(f"{iteration}/{n}", (files[n],)) for n in sorted(left)), *new),
        emitter=lambda: Emitter(MegatronValues(reader, checkpoint.spec, checkpoint.naming)),
        identity={"kind": "rename", "naming": naming, "source": file_stamps(folder)},
        markers=markers,
    )


def _objects(checkpoint: MegatronCheckpoint, naming: Naming) -> dict[str, ObjectRecord]:
    """Its objects by their new keys, without those that the other model does not ask for."""
    left = STATES_OF[checkpoint.naming]
    found = {key: record for key, record in checkpoint.reader.objects.items() if key.split("/")[0] not in left}
    return {renamed(key, naming): record for key, record in found.items()}


def _files(checkpoint: MegatronCheckpoint, made: Container[str]) -> dict[str, File]:
    """Every file of the iteration that is copied, by its name in the folder; not those that are made anew."""
    folder, reader = checkpoint.path, checkpoint.reader
    begin = Counter(t.chunks[0].file for t in reader.tensors.values() if t.chunks)
    found = Files(folder)
    names = [str(p.relative_to(folder)) for p in every_file(folder)]
    return {n: File(found, n, found.note(n), begin[n]) for n in names if n not in made}


def _common_state(checkpoint: MegatronCheckpoint, naming: Naming) -> bytes | None:
    """The state beside the tensors with its arguments renamed; None where it stays as it is."""
    legacy, reader = checkpoint.path / LEGACY_FILE, checkpoint.reader
    record = reader.objects.get(COMMON_STATE_KEY)
    if legacy.is_file():
        where, size = f"reading {legacy}", legacy.stat().st_size
    elif record:
        where, size = f"reading {COMMON_STATE_KEY} of {checkpoint.path / record.file}", record.length
    else:
        return None
    if size > MOST_BYTES:
        raise BridgeError(f"{where}: {size} bytes; expected at most {MOST_BYTES} beside the tensors")
    item = legacy.read_bytes() if legacy.is_file() or not record else reader.item(record)
    return renamed_common_state(item, naming, where)


def _backend(folder: Path) -> bytes:
    path = folder / _BACKEND
    return path.read_bytes() if path.is_file() else METADATA_JSON
