"""A pass through megatron's schedules leaves nothing behind for the next backward."""

import pytest
import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from mtp_formula import SPECS
from reference import randomise, some_ids

from dsv4_bridge.mcore import build_model
from dsv4_bridge.mcore.indexer_phase import indexer_settings, set_trained
from dsv4_bridge.mcore.schedule import Batch, forward_backward

pytestmark = pytest.mark.megatron


def test_a_plain_backward_is_the_same_before_and_after_a_schedule() -> None:
    """Scales of the MTP, balance and indexer losses are one a process; a schedule divides them by its micro-batches."""
    MTPLossLoggingHelper.tracker.clear()
    spec = SPECS[1]
    balance = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}
    model = build_model(spec, mtp_loss_scaling_factor=0.3, **balance, **indexer_settings("sparse", 0.5))
    set_trained([randomise(model, 12).train()], "sparse")
    ids, labels = some_ids(spec, 2, 40), some_ids(spec, 2, 40, seed=8)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=labels).mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    forward_backward([model], [Batch(ids, labels)] * 4)
    after = gradients()
    assert before.keys() == after.keys() and len(before) > 100
    assert any(".indexer." in name for name in before) and any(name.startswith("mtp.") for name in before)
    assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())
