"""Where a pass waits for the device: a known list, and nothing of ours inside a layer (docs/guides/gpu.md)."""

from collections import Counter

import pytest
import torch
from reference import randomise, small_spec, some_ids
from waiting import recording_waits

from dsv4_bridge.mcore import DeepSeekV4Model, build_model
from dsv4_bridge.mcore.kernels.grouped import grouped_linear
from dsv4_bridge.mcore.layers.cache import new_cache

pytestmark = pytest.mark.megatron

DISPATCH = "megatron/core/transformer/moe/token_dispatcher.py:dispatch_postprocess"
# On the host already when they are asked: the dispatcher brings the counts there, once a layer, for these.
HELD = {
    ("tolist", "megatron/core/transformer/moe/moe_utils.py:sort_chunks_by_idxs"),
    ("tolist", "megatron/core/transformer/moe/experts.py:forward"),
    ("tolist", "dsv4_bridge/mcore/layers/experts.py:forward"),
    ("tolist", "dsv4_bridge/mcore/layers/moe.py:forward"),
}
# On a CPU alone; a GPU is asked to stop by itself (`torch._assert_async`), and has its own kernel of the mixing.
ON_CPU = {
    ("numpy", "dsv4_bridge/mcore/kernels/mix_few.py:mix"),
    ("numpy", "dsv4_bridge/mcore/kernels/mix_few.py:_array"),
    ("int", "dsv4_bridge/mcore/model.py:_check_ids"),
    ("_local_scalar_dense", "dsv4_bridge/mcore/model.py:_check_ids"),
}
# megatron's other dispatcher: once to count, once for the weights.
ALLGATHER = {("cpu", DISPATCH), ("item", DISPATCH), ("_local_scalar_dense", DISPATCH), ("masked_select", DISPATCH)}


def model(layout: str = "grouped", dispatcher: str = "alltoall", **settings: object) -> DeepSeekV4Model:
    spec = small_spec(n_routed_experts=4, num_experts_per_tok=2)
    how = {"expert_layout": layout, "moe_token_dispatcher_type": dispatcher}
    return randomise(build_model(spec, **how, **settings)).train()


def trained(one: DeepSeekV4Model) -> Counter[tuple[str, str]]:
    ids = some_ids(one.spec, 2, 140)
    with recording_waits() as found:
        one(ids, labels=ids.roll(-1, 1)).sum().backward()
    return found


def test_the_recorder_sees_every_way_to_ask() -> None:
    x = torch.tensor([1.0, 0.0])
    asks = (
        lambda: [x.tolist()],
        lambda: [x[0].item()],
        lambda: bool(x.any()),
        lambda: int(x.sum()),
        lambda: [x.nonzero()],
        lambda: x[x > 0],
        lambda: [x.cpu()],
        lambda: x.masked_select(x > 0),
        lambda: torch.equal(x, x),
    )
    for number, ask in enumerate(asks):
        with recording_waits() as found:
            ask()
        assert found, number
    with recording_waits() as found:
        (x * 2).sum()
        x[torch.tensor([0])]
    assert not found


@pytest.mark.parametrize("layout", ["sequential", "grouped"])
@pytest.mark.parametrize("loss", [None, 0.01], ids=["", "indexer trained"])
def test_a_layer_waits_for_its_dispatcher_alone(layout: str, loss: float | None) -> None:
    one = model(layout, dsa_indexer_loss_coeff=loss, dsa_indexer_use_sparse_loss=bool(loss))
    assert set(trained(one)) - ON_CPU <= HELD


def test_the_other_dispatcher_waits_twice_a_layer() -> None:
    found = trained(model(dispatcher="allgather"))
    assert set(found) - ON_CPU - HELD == ALLGATHER
    assert found["cpu", DISPATCH] == found["masked_select", DISPATCH] == 4  # layers


def test_a_step_of_decoding_waits_for_the_dispatcher_alone() -> None:
    one = model().eval()
    ids = some_ids(one.spec, 2, 140)
    with torch.no_grad():
        cache = new_cache(one.config, torch.tensor([140, 126]), 150)
        one(ids, cache=cache, last_only=True)
        with recording_waits() as found:
            for _ in range(5):  # blocks are closed on the way
                one(ids[:, :1], cache=cache)
    assert set(found) - ON_CPU <= HELD
    assert cache.lengths.tolist() == list(cache.known) == [145, 131]
    cache.keep(torch.tensor([1]))
    assert cache.lengths.tolist() == list(cache.known) == [131]


def test_counts_that_lie_on_a_device_stay_there() -> None:
    """On a device that only remembers shapes a value that is asked for is an error."""
    x = torch.empty(96, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    counts = torch.empty(4, device="meta", dtype=torch.int64)
    weights = [torch.empty(32, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(4)]
    y = grouped_linear(x, counts, weights, True)
    y.backward(torch.empty_like(y))
    assert y.shape == (96, 32) and {t.grad.device.type for t in (x, *weights)} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        grouped_linear(x, counts, weights, False)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["sequential", "grouped"])
def test_torch_sees_no_waiting_on_a_gpu(layout: str) -> None:
    one = model(layout, dtype=torch.bfloat16)
    ids = some_ids(one.spec, 2, 140).cuda()
    for debug in ("default", "error"):  # the first pass compiles and fills caches
        torch.cuda.set_sync_debug_mode(debug)
        try:
            one(ids, labels=ids.roll(-1, 1)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
