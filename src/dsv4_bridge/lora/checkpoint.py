"""Adapters of a Megatron training checkpoint, read without megatron: what `mcore.adapters.sharded_adapters` saves."""

from pathlib import Path

import torch
from torch import Tensor

from ..errors import BridgeError, files_named, some
from ..spec.lora import ADAPTERS, ALPHA, CARRIERS, PARTS, Lora, Target, checkpoint_name, targets
from ..spec.plan import Item
from ..spec.spec import ModelSpec
from ..store.run_config import FILE, read_run_config
from ..store.torch_dist.reader import TorchDistReader, open_torch_dist
from .adapters import Adapter, Adapters


@files_named("reading adapters")
def read_adapters(path: Path, spec: ModelSpec | None = None) -> tuple[Adapters, ModelSpec]:
    """Whole adapters of a checkpoint that any layout saved, and the model's numbers.

    Args:
        path: root or iteration folder.
        spec: the model's numbers; None: those of the checkpoint's run_config.yaml.

    Raises:
        BridgeError: unreadable, no adapters, of another model, or tensors that are missing or unknown.
    """
    with open_torch_dist(path) as reader:
        if ALPHA not in reader.tensors:
            raise BridgeError(
                f"reading adapters of {path}: it has none ({ALPHA} is not in it): this is a run of full training, or "
                f"an import; use dsv4 export: `dsv4 export {path} OUT` writes its weights as a folder"
            )
        known = read_run_config(reader.path / FILE)
        if known is None and spec is None:
            raise BridgeError(f"reading adapters of {path}: it has no {FILE} of this tool, which tells the model")
        if known and spec and known[0].without_draft() != spec.without_draft():
            raise BridgeError(f"reading adapters of {path}: its {FILE} describes another model than the checkpoint's")
        spec = spec or known[0]  # type: ignore[index]
        left = {key for key in reader.tensors if key.startswith(f"{ADAPTERS}.") and key != ALPHA}
        values, keys, dora = {}, dict[str, None](), False
        for target in targets(spec, CARRIERS):
            if _key(target.items[0], "lora_A") not in reader.tensors:
                continue
            values[target.name], used = _adapter(reader, target, spec, path)
            left -= used
            keys |= {item.row.key: None for item in target.items}
            dora = dora or values[target.name].magnitude is not None
        if left:
            raise BridgeError(f"reading adapters of {path}: {len(left)} tensors are none ({some(sorted(left))})")
        rank = next(iter(values.values())).a.shape[0]
        alpha = float(_tensor(reader, ALPHA).reshape(()))
    return Adapters(Lora(rank, alpha, targets=tuple(keys), dora=dora), values), spec


def _adapter(reader: TorchDistReader, target: Target, spec: ModelSpec, path: Path) -> tuple[Adapter, set[str]]:
    """One adapter, and the keys that it was read from."""
    found: dict[str, list[Tensor]] = {part: [] for part in PARTS}
    used: set[str] = set()
    for number, item in enumerate(target.items):
        for part in PARTS if number == 0 else ("lora_B",):
            key = _key(item, part)
            if key not in reader.tensors and part == "magnitude":
                continue
            used.add(key)
            found[part].append(_tensor(reader, key, item.expert, spec.n_routed_experts))
    a, b = found["lora_A"][0], torch.cat(found["lora_B"])
    out, into = target.shape
    if a.shape[1:] != (into,) or b.shape != (out, len(a)):
        raise BridgeError(
            f"reading adapters of {path}: A of {target.name} is {list(a.shape)} and B {list(b.shape)}, expected "
            f"[rank, {into}] and [{out}, rank]"
        )
    return Adapter(a, b, *found["magnitude"]), used


def _key(item: Item, part: str) -> str:
    return f"{ADAPTERS}.{checkpoint_name(item)}.{part}"


def _tensor(reader: TorchDistReader, key: str, expert: int | None = None, experts: int = 0) -> Tensor:
    """A tensor, or one expert's of a stack."""
    if expert is None:
        bits = reader.read(key)
    else:
        shape = reader.tensors[key].shape if key in reader.tensors else (0,)
        if shape[0] != experts:
            raise BridgeError(f"reading {key} of {reader.path}: of {shape[0]} experts, expected {experts}")
        bits = reader.read(key, (expert, *(0 for _ in shape[1:])), (1, *shape[1:]))[0]
    tensor = torch.from_numpy(bits)
    return tensor.view(torch.bfloat16) if tensor.dtype is torch.uint16 else tensor
