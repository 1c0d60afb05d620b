"""A comparison as a page for a browser: `index.html`, its plots in it, and `parity.json` with all numbers."""

import json
from base64 import b64encode
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from importlib.util import find_spec
from pathlib import Path

from ..errors import BridgeError, counted, files_named, size
from ..web_page import facts, page, verdict
from .metrics import Choice, Difference, LogitsDifference
from .result import ParityReport, Run, SiteResult
from .sites import SITES

_STYLE = """
figure { margin: 0 0 1.6rem; } figure div { background: #fff; border-radius: .2rem; }
figure img { display: block; width: 100%; min-width: 44rem; height: auto; }
"""


def can_report(folder: Path) -> None:
    """Say before the work that a report could not be written.

    Raises:
        BridgeError: matplotlib is missing, or the folder is a file, cannot be written, or has a page of something else.
    """
    if find_spec("matplotlib") is None:
        raise BridgeError("writing a report: matplotlib is not installed; pip install 'dsv4-bridge[report]'")
    if folder.exists() and not folder.is_dir():
        raise BridgeError(f"writing a report: {folder} is not a folder")
    if (folder / "index.html").exists() and not (folder / "parity.json").exists():
        raise BridgeError(f"writing a report: {folder} has an index.html that is of no comparison; name another folder")
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        probe = there / ".dsv4-probe"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise BridgeError(
            f"writing a report to {folder}: {there} cannot be written ({error.strerror or error}); name another folder"
        ) from None


@files_named("writing the report")
def write_report(report: ParityReport, folder: Path) -> Path:
    """Write index.html and parity.json.

    Args:
        report: what was found.
        folder: made where it does not exist; files of an earlier report are replaced.

    Returns:
        Path of the page.

    Raises:
        BridgeError: it cannot be written.
    """
    can_report(folder)
    from .plots import draw

    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures = draw(report)
        (folder / "parity.json").write_text(json.dumps(report.to_json(), indent=1) + "\n")
        path = folder / "index.html"
        path.write_text(_page(report, figures))
    except OSError as error:
        raise BridgeError(f"writing a report to {folder}: {error.strerror or error}") from None
    return path


def _page(report: ParityReport, figures: dict[str, bytes]) -> str:
    title = f"Parity with {report.against}: {'passed' if report.passed else 'differs'}"
    pictures = "\n".join(
        f'<figure><div class="wide"><img src="data:image/png;base64,{b64encode(picture).decode()}" '
        f'alt="{escape(words.partition(".")[0], quote=True)}"></div><figcaption>{escape(words)}</figcaption></figure>'
        for words, picture in figures.items()
    )
    body = f"""{verdict(report.passed, report.verdict.text)}
{facts(about(report))}
<h2>Logits, all positions</h2>
<div class="wide">{_logits(report)}</div>
<h2>Pictures</h2>
{pictures}
<h2>Every sub-layer</h2>
<p>Error: largest difference over the reference's largest value; tolerance {report.tolerance.site:g}.
1&minus;cosine: of the token that agrees least. Flips: sets chosen otherwise (experts of a token,
blocks of a query), and the widest gap between the scores of what was swapped, over the largest; up to
{report.tolerance.tie:g} it is a near-tie. <code>parity.json</code> holds all numbers.</p>
<div class="wide">{_sites(report)}</div>"""
    return page(title, body, _STYLE, f"dsv4 parity --report, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")


