"""The indexer's objective against its formula in plain torch and float64, by itself and in the model."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from bugs import put
from mtp_formula import close
from reference import RECOMPUTING, draft_spec, randomise, small_spec, some_ids

from dsv4_bridge import BridgeError
from dsv4_bridge.mcore import DeepSeekV4Model, build_model
from dsv4_bridge.mcore.config import model_config
from dsv4_bridge.mcore.indexer_phase import indexer_settings, set_trained
from dsv4_bridge.mcore.kernels import attention as attend_module
from dsv4_bridge.mcore.kernels import indexer_loss
from dsv4_bridge.mcore.kernels.attention import Reach
from dsv4_bridge.mcore.kernels.index import IndexTerms, best_blocks, index_scores
from dsv4_bridge.mcore.layers.indexer import Indexer
from dsv4_bridge.mcore.metrics import collect
from dsv4_bridge.mcore.schedule import Batch, forward_backward

pytestmark = pytest.mark.megatron

WINDOW = 9
SPEC = small_spec(swiglu_limit=5.0, index_topk=5)


class Case(NamedTuple):
    """What the loss is given."""

    terms: IndexTerms
    q: torch.Tensor
    kv: torch.Tensor
    blocks: torch.Tensor
    chosen: torch.Tensor | None
    sink: torch.Tensor


def case(length: int, topk: int | None) -> Case:
    make = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    count = length // 4
    terms = IndexTerms(normal(2, length, 5, 8), normal(2, count, 8), normal(2, length, 5))
    scores = index_scores(*terms)
    chosen = None if topk is None else best_blocks(scores, (torch.arange(length)[None] + 1) // 4, min(topk, count))
    return Case(terms, normal(2, length, 3, 16) * 2, normal(2, length, 16), normal(2, count, 16) * 2, chosen, normal(3))


def formula(given: Case, counted: torch.Tensor | None = None, window: int = WINDOW) -> torch.Tensor:
    """Attention's probabilities of the compared blocks, head-summed and normalised, against the scores' softmax.

    One softmax over all keys with a mask, the sink as a column; the logarithms by definition.
    """
    q_i, k_i, w_i = given.terms
    length, count = given.q.shape[1], given.blocks.shape[1]
    query = torch.arange(length)[:, None]
    seen = (torch.arange(count) < (query + 1) // 4).expand(len(given.q), -1, -1)
    if given.chosen is not None:
        seen = (given.chosen.unsqueeze(-1) == torch.arange(count)).any(2)
    token = torch.arange(length)
    near = ((token <= query) & (query - token < window)).expand(len(given.q), -1, -1)
    scores = torch.einsum("bshd,bkd->bshk", given.q, torch.cat([given.kv, given.blocks], 1))
    scores = scores / math.sqrt(given.q.shape[-1])
    scores = scores.masked_fill(~torch.cat([near, seen], -1).unsqueeze(2), -math.inf)
    column = given.sink.view(1, 1, -1, 1).expand(*scores.shape[:3], 1)
    target = torch.cat([scores, column], -1).softmax(-1)[..., length:-1].sum(2).detach()  # [b, s, n]
    index = (torch.relu(torch.einsum("bshw,bnw->bshn", q_i, k_i)) * w_i.unsqueeze(-1)).sum(2)
    index = index / math.sqrt(q_i.shape[-1])
    total = torch.zeros((), dtype=q_i.dtype)
    for b in range(len(given.q)):
        for t in range(length):
            here = seen[b, t]
            if not here.any() or (counted is not None and not counted[b, t]):
                continue
            p = target[b, t][here] / target[b, t][here].sum()
            total = total + (p * (p.log() - index[b, t][here].log_softmax(-1))).sum()
    return total


def with_gradients(loss: Any, given: Case) -> list[torch.Tensor]:
    terms = IndexTerms(*(t.clone().requires_grad_() for t in given.terms))
    found = loss(given._replace(terms=terms))
    (found * 1.7).backward()
    return [found.detach(), *(t.grad for t in terms if t.grad is not None)]


@pytest.mark.parametrize(("length", "topk"), [(8, 2), (11, None), (50, 3), (150, 3), (150, None), (150, 100)])
@pytest.mark.parametrize("gathered", [False, True])
def test_values_and_gradients_are_the_formula(
    length: int, topk: int | None, gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen blocks gathered for each query, or masked; chunks of 32 queries."""
    monkeypatch.setattr(attend_module, "_DENSE", 0 if gathered else 10**6)
    given = case(length, topk)
    counted = torch.rand((2, length), generator=torch.Generator().manual_seed(1)) < 0.7
    wide = Case(IndexTerms(*(t.double() for t in given.terms)), *(widened(t) for t in given[1:]))
    for mask in (None, counted):
        theirs = with_gradients(lambda c, mask=mask: formula(c, mask), wide)
        ours = with_gradients(lambda c, mask=mask: indexer_loss.indexer_loss(*c, Reach(WINDOW, 4, 32), mask), given)
        assert len(ours) == len(theirs) == 4
        assert theirs[0] > 0
        assert all(close(a, b) <= 5e-6 for a, b in zip(ours, theirs, strict=True))


