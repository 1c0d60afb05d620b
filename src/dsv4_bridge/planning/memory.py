"""Bytes of every rank, before any process starts: weights, gradients, optimizer, activations, cache.

Parameters come from `pieces` over the plan of the table, activations from `activations`; nothing here
imports torch or megatron. Ranks of a pipeline stage hold the same amount of everything, for each size
that cuts the model divides what it cuts, so there is one line a stage.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import BridgeError, short
from ..parallel.layout import Layout
from ..parallel.notation import parse_layout
from ..parallel.topology import Sizes, Topology, check_rows, make_topology
from ..spec.lora import Lora
from ..spec.spec import ModelSpec
from .activations import DTYPE_BYTES, LOSS_CHUNK, Shape, cache_bytes, chunk_bytes, in_flight, recomputed_bytes
from .parameters import Count, Part, chunk_part

MODES = ("inference", "training", "lora")
_LORA = Lora(32)  # as the recipes have


@dataclass(frozen=True)
class Run:
    """What the ranks do.

    Attributes:
        mode: inference, training (all weights) or lora (adapters, the rest frozen).
        dtype: type of the model, bf16 or float32; what checkpoints keep in float32 stays so.
        seq_length: tokens a row; in inference, what the cache has room for.
        micro_batch: rows a micro-batch; in inference, rows decoded at a time.
        micro_batches: of a step and pipeline.
        recompute: full recompute of every layer.
        grad_dtype: type that gradients are summed in.
        distributed_optimizer: whether optimizer state is cut over the data-parallel ranks.
        optimizer: adamw, or muon for linear maps and AdamW for the rest.
        moments_dtype: type of AdamW's moments.
        lora: the adapters of mode lora.
        fused: by the fused kernels of a GPU, with grouped experts; else by the torch definitions.
        loss_chunk: tokens whose logits a rank holds at a time; 0: all of a micro-batch.
        indexer: whether the indexers learn along with the model.
    """

    mode: str = "training"
    dtype: str = "bf16"
    seq_length: int = 4096
    micro_batch: int = 1
    micro_batches: int = 1
    recompute: bool = False
    grad_dtype: str = "float32"
    distributed_optimizer: bool = True
    lora: Lora = _LORA
    optimizer: str = "adamw"
    moments_dtype: str = "float32"
    fused: bool = True
    loss_chunk: int = LOSS_CHUNK
    indexer: bool = False

    @property
    def adapters(self) -> Lora | None:
        """What is trained instead of the weights, if so."""
        return self.lora if self.mode == "lora" else None

    def shape(self, topology: Topology) -> Shape:
        """What one micro-batch is, on a rank."""
        return Shape(
            self.micro_batch,
            self.seq_length // topology.cp,
            self.dtype,
            topology.tp,
            topology.etp,
            self.recompute,
            self.adapters,
            self.fused,
            topology.cp,
            self.loss_chunk,
            self.indexer,
        )


@dataclass(frozen=True)
class StageMemory:
    """One rank of a pipeline stage; all ranks of the stage are alike.

    Attributes:
        stage: pipeline rank.
        ranks: how many ranks it has.
        chunks: what it holds, in the layout's letters.
        parameters: parameters and router buffers, adapters included.
        weights: their bytes.
        gradients: bytes of the gradient buffers.
        optimizer: bytes of Adam's moments, and of float32 master weights in a bf16 model.
        activations: bytes kept for the backward, over all micro-batches in flight, and one layer or chunk of logits
            that is computed again.
        cache: bytes of the decoding cache.
        step: bytes of the optimizer's step alone, when the activations are gone: a float32 copy of narrower gradients,
            which an optimizer of narrow moments does without.
    """

    stage: int
    ranks: int
    chunks: tuple[str, ...]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    cache: int
    step: int = 0

    @property
    def total(self) -> int:
        """The most bytes at a time: those that stay, and the larger of the activations and the step."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.step) + self.cache


