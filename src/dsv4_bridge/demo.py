"""The whole story on a tiny checkpoint."""

import tempfile
from pathlib import Path

from .bridge import export_hf, import_hf
from .errors import BridgeError
from .inspecting import inspect
from .render import inspect_facts, show, verify_table, verify_verdict
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
    show("[bold]1. dsv4 toy released[/]: a small random DeepSeek-V4-Flash in the released format")
    make_toy(released, "Flash", seed=0)
    show(inspect_facts(inspect(released)))
    show("\n[bold]2. dsv4 import released megatron[/]: a Megatron-Core torch_dist checkpoint")
    import_hf(released, megatron)
    show(inspect_facts(inspect(megatron)))
    show("\n[bold]3. dsv4 verify released megatron --level values[/]: does it hold every value?")
    show(verify_verdict(verify(released, megatron, "values")))
    show("\n[bold]4. dsv4 export megatron exported --like released[/]: and back")
    report = export_hf(megatron, back, released)
    kept = sum(e.kept for e in report.encoded.values())
    show(
        f"{report.bytes_written:,} bytes written, source scale kept in {kept:,} of "
        f"{sum(e.blocks for e in report.encoded.values()):,} blocks"
    )
    show("\n[bold]5. dsv4 verify released exported --level bytes[/]: is every stored byte the same?")
    show(verify_table(verify(released, back, "bytes")))
    differing = [p.name for p in sorted(released.iterdir()) if p.read_bytes() != (back / p.name).read_bytes()]
    show(f"files that differ: {', '.join(differing) or 'none'}")
    if differing:
        raise BridgeError(f"the demo's round trip changed {', '.join(differing)}; please report this")