def widened(x: torch.Tensor | None) -> torch.Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


def test_one_visible_block_leaves_nothing_to_learn() -> None:
    found = with_gradients(lambda c: indexer_loss.indexer_loss(*c, Reach(WINDOW, 4, 32)), case(7, 2))
    assert all(float(t.abs().max()) <= 1e-6 for t in found)


def test_an_indexer_that_agrees_loses_nothing() -> None:
    """KL is 0, and so are its gradients, where scores are the logarithms of the target."""
    given = case(60, None)
    reach = Reach(WINDOW, 4, 32)
    target = torch.zeros(2, 60, 15)
    for chunk in attend_module.weights_on_blocks(*given[1:4], None, given.sink, reach):
        target[:, chunk.here, : chunk.weights.shape[-1]] = chunk.weights.sum(2)
    # One head a block: the query's n-th head meets the n-th block alone, and its weight is what is wanted.
    eye = torch.eye(15).expand(2, 15, 15)
    terms = IndexTerms(torch.eye(15).expand(2, 60, 15, 15), eye, target.clamp(min=1e-30).log() * math.sqrt(15))
    found = with_gradients(lambda c: indexer_loss.indexer_loss(*c, reach), given._replace(terms=terms))
    assert all(float(t.abs().max()) <= 1e-4 for t in found)


# In the model.


def trained_by(coefficient: float, spec: Any = SPEC, **settings: Any) -> DeepSeekV4Model:
    return randomise(
        build_model(spec, dsa_indexer_loss_coeff=coefficient, initialize_weights=False, **settings), 3
    ).train()


def gradients(model: DeepSeekV4Model, ids: torch.Tensor, **more: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids.roll(-1, 1), **more).mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def layer_formula(model: DeepSeekV4Model, number: int, ids: torch.Tensor, sparse: bool) -> dict[str, torch.Tensor]:
    """Gradients of one layer's loss, its mean over queries, in float64 from what the layer was given."""
    core = model.decoder.layers[number].self_attention.core_attention
    seen: list[tuple] = []
    handle = core.register_forward_hook(lambda _, args, out: seen.append(args))
    choices = []
    hidden = core.indexer.choose
    core.indexer.choose = lambda terms: choices.append(hidden(terms)) or choices[-1]
    with torch.enable_grad():
        model(ids)
    handle.remove()
    del core.indexer.choose
    q, kv, x, qr, turn = (t.detach() for t in seen[0][:5])
    spec = model.spec
    values = {n: p.detach().double().requires_grad_() for n, p in core.indexer.named_parameters()}
    inputs = x.double().transpose(0, 1), qr.double().transpose(0, 1)
    keys = entries({n.removeprefix("compressor."): v for n, v in values.items()}, inputs[0], spec.index_head_dim, spec)
    own = {n: p.detach().double() for n, p in core.compressor.named_parameters()}
    blocks = entries(own, inputs[0], spec.head_dim, spec)
    queries = (inputs[1] @ values["linear_wq_b.weight"].T).unflatten(-1, (spec.index_n_heads, spec.index_head_dim))
    queries = turned(queries, turn[None, :, None].to(torch.complex128))
    weights = inputs[0] @ values["linear_weights_proj.weight"].T * spec.index_n_heads**-0.5
    given = Case(
        IndexTerms(queries, keys, weights),
        q.double(),
        kv.double(),
        blocks.detach(),
        choices[0] if sparse else None,
        core.attn_sink.detach().double(),
    )
    loss = formula(given, window=spec.sliding_window) / (ids.shape[0] * ids.shape[1])
    loss.backward()
    return {n: v.grad for n, v in values.items() if v.grad is not None} | {"loss": loss.detach()}


