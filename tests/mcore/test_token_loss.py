"""Losses of chunks of tokens are those of all tokens at once, and so are their gradients; logits are not kept."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_memory import Kept
from ranks import losses, run_ranks, whole, with_scales
from reference import draft_spec, randomise, small_spec, some_ids
from torch.nn import functional as F

from dsv4_bridge import BridgeError, make_toy
from dsv4_bridge.mcore import build_model
from dsv4_bridge.mcore.adapters.adapters import add_adapters
from dsv4_bridge.mcore.layers.token_loss import token_losses
from dsv4_bridge.parallel.balance import solve
from dsv4_bridge.planning import activations
from dsv4_bridge.planning.activations import Shape, chunk_bytes, head_sum_bytes, recomputed_bytes
from dsv4_bridge.spec.lora import CARRIERS, Lora
from dsv4_bridge.spec.variants import VARIANTS

pytestmark = pytest.mark.megatron
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Differences over the largest value, of those beyond 1e-6."""
    assert set(ours) == set(theirs)
    found = {n: float((ours[n] - g).abs().max() / g.abs().max()) for n, g in theirs.items() if g.abs().max() > 0}
    return {n: error for n, error in found.items() if not error <= 1e-6}


class Head:
    """An output layer and cross entropy; it notes how many tokens it saw at a time."""

    def __init__(self, weight: torch.Tensor):
        self.weight, self.seen = weight, list[int]()

    def __call__(self, hidden: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        self.seen.append(labels.numel())
        logits = (hidden @ (self.weight if weight is None else weight).T).float()
        return F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")


@pytest.mark.parametrize("seed", range(8))
def test_chunks_are_the_whole(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    length, batch, width, words = (int(torch.randint(low, 40, (), generator=random)) for low in (2, 1, 3, 5))
    hidden = torch.randn((length, batch, width), generator=random).requires_grad_()
    weight = torch.randn((words, width), generator=random).requires_grad_(seed % 4 != 0)
    labels = torch.randint(0, words, (batch, length), generator=random)
    scale = torch.rand(labels.shape, generator=random)
    learned = [x for x in (hidden, weight) if x.requires_grad]
    chunk = int(torch.randint(1, batch * length + 1, (), generator=random))
    found = []
    for most in (0, chunk, batch * length + 5):
        head = Head(weight)
        each = token_losses(head, hidden, labels, weight, most)
        assert max(head.seen) <= max(most, batch) or not most
        assert sum(head.seen) == batch * length
        with torch.no_grad():
            assert torch.equal(token_losses(Head(weight), hidden, labels, weight, most), each)
        found.append([each.detach(), *torch.autograd.grad((each * scale).sum(), learned)])
    one, chunked, all_at_once = ({str(n): x for n, x in enumerate(values)} for values in found)
    assert all(torch.equal(one[n], all_at_once[n]) for n in one)
    assert far(chunked, one) == {}


def test_gradients_of_narrow_weights_are_added_up_in_float32() -> None:
    """300 chunks: sums in bf16 would stand still."""
    random = torch.Generator().manual_seed(0)
    exact = torch.randn((11, 24), generator=random).bfloat16().double()
    hidden, labels = torch.randn((300, 1, 24), generator=random).bfloat16(), torch.full((1, 300), 3)
    gradients = {}
    for chunk in (0, 1):
        weight = exact.bfloat16().requires_grad_()
        token_losses(Head(weight), hidden.clone().requires_grad_(), labels, weight, chunk).sum().backward()
        assert weight.grad is not None and weight.grad.dtype is torch.bfloat16
        gradients[chunk] = weight.grad
    exact.requires_grad_()
    logits = torch.einsum("sbh,vh->bvs", hidden.double(), exact)
    F.cross_entropy(logits, labels, reduction="sum").backward()
    errors = {chunk: float((g.double() - exact.grad).norm() / exact.grad.norm()) for chunk, g in gradients.items()}
    assert errors[1] < 4e-3 and errors[1] < 2 * errors[0]


@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_chunks_is_that_of_rounding(seed: int) -> None:
    """Against whole logits in float64; 257 tokens of two rows, which no chunk but the first and the last divides."""
    random = torch.Generator().manual_seed(seed)
    length, batch, width, words = 257, 2, 48, 1000
    hidden, weight = (torch.randn(shape, generator=random) for shape in ((length, batch, width), (words, width)))
    labels = torch.randint(0, words, (batch, length), generator=random)
    scale = torch.rand(batch, length, generator=random)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    logits = torch.einsum("sbh,vh->bvs", *exact)
    losses64 = F.cross_entropy(logits, labels, reduction="none")
    gradients64 = torch.autograd.grad((losses64 * scale.double()).sum(), exact)
    # A product of n terms is off by n units at most; the softmax's sum by the largest of them, and by its own rounding.
    unit = torch.finfo(torch.float32).eps / 2
    most = torch.einsum("sbh,vh->bsv", hidden.double().abs(), weight.double().abs()).amax(-1)
    bound = unit * (2 * (width + 1) * most + 16 * (1 + losses64.detach().abs()))
    errors = []
    for chunk in (0, 2, 7, 50, 512, 514):
        given = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        losses = token_losses(Head(given[1]), given[0], labels, given[1], chunk)
        assert ((losses.detach().double() - losses64.detach()).abs() <= bound).all(), chunk
        gradients = torch.autograd.grad((losses * scale).sum(), given)
        error = [float((g.double() - e).norm() / e.norm()) for g, e in zip(gradients, gradients64, strict=True)]
        assert max(error) <= 64 * unit, (chunk, error)
        errors.append(error)
    whole, *chunked = errors
    assert all(e <= 2 * w + unit for error in chunked for e, w in zip(error, whole, strict=True)), errors


def run(model: Any, ids: torch.Tensor, chunk: int) -> dict[str, torch.Tensor]:
    """Losses and gradients of a step."""
    model.config.loss_chunk = chunk
    model.zero_grad()
    mask = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(9)) < 0.7).float()
    each = model(ids, labels=ids.roll(-1, 1), loss_mask=mask)
    ((each * mask).sum() / mask.sum()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"losses": each.detach()} | gradients


