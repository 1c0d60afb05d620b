"""The estimate of a step's time, in seconds: not only in shares, where a common factor would not be seen."""

import pytest

from dsv4_bridge.parallel.topology import Sizes
from dsv4_bridge.planning import search
from dsv4_bridge.planning.memory import Run, make_run_topology, plan_memory
from dsv4_bridge.spec.flops import count_flops
from dsv4_bridge.spec.variants import VARIANTS

FLASH = VARIANTS["Flash"].spec


@pytest.mark.parametrize(("mode", "recompute", "passes"), [("training", True, 4), ("training", False, 3)])
def test_arithmetic_takes_the_flops_that_are_counted(mode: str, recompute: bool, passes: int) -> None:
    run = Run(mode=mode, seq_length=4096, micro_batches=3, recompute=recompute)
    topology, dp = make_run_topology(FLASH, Sizes(), dp=2)
    plan = plan_memory(FLASH, topology, dp, run)
    found = search.ranked(FLASH, plan, 80 << 30)
    # One stage, no tensor parallelism: what is sent are gradients and weights of two replicas, half of each.
    sent = (plan.worst.gradients + plan.worst.weights) / 2 / search._INSIDE
    worked = passes * 3 * count_flops(FLASH, 4096).forward.total / search._RATE
    assert found.communication == pytest.approx(sent / (sent + worked), rel=1e-9)
    assert found.time == pytest.approx((sent + worked) / worked, rel=1e-9)
