"""The `dsv4` command: verbs only, each a few lines over a function of the same name.

Exit codes: 0 done; 1 the check ran and found differences; 2 unusable input or arguments.
"""

import json
import os
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..errors import printable
from .help import Verbs

app = typer.Typer(
    name="dsv4",
    cls=Verbs,
    help="Move DeepSeek-V4 between Hugging Face and Megatron-Core, byte-exact, streaming, on a CPU.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
SCHEMA = 1  # of what --json prints; counted up when a field's meaning changes
QUIET = "DSV4_QUIET"  # in the environment: no progress is shown


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"dsv4-bridge {package_version()}\n")
        raise typer.Exit


def _hush(asked: bool) -> None:
    if asked:
        os.environ[QUIET] = "1"


def quiet() -> bool:
    """Whether no progress is to be shown."""
    return bool(os.environ.get(QUIET))


def package_version() -> str:
    """Of this package, as it is installed."""
    from .. import __version__

    return __version__


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    hushed: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="Show no progress; results and errors are.", callback=_hush, is_eager=True),
    ] = False,
) -> None:
    """What comes before a verb, or behind it: `Verbs` gives the same options to each."""
    del version, hushed


def described(facts: dict[str, Any], verb: str) -> dict[str, Any]:
    """What --json prints: facts, and what they are."""
    return {"schema": SCHEMA, "verb": verb, "version": package_version()} | facts


class ExportEncoding(StrEnum):
    """Encodings that `export` writes."""

    source = "source"
    fp8 = "fp8"
    bf16 = "bf16"


class NamingOption(StrEnum):
    """How Megatron-LM calls tensors."""

    gpt = "gpt"
    hybrid = "hybrid"


Named = Annotated[
    NamingOption | None,
    typer.Option(
        "--naming", help="Megatron's names: of GPTModel (dev, and here; default) or HybridModel (main, V4.1)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Workers = Annotated[int, typer.Option("--workers", min=1, max=256, help="Files written at a time.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is in the way.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]


def verb() -> str:
    """The verb that was asked for, `""` if none."""
    return next((word for word in sys.argv[1:] if not word.startswith("-")), "")


def put(data: dict[str, Any], as_json: bool, shown: Any) -> None:
    """Print one JSON object, or what people read."""
    try:
        if as_json:
            sys.stdout.write(json.dumps(described(data, verb()), default=str) + "\n")
        elif isinstance(shown, str):
            sys.stdout.write("\t".join(map(printable, shown.split("\t"))) + "\n")  # names may be from anywhere
        else:
            from .show.console import show

            show(shown)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; what was found still decides the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def finish(good: bool) -> None:
    """Exit code 1 where a check found something."""
    if not good:
        raise typer.Exit(1)


class Dtype(StrEnum):
    """Types that a model computes in."""

    float32 = "float32"
    bf16 = "bf16"
