"""The plan of ranks for people; nothing here decides anything."""

from rich.console import Group
from rich.text import Text

from ...errors import counted, size
from ...planning.memory import StageMemory
from ...planning.ranks import GIB, RanksReport
from ...planning.search import USABLE, Ranked
from ...planning.tensors import PlanReport
from ...spec.lora import Lora
from .console import make_table


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}" if nbytes < 100 * GIB else f"{nbytes / GIB:.1f}"


def _adapters(lora: Lora) -> str:
    return f"{'DoRA' if lora.dora else 'LoRA'} of rank {lora.rank} on {', '.join(lora.keys)}"


def ranks_table(report: RanksReport) -> Group:
    """Bytes of each stage, the estimate, and the layouts that fit."""
    plan, run, found = report.chosen.plan, report.chosen.plan.run, report.chosen
    t = plan.topology
    cp = f", cp {t.cp}" if t.cp > 1 else ""
    sizes = f"tp {t.tp}, pp {t.pp}{cp}, ep {t.ep}, etp {t.etp}, dp {plan.dp} (experts: {plan.edp})"
    title = f"ranks of {report.what}: {counted(plan.gpus, 'GPU')}, {sizes}"
    columns = ["stage", ">ranks", "layers", ">parameters", ">weights", ">gradients", ">optimizer", ">activations"]
    stepping = any(stage.step for stage in plan.stages)
    table = make_table(title, *columns, *([">or step"] if stepping else []), ">cache", ">GiB a rank", "")
    for stage in plan.stages:
        table.add_row(
            str(stage.stage),
            f"{stage.ranks:,}",
            " | ".join(stage.chunks),
            *_cells(stage, stepping),
            _mark(report, stage),
        )
    batch = f"{run.micro_batches} micro-batches a step of {run.micro_batch} x {run.seq_length:,} tokens"
    if run.mode == "inference":
        batch = f"a cache of {run.micro_batch} x {run.seq_length:,} tokens"
    lines = [Text(f"run       {run.mode}, {run.dtype}, {batch}" + (", full recompute" if run.recompute else ""))]
    if run.mode != "inference":
        cut = "cut over data-parallel ranks" if run.distributed_optimizer else "whole on every rank"
        kind = {"adamw": "Adam", "muon": "Muon and Adam"}[run.optimizer]
        state = f"{kind} with {run.moments_dtype} moments and float32 masters"
        lines.append(Text(f"          gradients {run.grad_dtype}, {state}, {cut}"))
    if run.mode == "lora":
        lines.append(Text(f"          {_adapters(run.lora)}, the rest frozen"))
    lines.append(Text(f"layout    {t.layout}"))
    lines.append(
        Text(
            f"estimate  bubble {found.bubble:.1%}, imbalance {found.imbalance:.1%}, "
            f"communication {found.communication:.1%} of the step, {found.time:.2f} times the ideal step"
        )
    )
    if report.rows is not None:
        rows = report.rows
        work = f"the slowest of {t.cp} ranks has {rows.slowest:.3f} times the mean work"
        if rows.slowest < rows.at_home:
            work += f", {rows.at_home:.3f} with every query of the indexers at home"
        lines += [Text(f"rows      {work}"), Text(f"          {rows.queries}")]
    parts = [table, *lines]
    if report.gpu_memory is not None:
        parts.append(_verdict(report))
    if report.search is not None:
        parts += [Text(""), *_search(report)]
    return Group(*parts)


def _cells(stage: StageMemory, stepping: bool) -> list[str]:
    passing = (stage.activations, stage.step) if stepping else (stage.activations,)
    sizes = (stage.weights, stage.gradients, stage.optimizer, *passing, stage.cache, stage.total)
    return [f"{stage.parameters:,}", *map(_gib, sizes)]


def _mark(report: RanksReport, stage: StageMemory) -> Text:
    if report.gpu_memory is None:
        return Text("most" if stage is report.chosen.plan.worst else "")
    good = stage.total <= USABLE * report.gpu_memory
    return Text("fits", "green") if good else Text("over", "bold red")


def _verdict(report: RanksReport) -> Text:
    assert report.gpu_memory is not None
    worst = report.chosen.plan.worst
    usable = f"{USABLE:.0%} of {_gib(report.gpu_memory)} GiB"
    if report.fits:
        return Text(f"fits      the largest rank has {_gib(worst.total)} GiB of {usable}", "bold green")
    why = f"too large stage {worst.stage} needs {_gib(worst.total)} GiB a rank, {usable} are usable"
    run = report.chosen.plan.run
    if run.mode != "inference" and not run.recompute:
        why += "; with full recompute (--recompute, in a recipe model.recompute=full) a layer keeps its input alone"
    return Text(why, "bold red")


def _search(report: RanksReport) -> list[Text | object]:
    search = report.search
    assert search is not None
    some = f"{search.fitting:,}" if search.fitting else "none"
    head = f"{some} of {search.considered:,} layouts of {counted(search.gpus, 'GPU')} fit"
    tail = "the quickest by estimate" if search.fitting else "the smallest"
    cut = any(found.plan.topology.cp > 1 for found in search.best)
    columns = [
        ">tp",
        ">pp",
        *([">cp"] if cut else []),
        ">ep",
        ">etp",
        ">dp",
        "layout",
        ">GiB worst",
        ">bubble",
        ">imbalance",
        ">comm",
        ">time",
    ]
    table = make_table(f"{head}; {tail}", *columns)
    for found in search.best:
        table.add_row(*_ranked(found, cut))
    return [table, Text("time: step over one without bubble, imbalance and communication; an estimate that only ranks")]


def _ranked(found: Ranked, cut: bool) -> list[str]:
    plan, t = found.plan, found.plan.topology
    sizes = [str(n) for n in (t.tp, t.pp, *([t.cp] if cut else []), t.ep, t.etp, plan.dp)]
    shares = [f"{x:.1%}" for x in (found.bubble, found.imbalance, found.communication)]
    return [*sizes, str(t.layout), _gib(plan.worst.total), *shares, f"{found.time:.2f}"]


def plan_table(report: PlanReport) -> Group:
    """What goes where."""
    title = f"plan of {report.what} ({report.variant})"
    table = make_table(
        title,
        "row",
        ">tensors",
        "shape",
        "stored",
        ">released",
        "Megatron name (first)",
        "dtype",
        ">Megatron",
    )
    for r in report.rows:
        shape = "x".join(map(str, r.shape))
        table.add_row(
            r.key,
            f"{r.tensors:,}",
            shape,
            r.encoding,
            size(r.released_bytes),
            r.megatron,
            r.dtype,
            size(r.megatron_bytes),
        )
    table.add_section()
    table.add_row(
        "all",
        f"{sum(r.tensors for r in report.rows):,}",
        "",
        "",
        size(report.released_bytes),
        "",
        "",
        size(report.megatron_bytes),
    )
    shards = counted(len(report.shards), "shard")
    lines = [
        *([Text(f"layers    {report.pattern}")] if report.naming == "hybrid" and report.pattern else []),
        Text(f"released  {report.tensors:,} tensors, {report.released_bytes:,} bytes in {shards}"),
        Text(f"megatron  {report.megatron_bytes:,} bytes + {report.passenger_bytes:,} bytes of passengers"),
    ]
    if report.compared and not report.findings:
        lines.append(Text("headers   every tensor is as planned", "green"))
    lines += [Text(f"  {f}", "red") for f in report.findings]
    return Group(table, *lines)
