"""A packed row computes what its documents compute one by one: logits, losses, every gradient."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from bugs import Bug, put
from mtp_formula import far
from ranks import with_scales
from reference import RECOMPUTING, distance, draft_spec, randomise, some_ids
from torch.nn import functional as F

from dsv4_bridge import BridgeError
from dsv4_bridge.mcore import DeepSeekV4Model, build_model, model
from dsv4_bridge.mcore.layers import mtp
from dsv4_bridge.mcore.layers.cache import new_cache
from dsv4_bridge.mcore.layers.documents import ends_of
from dsv4_bridge.mcore.layers.observe import Watcher, watching
from dsv4_bridge.mcore.schedule import Batch, forward_backward

pytestmark = pytest.mark.megatron

# Every kind of layer, one routed by id; few choices, so that the indexer leaves blocks out.
SPECS = {depth: draft_spec(depth, swiglu_limit=5.0, index_topk=5) for depth in (1, 2)}
FACTOR = 0.3
# Below, at and above a block of 4, the window, and a block of 128.
LENGTHS = [
    (1, 3, 4, 5, 127, 128, 129),
    (129, 1, 1, 140, 2),
    (140,),
]


def boundaries(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def random_lengths(seed: int) -> tuple[int, ...]:
    make = torch.Generator().manual_seed(seed)
    short = torch.randint(1, 9, (3,), generator=make).tolist()
    return (*short, *torch.randint(1, 140, (2,), generator=make).tolist(), 1, *short[:1])


@contextmanager
def choices(replayed: list[tuple[str, str, torch.Tensor]] | None) -> Iterator[list[tuple[str, str, torch.Tensor]]]:
    """Records the experts and blocks that are chosen; or replays those of the documents to their packed row.

    Near a tie rounding may choose otherwise: equal choices are asserted, up to one in a hundred.
    """
    found: list[tuple[str, str, torch.Tensor]] = []
    used: set[int] = set()

    def watch(site: str, block: str, value: torch.Tensor) -> torch.Tensor | None:
        if site not in ("ffn.router", "attn.index"):
            return None
        found.append((site, block, value))
        if replayed is None:
            return None
        at = [n for n, entry in enumerate(replayed) if entry[:2] == (site, block) and n not in used]
        # A router sees the whole row at once, an indexer one document at a time.
        at = at[:1] if site == "attn.index" else at
        used.update(at)
        theirs = torch.cat([replayed[n][2] for n in at]) if at else value
        assert theirs.shape == value.shape, (site, block)
        same = (theirs.sort(-1).values == value.sort(-1).values).all(-1)
        assert float(same.float().mean()) > 0.99, (site, block)
        return theirs

    with watching(watch):
        yield found
    if replayed is not None:
        assert len(used) == len(replayed)


def targets(lengths: tuple[int, ...], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of their own (a roll of ids in their place shows) and weights, some 0: [1, s] each."""
    make = torch.Generator().manual_seed(sum(lengths))
    labels = torch.randint(0, vocabulary, (1, sum(lengths)), generator=make)
    return labels, (torch.rand((1, sum(lengths)), generator=make) < 0.8).float()


def gradients(trained: DeepSeekV4Model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}
    trained.zero_grad()
    return with_scales(found)


def one_by_one(trained: DeepSeekV4Model, lengths: tuple[int, ...], ids: torch.Tensor) -> tuple:
    """Logits, losses and gradients of the documents, by the model's logits and plain cross entropy."""
    labels, mask = targets(lengths, trained.spec.vocab_size)
    depth = trained.spec.mtp_layers
    documents = list(zip(*(t.split(lengths, 1) for t in (ids, labels, mask)), strict=True))
    reach = [sum(float(m[:, k + 1 :].sum()) for *_, m in documents) for k in range(depth)]
    logits, losses, total = [], [], torch.zeros(())
    with choices(None) as chosen:
        for document, label, weight in documents:
            logits.append(trained(document))
            losses.append(F.cross_entropy(logits[-1].transpose(1, 2), label, reduction="none"))
            total = total + (losses[-1] * weight).sum() / mask.sum()
    for document, label, weight in documents:
        for k, ahead in enumerate(trained.mtp_logits(document)):
            known = max(0, label.shape[1] - k - 1)  # a document's last tokens have no target
            loss = F.cross_entropy(ahead[:, :known].transpose(1, 2), label[:, k + 1 :], reduction="none")
            total = total + FACTOR / depth * (loss * weight[:, k + 1 :]).sum() / max(1.0, reach[k])
    total.backward()
    return torch.cat(logits, 1).detach(), torch.cat(losses, 1).detach(), gradients(trained), chosen