def _logits(report: ParityReport) -> str:
    head = ("error", "cosine, last", "cosine, least", "top-1 equal", "KL mean (nats)", "KL p95", "KL max")
    rows = []
    for title, f in logits_of(report):
        cells = [f"{f.error:.2e}", f"{f.last_cosine:.8f}", f"{f.cosine_min:.8f}", f"{100 * f.top1:.3f} %"]
        cells += [f"{x:.2e}" for x in (f.kl_mean, f.kl_p95, f.kl_max)]
        rows.append(f'<tr><td class="l">{title}</td>{_cells(cells)}</tr>')
    header = '<th class="l"></th>' + "".join(f"<th>{h}</th>" for h in head)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _sites(report: ParityReport) -> str:
    runs = runs_of(report)
    over = "".join(f'<th class="run" colspan="3">{title}</th>' for title, _ in runs)
    columns = "".join("<th>error</th><th>1&minus;cosine</th><th>flips</th>" for _ in runs)
    rows = []
    for index, first in enumerate(report.free.sites):
        new = not index or report.free.sites[index - 1].layer != first.layer
        layer = "head" if first.layer is None else f"layer {first.layer} ({report.layers[first.layer]})"
        cells = "".join(_site_cells(run.sites[index], report) for _, run in runs)
        rows.append(
            f'<tr{" class=new" if new else ""}><td class="l">{escape(layer) if new else ""}</td>'
            f'<td class="l">{first.site}</td><td class="l">{escape(SITES[first.site].words)}</td>{cells}</tr>'
        )
    return (
        f'<table><thead><tr><th class="l" colspan="3"></th>{over}</tr><tr><th class="l">layer</th><th class="l">'
        f'sub-layer</th><th class="l">what</th>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _site_cells(site: SiteResult, report: ParityReport) -> str:
    found = site.found
    if isinstance(found, Difference):
        bad = "" if site.error <= report.tolerance.site else ' class="bad"'
        return f"<td{bad}>{found.error:.2e}</td><td>{1 - found.cosine_min:.1e}</td><td></td>"
    return f"<td></td><td></td>{_flips(found, report.tolerance.tie)}"


def _flips(found: Choice, tie: float) -> str:
    if not found.flips:
        return "<td>0</td>"
    gap = "" if found.gap == float("inf") else f" (gap {found.gap:.0e})"
    kind = "near" if found.gap <= tie else "bad"
    return f'<td class="{kind}">{found.flips:,}{gap}</td>'


def _cells(values: Iterable[str]) -> str:
    return "".join(f"<td>{v}</td>" for v in values)


def runs_of(report: ParityReport) -> list[tuple[str, Run]]:
    """The model with its own choices, and with those replayed, each with its title."""
    replayed = [("choices replayed", report.replayed)] if report.replayed else []
    return [("own choices", report.free), *replayed]


def about(report: ParityReport) -> list[tuple[str, str]]:
    """What was compared, and with which versions: what it is called, and what it is."""
    reference = "the same" if report.reference == report.checkpoint else report.reference
    tokens = report.inputs
    seed = f", seed {tokens['seed']}" if tokens["seed"] is not None else ""
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    found = [
        ("checkpoint", report.checkpoint),
        ("reference", f"{reference}, in {report.against}' DeepseekV4ForCausalLM (eager)"),
        ("tokens", f"{tokens['batch']} x {tokens['seq_length']}, {tokens['source']}{seed}"),
    ]
    if report.narrow is not None:
        words = f"1 row with index_topk {report.narrow.index_topk} in both models, for the indexers to choose: for "
        found.append(("again", f"{words}{report.narrow.chosen:,} queries a layer"))
    words = f"{tokens['ids']:,} of {tokens['vocab_size']:,} token ids; in a CSA layer the indexer chose for "
    found.append(("exercised", f"{words}{tokens['chosen']:,} queries"))
    found.append(("tables", _tables(report)))
    found.append(("computed", f"in {report.dtype} on {report.device}: {versions}"))
    if report.steps:
        read, slowest = sum(step.nbytes for step in report.steps), max(report.steps, key=lambda step: step.seconds)
        words = f"{len(report.steps)} one at a time, {size(read)} read by both; the slowest was layer "
        found.append(("by layers", f"{words}{slowest.layer}, {slowest.seconds:,.1f} s"))
    if report.drafts:
        blocks = counted(len(report.drafts), "block")
        found.append(("MTP", f"{blocks} against a formula in float64, which transformers lacks"))
    return [*found, ("left out", report.left_out)] if report.left_out else found


def _tables(report: ParityReport) -> str:
    wrong = sum(table.differing for table in report.tables)
    rows = f"{sum(t.rows for t in report.tables):,} rows of {len(report.tables)}: embedding, experts by token, biases"
    return f"{rows}; {f'{wrong:,} differ' if wrong else 'all the same'}"


def logits_of(report: ParityReport) -> list[tuple[str, LogitsDifference]]:
    """Everything that has logits, by what it is called."""
    found = [(title, run.logits) for title, run in runs_of(report) if run.logits is not None]
    if report.narrow is not None:
        runs = [("", report.narrow.free)]
        if report.narrow.replayed is not None:
            runs.append((", replayed", report.narrow.replayed))
        found += [
            (f"index_topk {report.narrow.index_topk}{how}", run.logits) for how, run in runs if run.logits is not None
        ]
    return found + [(f"MTP block {draft.depth}", draft.logits) for draft in report.drafts]
