"""Tables that lose nothing where a terminal is narrow: columns that may fold do, and then rows are stacked."""

from collections.abc import Iterator

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
    a column.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
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

    def _stacked(self) -> Iterator[Text]:
        if self.title:
            yield _styled(self.title, "bold")
        names = [_text(column.header) for column in self.columns]
        wide = max((cell_len(name) for name in names[1:]), default=0)
        for number, row in enumerate(self.rows):
            cells = [column._cells[number] for column in self.columns]
            yield _styled(cells[0], "bold")
            for name, cell in list(zip(names, cells, strict=True))[1:]:
                if _text(cell):
                    yield Text("  " + name + " " * (wide - cell_len(name)) + "  ").append_text(_styled(cell))
            if row.end_section:
                yield Text("")


def _text(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _styled(cell: object, style: str = "") -> Text:
    return cell.copy() if isinstance(cell, Text) else Text(str(cell), style)
