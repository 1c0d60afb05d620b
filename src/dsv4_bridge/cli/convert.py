"""The verbs that convert."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import ExportEncoding, Json, Named, NamingOption, Overwrite, Revision, Workers, app, put


class RepackEncoding(StrEnum):
    """Encodings that `repack` writes."""

    fp8 = "fp8"
    bf16 = "bf16"


Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]


Lossy = Annotated[bool, typer.Option("--allow-lossy", help="Permit values to be rounded; the report says by how much.")]


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Read and convert everything, write nothing: a full check of the input.")
]


DropPassengers = Annotated[
    bool, typer.Option("--drop-passengers", help="Leave out tensors that Megatron has no place for.")
]


@app.command("import")
def import_(
    hf: str,
    out: Path,
    naming: Named = None,
    workers: Workers = 1,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    revision: Revision = None,
    drop_passengers: DropPassengers = False,
    allow_lossy: Lossy = False,
    as_json: Json = False,
) -> None:
    """HF folder or hub id -> Megatron torch_dist checkpoint."""
    from ..convert.jobs import import_hf
    from ..store.hub import resolve

    options = _options(workers, resume, overwrite, dry_run)
    report = import_hf(
        resolve(hf, revision),
        out,
        options,
        naming=None if naming is None else naming.value,
        drop_passengers=drop_passengers,
        allow_lossy=allow_lossy,
    )
    _print_report(report, out, as_json, dry_run)


@app.command()
def export(
    megatron: Path,
    out: Path,
    like: Annotated[str | None, typer.Option("--like", help="Released folder or hub id it came from.")] = None,
    encoding: Annotated[ExportEncoding, typer.Option("--encoding")] = ExportEncoding.source,
    workers: Workers = 1,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    revision: Revision = None,
    drop_passengers: DropPassengers = False,
    allow_lossy: Lossy = False,
    as_json: Json = False,
) -> None:
    """Megatron checkpoint -> HF folder; what did not change returns byte for byte."""
    from ..convert.jobs import export_hf
    from ..store.hub import resolve

    released = resolve(like, revision) if like else None
    options = _options(workers, resume, overwrite, dry_run)
    report = export_hf(
        megatron,
        out,
        released,
        encoding.value,
        options,
        drop_passengers=drop_passengers,
        allow_lossy=allow_lossy,
    )
    _print_report(report, out, as_json, dry_run)


@app.command()
def rename(
    megatron: Path,
    out: Path,
    naming: Annotated[NamingOption, typer.Option("--naming", help="Of GPTModel (dev) or HybridModel (main).")],
    like: Annotated[str | None, typer.Option("--like", help="Release with its numbers, if it has none.")] = None,
    workers: Workers = 1,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Megatron checkpoint -> the same under the names of Megatron's other model, training state included."""
    from ..convert.rename import rename as run_rename
    from ..store.hub import resolve

    released = resolve(like, revision) if like else None
    options = _options(workers, resume, overwrite, dry_run)
    report = run_rename(megatron, out, naming.value, options, like=released)
    _print_report(report, out, as_json, dry_run)


@app.command()
def repack(
    hf: str,
    out: Path,
    encoding: Annotated[RepackEncoding, typer.Option("--encoding")],
    workers: Workers = 1,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    revision: Revision = None,
    allow_lossy: Lossy = False,
    as_json: Json = False,
) -> None:
    """Re-encode a released checkpoint, only where lossless unless asked."""
    from ..convert.jobs import repack as run_repack
    from ..store.hub import resolve

    options = _options(workers, resume, overwrite, dry_run)
    report = run_repack(resolve(hf, revision), out, encoding.value, options, allow_lossy=allow_lossy)
    _print_report(report, out, as_json, dry_run)


def _options(workers: int, resume: bool, overwrite: bool, dry_run: bool) -> Any:
    from ..convert.run import Options
    from ..ranks import Ranks
    from .show.progress import TerminalProgress

    return Options(workers, resume, overwrite, TerminalProgress(), dry_run, Ranks.from_environment())


def _print_report(report: Any, out: Path, as_json: bool, dry_run: bool) -> None:
    from ..ranks import Ranks
    from .show.tables import conversion_table

    if Ranks.from_environment().rank:  # rank 0 prints what all of them did
        return
    facts = {"out": str(out), "dry_run": dry_run} | report.to_json()
    put(facts, as_json, conversion_table(report, out, dry_run=dry_run))
    if (out / "config.json").is_file() and not (out / "tokenizer.json").is_file():
        from .show.console import say

        say(f"dsv4: note: {out} has no tokenizer.json, for its source has none; servers want that of the release")
