"""FLOPs of logits that the backward of a loss in chunks makes again: as torch counts them on the real model."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dsv4_bridge.spec.flops import Terms, count_flops
from dsv4_bridge.spec.lora import Lora
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny

_LENGTH = 131


class Products(TorchDispatchMode):
    """FLOPs by torch's table alone: its counter follows modules, and cannot where one is called without gradients."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.megatron
@pytest.mark.parametrize("lora", [None, Lora(3)], ids=["trained", "adapters"])
def test_logits_of_chunks_are_made_again(lora: Lora | None) -> None:
    """What torch counts more in the backward of a loss in chunks; the forward is the same."""
    from dsv4_bridge.mcore import build_model
    from dsv4_bridge.mcore.adapters.adapters import add_adapters

    small = replace_spec(tiny(VARIANTS["Flash"]), num_hidden_layers=3, compress_ratios=(0, 4, 128, 0))
    spec = small.without_draft() if lora else small
    model = build_model(spec).train()
    if lora:
        add_adapters(model, lora)
    ids = torch.randint(spec.vocab_size, (1, _LENGTH))
    counted = []
    for chunk in (0, 20, _LENGTH):
        model.config.loss_chunk = chunk
        with Products() as seen:
            loss = model(ids, labels=ids.roll(-1, 1)).sum()
            forward = seen.flops
            loss.backward()
        counted.append((forward, seen.flops))
    whole, chunks, at_once = counted
    again = count_flops(spec, _LENGTH, lora=lora, logits_again=True).recomputed
    assert again.items() == Terms(logits=count_flops(spec, _LENGTH).forward.logits).items()
    assert whole == at_once
    assert chunks == (whole[0], whole[1] + again.total)
