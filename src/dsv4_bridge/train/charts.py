"""Lines over steps, as SVG that takes its colours from the page it stands in."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 24
_SPAN = 0.05  # of the largest value, that an axis covers at least
_POINTS = 300  # of a line; more steps are drawn as their mean, with the range they had behind it

STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.4rem 1.6rem; }
.charts svg { display: block; width: 100%; height: auto; margin-top: .2rem; }
.charts svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.charts h3 { font-size: 1rem; margin: 0; }
.grid { stroke: var(--line); stroke-width: 1; }
.one { stroke: var(--one); fill: var(--one); } .two { stroke: var(--two); fill: var(--two); }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .two.curve { stroke-dasharray: 6 3; }
.range { stroke: none; opacity: .22; }
.key::before { content: ""; display: inline-block; width: 1.4rem; border-top: 3px solid; margin-right: .35rem;
  vertical-align: middle; border-color: var(--one); } .key { margin-right: .9rem; white-space: nowrap; }
.key.other::before { border-color: var(--two); border-top-style: dashed; }
"""


class Line(NamedTuple):
    """A curve.

    Attributes:
        name: what it is.
        steps: [n], rising.
        values: [n], of each step.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def chart(title: str, lines: Sequence[Line], form: Callable[[float], str]) -> str:
    """One or two curves over the steps; empty where they have no finite value.

    Args:
        title: what is drawn, with its unit.
        lines: one or two; the second is dashed.
        form: a value in words.
    """
    drawn = [Line(line.name, *_finite(line)) for line in lines]
    drawn = [line for line in drawn if line.steps]
    if not drawn:
        return ""
    first, last = min(line.steps[0] for line in drawn), max(line.steps[-1] for line in drawn)
    marks = ticks(min(min(line.values) for line in drawn), max(max(line.values) for line in drawn))
    low, high = marks[0], marks[-1]

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for mark in marks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{escape(form(mark))}</text>')
    inner = [m for m in ticks(first, last, 4) if first <= m <= last and m == int(m)] if last > first else [first]
    for mark in inner:
        anchor = "end" if x(mark) > _WIDTH - 30 else "middle"
        parts.append(f'<text x="{x(mark):.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{int(mark):,}</text>')
    for line, kind in zip(drawn, ("one", "two"), strict=False):
        parts += _curve(line, kind, x, y)
    words = "; ".join(
        f"{line.name} from {form(line.values[0])} to {form(line.values[-1])}, least {form(min(line.values))}, "
        f"most {form(max(line.values))}"
        for line in drawn
    )
    keys = "".join(
        f'<span class="key{" other" * number}">{escape(line.name)}: {escape(form(line.values[-1]))}</span>'
        for number, line in enumerate(drawn)
    )
    return (
        f'<figure><h3>{escape(title)}</h3><figcaption>{keys}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'role="img" aria-label="{escape(f"{title} over steps {first:,.0f} to {last:,.0f}: {words}", quote=True)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from below `low` to above `high`, at least two."""
    least = max(abs(low), abs(high)) * _SPAN or 1.0
    if high - low < least:  # else the numbers at the axis would be the same
        low, high = (low + high - least) / 2, (low + high + least) / 2
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    each = unit * next(n for n in (1, 2, 5, 10) if n * unit >= rough * 0.999)
    begin, end = math.floor(low / each + 1e-9), math.ceil(high / each - 1e-9)
    return [round(n * each, 12 - math.floor(math.log10(each))) for n in range(begin, max(end, begin + 1) + 1)]


def _curve(line: Line, kind: str, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    if len(line.steps) == 1:
        return [f'<circle class="{kind}" cx="{x(line.steps[0]):.1f}" cy="{y(line.values[0]):.1f}" r="3"/>']
    each = -(-len(line.steps) // _POINTS)
    spans = [slice(begin, begin + each) for begin in range(0, len(line.steps), each)]
    middles = [(sum(line.steps[s]) / len(line.steps[s]), line.values[s]) for s in spans]
    found = []
    if each > 1:
        over = [f"{x(at):.1f},{y(max(values)):.1f}" for at, values in middles]
        under = [f"{x(at):.1f},{y(min(values)):.1f}" for at, values in reversed(middles)]
        found.append(f'<polygon class="{kind} range" points="{" ".join(over + under)}"/>')
    points = " ".join(f"{x(at):.1f},{y(sum(values) / len(values)):.1f}" for at, values in middles)
    return [*found, f'<polyline class="{kind} curve" points="{points}"/>']


def _finite(line: Line) -> tuple[list[float], list[float]]:
    pairs = [(step, value) for step, value in zip(line.steps, line.values, strict=True) if math.isfinite(value)]
    return [step for step, _ in pairs], [value for _, value in pairs]
