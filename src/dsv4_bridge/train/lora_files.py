"""Adapters as peft saves them: adapter_config.json and adapter_model.safetensors, out and in.

| here | in the file, behind `base_model.model.` | in the configuration |
|---|---|---|
| a module's adapter | `{module}.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector` | `target_modules` |
| a bare parameter's | the same of the module that holds it | `target_parameters` |
| routed experts' | all of a layer in one: A by experts then rank, B's columns by rank then experts | the same |

Of several parameters of one module peft wraps the first innermost: its tensors have `.base_layer` for each
wrapper around it. Sources: peft 0.21, tuners/lora/layer.py (ParamWrapper), tuners/tuners_utils.py
(_inject_parameters), utils/save_and_load.py.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..adapter_tensors import Adapter, Adapters, check_shapes
from ..durable import sync
from ..errors import BridgeError, files_named
from ..lock import hold
from ..lora import CARRIERS, Lora, Target, targets
from ..spec import ModelSpec, short
from ..store.safetensors import some
from ..strict_json import parse_json
from .lora_checkpoints import holds_adapters, read_adapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = ("transformers", "released")
_PREFIX = "base_model.model."
_MAX_CONFIG = 16 << 20

# Settings of peft that change what an adapter computes, and the values that leave it as it is here.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "use_qalora": (False,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "alora_invocation_tokens": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "mica": (None, False),
}
# Beginnings that write the base anew (PiSSA, OLoRA …) leave adapters of another base.
_BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva")


class Entry(NamedTuple):
    """One adapter in a file: of a module, of a parameter, or of all routed experts of a layer.

    Attributes:
        key: of its tensors, without the last words.
        module: what transformers calls it.
        parameter: whether that is a parameter.
        targets: one, or one an expert.
    """

    key: str
    module: str
    parameter: bool
    targets: tuple[Target, ...]


def entries(found: Iterable[Target]) -> tuple[Entry, ...]:
    """The adapters of a file that holds the targets `found`, in the plan's order."""
    of: dict[str, list[Target]] = {}
    for target in found:
        of.setdefault(target.module, []).append(target)
    inside: dict[str, list[str]] = {}
    for module, several in of.items():
        if several[0].parameter:
            inside.setdefault(module.rpartition(".")[0], []).append(module)
    made = []
    for module, several in of.items():
        key, parameter = module, several[0].parameter
        if parameter:
            holder = module.rpartition(".")[0]
            around = len(inside[holder]) - 1 - inside[holder].index(module)
            key = holder + ".base_layer" * around
        made.append(Entry(_PREFIX + key, module, parameter, tuple(several)))
    return tuple(made)


# ---------------------------------------------------------------- out


@files_named("writing adapters")
def export_peft(
    adapters: Adapters, spec: ModelSpec, folder: Path | str, base: str = "", names: str = "transformers"
) -> Path:
    """Write adapters for `peft.PeftModel.from_pretrained(DeepseekV4ForCausalLM, folder)`, or for servers.

    peft allows bare parameters no dropout, so where there are such the configuration says 0: dropout is of
    training, and does not change what the adapters compute.

    Args:
        adapters: whole adapters, as `gather_adapters` returns them.
        spec: the model's numbers.
        folder: new, or empty. It appears when it is complete.
        base: name of the checkpoint they belong to, for the configuration.
        names: `transformers`, what peft looks for; or `released`, what servers that keep the released names look for
            (vLLM).

    Raises:
        BridgeError: parameters that are no module of their own, under released names; the folder is in the way or
            cannot be written; adapters of another model.
    """
    folder = Path(folder)
    what = f"writing {folder}"
    if names not in NAMES:
        raise BridgeError(f"{what}: names {names!r}, expected {' or '.join(NAMES)}")
    known = check_shapes(adapters, spec, what)
    found = entries(known.values())
    if not found:
        raise BridgeError(f"{what}: there is no adapter to write")
    if names == "released":
        found = tuple(_released(entry, what) for entry in found)
    state: dict[str, Tensor] = {}
    for entry in found:
        values = [adapters.values[target.name] for target in entry.targets]
        whole = values[0] if len(entry.targets) == 1 else _stacked(values)
        for word, tensor in zip(_WORDS, whole, strict=True):
            if tensor is not None:
                state[f"{entry.key}.{word}"] = tensor.contiguous()
    config = _config(adapters.lora, found, spec, base)
    if names == "released":
        config["target_modules"] = sorted({entry.module.rpartition(".")[2] for entry in found})
    with hold(folder, what):
        _write(folder, state, (json.dumps(config, indent=2) + "\n").encode())
    return folder


