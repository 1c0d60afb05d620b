"""Gradients of the draft depths over several micro-batches, against the formula in float64."""

from typing import Any

import pytest
import torch
from mtp_formula import SPECS, far, formula_logits
from reference import randomise, some_ids
from torch import Tensor
from torch.nn import functional as F

from dsv4_bridge.mcore import DeepSeekV4Model, build_model
from dsv4_bridge.mcore.layers.context import ahead, ends_of
from dsv4_bridge.mcore.layers.observe import watching
from dsv4_bridge.mcore.metrics import collect
from dsv4_bridge.mcore.schedule import Batch, forward_backward

pytestmark = pytest.mark.megatron

ROWS, LENGTH, FACTOR = 2, 12, 0.3


def masks(kind: str) -> list[Tensor | None]:
    """Weights of the micro-batches' labels."""
    source = torch.Generator().manual_seed(4)
    ones = [(torch.rand((ROWS, LENGTH), generator=source) < share).float() for share in (0.7, 0.2, 0.9)]
    parts = [mask * torch.rand((ROWS, LENGTH), generator=source) * 0.3 for mask in ones]
    first = torch.zeros(ROWS, LENGTH)
    first[:, 0] = 0.4  # learned by the main loss, and by no depth
    return {
        "none": [None] * 3,
        "whole": [*ones],
        "fractions": [*parts],
        "small": [mask * 1e-3 for mask in ones],
        "empty": [ones[0], torch.zeros(ROWS, LENGTH), ones[1]],
        "empty fractions": [parts[0], torch.zeros(ROWS, LENGTH), parts[1]],
        "the first alone": [parts[0], first, parts[1]],
        "nothing": [torch.zeros(ROWS, LENGTH)] * 2,
        "one has none": [parts[0], None, parts[1]],
    }[kind]


def ours(model: DeepSeekV4Model, batches: list[Batch], streams: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of the depths. The trunk is cut off behind its last layer, so that nothing else reaches them."""
    last, waiting = f"layers.{model.spec.num_hidden_layers - 1}", iter(streams)

    def finalize(chunks: Any, num_tokens: Tensor | None = None, **_: Any) -> None:
        for parameter in chunks[0].parameters():
            if parameter.grad is not None and num_tokens is not None:
                parameter.grad /= float(num_tokens) or 1.0

    model.config.finalize_model_grads_func = finalize
    with watching(lambda site, block, value: next(waiting) if (site, block) == ("streams", last) else None):
        forward_backward([model], batches)
    return {n: p.grad for n, p in model.named_parameters() if n.startswith("mtp.") and p.grad is not None}


def formula(
    model: DeepSeekV4Model, batches: list[Batch], streams: list[Tensor], per_token: bool
) -> tuple[dict[str, Tensor], float]:
    """The same in float64, and the mean over weights of all depths."""
    values = {n: t.detach().double().requires_grad_() for n, t in model.named_parameters()}
    values |= {n: t.double() for n, t in model.named_buffers() if n.endswith("expert_bias")}
    depth = model.spec.mtp_layers
    totals: list[list[tuple[Tensor, float]]] = [[] for _ in range(depth)]
    for batch, stream in zip(batches, streams, strict=True):
        wide = stream.double().transpose(0, 1).unflatten(-1, (model.spec.hc_mult, -1))
        mask = torch.ones(ROWS, LENGTH) if batch.loss_mask is None else batch.loss_mask
        for k, logits in enumerate(formula_logits(model, values, wide, batch.input_ids)):
            wanted, weights = batch.labels[:, k + 1 :], mask[:, k + 1 :].double()
            losses = F.cross_entropy(logits[:, : LENGTH - k - 1].transpose(1, 2), wanted, reduction="none")
            totals[k].append(((losses * weights).sum(), float(weights.sum())))
    loss = torch.zeros((), dtype=torch.float64)
    for found in totals:
        if per_token:
            loss = loss + sum(total for total, _ in found) / (sum(weight for _, weight in found) or 1.0)
        elif means := [total / weight for total, weight in found if weight]:
            loss = loss + sum(means) / len(means)
    if loss.requires_grad:
        (FACTOR / depth * loss).backward()
    weight = sum(weight for found in totals for _, weight in found)
    mean = float(sum(total.detach() for found in totals for total, _ in found)) / (weight or 1.0)
    return {n: t.grad for n, t in values.items() if n.startswith("mtp.") and t.grad is not None}, mean


@pytest.mark.parametrize("per_token", [False, True], ids=["per micro-batch", "per token"])
@pytest.mark.parametrize(
    ("kind", "depth"),
    [
        ("none", 2),
        ("whole", 1),
        ("fractions", 1),
        ("fractions", 2),
        ("small", 1),
        ("empty", 1),
        ("empty fractions", 2),
        ("the first alone", 1),
        ("nothing", 1),
        ("one has none", 1),
    ],
)
def test_gradients_are_those_of_weighted_means(kind: str, depth: int, per_token: bool) -> None:
    spec = SPECS[depth]
    settings = {"mtp_loss_scaling_factor": FACTOR, "calculate_per_token_loss": per_token}
    model = randomise(build_model(spec, initialize_weights=False, **settings), 11).train()
    batches = [
        Batch(some_ids(spec, ROWS, LENGTH, seed=n), some_ids(spec, ROWS, LENGTH, seed=50 + n), mask)
        for n, mask in enumerate(masks(kind))
    ]
    source = torch.Generator().manual_seed(3)
    shape = (LENGTH, ROWS, spec.hc_mult * spec.hidden_size)
    streams = [torch.randn(shape, generator=source) / 2 for _ in batches]
    mine = ours(model, batches, streams)
    exact, mean = formula(model, batches, streams, per_token)
    assert collect(model).get("mtp_loss", 0.0) == pytest.approx(mean, rel=1e-5)
    if kind == "nothing":
        return assert_none(mine)
    assert sum(bool(g.any()) for g in exact.values()) > 30 * depth
    found = far({n: mine[n] for n in exact}, exact)
    # A head's scale is one number, a sum over all tokens that nearly cancels.
    assert {n: e for n, e in found.items() if not (n.endswith("hc_head_scale") and e < 1e-3)} == {}


def assert_none(gradients: dict[str, Tensor]) -> None:
    assert gradients and not any(g.any() for g in gradients.values())


def test_labels_stay_in_their_document() -> None:
    weights = torch.arange(1.0, 10).unsqueeze(0)
    assert ahead(weights).tolist() == [[2, 3, 4, 5, 6, 7, 8, 9, 0]]
    ends = ends_of(torch.tensor([0, 0, 3, 4, 4, 9, 9], dtype=torch.int32), 9, weights.device)
    assert ahead(weights, ends).tolist() == [[2, 3, 0, 0, 6, 7, 8, 9, 0]]
    assert ahead(ahead(weights, ends), ends).tolist() == [[3, 0, 0, 0, 7, 8, 9, 0, 0]]