def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotate the last pairs of channels."""
    width = 2 * turn.shape[-1]
    pairs = torch.view_as_complex(x[..., -width:].unflatten(-1, (-1, 2)).contiguous()) * turn
    return torch.cat([x[..., :-width], torch.view_as_real(pairs).flatten(-2)], -1)


def entries(values: dict[str, torch.Tensor], x: torch.Tensor, width: int, spec: Any) -> torch.Tensor:
    """A ratio-4 compressor, block by block: [b, s, hidden] -> [b, s // 4, width]."""
    from dsv4_bridge.mcore.layers.rope import turns

    kv, gate = x @ values["linear_wkv.weight"].T, x @ values["linear_wgate.weight"].T
    found = []
    for n in range(x.shape[1] // 4):
        here = slice(4 * n, 4 * n + 4)
        value, weight = kv[:, here, width:], gate[:, here, width:] + values["ape"][:, width:]
        if n:
            before = slice(4 * n - 4, 4 * n)
            value = torch.cat([kv[:, before, :width], value], 1)
            weight = torch.cat([gate[:, before, :width] + values["ape"][:, :width], weight], 1)
        entry = (value * weight.softmax(1)).sum(1)
        entry = entry * (entry.pow(2).mean(-1, keepdim=True) + spec.rms_norm_eps) ** -0.5 * values["norm.weight"]
        turn = turns(model_config(spec), 4, torch.tensor([4 * n])).to(torch.complex128)
        found.append(turned(entry, turn))
    return torch.stack(found, 1)


@pytest.mark.parametrize("sparse", [False, True])
def test_every_parameter_of_the_indexer_has_the_formulas_gradient(sparse: bool) -> None:
    """Its compressor's too; and nothing else moves by a bit."""
    coefficient = 0.3
    model = trained_by(coefficient, dsa_indexer_use_sparse_loss=sparse)
    ids = some_ids(SPEC, 2, 70)
    plain, ours = gradients(trained_by(0.0), ids), gradients(model, ids)
    inside = {n for n in ours if ".indexer." in n}
    assert inside == {n for n, _ in model.named_parameters() if ".indexer." in n}
    assert set(ours) - inside == set(plain)
    assert [n for n in plain if not torch.equal(plain[n], ours[n])] == []
    losses = []
    collect(model)
    gradients(model, ids)
    reported = collect(model)["indexer_loss"]
    for number in (1, 3):
        theirs = layer_formula(model, number, ids, sparse)
        losses.append(float(theirs.pop("loss")))
        at = f"decoder.layers.{number}.self_attention.core_attention.indexer."
        assert set(theirs) == {n.removeprefix(at) for n in ours if n.startswith(at)}
        assert {n: close(ours[at + n], coefficient * g) for n, g in theirs.items()} == pytest.approx(
            dict.fromkeys(theirs, 0.0), abs=1e-4
        )
    assert reported == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_off_by_default_and_in_evaluation() -> None:
    model = randomise(build_model(SPEC, initialize_weights=False), 3).train()
    ids = some_ids(SPEC, 1, 40)
    assert not any(".indexer." in n for n in gradients(model, ids))
    assert "indexer_loss" not in collect(model)
    model = trained_by(0.3).eval()
    assert not any(".indexer." in n for n in gradients(model, ids))
    assert "indexer_loss" not in collect(model)


@pytest.mark.parametrize("what", RECOMPUTING)
def test_recomputation_changes_no_bit_and_counts_once(what: str) -> None:
    found = []
    for settings in ({}, RECOMPUTING[what]):
        model = trained_by(0.3, **settings)
        found.append((gradients(model, some_ids(SPEC, 2, 70)), collect(model)["indexer_loss"]))
    (exact, once), (again, counted) = found
    assert set(exact) == set(again) and once == counted
    assert [n for n in exact if not torch.equal(exact[n], again[n])] == []


def test_a_packed_row_has_its_documents_losses() -> None:
    """Weighted by their tokens; those that stand for nothing have none."""
    lengths = (1, 3, 33, 5, 60)
    ids = some_ids(SPEC, 1, sum(lengths))
    ends, model = torch.tensor([0, *lengths]).cumsum(0), trained_by(0.3)
    packed = {n: g for n, g in gradients(model, ids, cu_seqlens=ends).items() if ".indexer." in n}
    loss = collect(model)["indexer_loss"]
    summed = {n: torch.zeros_like(g) for n, g in packed.items()}
    losses = 0.0
    for document in ids.split(lengths, 1):
        share = document.shape[1] / ids.shape[1]
        for name, grad in gradients(model, document).items():
            if name in summed:
                summed[name] += grad * share
        losses += collect(model).get("indexer_loss", 0.0) * share
    assert loss == pytest.approx(losses, rel=1e-4)
    assert max(close(packed[n], g) for n, g in summed.items()) <= 1e-3
    padding = torch.zeros_like(ids).bool()
    padding[:, 42:] = True  # the last document
    masked = gradients(model, ids, cu_seqlens=ends, padding_mask=padding)
    alone = gradients(model, ids[:, :42], cu_seqlens=ends[:-1])
    assert max(close(masked[n], alone[n]) for n in summed) <= 1e-3


def test_micro_batches_share_the_weight() -> None:
    """In megatron's schedule the loss is scaled as the main one: its gradient is the mean over micro-batches."""
    model = trained_by(0.3)
    batches = [Batch(ids, ids.roll(-1, 1)) for ids in (some_ids(SPEC, 1, 60, seed) for seed in (4, 5, 6))]
    each = [gradients(model, batch.input_ids) for batch in batches]
    model.zero_grad()
    forward_backward([model], batches)
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            mean = torch.stack([g[name] for g in each]).mean(0)
            assert parameter.grad is not None and close(parameter.grad, mean) <= 1e-5, name
    model.zero_grad()
    gradients(model, batches[0].input_ids)  # and a backward of one's own after it works


def test_the_warm_up_trains_the_indexer_alone_under_dense_attention() -> None:
    spec = draft_spec(swiglu_limit=5.0, index_topk=5)
    ids = some_ids(spec, 1, 70)
    for recompute in ({}, RECOMPUTING["full"]):
        model = randomise(
            build_model(spec, initialize_weights=False, **indexer_settings("warmup"), **recompute), 3
        ).train()
        set_trained(model, "warmup")
        found = gradients(model, ids)
        assert set(found) == {n for n, _ in model.named_parameters() if ".indexer." in n}
        assert all(g.any() for g in found.values())
    # Dense: as with enough choices for all.
    plain = randomise(build_model(draft_spec(swiglu_limit=5.0, index_topk=64), initialize_weights=False), 3).eval()
    chosen = randomise(build_model(spec, initialize_weights=False), 3).eval()
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids), plain(ids), atol=1e-5)
        assert not torch.allclose(chosen(ids), plain(ids), atol=1e-3)


