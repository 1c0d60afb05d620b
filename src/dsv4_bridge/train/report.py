"""A run as a page for a browser: what its log says, the recipe with its sources, commands to go on. No torch."""

import json
import re
import shlex
import statistics
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from ..errors import BridgeError, files_named
from ..files import put
from ..store.megatron import looks_megatron
from ..web_page import GENERATOR, facts, page, verdict
from .charts import STYLE, Line, chart
from .choose import Chosen, choose, load, values
from .log import FILE, duration
from .recipe import Recipe
from .recipes import RECIPES
from .resume import RECIPE

PAGE = "report.html"
_LONGEST = 1 << 20  # of a line of the log


@dataclass(frozen=True)
class RunReport:
    """What is known of a run from its folder.

    Attributes:
        folder: of the run.
        chosen: its recipe, each value with its source; those that are not the named recipe's are `given`.
        series: name -> steps and values, as its log has them.
        checkpoints: steps that can be gone on from.
    """

    folder: Path
    chosen: Chosen
    series: Mapping[str, tuple[array[float], array[float]]] = field(default_factory=dict)
    checkpoints: tuple[int, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """The run."""
        return self.chosen.recipe

    @property
    def step(self) -> int:
        """The last one that was logged."""
        return int(max((steps[-1] for steps, _ in self.series.values() if steps), default=0))

    def last(self, name: str) -> float | None:
        """The latest value of a series; None: there is none."""
        return self.series[name][1][-1] if name in self.series else None

    def to_json(self) -> dict[str, Any]:
        """The same as plain types, series by their last values."""
        return {
            "run": str(self.folder),
            "recipe": self.recipe.name,
            "step": self.step,
            "steps": self.recipe.schedule.steps,
            "checkpoints": list(self.checkpoints),
            "last": {name: values[-1] for name, (_, values) in self.series.items()},
        }


@files_named("reading a run")
def read_run(folder: Path) -> RunReport:
    """Read the log and the recipe of a run, also of one that is under way.

    Args:
        folder: the run's `out`, or one of its checkpoints.

    Raises:
        BridgeError: it is no run's folder, or nothing was logged there.
    """
    if re.fullmatch(r"iter_\d+", folder.name) and not (folder / FILE).exists():
        folder = folder.parent
    path = folder / FILE
    if not path.is_file() or not (folder / RECIPE).is_file():
        raise BridgeError(
            f"reading a run: {folder} has no {FILE} and {RECIPE}; name the folder that `dsv4 train` had as out="
        )
    series: dict[str, tuple[array[float], array[float]]] = {}
    for step, said in _lines(path):
        for name, value in said.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps, found = series.setdefault(name, (array("d"), array("d")))
                if not steps or step > steps[-1]:
                    steps.append(step)
                    found.append(float(value))
    if not series:
        raise BridgeError(f"reading a run: {path} has no step yet; wait until the first is made")
    tracked = sorted(int(p.name[5:]) for p in folder.glob("iter_*") if p.name[5:].isdecimal() and p.is_dir())
    return RunReport(folder, _sources(load(folder / RECIPE)), series, tuple(tracked))


@files_named("writing the report")
def write_run_report(report: RunReport, out: Path | None = None) -> Path:
    """Write the page.

    Args:
        report: the run.
        out: the file; by default `report.html` in the run's folder. A page of this command is replaced.

    Raises:
        BridgeError: another file is there, or it cannot be written.
    """
    path = out or report.folder / PAGE
    if path.is_dir():
        raise BridgeError(f"writing the report: {path} is a folder; name a file in it")
    if path.exists() and GENERATOR not in path.read_text(errors="replace")[:1000]:
        raise BridgeError(f"writing the report: {path} is no page of this command; name another file")
    text = _page(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    put(path, text.encode())
    return path


def _lines(path: Path) -> Iterator[tuple[float, dict[str, Any]]]:
    """What a log says of every step; a torn line of a run that was killed is passed over."""
    with path.open("rb") as file:
        while line := file.readline(_LONGEST):
            try:
                said = json.loads(line)
                step = float(said["step"])
            except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
                continue
            if 0 <= step < 1 << 53:
                yield step, said


def _sources(chosen: Chosen) -> Chosen:
    """With the sources of the recipe that a run's own is named after."""
    name = chosen.recipe.name
    if name not in RECIPES:
        return chosen
    base = choose(name)
    before, now = values(base.recipe), values(chosen.recipe)
    return Chosen(chosen.recipe, {k: base.sources[k] if before[k] == now[k] else "given" for k in now})


def _plain(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _giga(value: float) -> str:
    return f"{value / 1e9:.3g}"


# Title, the series of each curve with its name, how a value is said.
_CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...], Callable[[float], str]], ...] = (
    ("Loss, nats a token", (("loss", "training"), ("valid_loss", "validation")), _plain),
    ("Learning rate", (("lr", "of the step"),), "{:.3g}".format),
    ("Norm of the gradients", (("grad_norm", "before clipping"),), _plain),
    ("Load of experts, over the mean", (("expert_load_max", "fullest"), ("expert_load_min", "emptiest")), _plain),
    ("Balance loss", (("balance_loss", "an even load has about 1"),), _plain),
    ("Loss of the draft block, nats a token", (("mtp_loss", "MTP"),), _plain),
    ("Loss of the indexers, nats", (("indexer_loss", "of the step"),), _plain),
    ("Speed, tokens a second", (("tokens_per_second", "all ranks"),), _plain),
    ("Use of the GPU", (("mfu", "MFU"),), "{:.1%}".format),
    ("Memory, GB", (("memory_bytes", "the fullest rank, at most"),), _giga),
)