@dataclass(frozen=True)
class MemoryPlan:
    """A layout with the bytes of its ranks.

    Attributes:
        topology: how the model is cut.
        dp: data-parallel ranks.
        run: what the ranks do.
        stages: one a pipeline rank.
    """

    topology: Topology
    dp: int
    run: Run
    stages: tuple[StageMemory, ...]

    @property
    def gpus(self) -> int:
        """All ranks."""
        return self.topology.tp * self.topology.pp * self.topology.cp * self.dp

    @property
    def edp(self) -> int:
        """Expert-data-parallel ranks: how many have the same experts."""
        return expert_dp(self.topology, self.dp)

    @property
    def worst(self) -> StageMemory:
        """The stage with most bytes a rank."""
        return max(self.stages, key=lambda s: s.total)

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        t = self.topology
        sizes = {"tp": t.tp, "pp": t.pp, "vp": t.layout.vp, "cp": t.cp, "ep": t.ep, "etp": t.etp}
        sizes |= {"dp": self.dp, "edp": self.edp}
        return {
            "gpus": self.gpus,
            "sizes": sizes,
            "layout": str(t.layout),
            "layout_lists": t.layout.to_list(),
            "run": asdict(self.run),
            "stages": [asdict(s) | {"chunks": list(s.chunks), "total": s.total} for s in self.stages],
            "worst": {"stage": self.worst.stage, "total": self.worst.total},
        }


def expert_dp(topology: Topology, dp: int) -> int:
    """Ranks that have the same experts: tp * cp * dp / (etp * ep)."""
    return topology.tp * topology.cp * dp // (topology.etp * topology.ep)


def least_dp(tp: int, ep: int, etp: int, cp: int = 1) -> int:
    """The fewest data-parallel ranks that experts can be spread over."""
    return math.lcm(tp * cp, etp * ep) // (tp * cp)


def make_run_topology(
    spec: ModelSpec, sizes: Sizes, layout: str | None = None, dp: int | None = None
) -> tuple[Topology, int]:
    """The topology and its data-parallel size, checked against every rule.

    Args:
        spec: the model.
        sizes: of the groups that cut the model.
        layout: written pipeline layout; None: the solver's.
        dp: data-parallel ranks; None: the fewest that work.

    Raises:
        BridgeError: what cannot work, the rule, and the nearest that does.
    """
    tp, pp, ep, etp, cp, vp = sizes.tp, sizes.pp, sizes.ep, sizes.etp, sizes.cp, sizes.vp
    if wrong := [f"{k} {short(v)}" for k, v in (*vars(sizes).items(), ("dp", 1 if dp is None else dp)) if v < 1]:
        raise BridgeError(f"planning ranks: {', '.join(wrong)}; every size is 1 or more")
    if pp == 1 and vp > 1:
        raise BridgeError(
            f"planning ranks: {vp} chunks a rank without a pipeline (rule: stages are interleaved over 2 or more "
            f"pipeline ranks). Nearest that works: vp 1"
        )
    written = parse_layout(layout, pp, spec) if layout else None
    topology = make_topology(spec, sizes, written)
    least = least_dp(tp, ep, etp, cp)
    if dp is None:
        return topology, least
    if dp % least:
        near = max(1, round(dp / least)) * least
        of, each = ("tp*", f"{tp}*") if cp == 1 else ("tp*cp*", f"{tp}*{cp}*")
        raise BridgeError(
            f"planning ranks: {of}dp = {each}{dp} = {tp * cp * dp} ranks of a pipeline stage do not divide into "
            f"etp*ep = {etp}*{ep} = {etp * ep} (rule: {of}pp*dp = etp*ep*edp*pp, edp whole). "
            f"Nearest that works: dp {near}, with {tp * cp * pp * near} ranks"
        )
    return topology, dp