@pytest.mark.parametrize("adapted", [False, True], ids=["trained", "frozen head"])
def test_a_model_learns_the_same(adapted: bool) -> None:
    """Main loss and two draft depths; a chunk of all tokens gives the same bits."""
    spec = draft_spec(2)
    spec = spec.without_draft() if adapted else spec
    model = build_model(spec, mtp_loss_scaling_factor=0.3, initialize_weights=False)
    if adapted:
        add_adapters(model, Lora(3))
    randomise(model, 12).train()
    ids = some_ids(spec, 2, 41)
    one = run(model, ids, 0)
    assert ("output_layer.weight" in one) is not adapted and len(one) > 10
    assert all(torch.equal(x, one[n]) for n, x in run(model, ids, 82).items())
    direct = [n for n in one if "final_layernorm" in n or n in ("losses", "output_layer.weight")]
    assert len(direct) == (1 if adapted else 5)
    for chunk in (81, 7, 1):
        found = run(model, ids, chunk)
        assert far({n: found[n] for n in direct}, {n: one[n] for n in direct}) == {}
        # Behind the layers the last bits are others, and sums that nearly cancel show it.
        assert {n: e for n, e in far(with_scales(found), with_scales(one)).items() if e > 1e-4} == {}


def test_a_negative_chunk_is_refused() -> None:
    with pytest.raises(BridgeError, match=r"loss_chunk=-1: expected a number of tokens, or 0"):
        build_model(draft_spec(), loss_chunk=-1)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("more", [{}, FULL, {"adapted": True}], ids=["plain", "recompute", "adapters"])
