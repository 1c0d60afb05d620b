"""Balance of experts: the sequence-wise loss and the bias update, each against its formula in plain torch."""

import sys
from typing import Any

import pytest
import torch
from bugs import Bug, put
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from mtp_formula import far
from reference import RECOMPUTING, draft_spec, randomise, some_ids
from torch.nn import functional as F

from dsv4_bridge import BridgeError
from dsv4_bridge.mcore import DeepSeekV4Model, build_model
from dsv4_bridge.mcore.config import model_config
from dsv4_bridge.mcore.layers.moe import BiasRouter, HashRouter
from dsv4_bridge.mcore.layers.observe import watching
from dsv4_bridge.mcore.metrics import collect
from dsv4_bridge.mcore.schedule import Batch, forward_backward

pytestmark = pytest.mark.megatron

# The package has a function of the module's name.
finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]

SPEC = draft_spec(swiglu_limit=5.0)
BLOCKS = ["layers.1", "layers.2", "layers.3", "mtp.0"]  # layers.0 routes by id
COEFFICIENT = 0.7


def balancing(coefficient: float = COEFFICIENT) -> dict[str, Any]:
    return {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": coefficient}


def routers(model: torch.nn.Module) -> dict[str, BiasRouter]:
    return {m.block: m for m in model.modules() if isinstance(m, BiasRouter) and not isinstance(m, HashRouter)}


def gradients(model: DeepSeekV4Model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def formula(model: DeepSeekV4Model, inputs: dict[str, torch.Tensor], padded: int) -> dict[str, torch.Tensor]:
    """sum_i f_i P_i of every routed layer, mean over sequences (DeepSeek-V3 report, equations 17 to 20).

    f_i counts the tokens whose best scores, without the bias, include expert i's, over T K / N; P_i is the
    mean of i's share in the scores.
    """
    found = {}
    for block, router in routers(model).items():
        scores = F.softplus(inputs[block] @ router.weight.T).sqrt()  # [s, b, experts]
        scores = scores[: len(scores) - padded]
        losses = []
        for sequence in scores.unbind(1):
            best = sequence >= sequence.topk(SPEC.num_experts_per_tok).values[:, -1:]
            f = best.float().sum(0) * SPEC.n_routed_experts / (SPEC.num_experts_per_tok * len(sequence))
            p = (sequence / sequence.sum(-1, keepdim=True)).mean(0)
            losses.append((f * p).sum())
        found[block] = torch.stack(losses).mean()
    return found


def assert_balance_is_the_formula(padded: int = 0, **settings: Any) -> None:
    ids = some_ids(SPEC, 2, 40)
    padding = torch.zeros_like(ids).bool()
    padding[:, 40 - padded :] = padded > 0
    call = {"labels": ids.roll(-1, 1), "padding_mask": padding if padded else None}
    ours = randomise(build_model(SPEC, initialize_weights=False, **balancing(), **settings), 3).train()
    ours(ids, **call).mean().backward()
    mine, reported = gradients(ours), collect(ours)["balance_loss"]

    plain = randomise(build_model(SPEC, initialize_weights=False), 3).train()
    inputs: dict[str, torch.Tensor] = {}
    for block, router in routers(plain).items():
        router.register_forward_pre_hook(lambda _, args, block=block: inputs.__setitem__(block, args[0]))
    main = plain(ids, **call).mean()
    losses = formula(plain, inputs, padded)
    assert list(losses) == BLOCKS
    assert "balance_loss" not in collect(plain)
    (main + COEFFICIENT * sum(losses.values())).backward()
    theirs = gradients(plain)
    assert far(mine, theirs) == {}
    assert reported == pytest.approx(float(sum(losses.values())) / len(BLOCKS), rel=1e-5)
    plain(ids, **call).mean().backward()
    without = gradients(plain)
    assert (without["decoder.layers.3.mlp.router.weight"] - theirs["decoder.layers.3.mlp.router.weight"]).norm() > 1e-4


@pytest.mark.parametrize("padded", [0, 7])
def test_the_sequence_wise_loss_is_the_reports(padded: int) -> None:
    assert_balance_is_the_formula(padded)


def test_recomputation_counts_the_loss_once() -> None:
    assert_balance_is_the_formula(**RECOMPUTING["full"])


def aux_for_hash_layers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HashRouter, "_balanced", BiasRouter._balanced)


BUGS: dict[str, Bug] = {
    "over the batch, not the sequence": put(
        BiasRouter, "_apply_seq_aux_loss", lambda f: lambda self, w, s, m, n, b, **k: f(self, w, s, m, n * b, 1, **k)
    ),
    "hash layers have it too": aux_for_hash_layers,
}


@pytest.mark.parametrize("name", BUGS)
def test_a_mistake_in_the_loss_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[name](monkeypatch)
    with pytest.raises(AssertionError):
        assert_balance_is_the_formula()


def biases(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {block: router.expert_bias.clone() for block, router in routers(model).items()}


def pass_through(model: torch.nn.Module, batches: list[Batch], **more: Any) -> None:
    """A pass of megatron's schedule, with what it does at its end."""
    config = model.config
    config.finalize_model_grads_func = finalize.finalize_model_grads
    forward_backward([DistributedDataParallel(config, DistributedDataParallelConfig(), model)], batches, **more)


def stepped(model: DeepSeekV4Model, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Tokens of every expert in such a pass, counted here."""
    counts = {block: torch.zeros(SPEC.n_routed_experts) for block in BLOCKS}

    def count(site: str, block: str, value: torch.Tensor) -> None:
        if site == "ffn.router" and block in counts:
            counts[block] += torch.bincount(value.flatten(), minlength=SPEC.n_routed_experts)

    with watching(count):
        pass_through(model, batches)
    return counts


def some_batches() -> list[Batch]:
    return [Batch(ids, ids.roll(-1, 1)) for ids in (some_ids(SPEC, 2, 30, seed) for seed in (4, 5))]


def assert_steps_move_the_biases() -> None:
    rate = 0.03
    model = randomise(build_model(SPEC, moe_router_bias_update_rate=rate, initialize_weights=False), 3).train()
    table = model.decoder.layers[0].mlp.router.tid2eid.clone()
    for batches in (some_batches(), some_batches()[:1]):  # the second counts anew
        before = biases(model)
        counts = stepped(model, batches)
        for block, bias in biases(model).items():
            load = counts[block]
            assert float(load.sum()) == len(batches) * 60 * SPEC.num_experts_per_tok
            up, down = (load < load.mean()).double(), (load > load.mean()).double()
            assert torch.allclose(bias.double(), before[block].double() + rate * (up - down), rtol=0, atol=1e-7), block
            assert up.any() and down.any()
        loads = torch.stack([counts[block] / counts[block].mean() for block in BLOCKS])
        found = collect(model)
        assert found["expert_load_max"] == pytest.approx(float(loads.max()))
        assert found["expert_load_min"] == pytest.approx(float(loads.min()))
    assert torch.equal(model.decoder.layers[0].mlp.router.tid2eid, table)


def test_a_step_moves_each_bias_against_its_load() -> None:
    """By the rate, up where the expert had less than the mean, down where more; of all micro-batches together."""
    assert_steps_move_the_biases()


UPDATES: dict[str, Bug] = {
    "the other way": put(
        finalize, "get_updated_expert_bias", lambda f: lambda load, bias, rate, **k: f(load, bias, -rate, **k)
    ),
    "counts are kept": put(finalize, "reset_model_temporary_tensors", lambda _: lambda *args: None),
    "not multi-token prediction's": put(
        BiasRouter,
        "_apply_expert_bias",
        lambda f: lambda self, *a, **k: None if self.is_mtp_layer else f(self, *a, **k),
    ),
}


@pytest.mark.parametrize("name", UPDATES)
def test_a_mistake_in_the_update_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    UPDATES[name](monkeypatch)
    with pytest.raises(AssertionError):
        assert_steps_move_the_biases()


def test_a_model_of_bf16_keeps_its_biases_in_float32() -> None:
    """bf16 around 0.7 knows steps of 0.004: a rate of 0.001 would vanish."""
    model = randomise(
        build_model(SPEC, dtype=torch.bfloat16, moe_router_bias_update_rate=1e-3, initialize_weights=False), 3
    ).train()
    before = biases(model)
    pass_through(Float16Module(model.config, model), some_batches())
    for block, bias in biases(model).items():
        assert bias.dtype is torch.float32
        moved = (bias - before[block]).abs()
        assert ((moved - 1e-3).abs() < 1e-6).float().mean() > 0.7, block  # the others had the mean


@pytest.mark.parametrize("how", ["no rate", "frozen", "looking only"])
def test_biases_rest(how: str) -> None:
    model = randomise(
        build_model(SPEC, moe_router_bias_update_rate=0.0 if how == "no rate" else 0.1, initialize_weights=False), 3
    ).train()
    before = biases(model)
    if how == "looking only":
        pass_through(model, some_batches(), forward_only=True)
        assert all(float(r.local_tokens_per_expert.sum()) == 0 for r in routers(model).values())
    else:
        for router in routers(model).values():
            router.frozen_expert_bias = how == "frozen"
        stepped(model, some_batches())
    assert all(torch.equal(before[block], bias) for block, bias in biases(model).items())


def test_metrics_are_means_of_a_step_and_start_anew() -> None:
    """Two micro-batches together: the mean of what each says alone."""
    model = randomise(build_model(SPEC, initialize_weights=False, **balancing(), dsa_indexer_loss_coeff=0.1), 3).train()
    each = []
    for batch in some_batches():
        forward_backward([model], [batch])
        each.append(collect(model))
    forward_backward([model], some_batches())
    both = collect([model])
    for name in ("balance_loss", "indexer_loss", "mtp_loss"):
        assert each[0][name] != each[1][name]
        assert both[name] == pytest.approx((each[0][name] + each[1][name]) / 2, rel=1e-5)
    assert collect(model) == {}
    forward_backward([model.eval()], some_batches()[:1], forward_only=True)
    assert collect(model) == {}


def test_settings_that_balance_nothing_are_refused() -> None:
    for settings, said in (
        ({"moe_aux_loss_coeff": 1e-4}, "say moe_router_load_balancing_type='seq_aux_loss'"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "chosen by score and bias"),
        ({"moe_router_load_balancing_type": "noaux_tc"}, "chosen by score and bias"),
        ({"moe_router_enable_expert_bias": False}, "moe_router_bias_update_rate=0 leaves"),
    ):
        with pytest.raises(BridgeError, match=said):
            model_config(SPEC, **settings)
    config = model_config(SPEC, **balancing(1e-4), moe_router_bias_update_rate=1e-3)
    assert (config.moe_aux_loss_coeff, config.moe_router_bias_update_rate) == (1e-4, 1e-3)