def test_phases_choose_what_trains() -> None:
    model = build_model(SPEC, **indexer_settings("frozen"))
    set_trained(model, "frozen")
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert still == {n for n, _ in model.named_parameters() if ".indexer." in n} != set()
    model = build_model(SPEC, **indexer_settings("sparse", 0.02))
    set_trained([model], "sparse")
    assert all(p.requires_grad for p in model.parameters())
    assert (model.config.dsa_indexer_loss_coeff, model.config.dsa_indexer_use_sparse_loss) == (0.02, True)
    for call in (indexer_settings, lambda phase: set_trained(model, phase)):
        with pytest.raises(BridgeError, match="no phase 'warm', expected one of frozen, warmup, sparse"):
            call("warm")


def test_training_makes_the_indexer_agree() -> None:
    """A few steps on one row: the loss falls, and what is chosen holds more of the attention."""
    torch.manual_seed(0)
    model = randomise(build_model(SPEC, initialize_weights=False, **indexer_settings("warmup")), 3).train()
    set_trained(model, "warmup")
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    ids = some_ids(SPEC, 1, 80)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        model(ids, labels=ids).mean().backward()
        optimizer.step()
        losses.append(collect(model)["indexer_loss"])
    assert losses[-1] < 0.7 * losses[0], losses


def test_bf16_and_a_long_row_stay_linear_in_memory() -> None:
    """What is kept for the backward has the size of the indexer's inputs, whatever the length."""
    kept = []
    for length in (256, 512):
        given = case(length, 3)
        terms = IndexTerms(*(t.bfloat16().requires_grad_() for t in given.terms))
        sizes: list[int] = []
        count = lambda t, sizes=sizes: sizes.append(t.numel()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            rest = (t.bfloat16() for t in given[1:4])
            loss = indexer_loss.indexer_loss(terms, *rest, given.chosen, given.sink, Reach(WINDOW, 4, 32))
        loss.backward()
        assert terms.queries.grad is not None and terms.queries.grad.dtype is torch.bfloat16
        assert sum(sizes) == sum(t.numel() for t in given.terms)
        kept.append(sum(sizes))
    assert kept[1] == 2 * kept[0]


BUGS = {
    "the target is not normalised": put(indexer_loss, "_target", lambda f: lambda chunk, group: chunk.weights.sum(2)),
    "one head's attention": put(
        indexer_loss,
        "_target",
        lambda f: lambda chunk, group: f(chunk._replace(weights=chunk.weights[:, :, :1]), group),
    ),
    "queries of another turn": put(Indexer, "terms", lambda f: lambda self, x, qr, turn: f(self, x, qr, turn.conj())),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_mistake_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[name](monkeypatch)
    with pytest.raises(AssertionError):
        if name == "queries of another turn":
            test_every_parameter_of_the_indexer_has_the_formulas_gradient(True)
        else:
            test_values_and_gradients_are_the_formula(50, 3, False, monkeypatch)


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings, said in (
        ({"dsa_indexer_loss_coeff": -0.1}, "learn to avoid"),
        ({"csa_dense_attention": True, "dsa_indexer_use_sparse_loss": True}, "nothing is chosen"),
    ):
        with pytest.raises(BridgeError, match=said):
            model_config(SPEC, **settings)