@pytest.mark.parametrize(("batch", "length", "chunk"), [(2, 136, 100), (3, 61, 7)])
def test_what_is_kept_is_what_is_planned(
    batch: int, length: int, chunk: int, more: dict[str, Any], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = draft_spec(0 if "adapted" in more else 2, vocab_size=3000)
    adapted, settings = "adapted" in more, {k: v for k, v in more.items() if k != "adapted"}
    kind = {"bf16": torch.bfloat16}.get(dtype, torch.float32)
    model = build_model(spec, dtype=kind, loss_chunk=chunk, mtp_loss_scaling_factor=0.3, **settings)
    lora = Lora(3, targets=CARRIERS) if adapted else None
    if lora:
        add_adapters(model, lora)
    kept = Kept([*model.parameters(), *model.buffers()])
    ids = torch.randint(0, spec.vocab_size, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.tensor):
        loss = model.train()(ids, labels=ids.roll(-1, 1)).mean()
        forward = kept.now
        loss.backward()
    (held,) = solve(spec, 1).chunks
    shape = Shape(batch, length, dtype, lora=lora, recompute=bool(settings), loss_chunk=chunk)
    assert chunk_bytes(spec, held, shape) == pytest.approx(forward, rel=0.01)
    # The head's sum is no tensor that autograd keeps.
    monkeypatch.setattr(activations, "head_sum_bytes", lambda *_: 0)
    assert chunk_bytes(spec, held, shape) + recomputed_bytes(spec, held, shape) == pytest.approx(kept.most, rel=0.01)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_the_sum_of_a_heads_gradient_is_planned(dtype: str, trained: bool) -> None:
    """What is there of the weight's size and in float32 while the backward computes a chunk, beside the weight."""
    spec, kind = small_spec(vocab_size=307, hidden_size=24), getattr(torch, {"bf16": "bfloat16"}.get(dtype, dtype))
    weight = torch.randn((307, 24)).to(kind).requires_grad_(trained)
    held: list[int] = []

    class Watched(Head):
        def __call__(self, hidden: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None = None) -> Any:
            if weight is not None:  # the backward's
                found = {
                    t.untyped_storage().data_ptr(): t.nbytes
                    for t in gc.get_objects()
                    if type(t) is torch.Tensor and t.shape == weight.shape and t.dtype is torch.float32
                }
                found.pop(self.weight.untyped_storage().data_ptr(), None)
                held.append(sum(found.values()))
            return super().__call__(hidden, labels, weight)

    hidden, labels = torch.randn((50, 1, 24)).to(kind).requires_grad_(), torch.randint(0, 307, (1, 50))
    token_losses(Watched(weight), hidden, labels, weight, 10).sum().backward()
    shape = Shape(1, 50, dtype, lora=None if trained else Lora(3), loss_chunk=10)
    planned = head_sum_bytes(spec, shape)
    assert held == [0, *[planned] * 4] and planned == (4 * 307 * 24 if trained else 0)
    assert (
        head_sum_bytes(spec, replace(shape, loss_chunk=50)) == head_sum_bytes(spec, replace(shape, loss_chunk=0)) == 0
    )


def test_a_heads_share_is_flat_in_the_length() -> None:
    """Of Flash: logits are a chunk's, whatever the row; what grows is the head's input."""
    spec = VARIANTS["Flash"].spec
    chunk = solve(spec, 8).chunks[-1]
    rises = [recomputed_bytes(spec, chunk, Shape(length=length, recompute=False)) for length in (4096, 65536, 1 << 20)]
    whole_head = 4 * spec.vocab_size * spec.hidden_size
    assert rises[0] == rises[1] == rises[2] == 2048 * (4 * spec.vocab_size + 9) + whole_head
    assert recomputed_bytes(spec, chunk, Shape(length=65536, loss_chunk=0)) == 0
    whole_row, chunked = (chunk_bytes(spec, chunk, Shape(length=65536, loss_chunk=n)) for n in (0, 2048))
    assert whole_row - chunked == 2 * 65536 * (4 * spec.vocab_size + 9 - 8)  # main loss and MTP


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any], list[Any]]:
    folder = tmp_path_factory.mktemp("chunks")
    toy = make_toy(folder / "toy", "Flash", 4, spec=draft_spec(2, swiglu_limit=5.0), payload="natural")
    case = {"action": "step", "parallel": {"tp": 2}, "batch": 2, "length": 36, "seeds": [1]}
    draft = {"mtp_loss_scaling_factor": 0.3}
    cases = [case | {"settings": draft | {"loss_chunk": chunk}} for chunk in (0, 7, 72)]
    one, chunked, all_at_once = run_ranks(Path(folder), "chunks", 2, cases, weights=toy)
    return one, chunked, all_at_once


def test_ranks_that_share_vocabulary_and_tokens(two: tuple[list[Any], list[Any], list[Any]]) -> None:
    """Tensor and sequence parallelism: a chunk is made of both ranks' tokens."""
    one, chunked, all_at_once = two
    assert losses(chunked) == pytest.approx(losses(one), rel=1e-6)
    theirs, ours, same = (with_scales(whole(results, "gradients")) for results in two)
    assert all(torch.equal(same[n], g) for n, g in theirs.items())
    assert losses(all_at_once) == losses(one)
    wrong = {n: float((ours[n] - g).norm() / g.norm()) for n, g in theirs.items() if g.norm() > 1e-7}
    assert len(wrong) > 150 and {n: e for n, e in wrong.items() if e > 1e-4} == {}
    assert max(wrong["head.weight"], wrong["norm.weight"], wrong["mtp.1.norm.weight"]) <= 1e-6
