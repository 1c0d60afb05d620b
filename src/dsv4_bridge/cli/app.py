"""The `dsv4` command: verbs only, each a few lines over a function of the same name.

Exit codes: 0 done; 1 the check ran and found differences; 2 unusable input or arguments.
"""

import contextlib
import gc
import json
import os
import signal
import sys
import threading
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BridgeError, os_error, printable

app = typer.Typer(
    name="dsv4",
    help="Move DeepSeek-V4 between Hugging Face and Megatron-Core, byte-exact, streaming, on a CPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Level(StrEnum):
    """How closely `verify` looks."""

    names = "names"
    values = "values"
    bytes = "bytes"


class ExportEncoding(StrEnum):
    """Encodings that `export` writes."""

    source = "source"
    fp8 = "fp8"
    bf16 = "bf16"


class RepackEncoding(StrEnum):
    """Encodings that `repack` writes."""

    fp8 = "fp8"
    bf16 = "bf16"


class Payload(StrEnum):
    """What a toy's weights are."""

    natural = "natural"
    random = "random"
    extreme = "extreme"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Workers = Annotated[int, typer.Option("--workers", min=1, max=256, help="Files written at a time.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is in the way.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]
Lossy = Annotated[bool, typer.Option("--allow-lossy", help="Permit values to be rounded; the report says by how much.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Read and convert everything, write nothing: a full check of the input.")
]
DropPassengers = Annotated[
    bool, typer.Option("--drop-passengers", help="Leave out tensors that Megatron has no place for.")
]


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
    as_json: Json = False,
) -> None:
    """Make a small random checkpoint in the released format of a variant."""
    from ..store.inspect import inspect as look
    from ..toy.checkpoint import make_toy

    made = look(make_toy(dst, variant, seed, payload=payload.value, ragged=ragged))
    facts = {
        "path": made.path,
        "variant": variant,
        "seed": seed,
        "tensors": made.tensors,
        "bytes": made.bytes,
    }
    put(facts, as_json, f"{dst}: a toy {variant}, {made.tensors} tensors, {made.bytes / 1e6:.1f} MB")


@app.command()
def inspect(ckpt: str, revision: Revision = None, as_json: Json = False) -> None:
    """What is this: variant, encodings, coverage, sizes, what is missing or unknown."""
    from ..store.hub import describe
    from ..store.inspect import inspect as look
    from .show.tables import inspect_table

    report = look(*describe(ckpt, revision))
    put(report.to_json(), as_json, inspect_table(report))
    finish(report.sound)


@app.command("import")
def import_(
    hf: str,
    out: Path,
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
    report = import_hf(resolve(hf, revision), out, options, drop_passengers=drop_passengers, allow_lossy=allow_lossy)
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


@app.command()
def verify(
    a: str,
    b: Annotated[str | None, typer.Argument(help="Second checkpoint; without it, A's files and its checksums.")] = None,
    level: Annotated[Level | None, typer.Option("--level", help="How closely.", show_default="values")] = None,
    revision: Revision = None,
    checksums: Annotated[
        Path | None, typer.Option("--checksums", help="Those of A's files; by default A.checksums.json beside it.")
    ] = None,
    workers: Workers = 2,
    as_json: Json = False,
) -> None:
    """Are two checkpoints the same, or the files of one still as they were written? Exit code 1 if they differ."""
    from ..convert.verify import verify as compare
    from ..store.hub import resolve
    from .show.tables import TerminalProgress, files_verdict, verify_table

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


def _options(workers: int, resume: bool, overwrite: bool, dry_run: bool) -> Any:
    from ..convert.run import Options
    from ..ranks import Ranks
    from .show.tables import TerminalProgress

    return Options(workers, resume, overwrite, TerminalProgress(), dry_run, Ranks.from_environment())


def put(data: dict[str, Any], as_json: bool, shown: Any) -> None:
    """Print one JSON object, or what people read."""
    try:
        if as_json:
            sys.stdout.write(json.dumps(data, default=str) + "\n")
        else:
            from rich.text import Text

            from .show.tables import show

            show(Text(shown) if isinstance(shown, str) else shown)  # no markup: paths may have brackets
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; what was found still decides the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _print_report(report: Any, out: Path, as_json: bool, dry_run: bool) -> None:
    from ..ranks import Ranks
    from .show.tables import conversion_table

    if Ranks.from_environment().rank:  # rank 0 prints what all of them did
        return
    facts = {"out": str(out), "dry_run": dry_run} | report.to_json()
    put(facts, as_json, conversion_table(report, out, dry_run=dry_run))


def finish(good: bool) -> None:
    """Exit code 1 where a check found something."""
    if not good:
        raise typer.Exit(1)


# As `--help` lists them: look, convert, run, train.
_ORDER = "demo toy inspect plan import export repack verify generate parity data recipes train lora merge flops doctor"


def main() -> None:
    """Entry point: runs a verb, turns every BridgeError into one message and exit code 2."""
    from . import data as cli_data  # noqa: F401 - verbs register themselves

    order = {name: place for place, name in enumerate(_ORDER.split())}
    app.registered_commands.sort(key=lambda verb: order.get(verb.name or getattr(verb.callback, "__name__", ""), 99))

    # A plan is hundreds of thousands of small objects that all stay: looking for garbage among them
    # again and again takes a third of the time.
    gc.set_threshold(200_000, 20, 100)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(standalone_mode=False)
    except BridgeError as error:
        _say(str(error))
        code = 2
    except ModuleNotFoundError as error:
        if (extra := _EXTRAS.get((error.name or "").partition(".")[0])) is None:
            raise
        _say(f"{error.name} is not installed, which this needs; pip install 'dsv4-bridge[{extra}]'")
        code = 2
    except typer.TyperException as error:  # bad arguments
        message = getattr(error, "format_message", error.__str__)()
        _say(f"{message} (dsv4 --help lists verbs and options)")
        code = 2
    except _Terminated:
        code = 143
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # stdout's reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except OSError as error:
        _say(f"{_verb()}: {os_error(error)}")
        code = 2
    if code in (130, 143):  # typer turns Ctrl-C into its code
        _say(f"interrupted; {_GO_ON.get(_verb(), 'nothing is left half written')}")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if any(thread.name == "progress" for thread in threading.enumerate()):
        os._exit(code or 0)  # a display that is stuck in a full pipe would end the interpreter with an error
    sys.exit(code or 0)


# Top-level modules -> what brings them.
_EXTRAS = {
    **dict.fromkeys(("megatron", "triton", "psutil"), "megatron"),
    **dict.fromkeys(("transformers", "peft", "accelerate", "tokenizers"), "hf"),
    "tensorboard": "train",
    "matplotlib": "report",
}
_GO_ON = {
    **dict.fromkeys(
        ("import", "export", "repack"), "what is finished is kept: the same command with --resume goes on from there"
    ),
    "train": "no step was made since the last checkpoint, or they are lost; the same command goes on from there",
}


class _Terminated(BaseException):
    """SIGTERM came."""


def _terminated(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise _Terminated


def _verb() -> str:
    return next((word for word in sys.argv[1:] if not word.startswith("-")), "")


def _say(message: str) -> None:
    """A message on stderr; gone if nobody listens."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"dsv4: {printable(message)}\n")
        sys.stderr.flush()