def check_run(spec: ModelSpec, topology: Topology, run: Run) -> None:
    """Refuse a run that the ranks would refuse.

    Raises:
        BridgeError: the rule, and the nearest value that works.
    """
    known = (("mode", run.mode, MODES), ("dtype", run.dtype, DTYPE_BYTES), ("grad_dtype", run.grad_dtype, DTYPE_BYTES))
    for name, value, allowed in known:
        if value not in allowed:
            raise BridgeError(f"planning ranks: {name} is {short(value)}, expected one of {', '.join(allowed)}")
    for name in ("seq_length", "micro_batch", "micro_batches"):
        if getattr(run, name) < 1:
            raise BridgeError(f"planning ranks: {name} is {short(getattr(run, name))}, expected 1 or more")
    if run.indexer and run.mode == "inference":
        raise BridgeError("planning ranks: indexers learn in training alone; leave that out, or choose mode training")
    if run.mode == "lora":
        _ = run.lora.keys  # refuses what cannot be adapted
    tp, pp = topology.tp, topology.pp
    if run.seq_length > spec.max_position_embeddings:
        raise BridgeError(
            f"planning ranks: {run.seq_length} tokens a row, the model takes {spec.max_position_embeddings} at most"
        )
    if run.mode == "inference" and topology.cp > 1:
        raise BridgeError(
            f"planning ranks: decoding with cp {topology.cp} (rule: a cache holds whole rows). Nearest that works: cp 1"
        )
    check_rows(run.seq_length, topology.sizes, spec.sliding_window, "planning ranks")
    if run.mode != "inference" and run.seq_length % tp:
        near = max(tp, round(run.seq_length / tp) * tp)
        raise BridgeError(
            f"planning ranks: {run.seq_length} tokens a row do not divide over tp {tp} (rule: sequence parallelism "
            f"goes with tensor parallelism). Nearest that works: --seq-length {near}"
        )
    if topology.layout.vp > 1 and run.mode != "inference" and run.micro_batches % pp:
        near = max(pp, round(run.micro_batches / pp) * pp)
        raise BridgeError(
            f"planning ranks: {run.micro_batches} micro-batches a step with {topology.layout.vp} chunks a rank "
            f"(rule: interleaved stages take a multiple of pp {pp}). Nearest that works: {near}"
        )


def plan_memory(spec: ModelSpec, topology: Topology, dp: int, run: Run) -> MemoryPlan:
    """Bytes of the ranks of every pipeline stage.

    Raises:
        BridgeError: see `check_run`.
    """
    check_run(spec, topology, run)
    shape = run.shape(topology)
    layout = topology.layout
    stages = []
    for rank in range(topology.pp):
        chunks = layout.of_rank(rank)
        numbers = range(rank, len(layout.chunks), topology.pp)
        part = sum((chunk_part(spec, layout, n, topology, run.adapters) for n in numbers), Part())
        if run.mode == "inference":
            kept, cached = 0, cache_bytes(spec, chunks, shape)
        else:
            held = [chunk_bytes(spec, c, shape) for c in chunks]
            kept = in_flight(held, rank, topology.pp, run.micro_batches)
            kept += max(recomputed_bytes(spec, c, shape) for c in chunks)
            cached = 0
        copies = topology.cp * dp, expert_dp(topology, dp)
        parameters, weights, gradients, optimizer, step = _state(part, run, *copies)
        stages.append(
            StageMemory(
                rank,
                topology.tp * topology.cp * dp,
                tuple(str(Layout((c,), 1)) for c in chunks),
                parameters,
                weights,
                gradients,
                optimizer,
                kept,
                cached,
                step,
            )
        )
    return MemoryPlan(topology, dp, run, tuple(stages))


def _state(part: Part, run: Run, dp: int, edp: int) -> tuple[int, int, int, int, int]:
    """Values, and bytes of weights, gradients, optimizer and its step, of one rank; dp and edp hold the same."""
    e = DTYPE_BYTES[run.dtype]
    both = part.dense + part.expert
    added = part.adapters + part.expert_adapters
    values = both.parameters + both.buffers + added
    weights = (both.plain + added) * e + (both.wide + both.buffers) * 4
    if run.mode == "inference":
        return values, weights, 0, 0, 0
    trained = ((part.dense, dp), (part.expert, edp))
    if run.mode == "lora":
        trained = ((Count(part.adapters), dp), (Count(part.expert_adapters), edp))
    # A float32 parameter has a float32 gradient, whatever type is asked for.
    gradient = 4 if run.dtype == "float32" else DTYPE_BYTES[run.grad_dtype]
    gradients = sum(c.plain * gradient + c.wide * 4 for c, _ in trained)
    # megatron's optimizers of float32 moments read float32 gradients, and make them of others at the step.
    copied = 0 if gradient == 4 or run.moments_dtype == "bf16" else 4
    optimizer = step = 0
    for count, copies in trained:
        # A bf16 parameter has a float32 master, a float32 one is its own; Muon keeps one float32 momentum.
        momenta = count.matrices if run.optimizer == "muon" else 0
        whole = momenta * 4 + (count.parameters - momenta) * 2 * DTYPE_BYTES[run.moments_dtype]
        whole += count.plain * 4 if run.dtype == "bf16" else 0
        share = copies if run.distributed_optimizer else 1
        optimizer += -(-whole // share)
        step += -(-count.plain * copied // share)
    return values, weights, gradients, optimizer, step