def assert_packed_is_one_by_one(lengths: tuple[int, ...], depth: int = 1) -> None:
    trained = randomise(build_model(SPECS[depth], mtp_loss_scaling_factor=FACTOR, initialize_weights=False), 3).train()
    ids, ends = some_ids(trained.spec, 1, sum(lengths)), boundaries(lengths)
    logits, losses, theirs, chosen = one_by_one(trained, lengths, ids)
    body = [entry for entry in chosen if not entry[1].startswith("mtp.")]
    with torch.no_grad(), choices(body):
        assert distance(trained(ids, cu_seqlens=ends), logits) <= 1e-5
    labels, mask = targets(lengths, trained.spec.vocab_size)
    with watching(replaying(body)):
        ours = trained(ids, labels=labels, loss_mask=mask.clone(), cu_seqlens=ends)
        assert distance(ours.detach(), losses) <= 1e-5
        ((ours * mask).sum() / mask.sum()).backward()
    mine = gradients(trained)
    idle = set(theirs) ^ set(mine)  # an MTP depth no document reaches has zeros in one and none in the other
    assert all(not (theirs.get(n, mine.get(n))).any() for n in idle), idle
    shared = [n for n in theirs if n in mine]
    assert len(shared) > 150
    assert far({n: mine[n] for n in shared}, {n: theirs[n] for n in shared}) == {}


def replaying(body: list[tuple[str, str, torch.Tensor]]) -> Watcher:
    """As `choices`, without the assertions, for MTP's choices are its own."""
    used: set[int] = set()

    def watch(site: str, block: str, value: torch.Tensor) -> torch.Tensor | None:
        at = [n for n, entry in enumerate(body) if entry[:2] == (site, block) and n not in used]
        at = at[:1] if site == "attn.index" else at
        used.update(at)
        return torch.cat([body[n][2] for n in at]) if at else None

    return watch


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_packed_row_is_its_documents(lengths: tuple[int, ...]) -> None:
    assert_packed_is_one_by_one(lengths)


@pytest.mark.parametrize("seed", [1])
def test_of_random_lengths_with_two_mtp_depths(seed: int) -> None:
    assert_packed_is_one_by_one(random_lengths(seed), 2)


def without_a_boundary(found: tuple[slice, ...]) -> tuple[slice, ...]:
    return (*found[:-2], slice(found[-2].start, found[-1].stop))


