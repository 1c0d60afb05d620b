"""Fresh weights: what a row's role says of its values is what its module itself begins with."""

import pytest
import torch

from dsv4_bridge.mcore import build_model
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.train.initial import initialize_weights

pytestmark = pytest.mark.megatron


def test_constants_are_those_of_the_modules() -> None:
    """Norms and scales of 1, biases and sinks of 0: a role that says otherwise would train from another model."""
    model = build_model(tiny(VARIANTS["Flash"]), dtype=torch.float32)
    own = {name: value.detach().clone() for name, value in model.named_parameters()}
    constant = {name for name, value in own.items() if value.unique().numel() == 1}
    initialize_weights([model], 5, 0.02)
    for name, value in model.named_parameters():
        if name in constant:
            assert torch.equal(value, own[name]), name
        else:
            assert abs(value.std() / 0.02 - 1) < 0.2, name
    assert sum(name.endswith(("norm.weight", "layernorm.weight")) for name in constant) > 10