def _released(entry: Entry, what: str) -> Entry:
    """The same adapter under the released name of its weight."""
    items = [item for target in entry.targets for item in target.items]
    if entry.parameter or len(items) != 1:
        raise BridgeError(
            f"{what}: the adapter of {entry.module} has no released name of its own (servers take those of attention's "
            "projections and of shared experts); merge it with `dsv4 merge`, or say --names transformers"
        )
    name = items[0].name.removesuffix(".weight")
    return entry._replace(key=_PREFIX + name, module=name)


_WORDS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


def _stacked(values: list[Adapter]) -> Adapter:
    """Experts' A [e, r, in] and B [e, out, r] -> [e*r, in] and [out, r*e], peft's order."""
    a, b = torch.stack([v.a for v in values]), torch.stack([v.b for v in values])
    return Adapter(a.flatten(0, 1), b.permute(1, 2, 0).flatten(1))


def _config(lora: Lora, found: tuple[Entry, ...], spec: ModelSpec, base: str) -> dict[str, Any]:
    bare = [e for e in found if e.parameter]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0 if bare else lora.dropout,
        "use_dora": lora.dora,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": _named([e for e in found if not e.parameter], spec),
        "target_parameters": _named(bare, spec) or None,
    }


def _named(found: list[Entry], spec: ModelSpec) -> list[str]:
    """Names for peft, which takes a module whose name ends so behind a dot: `self_attn.kv_proj`.

    Short where every layer has it; the layer is part of the name where some do not.
    """
    layers: dict[str, list[Entry]] = {}
    for entry in found:
        layers.setdefault(entry.targets[0].items[0].row.key, []).append(entry)
    names = []
    for several in layers.values():
        if len(several) == spec.num_hidden_layers:
            block = several[0].targets[0].items[0].block
            names.append(several[0].module.removeprefix(f"model.{block.prefix}"))
        else:
            names += [entry.module for entry in several]
    return names


