"""How tokens, labels and choices are counted: one expert a token, equal scores, weights that are no whole numbers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import draft_spec, randomise, some_ids

from dsv4_bridge import BridgeError
from dsv4_bridge.mcore import build_model
from dsv4_bridge.mcore.kernels.index import best_blocks
from dsv4_bridge.mcore.layers.moe import BiasRouter
from dsv4_bridge.mcore.layers.observe import watching
from dsv4_bridge.mcore.metrics import collect
from dsv4_bridge.mcore.schedule import Batch, forward_backward
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.text.sampling import Sampling, choose, distribution
from dsv4_bridge.train.loop import decay_begins
from dsv4_bridge.train.recipe import Schedule

pytestmark = pytest.mark.megatron

SPEC = draft_spec(swiglu_limit=5.0)


# ---------------------------------------------------------------- one expert a token


def test_trap24_a_single_experts_weight_is_over_its_sum() -> None:
    """transformers divides by the sum of the chosen scores for one expert, too."""
    spec = replace_spec(SPEC, num_experts_per_tok=1)
    model = randomise(build_model(spec, initialize_weights=False), 5)
    for router in [m for m in model.modules() if isinstance(m, BiasRouter)]:
        hidden = torch.randn(7, 2, spec.hidden_size)
        weights, chosen = router(hidden, None, some_ids(spec, 2, 7))
        assert (chosen.sum(-1) == 1).all()
        assert torch.allclose(weights.sum(-1), torch.full((14,), spec.routed_scaling_factor))


# ---------------------------------------------------------------- equal scores


def test_of_equal_scores_those_in_front_are_taken() -> None:
    torch.manual_seed(0)
    for n, k in ((20, 8), (75, 8), (300, 64)):
        for scores in (
            torch.zeros(1, 40, n),
            torch.relu(torch.randn(1, 40, n) - 1),
            torch.randint(0, 5, (1, 40, n)).float(),
        ):
            visible = torch.randint(1, n + 1, (1, 40))
            found = best_blocks(scores, visible, k)
            for row in range(40):
                seen = int(visible[0, row])
                order = scores[0, row, :seen].sort(descending=True, stable=True).indices[:k]
                assert set(found[0, row].tolist()) - {-1} == set(order.tolist())
            # As many columns as a step, a chunk or the whole sequence has: the same blocks.
            wide = torch.cat([scores, torch.rand(1, 40, 61) * 9], -1)
            assert torch.equal(found.sort(-1).values, best_blocks(wide, visible, k).sort(-1).values)


SPECIAL = (0.0, -0.0, torch.inf, -torch.inf, torch.nan, -torch.nan, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["special", "few values", "all differ"])
def test_choices_are_those_of_a_stable_sort(dtype: torch.dtype, kind: str) -> None:
    """Zeros of both signs are equal, and NaN of both counts as +inf; queries see any number of blocks, or none."""
    source = torch.Generator().manual_seed(6)
    for n, k in ((1, 1), (5, 5), (9, 4), (33, 8), (300, 64), (2100, 512)):
        scores = torch.randn((2, 30, n), generator=source)
        if kind == "special":
            scores = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (2, 30, n), generator=source)]
        elif kind == "few values":
            scores = (scores * 2).round() / 2
        scores = scores.to(dtype)
        before = scores.clone()
        visible = torch.randint(0, n + 1, (2, 30), generator=source)
        found = best_blocks(scores, visible, k)
        assert found.shape == (2, 30, k) and found.dtype == torch.int64
        assert torch.equal(scores.isnan(), before.isnan()) and torch.equal(scores.nan_to_num(), before.nan_to_num())
        for row, seen, mine in zip(scores.flatten(0, 1), visible.flatten().tolist(), found.flatten(0, 1), strict=True):
            plain = torch.where(row[:seen].isnan(), torch.inf, row[:seen].float())
            best = plain.sort(descending=True, stable=True).indices[:k].tolist()
            assert sorted(mine.tolist()) == sorted([*best, *[-1] * (k - len(best))])


def test_choosing_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a look at a value on the host waits for all that was asked of it: once a chunk of queries."""

    def waits(*_: Any) -> Any:
        raise AssertionError("a value was read back")

    for name in ("__bool__", "item", "tolist", "nonzero", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    scores, visible = torch.zeros(1, 40, 20), torch.arange(40).unsqueeze(0) // 2
    best_blocks(scores, visible, 8)


def test_prefill_and_steps_choose_alike_among_equals() -> None:
    spec = replace_spec(SPEC, index_n_heads=4)
    model = randomise(build_model(spec, initialize_weights=False), 3).eval()
    for name, parameter in model.named_parameters():
        if ".indexer.linear_wq_b" in name:  # few heads, and scores that are mostly 0
            parameter.data.abs_().neg_()
    ids = some_ids(spec, 1, 120)
    with torch.no_grad():
        whole = model(ids)
        prefix = model(ids[:, :97])
    assert torch.allclose(whole[:, :97], prefix, atol=2e-5)


# ---------------------------------------------------------------- weights of labels


def gradients(batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Of the language model's loss alone."""
    model = randomise(build_model(SPEC, mtp_loss_scaling_factor=0.0, initialize_weights=False), 7).train()
    forward_backward([model], batches)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def batch(seed: int, mask: torch.Tensor) -> Batch:
    return Batch(some_ids(SPEC, 2, 24, seed=seed), some_ids(SPEC, 2, 24, seed=seed + 50), mask)


def random_masks() -> list[torch.Tensor]:
    torch.manual_seed(4)
    return [(torch.rand(2, 24) > 0.5).float() for _ in range(3)]


@pytest.mark.parametrize("weight", [0.29, 0.1, 0.05, 3.0])
def test_a_weight_of_all_labels_changes_nothing(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weighted mean does not change with the unit of its weights."""
    counted: list[float] = []

    def finalize(model: Any, num_tokens: torch.Tensor | None = None, **_: Any) -> None:
        assert num_tokens is not None
        counted.append(float(num_tokens))
        for parameter in model[0].parameters():
            if parameter.grad is not None:
                parameter.grad /= float(num_tokens)

    found = []
    for factor in (1.0, weight):
        batches = [batch(10 * k, mask * factor) for k, mask in enumerate(random_masks())]
        model = randomise(
            build_model(SPEC, mtp_loss_scaling_factor=0.3, calculate_per_token_loss=True, initialize_weights=False), 7
        ).train()
        model.config.finalize_model_grads_func = finalize
        forward_backward([model], batches)
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert counted[0] == sum(float(m.sum()) for m in random_masks())
    worst = max(float((a - found[1][n]).abs().max() / a.abs().max().clamp(min=1e-3)) for n, a in found[0].items())
    assert worst < 1e-4


def test_a_small_sum_of_weights_is_a_mean_too() -> None:
    mask = torch.zeros(2, 24)
    mask[0, 3:5] = 0.2
    small, whole = gradients([batch(1, mask)]), gradients([batch(1, (mask > 0).float())])
    for name in small:
        assert torch.allclose(small[name], whole[name], atol=1e-6, rtol=1e-4), name


def test_a_micro_batch_without_learned_tokens_does_not_count() -> None:
    masks = random_masks()[:2]
    nothing = batch(30, torch.zeros(2, 24))
    with_nothing = gradients([batch(0, masks[0]), nothing, batch(10, masks[1])])
    without = gradients([batch(0, masks[0]), batch(10, masks[1])])
    for name in without:
        assert torch.allclose(with_nothing[name], without[name], atol=1e-6, rtol=1e-4), name


def test_the_mtp_loss_is_the_mean_over_tokens() -> None:
    """The same rows in one, two or four micro-batches, with uneven masks."""
    torch.manual_seed(2)
    ids, labels = some_ids(SPEC, 4, 24), some_ids(SPEC, 4, 24, seed=9)
    mask = torch.zeros(4, 24)
    for row, learned in enumerate((2, 24, 7, 15)):
        mask[row, :learned] = 1
    found = []
    for micro in (1, 2, 4):
        model = randomise(build_model(SPEC, mtp_loss_scaling_factor=0.3, initialize_weights=False), 7).train()
        parts = [slice(k, k + micro) for k in range(0, 4, micro)]
        forward_backward([model], [Batch(ids[p], labels[p], mask[p]) for p in parts])
        found.append(collect(model)["mtp_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6) == pytest.approx(found[2], rel=1e-6)


def test_balance_is_by_each_rows_own_length() -> None:
    """Rows of unequal padding in one micro-batch have the balance that they have alone."""
    options = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.7}
    ids, lengths = some_ids(SPEC, 3, 30), (30, 11, 4)
    padding = torch.arange(30) >= torch.tensor(lengths)[:, None]

    def balance(rows: torch.Tensor, pad: torch.Tensor | None) -> dict[str, torch.Tensor]:
        model = randomise(build_model(SPEC, initialize_weights=False, **options), 7).train()
        seen: dict[str, torch.Tensor] = {}
        with watching(lambda site, block, value: value):
            model(rows, padding_mask=pad)
        for module in model.modules():
            if isinstance(module, BiasRouter) and module.tally:
                total, count = module.tally[1].take()
                if total is not None:
                    seen[module.block] = total / count
        return seen

    together = balance(ids, padding)
    alone = [balance(ids[k : k + 1, :n], None) for k, n in enumerate(lengths)]
    for block, value in together.items():
        if not block.startswith("mtp"):
            assert float(value) == pytest.approx(sum(float(a[block]) for a in alone) / 3, rel=1e-5), block


# ---------------------------------------------------------------- ids, temperature, decay


def test_ids_outside_of_the_vocabulary_are_refused() -> None:
    model = build_model(SPEC)
    for wrong in (SPEC.vocab_size, -1, 1 << 40):
        ids = some_ids(SPEC, 1, 8)
        ids[0, 3] = wrong
        with pytest.raises(BridgeError, match=rf"token ids from .*expected 0 to {SPEC.vocab_size - 1}"):
            model(ids)
        good = some_ids(SPEC, 1, 8)
        with pytest.raises(BridgeError, match=rf"token ids from .*expected 0 to {SPEC.vocab_size - 1}"):
            model.mtp_logits(ids)
        with pytest.raises(BridgeError, match=rf"labels from .*expected 0 to {SPEC.vocab_size - 1}"):
            model(good, labels=ids)


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 1e-10, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_a_temperature_near_zero_takes_the_largest(temperature: float, scale: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(5, 40) * scale
    how = Sampling(temperature=temperature, top_p=0.9, top_k=10)
    chances, _ = distribution(logits, how)
    assert not chances.isnan().any()
    if scale > 1 or temperature < 1e-3:
        assert torch.equal(choose(logits, how, torch.rand(5)), logits.argmax(-1))


@pytest.mark.parametrize(
    ("schedule", "begins"),
    [
        (Schedule(steps=100, warmup=10, decay="constant", decay_steps=0), None),
        (Schedule(steps=100, warmup=10, decay="cosine", decay_steps=0), 10),
        (Schedule(steps=100, warmup=10, decay="linear", decay_steps=50), 10),
        (Schedule(steps=100, warmup=10, decay="wsd", decay_steps=30), 70),
        (Schedule(steps=100, warmup=10, decay="wsd", decay_steps=0), 10),
        (Schedule(steps=100, warmup=10, decay="wsd", decay_steps=100_000), 10),
        (Schedule(steps=100, warmup=0, decay="wsd", decay_steps=100), 0),
    ],
)
def test_the_decay_begins_where_the_rate_first_falls(schedule: Schedule, begins: int | None) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from dsv4_bridge.train.build import _scheduler
    from dsv4_bridge.train.choose import change, choose

    assert decay_begins(schedule) == begins
    recipe = replace(change(choose("flash-pretrain").recipe, {}), schedule=schedule)
    parameter = torch.nn.Parameter(torch.zeros(1))
    scheduler: OptimizerParamScheduler = _scheduler(recipe, torch.optim.AdamW([parameter]))
    rates = []
    for step in range(schedule.steps):
        scheduler.num_steps = step
        scheduler.step(1)
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
    falls = [k for k in range(1, len(rates)) if rates[k] < rates[k - 1]]
    first = falls[0] if falls else None
    assert first == begins or (begins == 0 and rates[0] < recipe.optimizer.lr)
