"""The verbs that look: what is this, are two the same, can this machine do it."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BridgeError, counted, size
from .app import Json, NamingOption, Revision, Workers, app, finish, put


class Level(StrEnum):
    """How closely `verify` looks."""

    names = "names"
    values = "values"
    bytes = "bytes"


class Width(StrEnum):
    """How large a toy is."""

    tiny = "tiny"
    full = "full"


class Payload(StrEnum):
    """What a toy's weights are."""

    natural = "natural"
    random = "random"
    extreme = "extreme"


@app.command()
def demo(
    keep: Annotated[Path | None, typer.Option("--keep", help="Folder to leave the checkpoints in.")] = None,
) -> None:
    """The whole story on a tiny checkpoint: make, import, export, verify."""
    from .demo import demo as run_demo

    run_demo(keep)


@app.command()
def toy(
    dst: Path,
    variant: Annotated[str, typer.Option("--variant", help="Released variant to imitate.")] = "Flash",
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    payload: Annotated[Payload, typer.Option("--payload", help="Gaussian, random codes, or every legal extreme.")] = (
        Payload.natural
    ),
    ragged: Annotated[bool, typer.Option("--ragged", help="Widths that are no multiples of 128.")] = False,
    width: Annotated[Width, typer.Option("--width", help="A tiny model, or the released widths and experts.")] = (
        Width.tiny
    ),
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Decoder layers of a full width.")] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Threads that make tensors.")] = 2,
    naming: Annotated[
        NamingOption | None, typer.Option("--naming", help="A Megatron checkpoint with the names of this model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a small random checkpoint in the released format of a variant, or a Megatron one."""
    from ..spec.plan import layer_kinds
    from ..spec.variants import variant_named
    from ..store.inspect import inspect as look
    from ..toy.checkpoint import make_toy, toy_bytes, toy_spec
    from .show.console import say
    from .show.progress import TerminalProgress

    spec = toy_spec(variant, width.value, layers, ragged=ragged)
    kinds, of_release = layer_kinds(spec), layer_kinds(variant_named(variant).spec)
    absent = [name for name, count in of_release.items() if count and not kinds[name]]
    if width is Width.full:
        shown = ", ".join(f"{count} {name}" for name, count in kinds.items() if count)
        few = f"; too few layers for {', '.join(absent)}" if absent else ""
        deep = counted(spec.num_hidden_layers, "layer")
        say(f"{dst}: {size(toy_bytes(variant, spec))} of disk, {deep} ({shown}){few}")
    make_toy(
        dst,
        variant,
        seed,
        payload=payload.value,
        ragged=ragged,
        width=width.value,
        layers=layers,
        workers=workers,
        progress=TerminalProgress(),
        naming=None if naming is None else naming.value,
    )
    made = look(dst)
    facts = {
        "path": made.path,
        "variant": variant,
        "seed": seed,
        "tensors": made.tensors,
        "bytes": made.bytes,
        "layers": kinds,
        "absent": absent,
    }
    put(facts, as_json, f"{dst}: a toy {variant}, {made.tensors:,} tensors, {size(made.bytes)}")


@app.command()
def inspect(
    ckpt: str,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every tensor too, and say what of its contents cannot be right.")
    ] = False,
    revision: Revision = None,
    workers: Workers = 2,
    as_json: Json = False,
) -> None:
    """What is this: variant, encodings, coverage, sizes, what is missing or unknown. Exit code 1 with findings."""
    from ..store.hub import describe, resolve
    from ..store.inspect import inspect as look
    from .show.tables import inspect_table

    if deep:
        from ..convert.contents import examine
        from .show.progress import TerminalProgress

        folder = resolve(ckpt, revision)
        report = look(folder)
        contents = examine(folder, workers=workers, progress=TerminalProgress())
        facts = report.to_json() | {"contents": contents.to_json(), "sound": report.sound and contents.sound}
        put(facts, as_json, inspect_table(report, contents))
        finish(report.sound and contents.sound)
        return
    report = look(*describe(ckpt, revision))
    put(report.to_json(), as_json, inspect_table(report))
    finish(report.sound)


@app.command()
def verify(
    a: str,
    b: Annotated[str | None, typer.Argument(help="Second checkpoint; without it, A's files and its checksums.")] = None,
    level: Annotated[Level | None, typer.Option("--level", help="How closely.", show_default="values")] = None,
    revision: Revision = None,
    checksums: Annotated[
        Path | None, typer.Option("--checksums", help="Those of A's files; by default A.checksums.json beside it.")
    ] = None,
    release: Annotated[
        str | None, typer.Option("--release", help="Is A this release, byte for byte, by what is known of it offline?")
    ] = None,
    hub: Annotated[
        str | None, typer.Option("--hub", help="Is A what this repository on the Hub holds, by the Hub's own list?")
    ] = None,
    workers: Workers = 2,
    as_json: Json = False,
) -> None:
    """Are two checkpoints the same, is one a release, or are its files as written? Exit code 1 if they differ."""
    from ..convert.verify import verify as compare
    from ..store.hub import resolve
    from .show.progress import TerminalProgress
    from .show.tables import files_verdict, release_verdict, verify_table

    if release or hub:
        from ..convert.releases import verify_hub, verify_release

        if b or level or checksums or (release and (hub or revision)):
            raise BridgeError(
                "verifying against a release: --release and --hub each stand alone with one folder; only --hub takes a "
                "--revision"
            )
        told: dict[str, Any] = {"workers": workers, "progress": TerminalProgress()}
        found = verify_release(a, release, **told) if release else verify_hub(a, str(hub), revision, **told)
        put(found.to_json(), as_json, release_verdict(found))
        finish(found.whole)
        return
    if b is None:
        from ..convert.checksums import verify_files

        if level or revision:
            raise BridgeError("verifying files: --level and --revision are of two checkpoints; name a second one")
        held = verify_files(a, checksums, workers=workers, progress=TerminalProgress())
        put(held.to_json(), as_json, files_verdict(held))
        finish(held.same)
        return
    if checksums:
        raise BridgeError("verifying: --checksums is of the files of one checkpoint; leave the second one out")
    one, other = (Path(x) if Path(x).exists() else resolve(x, revision) for x in (a, b))
    report = compare(one, other, (level or Level.values).value, TerminalProgress())
    put(report.to_json(), as_json, verify_table(report))
    finish(report.same)


@app.command()
def doctor(folder: Annotated[Path | None, typer.Argument()] = None, as_json: Json = False) -> None:
    """Can this machine do the work; FOLDER is where outputs would go."""
    from dataclasses import asdict

    from .doctor import doctor as examine
    from .show.tables import doctor_table

    if folder is not None and not folder.is_dir():
        raise BridgeError(f"examining {folder}: not a folder")
    checks = examine(folder)
    put({"checks": [asdict(c) for c in checks]}, as_json, doctor_table(checks))
    finish(all(c.state != "bad" for c in checks))
