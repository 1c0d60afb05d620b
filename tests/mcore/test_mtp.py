"""Multi-token prediction, which transformers lacks, against its formula in plain torch."""

import pytest
import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from mtp_formula import SPECS, assert_mtp_is_the_formula, far
from reference import randomise, some_ids
from torch.nn import functional as F

from dsv4_bridge import BridgeError
from dsv4_bridge.mcore import build_model

pytestmark = pytest.mark.megatron


@pytest.fixture(autouse=True)
def fresh_counters() -> None:
    """megatron logs MTP losses in one table a process, as long as the first model is deep."""
    MTPLossLoggingHelper.tracker.clear()


@pytest.mark.parametrize(("depth", "length"), [(1, 1), (1, 3), (1, 150), (2, 150)])
def test_values_and_gradients_are_the_formula(depth: int, length: int) -> None:
    assert_mtp_is_the_formula(depth, length)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_loss_adds_every_depth_behind_its_factor(depth: int) -> None:
    """Depth k is trained on the token k + 2 ahead, and not beyond the end or the mask."""
    spec, factor = SPECS[depth], 0.3
    model = randomise(build_model(spec, mtp_loss_scaling_factor=factor, initialize_weights=False), 12).train()
    ids = some_ids(spec, 2, 40)
    labels = some_ids(spec, 2, 40, seed=8)  # unlike the ids: a roll of the wrong one shows
    mask = (torch.rand((2, 40), generator=torch.Generator().manual_seed(9)) < 0.7).float()
    losses = model(ids, labels=labels, loss_mask=mask.clone())
    ((losses * mask).sum() / mask.sum()).backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    logits = model(ids)
    main = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    assert torch.allclose(losses, main, atol=1e-5)
    total = (main * mask).sum() / mask.sum()
    for k, ahead in enumerate(model.mtp_logits(ids)):
        known = slice(0, 40 - k - 1)  # labels reach k + 1 less far
        loss = F.cross_entropy(ahead[:, known].transpose(1, 2), labels[:, k + 1 :], reduction="none")
        seen = mask[:, k + 1 :]
        total = total + factor / depth * (loss * seen).sum() / seen.sum()
    total.backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert theirs["mtp.layers.0.e_proj.weight"].any()
    assert far(ours, theirs) == {}


def test_a_model_without_mtp_has_none_of_it_and_the_same_logits() -> None:
    spec = SPECS[1]
    model = randomise(build_model(spec, initialize_weights=False), 13).eval()
    plain = build_model(spec.without_draft()).eval()
    assert plain.config.mtp_num_layers is None
    rest = {n: t for n, t in model.state_dict().items() if not n.startswith("mtp.")}
    assert set(rest) == set(plain.state_dict())
    plain.load_state_dict(rest)
    ids = some_ids(spec, 2, 20)
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))
    loss = plain(ids, labels=ids)
    assert loss.shape == (2, 20)
    with pytest.raises(BridgeError, match="mtp_num_layers=0"):
        build_model(spec.without_draft(), mtp_num_layers=0)