BUGS: dict[str, Bug] = {
    "attention crosses one boundary": put(
        model,
        "make_rotary",
        lambda f: lambda config, at, documents=None: f(config, at, documents and without_a_boundary(documents)),
    ),
    "positions run on": put(
        model, "restarting_positions", lambda f: lambda documents, device: torch.arange(documents[-1].stop)
    ),
    "a boundary is lost": put(model, "documents_of", lambda f: lambda *args: without_a_boundary(f(*args))),
    "multi-token prediction looks into the next document": put(mtp, "roll_boundaries", lambda f: lambda _: None),
    "it looks across one boundary": put(
        mtp, "roll_boundaries", lambda f: lambda documents: f(documents and without_a_boundary(documents))
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_mistake_at_a_boundary_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[name](monkeypatch)
    with pytest.raises(AssertionError):
        assert_packed_is_one_by_one((5, 9, 6))


@pytest.mark.parametrize("what", RECOMPUTING)
def test_recomputation_knows_each_micro_batch_boundaries(what: str) -> None:
    """Two in flight, of other boundaries: not a bit differs."""
    packed = [(5, 30, 9), (29, 1, 14)]
    found = []
    for settings in ({}, RECOMPUTING[what]):
        trained = randomise(build_model(SPECS[1], initialize_weights=False, **settings), 3).train()
        ids = [some_ids(trained.spec, 1, 44, seed) for seed in (5, 6)]
        both = zip(ids, packed, strict=True)
        losses = [trained(x, labels=x.roll(-1, 1), cu_seqlens=boundaries(lengths)) for x, lengths in both]
        losses[0].sum().backward()
        losses[1].mean().backward()
        found.append(([loss.detach() for loss in losses], gradients(trained)))
    (losses, exact), (again, recomputed) = found
    assert all(torch.equal(a, b) for a, b in zip(losses, again, strict=True))
    assert set(exact) == set(recomputed)
    assert [n for n in exact if not torch.equal(exact[n], recomputed[n])] == []


def test_the_schedule_hands_boundaries_and_padding_on() -> None:
    trained = randomise(build_model(SPECS[1].without_draft(), initialize_weights=False), 3).train()
    lengths = (5, 60, 7)
    ids = some_ids(trained.spec, 1, 72)
    labels, mask = targets(lengths, trained.spec.vocab_size)
    padding = torch.zeros_like(ids).bool()
    padding[:, 65:] = True
    with torch.no_grad():
        direct = trained(ids, labels=labels, cu_seqlens=boundaries(lengths))
    batch = Batch(ids, labels, mask, padding, boundaries(lengths))
    (loss,) = forward_backward([trained], [batch])
    assert float(loss) == pytest.approx(float((direct * mask).sum() / mask.sum()), rel=1e-6)
    counts = [b for n, b in trained.named_buffers() if n.endswith("local_tokens_per_expert")]
    assert [float(c.sum()) for c in counts] == [2.0 * 65] * 3
    forward_backward([trained], [batch], forward_only=True)  # a look at other data counts for nothing
    assert [float(c.sum()) for c in counts] == [2.0 * 65] * 3


def test_boundaries_that_are_none_are_refused() -> None:
    trained = build_model(SPECS[1].without_draft()).eval()
    ids = some_ids(trained.spec, 1, 12)
    for wrong, said in (
        ([0, 5], r"\[0, 5\], expected boundaries in order from 0 to 12"),
        ([1, 12], "from 0 to 12"),
        ([0, 7, 5, 12], "in order"),
        ([0, 13], "from 0 to 12"),
        ([12], "from 0 to 12"),
    ):
        with pytest.raises(BridgeError, match=said):
            trained(ids, cu_seqlens=torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(BridgeError, match=r"float32 \[2\], expected int32"):
        trained(ids, cu_seqlens=torch.tensor([0.0, 12.0]))
    with pytest.raises(BridgeError, match=r"2 rows with one cu_seqlens; lay the rows .* \[1, 12\]"):
        trained(ids.view(2, 6), cu_seqlens=torch.tensor([0, 6, 12]))
    with pytest.raises(BridgeError, match="cu_seqlens is for training"):
        trained(ids, cu_seqlens=torch.tensor([0, 12]), cache=new_cache(trained.config, torch.tensor([12]), 20))


def test_repeated_boundaries_are_padding() -> None:
    trained = randomise(build_model(SPECS[1].without_draft(), initialize_weights=False), 3).eval()
    ids = some_ids(trained.spec, 1, 12)
    with torch.no_grad():
        plain = trained(ids, cu_seqlens=torch.tensor([0, 5, 12]))
        padded = trained(ids, cu_seqlens=torch.tensor([0, 0, 5, 5, 12, 12, 12]))
    assert torch.equal(plain, padded)
    assert ends_of((slice(0, 5), slice(5, 12))) == [0, 5, 12]
