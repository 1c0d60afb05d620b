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


class ExportEncoding(StrEnum):
    """Encodings that `export` writes."""

    source = "source"
    fp8 = "fp8"
    bf16 = "bf16"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Workers = Annotated[int, typer.Option("--workers", min=1, max=256, help="Files written at a time.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is in the way.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]


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


class Dtype(StrEnum):
    """Types that a model computes in."""

    float32 = "float32"
    bf16 = "bf16"
