"""The estimate of a step's time, in seconds: not only in shares, where a common factor would not be seen."""

import pytest

from dsv4_bridge.parallel.topology import Sizes
from dsv4_bridge.planning import search
from dsv4_bridge.planning.index_queries import rank_flops
from dsv4_bridge.planning.memory import Run, make_run_topology, plan_memory
from dsv4_bridge.planning.rates import INSIDE, RATE
from dsv4_bridge.planning.row_traffic import sent_backward, sent_forward
from dsv4_bridge.spec.flops import count_flops, forward_costs, share_flops
from dsv4_bridge.spec.variants import VARIANTS

FLASH = VARIANTS["Flash"].spec


@pytest.mark.parametrize(("mode", "recompute", "passes"), [("training", True, 4), ("training", False, 3)])
def test_arithmetic_takes_the_flops_that_are_counted(mode: str, recompute: bool, passes: int) -> None:
    run = Run(mode=mode, seq_length=4096, micro_batches=3, recompute=recompute)
    topology, dp = make_run_topology(FLASH, Sizes(), dp=2)
    plan = plan_memory(FLASH, topology, dp, run)
    found = search.ranked(FLASH, plan, 80 << 30)
    # One stage, no tensor parallelism: what is sent are gradients and weights of two replicas, half of each.
    sent = (plan.worst.gradients + plan.worst.weights) / 2 / INSIDE
    worked = passes * 3 * count_flops(FLASH, 4096).forward.total / RATE
    assert found.communication == pytest.approx(sent / (sent + worked), rel=1e-9)
    assert found.time == pytest.approx((sent + worked) / worked, rel=1e-9)


@pytest.mark.parametrize(("recompute", "passes"), [(True, 4), (False, 3)])
def test_rows_over_ranks_cost_their_bytes_and_the_wait_for_the_last_rank(recompute: bool, passes: int) -> None:
    length, cp, each = 1 << 18, 4, 3
    run = Run(seq_length=length, micro_batches=each, recompute=recompute)
    topology, dp = make_run_topology(FLASH, Sizes(cp=cp), dp=1)
    plan = plan_memory(FLASH, topology, dp, run)
    found = search.ranked(FLASH, plan, 80 << 30)
    shape = run.shape(topology)
    forth, back = (sum(f(FLASH, r, shape).total for r in FLASH.compress_ratios) for f in (sent_forward, sent_backward))
    rows = each * ((passes - 2) * forth + back)
    # Gradients and weights of cp ranks, which hold the same.
    state = (plan.worst.gradients + plan.worst.weights) * (cp - 1) / cp
    sent = (rows + state) / INSIDE
    layers, draft, head = forward_costs(FLASH, length)
    ideal = passes * each * length * (sum(layers) + draft + head) / cp / RATE
    shares = rank_flops(FLASH, length, cp, 2)
    assert max(shares) < max(share_flops(FLASH, length, cp))
    worked = ideal * max(shares) * cp / sum(shares)
    assert max(shares) * cp / sum(shares) > 1.05
    assert found.communication == pytest.approx(sent / (sent + worked), rel=1e-9)
    assert found.time == pytest.approx((sent + worked) / ideal, rel=1e-9)


def sizes_found(length: int, mode: str = "training") -> list[tuple[int, int]]:
    run = Run(mode=mode, seq_length=length, recompute=True)
    return [(r.plan.topology.cp, r.plan.dp) for r in search.search(FLASH, 64, 141 << 30, run, 256).best]


def test_long_rows_are_cut_and_short_ones_are_not() -> None:
    assert sizes_found(65536)[0][0] > 1
    assert {cp for cp, _ in sizes_found(4096)} == {cp for cp, _ in sizes_found(65536, "inference")} == {1}
    odd = 65536 + 2  # does not divide over more ranks
    assert {cp for cp, _ in sizes_found(odd)} <= {1, 2}
    assert all(odd // cp >= search.LEAST_SHARE for cp, _ in sizes_found(odd))