def _page(report: RunReport) -> str:
    recipe, step = report.recipe, report.step
    whole = step >= recipe.schedule.steps
    charts = "".join(
        chart(title, [Line(name, *report.series[key]) for key, name in curves if key in report.series], form)
        for title, curves, form in _CHARTS
    )
    words = f"step {step:,} of {recipe.schedule.steps:,}" + (": finished" if whole else ", and not at its end")
    rows = "".join(
        f'<tr><td class="l">{escape(key)}</td><td class="l any">{escape(_shown(value))}</td>'
        f'<td class="l any">{escape(report.chosen.sources[key])}</td></tr>'
        for key, value in values(recipe).items()
    )
    body = f"""{verdict(whole or None, words)}
{facts(_about(report))}
<h2>Over the steps</h2>
<div class="charts">{charts}</div>
<h2>To go on</h2>
{"".join(f"<p>{escape(why)}</p><pre>{escape(command)}</pre>" for why, command in commands(report))}
<h2>The recipe</h2>
<div class="wide"><table><thead><tr><th class="l">key</th><th class="l">value</th><th class="l">where it comes from</th>
</tr></thead><tbody>{rows}</tbody></table></div>"""
    made = f"dsv4 report, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, from {FILE} and {RECIPE}"
    return page(f"{recipe.name}: {report.folder.resolve().name}", body, STYLE, made)


def _about(report: RunReport) -> Iterator[tuple[str, str]]:
    recipe, series = report.recipe, report.series
    yield "for", recipe.summary or recipe.name
    yield "model", f"{recipe.variant}, {f'from {recipe.start}' if recipe.start else 'fresh weights'}"
    yield "data", " ".join(recipe.data.train) or "not said"
    if "rows" in series:
        rows = sum(series["rows"][1])
        epoch = report.last("epoch")
        passes = f", {epoch:.3g} passes through the data" if epoch is not None else ""
        yield "seen", f"{rows * recipe.data.seq_length:,.0f} tokens in {rows:,.0f} rows{passes}"
    if "loss" in series:
        losses = series["loss"][1]
        yield "loss", f"{losses[0]:.4f} at first, {losses[-1]:.4f} at last, {min(losses):.4f} at least"
    if "valid_loss" in series:
        held = series["valid_loss"][1]
        yield "validation", f"{held[0]:.4f} at first, {held[-1]:.4f} at last, {min(held):.4f} at least"
    if "seconds" in series:
        took = series["seconds"][1]
        yield "time", f"{duration(sum(took))} in steps, {statistics.median(took):.3g} s the median step"
    if "tokens_per_second" in series:
        yield "speed", f"{statistics.median(series['tokens_per_second'][1]):,.0f} tokens a second, the median step"
    if report.step < recipe.schedule.steps and (left := report.last("eta_seconds")):
        yield "left", f"about {duration(left)}, as the last step saw it"
    if "time" in series:
        begin, end = (datetime.fromtimestamp(series["time"][1][at], UTC) for at in (0, -1))
        yield "when", f"{begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC"
    if report.checkpoints:
        yield "checkpoints", "of steps " + ", ".join(f"{step:,}" for step in report.checkpoints)
    else:
        yield "checkpoints", "none yet"


def commands(report: RunReport) -> Iterator[tuple[str, str]]:
    """What can be done with a run: why, and the command."""
    recipe, run = report.recipe, str(report.folder)
    start = recipe.start if recipe.start and not looks_megatron(Path(recipe.start)) else ""  # a released folder
    gpus = recipe.parallel.gpus
    ranks = f"torchrun --nproc-per-node {min(gpus, 8)} -m dsv4_bridge" if gpus > 1 else "dsv4"
    if gpus > 8:
        ranks = f"torchrun --nnodes {-(-gpus // 8)} --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500"
        ranks += " -m dsv4_bridge"
    if report.step < recipe.schedule.steps:
        yield "Go on to the last step:", f"{ranks} train {_quoted(f'{run}/{RECIPE}')}"
    else:
        more = recipe.schedule.steps * 2
        yield "Train longer:", f"{ranks} train {_quoted(f'{run}/{RECIPE}')} schedule.steps={more}"
    if not report.checkpoints:
        return
    if recipe.lora.rank:
        yield "The adapters for peft:", f"dsv4 lora {_quoted(run)} {_quoted(f'{run}-adapter')}"
        if start:
            merged = _quoted(f"{run}-merged")
            yield "Or merged into the release:", f"dsv4 merge {_quoted(start)} {_quoted(run)} {merged}"
        return
    hf = f"{run}-hf"
    how = f"--like {_quoted(start)}" if start else "--encoding bf16"  # of fresh weights there is no release
    how += " --allow-lossy" if recipe.model.dtype == "float32" else ""
    yield "To the released format:", f"dsv4 export {_quoted(run)} {_quoted(hf)} {how}"
    yield "What is in it, and is it the same model?", f"dsv4 inspect {_quoted(hf)}\ndsv4 parity {_quoted(hf)}"
    if start:
        yield (
            "What changed since the start? Exit code 1: something did.",
            f"dsv4 verify {_quoted(start)} {_quoted(hf)} --level bytes",
        )
    yield "Try it:", f'dsv4 generate {_quoted(run)} --prompt "Once upon a time"'


def _quoted(path: str) -> str:
    return shlex.quote(path)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
