"""The command `dsv4`: its verbs in the order of `--help`, its messages, its exit codes."""

import contextlib
import difflib
import gc
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import typer

from ..errors import BridgeError, os_error, printable
from ..ranks import slurm_ranks
from . import check, convert, data, flops, lora, model, plan, publish, train  # noqa: F401 - verbs register themselves
from .app import app, described, verb

# As `--help` lists them: look, convert, run, train.
_ORDER = (
    "demo toy inspect plan import export rename repack verify generate parity "
    "data recipes train report lora merge push flops doctor"
)
_BAD_ARGUMENTS: Any = typer.BadParameter.__base__  # UsageError, of typer or of click; typer does not export it
_PLACE = {name: place for place, name in enumerate(_ORDER.split())}
app.registered_commands.sort(key=lambda one: _PLACE[one.name or getattr(one.callback, "__name__", "")])


def main() -> None:
    """Entry point: runs a verb, turns every BridgeError into one message and exit code 2."""
    # A plan is hundreds of thousands of small objects that all stay: looking for garbage among them
    # again and again takes a third of the time.
    gc.set_threshold(200_000, 20, 100)
    signal.signal(signal.SIGTERM, _terminated)
    sys.unraisablehook = _swallowed
    os.environ.update(slurm_ranks(os.environ))
    if sys.argv[1:2] == ["help"]:  # `help VERB`, as git and others have it
        sys.argv[1:] = [*sys.argv[2:], "--help"]
    try:
        code = app(standalone_mode=False)
    except BridgeError as error:
        if _turn_comes(os.environ):
            _refused(str(error))
        code = 2
    except ModuleNotFoundError as error:
        if (extra := _EXTRAS.get((error.name or "").partition(".")[0])) is None:
            raise
        _refused(f"{error.name} is not installed, which this needs; pip install 'dsv4-bridge[{extra}]'")
        code = 2
    except _BAD_ARGUMENTS as error:
        message = getattr(error, "format_message", error.__str__)()
        if len(sys.argv) < 2:  # without a word: the help
            sys.stderr.write(f"{message}\n")
        else:
            _refused(_instead(message))
        code = 2
    except _Terminated:
        code = 143
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:  # stdout's reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except OSError as error:
        _refused(f"{verb()}: {os_error(error)}")
        code = 2
    except (MemoryError, ImportError) as error:
        if isinstance(error, ImportError) and not re.search("failed to map|annot allocate memory", str(error)):
            raise
        _refused(f"{verb()}: the system gives this process no more memory; raise its limit (ulimit -v, or a job's)")
        code = 2
    except RuntimeError as error:
        if str(error) != "can't start new thread":  # of Python's threading
            raise
        _refused(
            f"{verb()}: the system gives this process no more threads; raise its limit (ulimit -u, or a container's)"
        )
        code = 2
    if code in (130, 143):  # typer turns Ctrl-C into its code
        _say(f"interrupted; {_GO_ON.get(verb(), 'nothing is left half written')}")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if any(thread.name == "progress" for thread in threading.enumerate()):
        os._exit(code or 0)  # a display that is stuck in a full pipe would end the interpreter with an error
    sys.exit(code or 0)


def _instead(message: str) -> str:
    """What is said of arguments that cannot be used, with what to do about them."""
    message = re.sub(r"\s*\n\s*", " ", message).replace("Value error, ", "")  # choices come one a line
    if verb() not in _PLACE:
        message = re.sub(r"\.? Did you mean .*", "", message)  # of some releases of typer
        near = difflib.get_close_matches(verb(), _PLACE, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        if verb() == "version" or {"-V", "-v"} & {*sys.argv[1:]}:
            meant = "; dsv4 --version prints it"
        return f"{message}{meant} (dsv4 --help lists the verbs)"
    if verb() == "train" and (key := _recipe_key(message)):
        message = f"{message.partition(' (')[0]}; keys of a recipe have no dashes: {key}"
    return f"{message} (dsv4 {verb()} --help lists its options)"


def _recipe_key(message: str) -> str:
    """The words `key=value` that were written as an option, `""` if none were."""
    from ..train.choose import known_key

    found = re.match(r"No such option:? ['\"]?--?([\w.-]+)", message)
    key = known_key(found[1]) if found else ""
    value = next(
        (word.partition("=")[2] for word in sys.argv[2:] if found and word.lstrip("-").startswith(f"{found[1]}=")), ""
    )
    return f"{key}={value or 'VALUE'}" if key else ""


# Top-level modules -> what brings them.
_EXTRAS = {
    **dict.fromkeys(("megatron", "triton", "psutil"), "megatron"),
    **dict.fromkeys(("transformers", "peft", "accelerate", "tokenizers"), "hf"),
    "tensorboard": "train",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "matplotlib": "report",
    **dict.fromkeys(("pyarrow", "zstandard"), "data"),
}


_GO_ON = {
    **dict.fromkeys(
        ("import", "export", "rename", "repack"),
        "what is finished is kept: the same command with --resume goes on from there",
    ),
    "merge": "a merge is not resumed: the same command with --overwrite starts over",
    "push": "what was sent is kept: the same command goes on from there",
    "train": "no step was made since the last checkpoint, or they are lost; the same command goes on from there",
}


class _Terminated(BaseException):
    """SIGTERM came."""


def _terminated(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
    raise _Terminated


def _swallowed(what: Any) -> None:
    """A signal that came while Python ran a finalizer, where its exception ends nothing: it is sent again."""
    if not isinstance(what.exc_value, _Terminated | KeyboardInterrupt):
        sys.__unraisablehook__(what)
        return
    number = signal.SIGINT if isinstance(what.exc_value, KeyboardInterrupt) else signal.SIGTERM
    if number == signal.SIGTERM:
        signal.signal(number, _terminated)
    again = threading.Timer(0.05, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _refused(message: str) -> None:
    """A message on stderr, and for a program that reads JSON an object on stdout."""
    _say(message)
    if "--json" in sys.argv[1:]:
        with contextlib.suppress(OSError, ValueError):
            facts = described({"error": printable(message), "exit_code": 2}, verb())
            sys.stdout.write(json.dumps(facts) + "\n")


def _turn_comes(env: Mapping[str, str]) -> bool:
    """Whether to say what this process ends with: what all ranks meet is said once.

    Rank 0 speaks at once, and launchers end the others when one of them ends; a rank that is still there later
    met something of its own, or has another launcher.
    """
    if env.get("RANK", "0") == "0" or env.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        time.sleep(2.0 if env.get("LOCAL_RANK") == "0" else 4.0)
    except (_Terminated, KeyboardInterrupt):
        return False
    return True


def _say(message: str) -> None:
    """A message on stderr; gone if nobody listens."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"dsv4: {printable(message)}\n")
        sys.stderr.flush()
