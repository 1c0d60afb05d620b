"""The `dsv4` command: verbs only, each a few lines over a function of the same name.

Exit codes: 0 done; 1 the check ran and found differences; 2 unusable input or arguments.
"""

import json
import os
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="dsv4",
    help="Move DeepSeek-V4 between Hugging Face and Megatron-Core, byte-exact, streaming, on a CPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


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


def put(data: dict[str, Any], as_json: bool, shown: Any) -> None:
    """Print one JSON object, or what people read."""
    try:
        if as_json:
            sys.stdout.write(json.dumps(data, default=str) + "\n")
        elif isinstance(shown, str):
            sys.stdout.write(shown + "\n")
        else:
            from .show.tables import show

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
