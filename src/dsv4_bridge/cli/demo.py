"""The whole story on a tiny checkpoint."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

from rich.markup import escape

from ..convert.jobs import export_hf, import_hf
from ..convert.verify import verify
from ..errors import BridgeError
from ..store.inspect import inspect
from ..toy.checkpoint import make_toy
from .show.console import show
from .show.tables import inspect_facts, verify_table, verify_verdict


def demo(keep: Path | None = None) -> None:
    """Make a toy Flash in the released format, import it, export it, compare every byte, and run it."""
    if keep:
        _run(keep)
        show(f"\n[bold]Next[/]: released, megatron and exported are in {escape(str(keep))}, for any verb (dsv4 --help)")
        return
    with tempfile.TemporaryDirectory(prefix="dsv4-demo-") as folder:
        _run(Path(folder))
    show(
        "\n[bold]Next[/]: dsv4 demo --keep FOLDER leaves these; dsv4 import HF OUT --dry-run says what a release takes"
    )


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
    show("\n[bold]6. dsv4 parity megatron[/]: does the model on Megatron-Core compute what transformers computes?")
    _compare(megatron)


def _compare(megatron: Path) -> None:
    if lost := [name for name in ("megatron.core", "transformers") if not _installed(name)]:
        show(f"not run: {' and '.join(lost)} not installed; pip install 'dsv4-bridge\\[megatron,hf]'")
        return
    from ..parity import parity
    from .show.parity import parity_table

    report = parity(megatron)
    show(parity_table(report))
    if not report.passed:
        raise BridgeError("the demo's model does not compute what transformers computes; please report this")


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a package that is not there itself
        return False
