"""Adapters of peft, in: what a file's names say, checked against the model and the configuration, then its bytes.

A tensor's full name says which module it belongs to. The configuration has to agree with it: tensors that it does not
name, and names that the file has no tensors for, mean that one of the two is not the other's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BridgeError, files_named, some
from ..files import AnyPath
from ..spec.dtypes import DTYPES
from ..spec.lora import CARRIERS, MERGEABLE, Lora, Target, targets
from ..spec.spec import ModelSpec
from ..store.megatron import looks_megatron
from ..store.safetensors import TensorInfo, read_header
from .adapters import Adapter, Adapters
from .checkpoint import read_adapters
from .peft_config import CONFIG, PeftConfig, read_config, scaled
from .peft_names import PREFIX, WORDS, Entry, Numbers, Selection, entries, in_our_names, numbers, selected, split

WEIGHTS = "adapter_model.safetensors"
_FLOATS = ("F32", "BF16", "F16", "F64")
# Whole weights that peft saves beside adapters: key in the file -> name of the weight in a release.
_WHOLE = {"lm_head": "head.weight", "model.embed_tokens": "embed.weight"}


@files_named("reading adapters")
def open_adapters(path: Path, spec: ModelSpec, *, merging: bool = False) -> Adapters:
    """Adapters of a folder that peft saved, or of a training checkpoint.

    Raises:
        BridgeError: see `import_peft` and `read_adapters`.
    """
    try:
        trained = looks_megatron(path)
    except (OSError, ValueError) as error:
        raise BridgeError(f"reading adapters of {path}: {error}") from None
    return read_adapters(path, spec)[0] if trained else import_peft(path, spec, merging=merging)


@files_named("reading adapters")
def import_peft(folder: AnyPath, spec: ModelSpec, *, merging: bool = False) -> Adapters:
    """Read adapters that `export_peft` or peft itself saved for transformers' DeepSeek-V4.

    Every shape is compared with the model's before a byte of a tensor is read.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        spec: the model's numbers.
        merging: also take what training has no place for: adapters of compressors, indexers and the head, and whole
            weights of the head and the embedding.

    Returns:
        A [rank, in] and B [out, rank] in the file's type, one pair a target; ranks and alphas of their own in `own`.

    Raises:
        BridgeError: unreadable, a setting that is not supported, tensors that are no adapter of this model,
            lack a partner or have other shapes, a configuration that does not agree with them.
    """
    folder = Path(folder)
    config, path = read_config(folder), folder / WEIGHTS
    where, stated = f"reading {path}", f"reading {folder / CONFIG}"
    if config.saved and not merging:
        raise BridgeError(f"{stated}: modules_to_save names {config.saved[0]}, a whole weight; {_MERGE}")
    infos = _header(path)
    known = entries(targets(spec, MERGEABLE))
    ours = in_our_names(infos, known, where)
    selection = selected(known, config, stated)
    found = _claimed(ours, known, selection)
    whole = _whole(ours, infos, spec, where)
    keys = {entry.module: [f"{entry.key}.{word}" for word in (WORDS if config.dora else WORDS[:2])] for entry in found}
    claimed = {key for several in keys.values() for key in several} | set(whole)
    if left := sorted(ours[key] for key in ours if key not in claimed):
        raise BridgeError(f"{where}: {len(left)} tensors are no adapter of this model ({some(left)}); {_why(left)}")
    if not merging:
        _trainable(found, whole, ours, where)
    for entry in found:
        if lost := [key for key in keys[entry.module] if key not in ours]:
            raise BridgeError(f"{where}: it lacks {lost[0]}, beside others of {entry.module}")
    if not found:
        raise BridgeError(f"{where}: there is no adapter in it")
    for module in config.saved:
        if not any(key.startswith(f"{PREFIX}{module}.") for key in whole):
            raise BridgeError(f"{where}: it lacks {PREFIX}{module}.weight, which modules_to_save of {CONFIG} promises")
    _agree(found, known, selection, ours, stated)
    of = numbers(found, config, selection.names, stated)
    for entry in found:
        _check_shapes(entry, keys[entry.module], ours, infos, of[entry.module], config, where)
    with path.open("rb") as file:

        def read(key: str) -> Tensor:
            return _read(file, infos[ours[key]], ours[key], where)

        values: dict[str, Adapter] = {}
        for entry in found:
            parts = [read(key) for key in keys[entry.module]]
            adapters = _apart(parts, len(entry.targets), of[entry.module].rank)
            values |= {target.name: adapter for target, adapter in zip(entry.targets, adapters, strict=True)}
        weights = {name: read(key) for key, name in whole.items()}
    return _adapters(found, of, values, weights, config)


_MERGE = "training has no place for it: `dsv4 merge` puts it into the base, and training may start from that"


def _header(path: Path) -> dict[str, TensorInfo]:
    if not path.is_file():
        pickle = path.with_name("adapter_model.bin").exists()
        hint = "adapter_model.bin is a pickle and may run code; save it as safetensors" if pickle else "not there"
        raise BridgeError(f"reading {path}: {hint}")
    try:
        return read_header(path).tensors
    except BridgeError as error:
        said = str(error).removeprefix(f"reading {path}: ")
        raise BridgeError(f"reading {path}: no usable safetensors file ({said})") from None


def _claimed(ours: Mapping[str, str], known: Sequence[Entry], selection: Selection) -> tuple[Entry, ...]:
    """The adapters that the names in a file speak of."""
    present: list[Target] = []
    stems = {split(key)[0] for key in ours if split(key)[1]}
    for entry in known:
        key = entry.key.replace(".base_layer", "")
        here = key in stems or (entry.parameter and f"{key}.base_layer" in stems)
        # Which of a module's parameters tensors belong to, the configuration alone tells.
        told = len(entry.names) > 1 or not entry.parameter or entry.module in (selection.names or {})
        if here and told:
            present += entry.targets
    return entries(present)


def _whole(ours: Mapping[str, str], infos: Mapping[str, TensorInfo], spec: ModelSpec, where: str) -> dict[str, str]:
    """Key of each whole weight in a file -> its name in a release."""
    found: dict[str, str] = {}
    for module, name in _WHOLE.items():
        # Where an adapter is of it too, peft saves what that adapts.
        keys = [key for middle in ("", ".base_layer") if (key := f"{PREFIX}{module}{middle}.weight") in ours]
        if len(keys) > 1:
            raise BridgeError(f"{where}: {keys[0]} and {keys[1]} are one weight; remove one of them")
        for key in keys:
            info, shape = infos[ours[key]], (spec.vocab_size, spec.hidden_size)
            if info.dtype not in _FLOATS or info.shape != shape:
                raise BridgeError(
                    f"{where}: {key} is {info.dtype} {list(info.shape)}, expected {list(shape)} of floats; a "
                    "vocabulary of another size has no place in this model"
                )
            found[key] = name
    return found


def _why(left: Sequence[str]) -> str:
    """What a user can do about tensors without a place."""
    apart = "merge with peft's merge_and_unload and `dsv4 import` the result, or train without them"
    for word, said in (
        ("lora_embedding_", f"an embedding's adapter has no place here: {apart}"),
        ("token_adapter", f"single rows of the embedding have no place here: {apart}"),
        (".bias", f"this model has no biases to train: {apart}"),
        ("lora_magnitude_vector", f"use_dora of {CONFIG} has to be true for magnitudes"),
        (".mlp.experts.", f"target_parameters of {CONFIG} has to name what they adapt (mlp.experts.gate_up_proj …)"),
    ):
        if any(word in name for name in left):
            return said
    return f"may carry one: {', '.join(CARRIERS)}; in a merge also the linear maps of compressors and indexers"


def _trainable(found: Sequence[Entry], whole: Mapping[str, str], ours: Mapping[str, str], where: str) -> None:
    for entry in found:
        if entry.row not in CARRIERS:
            name = next(ours[key] for key in ours if key.startswith(f"{entry.key}.lora_"))
            raise BridgeError(f"{where}: {some([name])} is of {entry.row}, and {_MERGE}")
    for key in whole:
        raise BridgeError(f"{where}: {some([ours[key]])} is a whole weight, and {_MERGE}")


def _agree(
    found: Sequence[Entry], known: Sequence[Entry], selection: Selection, ours: Mapping[str, str], stated: str
) -> None:
    """Refuse a configuration that is not this file's."""
    if selection.names is None:
        return
    present = {entry.module for entry in found}
    rows = {entry.row for entry in found}
    if strange := [entry.module for entry in found if entry.module not in selection.names]:
        raise BridgeError(
            f"{stated}: the file has adapters of {len(strange)} that it does not name ({some(strange)}), and peft "
            "would pass over them; name them in target_modules or target_parameters, or out of exclude_modules"
        )
    for pattern, modules in selection.means.items():
        if modules and not modules & present:
            raise BridgeError(
                f"{stated}: it names {some([pattern])}, and the file has no tensors of it; is it whole? Take the name "
                "out where that is meant"
            )
    if any(ours[key] != key for key in ours):  # the short names that servers want do not tell layers apart
        return
    lost = [e.module for e in known if e.row in rows and e.module in selection.names and e.module not in present]
    if lost:
        raise BridgeError(
            f"{stated}: it names {len(lost)} that the file has no tensors of ({some(lost)}); is the file whole? Where "
            "other layers are meant, say so with layers_to_transform or exclude_modules"
        )


