"""Adapters as peft saves them: adapter_config.json and adapter_model.safetensors, out; `peft_reading` reads them.

Names: see `peft_names`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import BridgeError, files_named
from ..files import AnyPath, local, place_folder, scratch_folder, sync
from ..lock import hold
from ..spec.spec import ModelSpec
from .adapters import Adapter, Adapters, check_shapes
from .peft_config import CONFIG
from .peft_names import PREFIX, WORDS, Entry, entries
from .peft_reading import WEIGHTS, import_peft, open_adapters

__all__ = ["CONFIG", "NAMES", "WEIGHTS", "export_peft", "import_peft", "open_adapters"]

NAMES = ("transformers", "released")


@files_named("writing adapters")
def export_peft(
    adapters: Adapters,
    spec: ModelSpec,
    folder: AnyPath,
    base: str = "",
    names: str = "transformers",
    *,
    overwrite: bool = False,
) -> Path:
    """Write adapters for `peft.PeftModel.from_pretrained(DeepseekV4ForCausalLM, folder)`, or for servers.

    peft allows bare parameters no dropout, so where there are such the configuration says 0: dropout is of
    training, and does not change what the adapters compute.

    Args:
        adapters: whole adapters, as `gather_adapters` returns them.
        spec: the model's numbers.
        folder: new, or empty; with `overwrite`, or of such adapters. It appears when it is complete.
        base: name of the checkpoint they belong to, for the configuration.
        names: `transformers`, what peft looks for; or `released`, what servers that keep the released names look for
            (vLLM).
        overwrite: replace a folder of adapters that is in the way.

    Raises:
        BridgeError: parameters that are no module of their own, under released names; the folder is in the way or
            cannot be written; adapters of another model.
    """
    folder = local(folder, "writing")
    what = f"writing {folder}"
    if names not in NAMES:
        raise BridgeError(f"{what}: names {names!r}, expected {' or '.join(NAMES)}")
    known = check_shapes(adapters, spec, what)
    found = entries(known.values())
    if not found:
        raise BridgeError(f"{what}: there is no adapter to write")
    if adapters.whole:
        raise BridgeError(f"{what}: {min(adapters.whole)} is a whole weight and no adapter; `dsv4 merge` takes it")
    if adapters.lora.dora and (bare := [entry.module for entry in found if entry.parameter]):
        raise BridgeError(f"{what}: peft has no DoRA of the bare parameter {bare[0]}; `dsv4 merge` takes it")
    if names == "released":
        found = tuple(_released(entry, what) for entry in found)
    state: dict[str, Tensor] = {}
    for entry in found:
        values = [adapters.values[target.name] for target in entry.targets]
        whole = values[0] if len(entry.targets) == 1 else _stacked(values)
        for word, tensor in zip(WORDS, whole, strict=True):
            if tensor is not None:
                state[f"{entry.key}.{word}"] = tensor.contiguous()
    config = _config(adapters, found, spec, base)
    if names == "released":
        config["target_modules"] = sorted({entry.module.rpartition(".")[2] for entry in found})
    with hold(folder, what):
        _write(folder, overwrite, state, (json.dumps(config, indent=2) + "\n").encode())
    return folder


def _released(entry: Entry, what: str) -> Entry:
    """The same adapter under the released name of its weight."""
    if not (name := entry.released):
        raise BridgeError(
            f"{what}: the adapter of {entry.module} has no released name of its own (servers take those of attention's "
            "projections and of shared experts); merge it with `dsv4 merge`, or say --names transformers"
        )
    return entry._replace(key=PREFIX + name, module=name)


def _stacked(values: list[Adapter]) -> Adapter:
    """Experts' A [e, r, in] and B [e, out, r] -> [e*r, in] and [out, r*e], peft's order."""
    a, b = torch.stack([v.a for v in values]), torch.stack([v.b for v in values])
    return Adapter(a.flatten(0, 1), b.permute(1, 2, 0).flatten(1))


def _config(adapters: Adapters, found: tuple[Entry, ...], spec: ModelSpec, base: str) -> dict[str, Any]:
    bare, lora = [e for e in found if e.parameter], adapters.lora
    own = {e.module: adapters.own[e.targets[0].name] for e in found if e.targets[0].name in adapters.own}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": _plain(lora.alpha),
        "lora_dropout": 0.0 if bare else lora.dropout,
        "rank_pattern": {module: rank for module, (rank, _) in own.items()},
        "alpha_pattern": {module: _plain(alpha) for module, (_, alpha) in own.items()},
        "use_dora": lora.dora,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": _named([e for e in found if not e.parameter], spec),
        "target_parameters": _named(bare, spec) or None,
    }


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


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


def _write(folder: Path, overwrite: bool, state: dict[str, Tensor], config: bytes) -> None:
    try:
        _check_place(folder, overwrite)
        with scratch_folder(folder.with_name(f"{folder.name}.part")) as part:
            save_file(state, part / WEIGHTS, {"format": "pt"})
            (part / CONFIG).write_bytes(config)
            (part / WEIGHTS).chmod((part / CONFIG).stat().st_mode)  # safetensors keeps others from reading it
            for path in (part / WEIGHTS, part / CONFIG):
                sync(path)
            place_folder(part, folder)
    except (OSError, SafetensorError) as error:
        raise BridgeError(f"writing {folder}: {getattr(error, 'strerror', None) or error}") from None


def _check_place(folder: Path, overwrite: bool) -> None:
    """Refuse what is in the way: a file, or a folder that is neither empty nor to be replaced."""
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if folder.exists() and not folder.is_dir():
        raise BridgeError(f"writing {folder}: it exists and is not an empty folder")
    if there and not overwrite:
        raise BridgeError(
            f"writing {folder}: it exists and is not an empty folder; choose another, or --overwrite replaces adapters"
        )
    if others := [name for name in there if name not in (CONFIG, WEIGHTS, "README.md")]:
        raise BridgeError(
            f"writing {folder}: --overwrite replaces a folder of adapters, and this one holds {', '.join(others[:3])} "
            "too; choose another"
        )
