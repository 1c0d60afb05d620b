"""Weights into a live model and out of it, a stripe or a tensor at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...codec.tensors import as_tensor
from ...errors import BridgeError, counted, files_named
from ...files import AnyPath
from ...spec.encodings import TILE
from ...spec.plan import Item
from ...spec.spec import ModelSpec, differing
from ...store.checkpoint import open_checkpoint
from ...store.reading import kept_in_cache
from ...store.values import Scratch, Values
from ..model import DeepSeekV4Model
from .on_device import computes, device_stripes, scratch_for
from .places import Place, places


@files_named("loading weights")
def load_weights(model: DeepSeekV4Model, checkpoint: AnyPath, *, allow_lossy: bool = False) -> None:
    """Fill a model from a Hugging Face folder (any encoding and naming) or a torch_dist checkpoint.

    Only what this rank holds is read, a stripe of rows at a time. A model on a GPU gets the codes of encoded weights
    and decodes them there, to the same values.

    Args:
        model: made by `build_model` for the same numbers; without MTP where it should not be loaded.
        checkpoint: the folder, or `owner/name` on the Hub.
        allow_lossy: permit float32 weights to be rounded to a bf16 model's parameters.

    Raises:
        BridgeError: unreadable, other numbers, a tensor missing, or a value that would be rounded.
    """
    with open_checkpoint(checkpoint) as opened:
        check_numbers(model, opened.spec, opened.path)
        _fill(model, opened.source, set(opened.plan.by_name), opened.path, allow_lossy)


def check_numbers(model: DeepSeekV4Model, spec: ModelSpec, path: Path) -> None:
    """Refuse a checkpoint with which another model is computed; draft blocks are looked for one by one."""
    if others := differing(spec.without_draft(), model.spec.without_draft()):
        raise BridgeError(f"loading {path}: it has other numbers than the model: {'; '.join(others[:4])}")


def _fill(model: DeepSeekV4Model, source: Values, there: set[str], path: Path, allow_lossy: bool) -> None:
    plan, found = places(model)
    if lost := [i.name for i in plan.items if i.name in found and i.name not in there]:
        raise BridgeError(
            f"loading {path}: it lacks {counted(len(lost), 'tensor')} of the model ({lost[0]} …); "
            "where the checkpoint has no draft block, train by flash-finetune-no-mtp (model.mtp=false), or in Python "
            "build the model without MTP (spec.without_draft())"
        )
    scratch = scratch_for(next(model.parameters()).device)
    with kept_in_cache():  # other ranks of this machine read the same
        for item in plan.items:
            fill_item(item, found.get(item.name, ()), source, scratch, allow_lossy)


def fill_item(item: Item, here: Sequence[Place], source: Values, scratch: Scratch, allow_lossy: bool) -> None:
    """Read the rows of an item that have a place, and put them there.

    Raises:
        BridgeError: unreadable, or values would be rounded and `allow_lossy` does not say that they may.
    """
    for start, stop in _spans([(p.start, p.stop) for p in here]):
        at = start // TILE * TILE  # stripes of quantised tensors begin at whole tiles
        for values in stripes_on(here[0].tensor.device, item, at, stop, source, scratch):
            for place in here:
                low, high = max(at, place.start), min(at + len(values), place.stop)
                if low < high:
                    held = values[low - at : high - at]
                    if values.ndim > 1:
                        held = held[:, slice(*place.columns)]
                    _store(place.rows(low, high), held, item, allow_lossy)
            at += len(values)


def stripes_on(
    device: torch.device, item: Item, start: int, stop: int, source: Values, scratch: Scratch
) -> Iterator[Tensor]:
    """Rows of an item, decoded, stripe by stripe: where they are used, or on the host for a CPU."""
    if computes(device):
        return device_stripes(source, item, start, stop, scratch, device)
    return map(as_tensor, source.stripes(item, start, stop, scratch))


def _spans(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Contiguous row ranges, joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(parts):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _store(into: Tensor, values: Tensor, item: Item, allow_lossy: bool) -> None:
    if into.dtype is torch.bfloat16 and values.dtype is torch.float32 and not allow_lossy:
        rounded = int((values.to(torch.bfloat16).float() != values).sum())
        if rounded:
            raise BridgeError(
                f"loading {item.name} into a bf16 model would round {rounded} float32 values; "
                "allow_lossy=True accepts that"
            )
    into.copy_(values)
