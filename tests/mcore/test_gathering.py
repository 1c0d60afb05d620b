"""Who reads a parameter waits for it: its module, or the one that reads it from inside of itself."""

import pytest
import torch
from reference import draft_spec, randomise, some_ids

from dsv4_bridge.mcore import build_model
from dsv4_bridge.mcore.indexer_phase import indexer_settings, set_trained
from dsv4_bridge.mcore.optim.param_gather import READ_INNER
from dsv4_bridge.mcore.schedule import Batch, forward_backward

pytestmark = pytest.mark.megatron

SPEC = draft_spec(swiglu_limit=5.0, index_topk=5)


@pytest.mark.parametrize("experts", ["sequential", "grouped"])
@pytest.mark.parametrize("phase", ["frozen", "sparse", "warmup"])
def test_every_parameter_is_waited_for(phase: str, experts: str) -> None:
    model = build_model(
        SPEC, dtype=torch.float32, initialize_weights=False, expert_layout=experts, **indexer_settings(phase)
    )
    randomise(model)
    set_trained(model, phase)
    waited: set[int] = set()

    def wait(module: torch.nn.Module, _: object) -> None:
        waited.update(id(p) for p in module.parameters(recurse=isinstance(module, READ_INNER)))

    for module in model.modules():
        module.register_forward_pre_hook(wait)
    ids = some_ids(SPEC, 1, 140)
    forward_backward([model.train()], [Batch(ids, ids.roll(-1, 1))])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and [name for name, p in trained.items() if id(p) not in waited] == []
