"""What a merge did, for people."""

from collections.abc import Collection

from rich.console import Group
from rich.text import Text

from ...convert.merge import Merged, MergeReport
from ...errors import counted, size
from .console import make_table


def merge_table(report: MergeReport) -> Group:
    """The rows of the table that had adapters, and what rounding left of them."""
    columns = (">tensors", ">rank", ">scale", "stored", ">delta", ">survived", ">lost", ">error", ">values unchanged")
    table = make_table("merged", "row", *columns)
    counts = {row.name: sum(t.row == row.name for t in report.tensors) for row in report.rows}
    for row in (*report.rows, report.total):
        if row.name == "all":
            table.add_section()
        table.add_row(
            row.name,
            f"{counts.get(row.name, len(report.tensors)):,}",
            *_numbers([t for t in report.tensors if row.name in (t.row, "all")]),
            row.encoding,
            f"{row.delta:.4g}",
            f"{row.survived:.4g}",
            f"{100 * row.lost:.1f} %",
            f"{100 * row.error:.1f} %",
            f"{100 * row.unchanged / row.values:.1f} %",
        )
    written = f"{report.out}: {counted(len(report.tensors), 'tensor')} merged, {report.copied:,} copied as they were"
    last = f"{written}, {size(report.bytes_written)}" + (" in all, nothing written" if report.dry_run else "")
    return Group(table, Text(last))


def _numbers(tensors: list[Merged]) -> tuple[str, str]:
    """Ranks and scales of several tensors; of whole weights there are none."""
    adapters = [t for t in tensors if t.rank]
    return _span({t.rank for t in adapters}), _span({t.scale for t in adapters})


def _span(numbers: Collection[float]) -> str:
    """From the least to the largest."""
    return " to ".join(dict.fromkeys(f"{n:.4g}" for n in (min(numbers), max(numbers)))) if numbers else "-"
