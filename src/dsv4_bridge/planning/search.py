"""Which layouts of so many GPUs fit their memory, the quickest by estimate first. Pure numbers.

The estimate ranks, it does not predict: operations at one rate, bytes at the rate of the slowest link of
their group, nothing overlapped.

    step = operations of the slowest stage * (1 + bubble) + bytes / link
    bubble = (pp - 1) / (vp * micro-batches)
    time = step / (all operations shared equally by all GPUs)

A group that fits into one node (megatron-core's order: tensor, context, expert, data, pipeline)
uses the link inside it. Bytes of a layer and token: tensor parallelism gathers and scatters H four times a
pass; expert parallelism sends k*H there and back; a pipeline boundary takes all streams; data parallelism
sums gradients and gathers weights once a step; context parallelism sends what `row_traffic` counts, and the last rank
of a row, which sees most blocks, is waited for.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from ..errors import BridgeError
from ..parallel.balance import flop_costs, parameter_costs, solve
from ..parallel.layout import Layout
from ..parallel.topology import Sizes, Topology, check_rows, make_topology
from ..spec.spec import ModelSpec
from .index_queries import rank_flops
from .memory import MemoryPlan, Run, expert_dp, least_dp, plan_memory
from .rates import BETWEEN, INSIDE, RATE
from .row_traffic import sent_backward, sent_forward

NODE = 8
# Share of the memory that plans may use: CUDA and NCCL take some, temporaries and fragments more.
USABLE = 0.9
_MOST_GPUS = 1 << 20
# Tokens of a row that a context-parallel rank has at least, in a layout that is looked for: fewer are lawful, and
# data parallelism is the better use of the ranks.
LEAST_SHARE = 4096


@dataclass(frozen=True)
class Ranked:
    """One layout that was considered.

    Attributes:
        plan: it, with its bytes.
        bubble: idle share of the pipeline, over the busy one.
        imbalance: operations of the slowest stage over the mean, minus 1.
        communication: share of the step.
        time: step over the ideal one.
        fits: whether the worst rank stays within the usable memory.
    """

    plan: MemoryPlan
    bubble: float
    imbalance: float
    communication: float
    time: float
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        facts = {k: v for k, v in vars(self).items() if k != "plan"}
        plan = self.plan.to_json()
        return {k: plan[k] for k in ("gpus", "sizes", "layout", "worst")} | {
            "micro_batches": self.plan.run.micro_batches,
            **facts,
        }


@dataclass(frozen=True)
class Search:
    """What was looked for, and found.

    Attributes:
        gpus: all ranks.
        gpu_memory: bytes of one GPU.
        considered: layouts that keep the rules.
        fitting: those that fit.
        best: the best ten that fit, or the ten smallest where none does.
    """

    gpus: int
    gpu_memory: int
    considered: int
    fitting: int
    best: tuple[Ranked, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(replace(self, best=())) | {"usable": USABLE, "best": [r.to_json() for r in self.best]}


def micro_batches(run: Run, global_batch: int, dp: int) -> int | None:
    """Micro-batches a step and pipeline; None where the batch does not divide."""
    rows = run.micro_batch * dp
    return None if global_batch % rows else global_batch // rows


def search(spec: ModelSpec, gpus: int, gpu_memory: int, run: Run, global_batch: int, vp: int = 1) -> Search:
    """Plan every layout of `gpus` ranks whose sizes are powers of two and keep the rules.

    Args:
        spec: the model.
        gpus: all ranks.
        gpu_memory: bytes of one GPU.
        run: what they do; its micro_batches are set by `global_batch`.
        global_batch: rows a step, over all ranks.
        vp: chunks a rank.

    Returns:
        What was found; nothing where no layout keeps the rules.

    Raises:
        BridgeError: more GPUs than are ever had.
    """
    if not 1 <= gpus <= _MOST_GPUS:
        raise BridgeError(f"ranking layouts: {gpus} GPUs, expected 1 to {_MOST_GPUS}")
    found = [
        ranked(spec, plan_memory(spec, topology, dp, batch), gpu_memory)
        for topology, dp, batch in _candidates(spec, gpus, run, global_batch, vp)
    ]
    fitting = sorted((r for r in found if r.fits), key=lambda r: (r.time, r.plan.worst.total))
    best = fitting or sorted(found, key=lambda r: (r.plan.worst.total, r.time))
    return Search(gpus, gpu_memory, len(found), len(fitting), tuple(best[:10]))


def _candidates(
    spec: ModelSpec, gpus: int, run: Run, global_batch: int, vp: int
) -> Iterator[tuple[Topology, int, Run]]:
    limit = parameter_costs(spec)
    layouts: dict[int, Layout] = {}
    for pp in _powers(spec.num_hidden_layers):
        try:
            layouts[pp] = solve(spec, pp, vp if pp > 1 else 1, limit=limit)
        except BridgeError:
            break
    sizes = product(
        (t for t in _powers(spec.o_groups) if spec.o_groups % t == 0 and spec.vocab_size % t == 0),
        layouts,
        (e for e in _powers(spec.n_routed_experts) if spec.n_routed_experts % e == 0),
        (e for e in _powers(NODE) if spec.moe_intermediate_size % e == 0),
        _powers(1 if run.mode == "inference" else max(1, run.seq_length // LEAST_SHARE)),
    )
    for tp, pp, ep, etp, cp in sizes:
        dp, rest = divmod(gpus, tp * pp * cp)
        if rest or not dp or dp % least_dp(tp, ep, etp, cp) or etp > tp:
            continue
        count = 1 if run.mode == "inference" else micro_batches(run, global_batch, dp)
        if count is None or (run.mode != "inference" and (run.seq_length % tp or (vp > 1 < pp and count % pp))):
            continue
        try:
            topology = make_topology(spec, Sizes(tp, pp, ep, etp, cp), layouts[pp])
            check_rows(run.seq_length, topology.sizes, spec.sliding_window, "ranking layouts")
        except BridgeError:
            continue
        yield topology, dp, replace(run, micro_batches=count)


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length()) if 1 << n <= most]


def ranked(spec: ModelSpec, plan: MemoryPlan, gpu_memory: int) -> Ranked:
    """A plan with its estimate; see the module's docstring."""
    topology, run = plan.topology, plan.run
    layout, costs = topology.layout, flop_costs(spec, run.seq_length)
    passes = 1 if run.mode == "inference" else 4 if run.recompute else 3
    tokens = run.micro_batches * run.micro_batch * run.seq_length  # of one pipeline; others have rows of their own
    whole = sum(map(costs.of, layout.chunks))
    slowest = passes * tokens * costs.worst(layout) / (topology.tp * topology.cp) / RATE
    if topology.cp > 1 and run.mode != "inference":  # the last rank of a row sees most blocks
        shares = rank_flops(spec, run.seq_length, topology.cp, run.shape(topology).e, rows=run.micro_batch)
        slowest *= max(shares) * len(shares) / sum(shares)
    ideal = passes * tokens * whole / (topology.tp * topology.pp * topology.cp) / RATE
    bubble = (topology.pp - 1) / (layout.vp * run.micro_batches)
    sent = _sent_seconds(spec, plan, tokens / (topology.tp * topology.cp), passes)
    step = slowest * (1 + bubble) + sent
    fits = plan.worst.total <= USABLE * gpu_memory
    return Ranked(plan, bubble, costs.imbalance(layout), sent / step, step / ideal, fits)


