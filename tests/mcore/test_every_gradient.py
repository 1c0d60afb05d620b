"""However short documents are, every trained parameter gets a gradient: data parallelism waits for all of them."""

import pytest
import torch
from reference import draft_spec, randomise, some_ids

from dsv4_bridge.mcore import build_model
from dsv4_bridge.mcore.adapters.adapters import add_adapters
from dsv4_bridge.mcore.indexer_phase import indexer_settings, set_trained
from dsv4_bridge.mcore.schedule import Batch, forward_backward
from dsv4_bridge.spec.lora import CARRIERS, Lora

pytestmark = pytest.mark.megatron

SPEC = draft_spec(swiglu_limit=5.0, index_topk=5)
DORA = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_b", "ffn.shared_experts")
ADAPTED: dict[str, Lora | None] = {
    "none": None,
    "everything": Lora(4, 6, targets=CARRIERS),
    "dora": Lora(4, 6, targets=DORA, dora=True),
}
CASES = [("frozen", "none"), ("warmup", "none"), ("sparse", "none"), ("frozen", "everything"), ("frozen", "dora")]
# Nothing is compressed, and most experts have no token; blocks of 4; and a block of 128.
LENGTHS = [(2,), (1, 3), (5, 2), (128, 1)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("experts", ["sequential", "grouped"])
@pytest.mark.parametrize("phase, adapted", CASES)
def test_every_parameter_has_a_gradient(phase: str, adapted: str, experts: str, lengths: tuple[int, ...]) -> None:
    model = build_model(
        SPEC, dtype=torch.float32, initialize_weights=False, expert_layout=experts, **indexer_settings(phase)
    )
    randomise(model)
    lora = ADAPTED[adapted]
    if lora is not None:
        add_adapters(model, lora)
    set_trained(model, phase)
    ids = some_ids(SPEC, 1, sum(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    batch = Batch(ids, ids.roll(-1, 1), torch.rand(1, sum(lengths)), cu_seqlens=ends if len(lengths) > 1 else None)
    forward_backward([model.train()], [batch])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and [name for name, parameter in trained.items() if parameter.grad is None] == []
    assert all(bool(parameter.grad.isfinite().all()) for parameter in trained.values() if parameter.grad is not None)
