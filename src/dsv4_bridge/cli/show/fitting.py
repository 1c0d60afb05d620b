"""Tables that lose nothing where a terminal is narrow: columns that may fold do, and then rows are stacked."""

from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

_WORD = 18  # cells that a folding column keeps, if its words are as long
_FRAME = 3  # cells around a column


class Fitting(Table):
    """A table whose first column and whose numbers are never cut.

    Where they do not fit beside words of the other columns, every row becomes a paragraph: its first cell, then a line
    a column. A header of two lines has in its upper one what the columns to its right have in common, up to the next.
    """

    def __init__(self, heading: str = "", **style: Any) -> None:
        super().__init__(header_style="bold", **style)
        self._heading = heading

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._heading:
            yield Text(self._heading, "bold")
        if self.least() <= options.max_width:
            yield from super().__rich_console__(console, options)
        else:
            yield from self._stacked()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        if self.least() <= options.max_width:
            return super().__rich_measure__(console, options)
        return Measurement(1, options.max_width)

    def least(self) -> int:
        """The fewest cells that it can be shown in as a table."""
        return 1 + sum(_FRAME + self._narrowest(column) for column in self.columns)

    def _narrowest(self, column: Column) -> int:
        cells = [_text(cell) for cell in (column.header, *column._cells)]
        if column.no_wrap:
            return max((cell_len(line) for text in cells for line in text.split("\n")), default=0)
        words = (cell_len(word) for text in cells for word in text.split())
        return min(_WORD, max(words, default=0))

    def _stacked(self) -> Iterator[Text | Table]:
        names = self._names()
        wide = 2 + max((cell_len(name) for name in names[1:]), default=0)
        for number, row in enumerate(self.rows):
            key, *cells = [column._cells[number] for column in self.columns]
            if _text(key):  # a number says nothing without its column's name
                named = Text(f"{names[0]} ", "bold") if _text(key).strip().isdigit() else Text()
                yield named + _styled(key, "bold")
            lines = Table.grid(Column(width=wide, no_wrap=True), Column(overflow="fold"), padding=(0, 2, 0, 0))
            for name, cell in zip(names[1:], cells, strict=True):
                if _text(cell):
                    lines.add_row(f"  {name}", _styled(cell))
            yield lines
            if row.end_section:
                yield Text("")

    def _names(self) -> list[str]:
        """Of the columns, each with what stands over it."""
        over, names = "", []
        for column in self.columns:
            above, _, name = _text(column.header).rpartition("\n")
            over = above or over
            names.append(f"{over} {name}".strip())
        return names


def _text(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _styled(cell: object, style: str = "") -> Text:
    return cell.copy() if isinstance(cell, Text) else Text(str(cell), style)
