"""What the verbs about checkpoints found, for people; nothing here decides anything."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...errors import counted, size
from .console import make_table

if TYPE_CHECKING:
    from ...codec import Certificate, EncodeStats
    from ...convert.checksums import FilesReport
    from ...convert.contents import ContentsReport
    from ...convert.emitter import Report
    from ...convert.releases import ReleaseReport
    from ...convert.verify import VerifyReport
    from ...store.inspect import InspectReport
    from ..doctor import Check


def verify_table(report: VerifyReport) -> Group:
    """The tally by row, the differences, the verdict."""
    table = make_table(f"verify --level {report.level}", "row", ">tensors", ">bytes", ">identical", "")
    for key, row in report.rows.items():
        mark = Text("same", "green") if row.identical == row.tensors else Text("DIFFERS", "bold red")
        table.add_row(key, f"{row.tensors:,}", size(row.bytes), f"{row.identical:,}", mark)
    total = report.total()
    share = 100 * total.identical_bytes / total.bytes if total.bytes else 100 * report.same
    table.add_section()
    table.add_row("all", f"{total.tensors:,}", size(total.bytes), f"{total.identical:,}", f"{share:.6g} % of bytes")
    return Group(table, verify_verdict(report))


def verify_verdict(report: VerifyReport) -> Group:
    """The tensors that differ, the verdict."""
    lines = [Text(f"note: {note}", "yellow") for note in report.notes]
    lines += [Text(f"  config {what}", "red") for what in report.config]
    lines += [Text(f"  {d.name}: {d.what}") for d in report.differences[:20]]
    if report.differing > 20:
        lines.append(Text(f"  … and {report.differing - 20} more (--json lists them)"))
    total = report.total()
    if report.same:
        verdict = f"identical: {counted(total.tensors, 'tensor')}, {total.bytes:,} bytes, by {report.level}"
        return Group(*lines, Text(verdict, "bold green"))
    what = [counted(report.differing, "tensor")] if report.differing or not report.config else []
    what += [f"{counted(len(report.config), 'number')} of the model"] if report.config else []
    differ = "differs" if report.differing + len(report.config) == 1 else "differ"
    return Group(*lines, Text(f"{' and '.join(what)} {differ} between {report.a} and {report.b}", "bold red"))


def files_verdict(report: FilesReport) -> Group:
    """The files that are not as they were written, the verdict."""
    lines = [Text(f"  {name}: {what}") for name, what in list(report.wrong.items())[:20]]
    if len(report.wrong) > 20:
        lines.append(Text(f"  … and {len(report.wrong) - 20} more (--json lists them)"))
    if report.others:
        some = ", ".join(report.others[:3]) + (" …" if len(report.others) > 3 else "")
        lines.append(
            Text(f"note: {counted(len(report.others), 'file')} not written with it, not looked at: {some}", "yellow")
        )
    if report.same:
        verdict = f"as written: {counted(report.files, 'file')}, {report.bytes:,} bytes, by CRC-32C ({report.made})"
        return Group(*lines, Text(verdict, "bold green"))
    return Group(*lines, Text(f"{len(report.wrong)} of {report.files} files are not as written", "bold red"))


def release_verdict(report: ReleaseReport) -> Group:
    """The files that are not the release's, what is proven and what is not, the verdict."""
    wrong, unproven = _by_word(report.wrong), _by_word(report.unproven)
    lines = [Text(f"  {_and_more(names)}: {what}") for what, names in list(wrong.items())[:20]]
    if len(wrong) > 20:
        lines.append(Text(f"  … and {len(wrong) - 20} more (--json lists them)"))
    lines += [Text(f"not proven: {_and_more(names)}: {what}", "yellow") for what, names in unproven.items()]
    for what, names in (("not in the folder, and not needed", report.absent), ("not looked at", report.others)):
        if names:
            some = ", ".join(names[:3]) + " …" * (len(names) > 3)
            lines.append(Text(f"note: {counted(len(names), 'file')} {what}: {some}"))
    whose = f"{report.release} at {report.revision[:12]}"
    if report.whole:
        proven = f"{counted(len(report.proven), 'file')}, {report.bytes:,} bytes, by their published digests"
        return Group(*lines, Text(f"byte for byte {whose}: {proven}", "bold green"))
    if report.same:
        proven = f"{counted(len(report.proven), 'file')} proven, {len(report.unproven)} not"
        told = f"nothing differs of what is known, but {proven}: it cannot be said here that this is {whose}"
        return Group(*lines, Text(told, "bold yellow"))
    differ = "differs" if len(report.wrong) == 1 else "differ"
    return Group(*lines, Text(f"not {whose}: {counted(len(report.wrong), 'file')} {differ}", "bold red"))


