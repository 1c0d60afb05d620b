"""What a merge did, for people."""

from rich.console import Group
from rich.text import Text

from .render import make_table, size
from .train.merge import MergeReport


def merge_table(report: MergeReport) -> Group:
    """The rows of the table that had adapters, and what rounding left of them."""
    columns = (">tensors", "stored", ">delta", ">survived", ">lost", ">error", ">values unchanged")
    table = make_table("merged", "row", *columns)
    counts = {row.name: sum(t.row == row.name for t in report.tensors) for row in report.rows}
    for row in (*report.rows, report.total):
        if row.name == "all":
            table.add_section()
        table.add_row(
            row.name,
            f"{counts.get(row.name, len(report.tensors)):,}",
            row.encoding,
            f"{row.delta:.4g}",
            f"{row.survived:.4g}",
            f"{100 * row.lost:.1f} %",
            f"{100 * row.error:.1f} %",
            f"{100 * row.unchanged / row.values:.1f} %",
        )
    written = f"{report.out}: {len(report.tensors):,} tensors merged, {report.copied:,} copied as they were"
    return Group(table, Text(f"{written}, {size(report.bytes_written)}"))