def _check_shapes(
    entry: Entry,
    keys: Sequence[str],
    ours: Mapping[str, str],
    infos: Mapping[str, TensorInfo],
    of: Numbers,
    config: PeftConfig,
    where: str,
) -> None:
    count, (out, into) = len(entry.targets), entry.targets[0].shape
    rank = of.rank
    patterns = {of.pattern: config.ranks[of.pattern]} if of.pattern else {}
    why = f"rank_pattern is {patterns} in {CONFIG}" if patterns else f"rank {rank} of {CONFIG}"
    why += f", {count} experts" if count > 1 else ""
    if rank > max(out, into):
        raise BridgeError(f"{where}: {entry.module} is [{out}, {into}] and its adapter of rank {rank}: {why}; too many")
    wanted = ((count * rank, into), (out, rank * count), (out,))
    for key, shape in zip(keys, wanted, strict=False):
        info = infos[ours[key]]
        if info.dtype not in _FLOATS:
            raise BridgeError(f"{where}: {ours[key]} is {info.dtype}, expected {', '.join(_FLOATS)}")
        if info.shape != shape:
            raise BridgeError(f"{where}: {ours[key]} is {list(info.shape)}, expected {list(shape)}: {why}")


def _read(file: Any, info: TensorInfo, name: str, where: str) -> Tensor:
    """A tensor whose shape was checked."""
    data = np.empty(info.nbytes, np.uint8)
    try:
        file.seek(info.start)
        done = file.readinto(memoryview(data))
    except OSError as error:
        raise BridgeError(f"{where}: {error.strerror or error}") from None
    if done != info.nbytes:
        raise BridgeError(f"{where}: {name} ends early; did something change the file? Start again")
    tensor = torch.from_numpy(data).view(getattr(torch, DTYPES[info.dtype].torch)).reshape(info.shape)
    if not bool(torch.isfinite(tensor).all()):
        raise BridgeError(f"{where}: {name} holds values that are not finite; the training that made it had failed")
    return tensor