def _by_word(told: Mapping[str, str]) -> dict[str, list[str]]:
    """What is said -> the files that it is said of."""
    grouped: dict[str, list[str]] = defaultdict(list)
    for name, what in told.items():
        grouped[re.sub(r"its [\d,]+ tensors", "its tensors", what)].append(name)
    return grouped


def _and_more(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def inspect_table(report: InspectReport, contents: ContentsReport | None = None) -> Group:
    """What a checkpoint is, row by row, and what was found in its tensors."""
    table = make_table(f"{report.path}", "row", ">tensors", ">values", ">bytes", "encoding")
    for key, row in report.rows.items():
        table.add_row(key, f"{row.tensors:,}", f"{row.values:,}", size(row.bytes), ", ".join(row.encodings))
    return Group(table, inspect_facts(report), *([contents_verdict(contents)] if contents else []))


def contents_verdict(report: ContentsReport) -> Group:
    """What the tensors of a checkpoint hold, in a few lines."""
    if report.sound:
        told = f"{report.tensors:,} tensors, {size(report.bytes)} read: nothing in them is amiss"
        return Group(Text(told, "bold green"))
    lines = [Text(f"  {finding}", "red") for finding in report.findings]
    return Group(Text(f"of {report.tensors:,} tensors read, these cannot be right:", "bold red"), *lines)


def inspect_facts(report: InspectReport) -> Group:
    """What a checkpoint is, in a few lines."""
    encodings = ", ".join(f"{cls} {encoding}" for cls, encoding in report.encodings.items())
    facts = [
        f"variant     {report.variant}",
        f"format      {report.format}, names: {report.naming}",
        f"encodings   {encodings}",
        f"tensors     {report.tensors:,} in {size(report.bytes)} ({report.bytes:,} bytes)",
        f"parameters  {report.parameters:,}",
        f"mtp.*       {report.draft}",
        f"passengers  {len(report.passengers)}" + (f" ({report.passengers[0]} …)" if report.passengers else ""),
    ]
    lines = [Text(f) for f in facts] + [Text(f"note        {n}") for n in report.notes]
    found = [Text(f"  {f}", "red") for f in report.findings]
    verdict = Text("every tensor is claimed", "bold green") if report.sound else Text("NOT sound:", "bold red")
    return Group(*lines, verdict, *found)


def conversion_table(report: Report, out: Path, *, dry_run: bool) -> Group:
    """What a conversion did."""
    what = "converted, nothing written" if dry_run else "written"
    lines = [Text(f"{out}: {counted(report.tensors, 'tensor')}, {size(report.bytes_written)} {what}")]
    errors = (">values rounded", ">largest error", ">relative RMS")
    parts: list[Table | Text] = []
    if report.encoded:
        table = make_table("encoded", "row", ">blocks", ">source scale kept", ">fresh scale", *errors)
        for key, done in report.encoded.items():
            table.add_row(key, *(f"{n:,}" for n in (done.blocks, done.kept, done.fresh)), *_errors(done))
        parts.append(table)
    if report.recoded:
        table = make_table("MXFP4 to FP8 certificate", "row", ">blocks", ">exact", ">largest scale spread", *errors)
        for key, done in report.recoded.items():
            table.add_row(key, f"{done.blocks:,}", f"{done.exact:,}", str(done.spread), *_errors(done))
        parts.append(table)
    if report.lacking:
        lines.append(Text(f"  {report.lacking:,} of the draft are those of --like: the checkpoint has none", "yellow"))
    for key, count in report.rounded.items():
        lines.append(Text(f"  {key}: up to {count:,} values rounded to bf16", "yellow"))
    return Group(*parts, *lines)


def _errors(done: EncodeStats | Certificate) -> tuple[str, str, str]:
    return f"{done.rounded_values:,}", f"{done.max_abs_error:.3g}", f"{done.relative_rms_error:.2g}"


def doctor_table(checks: Iterable[Check]) -> Table:
    """One line a check."""
    table = make_table("doctor", "what", "found", "", "hint")
    style = {"ok": "green", "missing": "yellow", "bad": "bold red"}
    for c in checks:
        hint = Text(c.hint if c.state != "ok" else "")  # no markup: it has brackets of its own
        table.add_row(c.what, Text(c.found), Text(c.state, style[c.state]), hint)
    return table
