"""The whole story on a tiny checkpoint."""

import tempfile
from pathlib import Path

from .bridge import export_hf, import_hf
from .inspecting import inspect
from .render import inspect_table, show, verify_table
from .toy import make_toy
from .verifying import verify


def demo(keep: Path | None = None) -> None:
    """Make a toy Flash in the released format, import it, export it, and compare every byte."""
    if keep:
        _run(keep)
        return
    with tempfile.TemporaryDirectory(prefix="dsv4-demo-") as folder:
        _run(Path(folder))


def _run(folder: Path) -> None:
    released, megatron, back = folder / "released", folder / "megatron", folder / "exported"
    show("[bold]1. dsv4 toy[/]     a small random DeepSeek-V4-Flash in the released format (FP8 and MXFP4)")
    make_toy(released, "Flash", seed=0)
    show(inspect_table(inspect(released)))
    show("\n[bold]2. dsv4 import[/]  released format -> Megatron-Core torch_dist checkpoint")
    report = import_hf(released, megatron)
    show(f"   {report.bytes_written:,} bytes in {megatron.name}/iter_0000000")
    show("\n[bold]3. dsv4 verify[/]  does the Megatron checkpoint hold every value?")
    show(verify_table(verify(released, megatron, "values")))
    show("\n[bold]4. dsv4 export[/]  and back, --like the released folder")
    export_hf(megatron, back, released)
    show("\n[bold]5. dsv4 verify --level bytes[/]  is every stored byte the same?")
    result = verify(released, back, "bytes")
    show(verify_table(result))
    files = [p.name for p in sorted(released.iterdir()) if p.read_bytes() != (back / p.name).read_bytes()]
    show(f"whole files that differ: {', '.join(files) or 'none'}")
