"""The verbs of adapters: `lora`, `merge`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .app import ExportEncoding, Json, Overwrite, Revision, Workers, app, put
from .convert import DryRun, Lossy


class Names(StrEnum):
    """Whose names an adapter's modules have."""

    transformers = "transformers"
    released = "released"


@app.command()
def lora(
    megatron: Path,
    out: Path,
    base: Annotated[str, typer.Option("--base", help="Name of the checkpoint it adapts, for peft.")] = "",
    names: Annotated[Names, typer.Option("--names", help="Of modules: for peft, or released ones for vLLM.")] = (
        Names.transformers
    ),
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Adapters of a training checkpoint -> folder that peft loads onto transformers' model."""
    from ..lora.checkpoint import read_adapters
    from ..lora.peft import export_peft

    adapters, spec = read_adapters(megatron)
    export_peft(adapters, spec, out, base, names.value, overwrite=overwrite)
    values = sum(t.numel() for adapter in adapters.values.values() for t in adapter if t is not None)
    how = adapters.lora
    facts = {"out": str(out), "rank": how.rank, "alpha": how.alpha, "dora": how.dora, "targets": list(how.targets)}
    facts |= {"adapters": len(adapters.values), "values": values}
    kind = "DoRA" if how.dora else "LoRA"
    shown = f"{out}: {kind} of rank {how.rank}, alpha {how.alpha:g}, on {', '.join(how.targets)}; {values:,} values"
    put(facts, as_json, shown)


@app.command()
def merge(
    hf: str,
    adapter: Path,
    out: Path,
    encoding: Annotated[ExportEncoding, typer.Option("--encoding")] = ExportEncoding.source,
    workers: Workers = 1,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    revision: Revision = None,
    allow_lossy: Lossy = False,
    as_json: Json = False,
) -> None:
    """HF folder or hub id + adapters -> HF folder; the report says how much of each delta rounding removed.

    ADAPTER is a folder that peft or `dsv4 lora` wrote, or a training checkpoint of adapters.
    """
    from ..convert.merge import merge as run_merge
    from ..convert.run import Options
    from ..store.hub import resolve
    from .show.merge import merge_table
    from .show.progress import TerminalProgress

    options = Options(workers, overwrite=overwrite, progress=TerminalProgress(), dry_run=dry_run)
    report = run_merge(resolve(hf, revision), adapter, out, encoding.value, options, allow_lossy=allow_lossy)
    put(report.to_json() if as_json else {}, as_json, "" if as_json else merge_table(report))
    for line in report.warnings:
        sys.stderr.write(f"dsv4: warning: {line}\n")