def _apart(parts: Sequence[Tensor], count: int, rank: int) -> list[Adapter]:
    """The adapters of an entry: one, or those of experts that lie in one tensor."""
    a, b, *magnitude = parts
    if count == 1:
        return [Adapter(a, b, *magnitude)]
    stacked = b.unflatten(1, (rank, count)).permute(2, 0, 1)  # [e, out, r]
    return [Adapter(x, y.contiguous()) for x, y in zip(a.unflatten(0, (count, rank)), stacked, strict=True)]


def _adapters(
    found: Sequence[Entry],
    of: Mapping[str, Numbers],
    values: Mapping[str, Adapter],
    weights: Mapping[str, Tensor],
    config: PeftConfig,
) -> Adapters:
    each: dict[str, tuple[int, float]] = {}
    for entry in found:
        rank, alpha, _ = of[entry.module]
        each |= {target.name: (rank, scaled(alpha, rank, config.rslora)) for target in entry.targets}
    usual = (config.rank, scaled(config.alpha, config.rank, config.rslora))
    if len(set(each.values())) == 1:
        (usual,) = set(each.values())
    keys = {item.row.key for entry in found for target in entry.targets for item in target.items}
    lora = Lora(usual[0], usual[1], config.dropout, tuple(k for k in MERGEABLE if k in keys), config.dora)
    own = {name: pair for name, pair in each.items() if pair != usual}
    return Adapters(lora, dict(values), own, dict(weights))
