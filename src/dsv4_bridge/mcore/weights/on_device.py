"""Encoded weights decoded where the model lies: codes cross the bus to a GPU, not the values that they stand for."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...codec.tensors import as_tensor, decode, illegal
from ...spec.plan import Item
from ...store.values import HFValues, Scratch, Values


class Pinned(Scratch):
    """Buffers that a GPU reads without the host copying them first."""

    def new(self, size: int) -> np.ndarray:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()


def computes(device: torch.device) -> bool:
    """Whether values are decoded and encoded on the device itself; on a CPU the compiled codecs are faster."""
    return device.type != "cpu"


def scratch_for(device: torch.device) -> Scratch:
    """Buffers to read into what goes to `device`."""
    return Pinned() if device.type == "cuda" else Scratch()


def device_stripes(
    source: Values, item: Item, start: int, stop: int, scratch: Scratch, device: torch.device
) -> Iterator[Tensor]:
    """Rows of an item on a device, stripe by stripe, as `source.stripes` has them on the host: bf16, float32, int.

    A stripe's codes are copied, looked through and decoded there; the host waits once, until they were looked
    through: then its buffer may be filled again, while the device decodes.

    Raises:
        BridgeError: what cannot be decoded, in the words of the codec.
    """
    bound = source.checkpoint.bound[item.name] if isinstance(source, HFValues) else None
    if bound is None or bound.scale is None or not isinstance(source, HFValues):
        for stripe in source.stripes(item, start, stop, scratch):
            yield as_tensor(stripe).to(device)
        return
    for first, raw, scale in source.stored(item, start, stop, scratch):
        assert scale is not None
        codes, scales = (torch.from_numpy(x).to(device, non_blocking=True) for x in (raw, scale))
        if bool(illegal(bound.encoding, codes, scales)):
            source.decoded(bound, first, raw, scale, scratch)
            raise AssertionError(f"{bound.weight_name}: only the device finds fault with it")
        yield decode(bound.encoding, codes, scales)