def _sent_seconds(spec: ModelSpec, plan: MemoryPlan, tokens: float, passes: int) -> float:
    """Seconds of communication of a rank and step; `tokens` are a rank's under sequence parallelism."""
    t, e, hidden = plan.topology, 2 if plan.run.dtype == "bf16" else 4, spec.hidden_size
    chunks = t.layout.of_rank(0)
    layers = max(sum(c.stop - c.start + c.mtp for c in t.layout.of_rank(r)) for r in range(t.pp))
    training = plan.run.mode != "inference"
    groups: list[tuple[float, int]] = []  # bytes, ranks that the group spans
    if t.tp > 1:
        groups.append((4 * passes * layers * tokens * hidden * e * (t.tp - 1), t.tp))
    routed = tokens * spec.num_experts_per_tok * hidden * e
    if t.ep > 1:
        groups.append((2 * passes * layers * routed * (t.ep - 1) / t.ep, t.etp * t.ep))
    if t.etp > 1:
        groups.append((2 * passes * layers * routed * (t.etp - 1), t.etp))
    if t.pp > 1:
        streams = spec.hc_mult * hidden * e
        groups.append(((1 + training) * len(chunks) * tokens * streams, plan.gpus))
    if t.cp > 1:
        groups.append((_row_bytes(spec, plan, passes), t.tp * t.cp))
    if training:
        stage = plan.worst
        span = t.tp * t.cp * plan.dp
        for copies in (t.cp * plan.dp, expert_dp(t, plan.dp)):
            # Both groups are charged half of what the rank holds: gradients once, weights once.
            share = (stage.gradients + stage.weights * (plan.run.mode == "training")) / 2
            groups.append((share * (copies - 1) / copies, span))
    return sum(size / (INSIDE if span <= NODE else BETWEEN) for size, span in groups)


def _row_bytes(spec: ModelSpec, plan: MemoryPlan, passes: int) -> float:
    """Of a rank and step between context-parallel ranks: a forward a pass that is one, and a backward."""
    t, run = plan.topology, plan.run
    shape, count = run.shape(t), spec.num_hidden_layers
    kinds = set(spec.compress_ratios)
    forth = {ratio: sent_forward(spec, ratio, shape).total for ratio in kinds}
    back = {ratio: sent_backward(spec, ratio, shape).total for ratio in kinds}
    worst = 0
    for rank in range(t.pp):
        ratios = [r for c in t.layout.of_rank(rank) for r in spec.compress_ratios[c.start : c.stop]]
        ratios += [r for c in t.layout.of_rank(rank) for r in spec.compress_ratios[count : count + c.mtp]]
        worst = max(worst, sum((passes - 2) * forth[r] + back[r] for r in ratios))
    return worst * run.micro_batches
