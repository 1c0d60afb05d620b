"""A comparison as tables for a terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...parity.metrics import Choice, Difference
from ...parity.report import about, logits_of, runs_of
from ...parity.result import ParityReport, SiteResult, Tolerance
from .console import make_table

_LEGEND = (
    "error: largest difference over the largest value; experts, blocks, flips: sets chosen otherwise, ~: near-ties\n"
)


def parity_table(report: ParityReport, every_site: bool = False) -> Group:
    """What was compared, a line a layer (or a sub-layer), the logits, the verdict."""
    table = sites_table(report) if every_site else layers_table(report)
    style = "bold green" if report.passed else "bold red"
    head = Text("\n".join(f"{name:<12}{words}" for name, words in about(report)))
    verdict = Text(report.verdict.text, style)
    return Group(head, Text(), table, Text(_LEGEND, "dim"), logits_table(report), verdict)


def layers_table(report: ParityReport) -> Table:
    """One line a layer: its worst sub-layer, its flipped choices."""
    table = _table("layer", "kind", *_columns(report, "worst", ">error", ">1-cosine", ">experts", ">blocks"))
    for layer, kind in [*enumerate(report.layers), (None, "")]:
        cells: list[Any] = []
        if not report.free.of_layer(layer):  # a part of the layers was compared
            continue
        for _, run in runs_of(report):
            sites = run.of_layer(layer)
            worst = max((s for s in sites if isinstance(s.found, Difference)), key=lambda s: s.error)
            cells += [worst.site, *_error(worst, report.tolerance)]
            cells += [_flips(next((s for s in sites if s.site == name), None)) for name in ("ffn.router", "attn.index")]
        table.add_row("head" if layer is None else str(layer), kind, *cells)
    return table


def sites_table(report: ParityReport) -> Table:
    """One line a sub-layer."""
    table = _table("layer", "sub-layer", *_columns(report, ">error", ">1-cosine", ">relative", ">flips"))
    last: int | None = report.free.sites[0].layer
    for index, first in enumerate(report.free.sites):
        if first.layer != last:
            table.add_section()
        cells: list[Any] = []
        for _, run in runs_of(report):
            site = run.sites[index]
            relative = f"{site.found.relative:.1e}" if isinstance(site.found, Difference) else ""
            cells += [*_error(site, report.tolerance), relative, _flips(site)]
        name = "head" if first.layer is None else str(first.layer)
        table.add_row(name if first.layer != last or not index else "", first.site, *cells)
        last = first.layer
    return table


def logits_table(report: ParityReport) -> Table:
    """The logits of every run, over all positions."""
    table = _table("logits", ">error", ">cosine, last", ">cosine, least", ">top-1", ">KL mean", ">p95", ">max")
    for title, found in logits_of(report):
        table.add_row(
            title,
            f"{found.error:.1e}",
            f"{found.last_cosine:.7f}",
            f"{found.cosine_min:.7f}",
            f"{100 * found.top1:.2f} %",
            *(f"{x:.1e}" for x in (found.kl_mean, found.kl_p95, found.kl_max)),
        )
    return table


def _error(site: SiteResult, tolerance: Tolerance) -> tuple[Text, Text]:
    if not isinstance(site.found, Difference):
        return Text(), Text()
    style = "" if site.error <= tolerance.site else "red"
    return Text(f"{site.error:.1e}", style), Text(f"{1 - site.found.cosine_min:.1e}")


def _flips(site: SiteResult | None) -> Text:
    """Flipped sets of all; `~` before it: near-ties only. Empty where nothing is chosen."""
    if site is None or not isinstance(site.found, Choice):
        return Text()
    if not site.flips:
        return Text("0")
    near = not site.far
    return Text(f"{'~' if near else ''}{site.flips}/{site.found.queries}", "yellow" if near else "red")


def _table(*columns: str) -> Table:
    return make_table("", *columns, box=SIMPLE_HEAD)


def _columns(report: ParityReport, *names: str) -> list[str]:
    """The same columns for every run, its title above the first where there are several."""
    runs = [title for title, _ in runs_of(report)]
    columns = []
    for title in runs:
        above = [title, *[""] * (len(names) - 1)]
        columns += [f"{'>' * n.startswith('>')}{over}\n{n.lstrip('>')}" for n, over in zip(names, above, strict=True)]
    return columns if len(runs) > 1 else list(names)
