"""What was asked of `dsv4 plan` about ranks, checked and answered: one layout, and those that fit."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import BridgeError
from ..parallel.notation import parse_layout
from ..parallel.topology import Sizes
from ..spec.plan import check_computed
from ..spec.spec import ModelSpec
from .index_queries import rank_flops, spread_rows
from .memory import Run, make_run_topology, plan_memory
from .search import USABLE, Ranked, Search, micro_batches, ranked, search

SCHEMA = 1
GIB = 1 << 30
_SPARE = 4  # micro-batches a pipeline rank and tensor-parallel rank, where no batch is given


@dataclass(frozen=True)
class Asked:
    """What a user may say; None: not said.

    Attributes:
        tp: tensor-parallel ranks.
        pp: pipeline ranks.
        ep: expert-parallel ranks.
        etp: expert-tensor-parallel ranks.
        dp: data-parallel ranks.
        cp: context-parallel ranks.
        vp: chunks a pipeline rank.
        layout: written pipeline layout.
        gpus: all ranks.
        gpu_memory: GiB of one GPU.
        global_batch: rows a step.
        run: the rest.
    """

    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    etp: int | None = None
    dp: int | None = None
    cp: int | None = None
    vp: int | None = None
    layout: str | None = None
    gpus: int | None = None
    gpu_memory: float | None = None
    global_batch: int | None = None
    run: Run = field(default_factory=Run)

    @property
    def one(self) -> bool:
        """Whether a layout was named, not only a number of GPUs."""
        named = (self.tp, self.pp, self.ep, self.etp, self.dp, self.cp, self.layout)
        return self.gpus is None or any(size is not None for size in named)


@dataclass(frozen=True)
class Rows:
    """How level the work of context-parallel ranks is.

    Attributes:
        slowest: training FLOPs of the busiest rank over the mean.
        at_home: the same if every rank scored all blocks of its own queries.
        queries: why the indexers' queries are scored elsewhere, or are not.
    """

    slowest: float
    at_home: float
    queries: str


@dataclass(frozen=True)
class RanksReport:
    """The answer.

    Attributes:
        what: the checkpoint or variant.
        spec: its numbers.
        chosen: the layout that was asked for, or the best.
        gpu_memory: bytes of one GPU, where given.
        search: what else fits, where it was asked for.
    """

    what: str
    spec: ModelSpec
    chosen: Ranked
    gpu_memory: int | None
    search: Search | None

    @property
    def rows(self) -> Rows | None:
        """Of the chosen layout, where it cuts rows that are trained on."""
        topology, run = self.chosen.plan.topology, self.chosen.plan.run
        if topology.cp == 1 or run.mode == "inference":
            return None
        cut = self.spec, run.seq_length, topology.cp, run.shape(topology).e
        every = [rank_flops(*cut, mode, run.micro_batch) for mode in ("auto", "home")]
        slowest, at_home = (max(each) * len(each) / sum(each) for each in every)
        return Rows(slowest, at_home, spread_rows(*cut, rows=run.micro_batch).reason)

    @property
    def fits(self) -> bool:
        """Whether the chosen layout fits; True where no memory was given."""
        return self.gpu_memory is None or self.chosen.fits

    def to_json(self) -> dict[str, Any]:
        """Plain types; `schema` changes when a field's meaning does."""
        return {
            "schema": SCHEMA,
            "what": self.what,
            "plan": self.chosen.plan.to_json(),
            "estimate": {k: getattr(self.chosen, k) for k in ("bubble", "imbalance", "communication", "time")},
            "rows": self.rows and asdict(self.rows),
            "gpu_memory": self.gpu_memory,
            "usable": USABLE,
            "fits": None if self.gpu_memory is None else self.chosen.fits,
            "search": self.search and self.search.to_json(),
        }


def plan_ranks(what: str, spec: ModelSpec, asked: Asked) -> RanksReport:
    """Plan the layout that was asked for, and look for those that fit.

    Raises:
        BridgeError: what cannot work, with the rule and the nearest that does.
    """
    check_computed(spec, f"planning ranks of {what}")
    for name in ("dp", "gpus", "global_batch", "gpu_memory"):
        if (value := getattr(asked, name)) is not None and not value > 0:
            raise BridgeError(f"planning ranks: {name} is {value}, expected more than 0")
    memory = None if asked.gpu_memory is None else int(asked.gpu_memory * GIB)
    if not asked.one:
        assert asked.gpus is not None
        found = search(spec, asked.gpus, memory or 80 * GIB, asked.run, _batch(asked, asked.gpus), asked.vp or 1)
        if not found.best:
            raise BridgeError(
                f"ranking layouts of {what}: none of {asked.gpus} GPUs keeps the rules with {asked.run.seq_length} "
                f"tokens a row, micro-batches of {asked.run.micro_batch}, {_batch(asked, asked.gpus)} rows a step and "
                f"{asked.vp or 1} chunks a rank; try a power of two of GPUs, and rows a step that it divides"
            )
        return RanksReport(what, spec, found.best[0], memory, found)
    chosen = _chosen(spec, asked, memory)
    others = None
    if memory is not None:
        gpus = chosen.plan.gpus
        others = search(spec, gpus, memory, asked.run, _batch(asked, gpus), asked.vp or 1)
    return RanksReport(what, spec, chosen, memory, others)


def _batch(asked: Asked, gpus: int) -> int:
    return asked.global_batch or _SPARE * gpus * asked.run.micro_batch


def _chosen(spec: ModelSpec, asked: Asked, memory: int | None) -> Ranked:
    named = asked.tp, asked.pp, asked.ep, asked.etp, asked.cp, asked.vp
    tp, pp, ep, etp, cp, vp = (1 if size is None else size for size in named)
    if asked.layout and asked.pp is None:
        pp = max(1, asked.layout.count("|") + 1) // vp or 1
    if asked.layout and asked.vp is None:
        vp = parse_layout(asked.layout, pp, spec).vp
    dp = asked.dp
    if asked.gpus is not None:
        each = max(1, tp * pp * cp * (dp or 1))
        if asked.gpus % each or (dp and asked.gpus != each):
            near = each if dp else max(1, round(asked.gpus / each)) * each
            of, sizes = ("tp*pp", f"{tp}*{pp}") if cp == 1 else ("tp*pp*cp", f"{tp}*{pp}*{cp}")
            raise BridgeError(
                f"planning ranks: {asked.gpus} GPUs are not {of}*dp = {sizes}*{dp or 'any'} "
                f"(rule: {of}*dp is the number of ranks). Nearest that works: --gpus {near}"
            )
        dp = asked.gpus // max(1, tp * pp * cp)
    topology, dp = make_run_topology(spec, Sizes(tp, pp, ep, etp, cp, vp), asked.layout, dp)
    rows = _batch(asked, tp * pp * cp * dp)
    count = 1 if asked.run.mode == "inference" else micro_batches(asked.run, rows, dp)
    if count is None:
        each = asked.run.micro_batch * dp
        raise BridgeError(
            f"planning ranks: {rows} rows a step do not divide over {dp} data-parallel ranks with micro-batches of "
            f"{asked.run.micro_batch}. Nearest that works: --global-batch {max(1, round(rows / each)) * each}"
        )
    plan = plan_memory(spec, topology, dp, replace(asked.run, micro_batches=count))
    return ranked(spec, plan, memory if memory is not None else 80 * GIB)
