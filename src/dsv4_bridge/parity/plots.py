"""A comparison as pictures. Colours are Okabe and Ito's, told apart with any colour vision; shapes repeat them."""

import io
from typing import Any

import numpy as np

from .metrics import Choice
from .result import ParityReport, Run
from .sites import SITES

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_RUNS = {"own choices": "#0072B2", "choices replayed": "#E69F00"}
_FLOOR = 1e-17  # KL below is drawn here: float64 cannot tell it from 0
_STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 160,
}


def draw(report: ParityReport) -> dict[str, bytes]:
    """The plots: what one shows, in words -> a PNG."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = {"own choices": report.free} | ({"choices replayed": report.replayed} if report.replayed else {})
    found = {
        "error": (
            _errors,
            "Largest difference of every sub-layer over the reference's largest value, by layer (dashed: tolerance). "
            "A wrong tensor shows as a jump, rounding as a slow rise; exact equality is not drawn.",
        ),
        "kl": (
            _kl,
            "KL divergence of the next-token distribution, reference against ours, at every position; beside it "
            "how many positions have which.",
        ),
        "flips": (
            _flips,
            "Choices that differ from the reference's, by layer: sets of experts a token, sets of blocks a query. "
            "Light: near-ties, which rounding decides. Under replay: what our model would have chosen by itself.",
        ),
    }
    if report.free.logits is None:
        del found["kl"]
    drawn: dict[str, bytes] = {}
    with mpl.rc_context(dict[Any, Any](_STYLE)):
        for plot, words in found.values():
            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            plot(figure, report, runs)
            held = io.BytesIO()
            figure.savefig(held, format="png")
            drawn[words] = held.getvalue()
    return drawn


def _errors(figure: Any, report: ParityReport, runs: dict[str, Run]) -> None:
    figure.set_size_inches(10.5, 4.6)
    panels = np.atleast_1d(figure.subplots(1, len(runs), sharey=True))
    names = [name for name, site in SITES.items() if not site.choices and name not in ("head", "logits")]
    for axes, (title, run) in zip(panels, runs.items(), strict=True):
        for name, colour, marker in zip(names, _COLOURS, _MARKERS, strict=True):
            points = [(s.layer, s.error) for s in run.sites if s.site == name and 0 < s.error < np.inf]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.2, label=name)
        axes.axhline(report.tolerance.site, color="#555555", linestyle="--", linewidth=1)
        axes.set_yscale("log")
        axes.set_title(title, loc="left")
        _layer_axis(axes, len(report.layers))
    panels[0].set_ylabel("error, relative to the largest value")
    panels[-1].annotate(
        "tolerance", (1, report.tolerance.site), xycoords=("axes fraction", "data"), fontsize=9, color="#555555",
        xytext=(0, 3), textcoords="offset points", ha="right",
    )  # fmt: skip
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=10)


def _kl(figure: Any, report: ParityReport, runs: dict[str, Run]) -> None:
    figure.set_size_inches(10.5, 4.2)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    drawn = {title: np.maximum(run.logits.kl, _FLOOR) for title, run in runs.items() if run.logits is not None}
    everything = np.concatenate([kl[np.isfinite(kl)] for kl in drawn.values()] or [np.array([_FLOOR])])
    low, high = np.log10(everything.min()) - 0.4, np.log10(everything.max()) + 0.4
    bins = np.logspace(low, high, 40)
    for title, kl in drawn.items():
        batch, length = kl.shape
        position = np.broadcast_to(np.arange(length), (batch, length))
        left.plot(position.ravel(), kl.ravel(), ".", color=_RUNS[title], markersize=3.5, alpha=0.6, label=title)
        common: dict[str, Any] = {"bins": bins, "orientation": "horizontal", "color": _RUNS[title]}
        right.hist(kl[np.isfinite(kl)], histtype="stepfilled", alpha=0.25, **common)
        right.hist(kl[np.isfinite(kl)], histtype="step", linewidth=1.4, **common)
    left.set_yscale("log")
    left.set_ylim(10**low, 10**high)
    left.set_xlabel("position in the sequence (tokens)")
    left.set_ylabel("KL (reference || ours), nats")
    right.set_xlabel("positions")
    if len(runs) > 1:
        legend = figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2, markerscale=3)
        for handle in legend.legend_handles:
            handle.set_alpha(1)


def _flips(figure: Any, report: ParityReport, runs: dict[str, Run]) -> None:
    from matplotlib.patches import Patch

    figure.set_size_inches(10.5, 3.8)
    panels = figure.subplots(1, 2)
    for axes, site, title, unit in zip(
        panels, ("ffn.router", "attn.index"), ("experts", "blocks"), ("tokens", "queries"), strict=True
    ):
        width, most = 0.8 / len(runs), 0.0
        for place, (name, run) in enumerate(runs.items()):
            for result in run.sites:
                if result.site != site or not isinstance(result.found, Choice) or result.layer is None:
                    continue
                near, far = (100 * n / result.found.queries for n in (result.found.ties, result.far))
                at = result.layer + (place - (len(runs) - 1) / 2) * width
                axes.bar(at, far, width, color=_RUNS[name])
                axes.bar(at, near, width, bottom=far, color=_RUNS[name], alpha=0.35)
                most = max(most, near + far)
        axes.set_title(f"choice of {title}", loc="left")
        axes.set_ylabel(f"{unit} with another choice, %")
        axes.set_ylim(0, most * 1.1 or 1)
        axes.grid(axis="x", visible=False)
        _layer_axis(axes, len(report.layers))
        if not most:
            axes.text(0.5, 0.5, "none differ", transform=axes.transAxes, ha="center", color="#555555")
    parts = [("", 1.0), (", near-tie", 0.35)]
    handles = [Patch(color=_RUNS[n], alpha=a, label=n + kind, linewidth=0) for n in runs for kind, a in parts]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=10)


def _layer_axis(axes: Any, count: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.set_xlim(-0.6, count - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
