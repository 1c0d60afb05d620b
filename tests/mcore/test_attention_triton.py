"""Attention's Triton kernels against the torch definition: output, and gradients of q, kv, blocks and sink."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import DEVICE, IN_ORDER, TORCH, TRITON, assert_close, values_and_gradients
from reference import distance, randomise, small_spec, some_ids
from torch import Tensor

from dsv4_bridge.mcore import build_model
from dsv4_bridge.mcore.kernels import attention_keys_triton
from dsv4_bridge.mcore.kernels.attention import Reach, attend
from dsv4_bridge.mcore.kernels.choice import Choice

pytestmark = [pytest.mark.megatron, pytest.mark.kernel]
F32, BF16 = torch.float32, torch.bfloat16
# Sums over hundreds of rows, in another order than torch's.
FAR = {F32: 4e-6, BF16: 2**-5}


class Case(NamedTuple):
    """Sizes of a call: topk None: all visible blocks; places: choices a query, chosen ones anywhere among them."""

    batch: int
    length: int
    heads: int
    width: int
    window: int
    ratio: int
    topk: int | None = None
    places: int = 0


def tensors(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor | None]:
    """q, kv, maybe blocks, sink; and the choices: distinct visible blocks, -1 in between, none for the first queries.

    Keys have a mean, which all weights share: sums of gradients do not vanish.
    """
    make = torch.Generator().manual_seed(seed)
    count = case.length // case.ratio if case.ratio else 0
    shapes = [(case.batch, case.length, case.heads, case.width), (case.batch, case.length, case.width)]
    shapes += [(case.batch, count, case.width)] if case.ratio else []
    found = [(torch.randn(s, generator=make) + 0.3).to(DEVICE, dtype) for s in shapes]
    sink = torch.randn(case.heads, generator=make).to(DEVICE)
    if case.topk is None:
        return [*found, sink], None
    places = max(case.places, case.topk)
    visible = (torch.arange(case.length) + 1) // case.ratio
    scores = torch.rand((case.batch, case.length, count), generator=make)
    hidden = torch.arange(count) >= visible[:, None]
    order = scores.masked_fill(hidden, -1).argsort(-1, descending=True)[..., : case.topk]
    order = torch.where(order < visible[:, None], order, -1)
    chosen = torch.full((case.batch, case.length, places), -1)
    where = torch.rand(chosen.shape, generator=make).argsort(-1)[..., : order.shape[-1]]
    return [*found, sink], chosen.scatter(2, where, order).to(DEVICE)


def computed(case: Case, dtype: torch.dtype, by: Choice, seed: int = 0) -> list[Tensor]:
    """The output, then gradients."""
    given, chosen = tensors(case, dtype, seed)

    def run(q: Tensor, kv: Tensor, *rest: Tensor) -> Tensor:
        *blocks, sink = rest
        return attend(q, kv, *blocks or [None], chosen, sink, Reach(case.window, case.ratio, 64), by)

    return values_and_gradients(run, given)


def assert_equal_to_torch(case: Case, dtype: torch.dtype, by: Choice = TRITON, seed: int = 0) -> None:
    found, expected = computed(case, dtype, by, seed), computed(case, dtype, TORCH, seed)
    assert all(bool(t.isfinite().all()) for t in found)
    assert_close(found, expected, FAR[dtype])


SHARED = {
    "no blocks, below the window": Case(2, 37, 4, 32, 128, 0),
    "no blocks, a small window, odd heads and width": Case(2, 45, 3, 24, 7, 0),
    "all blocks of 4": Case(2, 37, 8, 64, 5, 4),
    "blocks of 4, none complete": Case(2, 3, 4, 32, 128, 4),
    "one token": Case(1, 1, 4, 32, 128, 4),
    "all blocks of 128, rows in parts": Case(1, 261, 4, 32, 128, 128),
    "blocks of 128, none complete": Case(1, 40, 4, 32, 128, 128),
    "64 heads": Case(1, 9, 64, 32, 3, 2),
    "real width": Case(1, 21, 4, 512, 128, 1),
}
CHOSEN = {
    "toy heads": Case(2, 9, 8, 64, 4, 2, 3),
    "more choices than blocks": Case(1, 9, 4, 32, 128, 4, 5),
    "64 heads": Case(1, 5, 64, 32, 128, 1, 3),
    "80 heads: two tiles a query": Case(1, 3, 80, 24, 2, 1, 2),
    "top 512": Case(1, 4, 4, 32, 128, 1, 3, 512),
    "real width, several tiles of keys": Case(1, 19, 4, 512, 6, 1, 18, 19),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_keys_that_all_queries_share(name: str, dtype: torch.dtype) -> None:
    assert_equal_to_torch(SHARED[name], dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_blocks(name: str, dtype: torch.dtype) -> None:
    assert_equal_to_torch(CHOSEN[name], dtype)


@given(
    st.builds(
        Case,
        st.integers(1, 2),
        st.integers(1, 12),
        st.integers(1, 9),
        st.integers(3, 70),
        st.integers(1, 14),
        st.integers(1, 5),
        st.one_of(st.none(), st.integers(1, 6)),
        st.integers(0, 9),
    ),
    st.sampled_from([TRITON, IN_ORDER]),
    st.integers(0, 99),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_sizes(case: Case, by: Choice, seed: int) -> None:
    assert_equal_to_torch(case, F32, by, seed)


@pytest.mark.parametrize("waiting", [1, 1 << 29])
def test_a_fixed_order_repeats_itself_to_the_bit(waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One query at a time waits to be added, or all."""
    monkeypatch.setattr(attention_keys_triton, "_WAITING", waiting)
    case = Case(2, 5, 4, 32, 3, 1, 3, 4)
    first, again = (computed(case, F32, IN_ORDER) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert_close(first, computed(case, F32, TORCH), FAR[F32])


@pytest.mark.parametrize("sink", [-1e4, 1e4, -torch.inf])
def test_a_sink_that_is_nothing_or_everything(sink: float) -> None:
    case = CHOSEN["more choices than blocks"]
    (q, kv, blocks, _), chosen = tensors(case, F32)
    given = [q, kv, blocks, torch.full((case.heads,), sink, device=DEVICE)]
    reach = Reach(case.window, case.ratio, 64)

    def run(by: Choice) -> list[Tensor]:
        return values_and_gradients(lambda q, kv, b, sink: attend(q, kv, b, chosen, sink, reach, by), given)

    found, expected = run(TRITON), run(TORCH)
    assert all(bool(t.isfinite().all()) for t in found)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_gradients_that_are_views() -> None:
    """What comes in need not lie in one piece: rows of a packed row, a transposed gradient."""
    case = Case(2, 11, 4, 32, 5, 3)
    (q, kv, blocks, sink), _ = tensors(case, F32)
    wide = torch.cat([q, q], 1)
    found = []
    for by in (TRITON, TORCH):
        leaf = wide.clone().requires_grad_()
        out = attend(leaf[:, 3:14], kv, blocks, None, sink, Reach(5, 3, 64), by)
        out.transpose(0, 1).square().sum().backward()
        found.append([out.detach(), leaf.grad])
    assert_close(*found, tolerance=FAR[F32])


@pytest.mark.parametrize("lengths", [(14,), (9, 1, 4)], ids=str)
def test_a_whole_model(lengths: tuple[int, ...]) -> None:
    """Every gradient of a model with CSA and HCA layers, of one document or of a packed row."""
    spec = small_spec(num_hidden_layers=2, compress_ratios=(4, 128), index_topk=2)
    ids = some_ids(spec, 1, sum(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0).int() if len(lengths) > 1 else None
    found = []
    for kernels in ("triton", "torch"):
        model = randomise(build_model(spec, kernels=kernels), 3).train().to(DEVICE)
        logits = model(ids.to(DEVICE), cu_seqlens=ends)
        logits.square().sum().backward()
        found.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (ours, mine), (theirs, exact) = found
    assert distance(ours, theirs) <= 1e-5
    assert set(mine) == set(exact) and len(exact) > 20
    # By module: a single number beside a matrix is a sum over all tokens that nearly cancels.
    modules = {n.rpartition(".")[0] for n in exact}
    whole = [
        {m: torch.cat([g.flatten() for n, g in grads.items() if n.startswith(m + ".")]) for m in modules}
        for grads in (mine, exact)
    ]
    far = {m: float((whole[0][m] - g).norm() / g.norm()) for m, g in whole[1].items() if g.any()}
    assert {m: value for m, value in far.items() if not value <= 1e-4} == {}
