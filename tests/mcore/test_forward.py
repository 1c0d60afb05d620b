"""The model computes what transformers computes: float32, everything random, every position."""

import pytest
import torch
from reference import (
    assert_equal_to_reference,
    counting_clamped,
    distance,
    pair,
    randomise,
    recorded,
    small_spec,
    some_ids,
)

from dsv4_bridge.mcore import build_model
from dsv4_bridge.spec.spec import ModelSpec

pytestmark = pytest.mark.megatron

# transformers' first two layers of Pro are compressed; other group counts, factor and depth of mixing.
PRO = small_spec(
    compress_ratios=(128, 128, 4, 128),
    routed_scaling_factor=2.5,
    num_attention_heads=6,
    o_groups=3,
    num_hash_layers=2,
    n_shared_experts=1,
    hc_sinkhorn_iters=3,
)


@pytest.mark.parametrize(("batch", "length"), [(3, 1), (3, 3), (3, 127), (3, 128), (3, 301), (2, 1024)])
def test_logits_equal_transformers(batch: int, length: int) -> None:
    """Below and above one block of 4, the window, one block of 128, and no multiple of either."""
    assert_equal_to_reference(small_spec(), batch, length)


@pytest.mark.parametrize("length", [3, 301])
def test_logits_of_a_model_in_the_manner_of_pro_equal_transformers(length: int) -> None:
    assert_equal_to_reference(PRO, 2, length)


def test_as_many_sinkhorn_iterations_as_the_releases_have() -> None:
    assert_equal_to_reference(small_spec(hc_sinkhorn_iters=20), 2, 127)


def test_more_choices_than_blocks_means_all_of_them() -> None:
    assert_equal_to_reference(small_spec(index_topk=64), 2, 127)


@pytest.mark.parametrize("spec", [small_spec(), PRO], ids=["small", "pro"])
def test_the_clamp_fires_in_routed_and_shared_experts(spec: ModelSpec) -> None:
    """What makes the comparisons above see the clamp."""
    with torch.no_grad(), counting_clamped(spec) as found:
        pair(spec).reference(some_ids(spec, 2, 128))
    kinds = [f"{kind} {side}" for kind in ("routed", "shared") for side in ("gate", "up", "-up")]
    assert all(found[kind] > 50 for kind in kinds), found


def test_far_more_blocks_than_choices() -> None:
    """8 of 576 blocks."""
    spec = small_spec()
    assert_equal_to_reference(spec, 1, 2304)
    late = recorded(spec, 1, 2304).choices.chosen["attn.index", "layers.1"][0, -1]
    assert late.min() >= 0
    assert len(set(late.tolist())) == spec.index_topk


def test_logits_without_replay() -> None:
    """As a user runs it, where no choice is close."""
    spec = small_spec(index_topk=64)
    with torch.no_grad():
        ours = pair(spec).ours(some_ids(spec, 3, 130))
    assert distance(ours, recorded(spec, 3, 130).logits) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["sequential", "grouped"])
@torch.no_grad()
def test_experts_on_one_rank_come_to_what_the_dispatcher_does(layout: str, dtype: torch.dtype) -> None:
    """To the bit: inference leaves the dispatcher out, training never does. One expert a token, several, and all."""
    for topk, length in ((1, 40), (3, 1), (3, 150), (8, 7)):
        spec = small_spec(num_experts_per_tok=topk)
        model = randomise(build_model(spec, dtype=dtype, expert_layout=layout, initialize_weights=False), topk)
        ids = some_ids(spec, 2, length, seed=topk)
        assert torch.equal(model.eval()(ids), model.train()(ids))
