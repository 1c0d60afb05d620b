"""A console that steers no terminal, tables that lose nothing, sizes; it knows nothing of what is told."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.segment import Segment

from ...errors import printable
from .fitting import Fitting
from .lines import columns


class Plain(Console):
    """A console for names from files, and whose reader may go away.

    What is printed can hold names from anywhere: what would steer a terminal is shown as text. And where nobody reads
    stdout any longer, rich would send it to nowhere and end the process.
    """

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            shown = segment.text if segment.control else printable(segment.text)
            yield segment if shown == segment.text else segment._replace(text=shown)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


_ENDLESS = 10_000  # columns, where nobody's terminal has an edge


def show(what: Any) -> None:
    """Print to stdout; where that is no terminal, no line is broken and nothing is cut."""
    width = columns()
    Plain(width=_ENDLESS if width is None else width, highlight=False).print(what)


def say(line: str) -> None:
    """A line on stderr, beside what a verb answers."""
    Plain(stderr=True).print(line, highlight=False, soft_wrap=True, markup=False)


def make_table(heading: str, *columns: str, **style: Any) -> Fitting:
    """An empty table; a column that begins with `>` is set to the right. The first and these are never cut."""
    table = Fitting(heading, **style)
    for number, column in enumerate(columns):
        right = column.startswith(">")
        whole = right or not number
        justify = "right" if right else "left"
        table.add_column(column.lstrip(">"), justify=justify, no_wrap=whole, overflow="fold")
    return table