def _write(folder: Path, state: dict[str, Tensor], config: bytes) -> None:
    part = folder.with_name(f".{folder.name}.part")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BridgeError(f"writing {folder}: it exists and is not an empty folder")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(state, part / WEIGHTS, {"format": "pt"})
        (part / CONFIG).write_bytes(config)
        (part / WEIGHTS).chmod((part / CONFIG).stat().st_mode)  # safetensors keeps others from reading it
        for path in (part / WEIGHTS, part / CONFIG, part):
            sync(path)
        part.rename(folder)  # over an empty folder too
    except (OSError, SafetensorError) as error:
        raise BridgeError(f"writing {folder}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ---------------------------------------------------------------- in


@files_named("reading adapters")
def open_adapters(path: Path, spec: ModelSpec) -> Adapters:
    """Adapters of a folder that peft saved, or of a training checkpoint.

    Raises:
        BridgeError: see `import_peft` and `read_adapters`.
    """
    return read_adapters(path, spec)[0] if holds_adapters(path) else import_peft(path, spec)


@files_named("reading adapters")
def import_peft(folder: Path | str, spec: ModelSpec) -> Adapters:
    """Read adapters that `export_peft` or peft itself saved for transformers' DeepSeek-V4.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        spec: the model's numbers.

    Raises:
        BridgeError: unreadable, a setting that is not supported, tensors that are no adapter of this model,
            lack a partner or have other shapes.
    """
    folder = Path(folder)
    config = _read_config(folder)
    lora = _settings(config, folder)
    state = _in_our_names(_read_tensors(folder), spec)
    found = _claimed(state, config, spec, folder)
    values: dict[str, Adapter] = {}
    for entry in found:
        for target, adapter in zip(entry.targets, _taken(entry, state, lora, folder), strict=True):
            values[target.name] = adapter
    if state:
        raise BridgeError(
            f"reading {folder / WEIGHTS}: {len(state)} tensors are no adapter of this model ({some(sorted(state))}); "
            f"may carry one: {', '.join(CARRIERS)}"
        )
    keys = {i.row.key for e in found for t in e.targets for i in t.items}
    lora = Lora(lora.rank, lora.alpha, lora.dropout, tuple(k for k in CARRIERS if k in keys), lora.dora)
    adapters = Adapters(lora, values)
    check_shapes(adapters, spec, f"reading {folder / WEIGHTS}")
    return adapters


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise BridgeError(f"reading {path}: {path.stat().st_size} bytes are too many for a configuration")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise BridgeError(f"reading {path}: {error.strerror or error}; expected a folder that peft saved") from None


def _settings(config: Mapping[str, Any], folder: Path) -> Lora:
    where = f"reading {folder / CONFIG}"
    if config.get("peft_type") != "LORA":
        raise BridgeError(f"{where}: peft_type is {short(config.get('peft_type'))}, expected 'LORA'")
    for name, allowed in _NEUTRAL.items():
        if name in config and config[name] not in allowed:
            raise BridgeError(f"{where}: {name} is {short(config[name])}, and only {short(allowed[0])} is supported")
    if (begin := config.get("init_lora_weights")) not in _BEGINNINGS:
        raise BridgeError(
            f"{where}: init_lora_weights is {short(begin)}, which changes the base; convert it to plain LoRA with peft "
            "(save_pretrained, path_initial_model_for_weight_conversion)"
        )
    rank, alpha, dropout = (config.get(k, d) for k, d in (("r", 8), ("lora_alpha", 8), ("lora_dropout", 0.0)))
    if type(rank) is not int or not 1 <= rank <= 1 << 20:
        raise BridgeError(f"{where}: r is {short(rank)}, expected a number above 0")
    for name, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise BridgeError(f"{where}: {name} is {short(value)}, expected a number")
    if config.get("use_rslora"):  # alpha / sqrt(r), arXiv:2312.03732
        alpha = alpha * math.sqrt(rank)
    return Lora(rank, float(alpha), float(dropout), dora=bool(config.get("use_dora")))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickle = (folder / "adapter_model.bin").exists()
        hint = "adapter_model.bin is a pickle and may run code; save it as safetensors" if pickle else "not there"
        raise BridgeError(f"reading {path}: {hint}")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BridgeError(f"reading {path}: no usable safetensors file ({error})") from None


def _in_our_names(state: Mapping[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Tensors under released names, which servers' adapters have, under those of transformers."""
    known = {
        _PREFIX + entry.targets[0].items[0].name.removesuffix(".weight"): entry.key
        for entry in entries(targets(spec, CARRIERS))
        if not entry.parameter and len(entry.targets) == len(entry.targets[0].items) == 1
    }
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        word = next((w for w in _WORDS if key.endswith(f".{w}")), "")
        stem = key.removesuffix(f".{word}").replace(f"{_PREFIX}model.layers.", f"{_PREFIX}layers.", 1)
        found[f"{known[stem]}.{word}" if stem in known else key] = tensor
    return found


def _claimed(
    state: Mapping[str, Tensor], config: Mapping[str, Any], spec: ModelSpec, folder: Path
) -> tuple[Entry, ...]:
    """The adapters that the names in `state` speak of."""
    present = []
    alone = entries(targets(spec, CARRIERS))
    said = config.get("target_parameters") or []
    if not isinstance(said, list) or not all(isinstance(name, str) for name in said):
        raise BridgeError(f"reading {folder / CONFIG}: target_parameters is {short(said)}, expected a list of names")
    for entry in alone:
        named = not entry.parameter or any(entry.module == n or entry.module.endswith("." + n) for n in said)
        key = entry.key.replace(".base_layer", "") if entry.parameter else entry.key
        stems = (key, f"{key}.base_layer")
        if named and any(f"{stem}.{word}" in state for stem in stems for word in _WORDS):
            present += entry.targets
    return entries(present)


def _taken(entry: Entry, state: dict[str, Tensor], lora: Lora, folder: Path) -> list[Adapter]:
    """The adapters of an entry; their tensors are taken out of `state`."""
    words = _WORDS if lora.dora else _WORDS[:2]
    keys = [f"{entry.key}.{word}" for word in words]
    if lost := [key for key in keys if key not in state]:
        raise BridgeError(f"reading {folder / WEIGHTS}: it lacks {lost[0]}, beside others of {entry.module}")
    a, b, *magnitude = (state.pop(key) for key in keys)
    for key, tensor in zip(keys, (a, b, *magnitude), strict=True):
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise BridgeError(
                f"reading {folder / WEIGHTS}: {key} is {tensor.dtype} or holds values that are not finite"
            )
    count, (out, into) = len(entry.targets), entry.targets[0].shape
    wanted = {keys[0]: (count * lora.rank, into), keys[1]: (out, lora.rank * count)}
    for key, tensor in zip(keys, (a, b), strict=False):
        if tuple(tensor.shape) != wanted[key]:
            raise BridgeError(
                f"reading {folder / WEIGHTS}: {key} is {list(tensor.shape)}, expected {list(wanted[key])}: rank "
                f"{lora.rank} of {CONFIG}" + (f", {count} experts" if count > 1 else "")
            )
    if count == 1:
        return [Adapter(a, b, *magnitude)]
    stacked = b.unflatten(1, (lora.rank, count)).permute(2, 0, 1)  # [e, out, r]
    return [Adapter(x, y.contiguous()) for x, y in zip(a.unflatten(0, (count, lora.rank)), stacked, strict=True)]
