"""The verbs that run the model: `parity`, `generate`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import BridgeError, counted, printable, size
from .app import Dtype, Json, Revision, app, finish, put, quiet


class Against(StrEnum):
    """Other implementations that `parity` compares with."""

    transformers = "transformers"


@app.command()
def parity(
    ckpt: str,
    against: Annotated[Against, typer.Option("--against", help="The implementation to compare with.")] = (
        Against.transformers
    ),
    reference: Annotated[
        str | None, typer.Option("--reference", help="Checkpoint that the reference loads, by default CKPT.")
    ] = None,
    sites: Annotated[bool, typer.Option("--sites", help="Show every sub-layer.")] = False,
    layers: Annotated[
        str | None, typer.Option("--layers", help="A part, as 0-7; from layer 1 on with embeddings as input.")
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream/--whole", help="A layer at a time in memory, or a whole model.")
    ] = True,
    work: Annotated[
        Path | None, typer.Option("--work", help="Folder to keep the state in; a stopped comparison goes on from it.")
    ] = None,
    replay: Annotated[
        bool | None,
        typer.Option(
            "--replay/--no-replay",
            help="Also run with the reference's choices of experts and blocks; by default where the models differ.",
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype")] = Dtype.float32,
    prompt_ids: Annotated[str | None, typer.Option("--prompt-ids", help="Token ids, as 1,2,3.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Text for the checkpoint's tokenizer.json.")] = None,
    seq_length: Annotated[
        int | None, typer.Option("--seq-length", min=1, help="Random tokens a row, by default 301.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows of random tokens.")] = 2,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of random tokens.")] = 0,
    report: Annotated[Path | None, typer.Option("--report", help="Folder for an HTML page with plots.")] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Does our model compute what transformers computes, layer by layer? Exit code 1 if not."""
    from ..parity import Inputs
    from ..parity import parity as compare
    from ..parity.report import can_report, write_report
    from ..store.hub import resolve
    from ..text.tokenizer import parse_ids
    from .show.parity import parity_table

    if report:
        can_report(report)
    one, other = (x and (Path(x) if Path(x).exists() else resolve(x, revision)) for x in (ckpt, reference))
    inputs = Inputs(seq_length, batch, seed, tuple(parse_ids(prompt_ids)) if prompt_ids is not None else None, text)
    found = compare(
        one or ckpt,
        reference_checkpoint=other or None,
        inputs=inputs,
        dtype=dtype.value,
        replay=replay,
        stream=stream,
        layers=_span(layers),
        work=work,
        say=(lambda _: None) if quiet() else lambda line: print(printable(line), file=sys.stderr),
    )
    if report:
        print(f"written {write_report(found, report)}", file=sys.stderr)
    put(found.to_json() if as_json else {}, as_json, "" if as_json else parity_table(found, sites))
    finish(found.passed)


def _span(text: str | None) -> tuple[int, int] | None:
    """First and last layer of `3-7` or `3`."""
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal():
        raise BridgeError(f"reading --layers {text!r}: expected a layer or a span of them, as 5 or 0-7")
    return int(first), int(last or first)


@app.command()
def generate(
    ckpt: str,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Text to continue; may be repeated.")] = None,
    prompt_ids: Annotated[
        list[str] | None, typer.Option("--prompt-ids", help="Tokens to continue as they are, 1,2,3; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw from the likeliest tokens of this sum.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw from so many likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text to end at; may be repeated.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's turn to answer.")] = False,
    answer: Annotated[
        list[str] | None, typer.Option("--answer", help="Exit code 1 unless the text begins so; one for all or each.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype")] = Dtype.float32,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--whole",
            help="Leave the model in its checkpoint and read what is needed; by default where it does not fit.",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", help="GiB of the process with --stream; by default most of what is free."),
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Continue prompts with a checkpoint of either format, cached, greedy or sampled.

    Started by torchrun, each process holds a share of the experts.
    """
    from ..generate.generate import Ask
    from ..generate.generate import generate as run
    from ..generate.stream import InOrder
    from ..ranks import Ranks
    from ..store.hub import resolve
    from ..text.sampling import Sampling
    from ..text.tokenizer import parse_ids

    ids = [parse_ids(text) for text in prompt_ids or ()]
    ask = Ask(prompt or (), ids, max_new_tokens, stop or (), chat, answer or ())
    how = Sampling(temperature, top_p, top_k, seed)
    order = InOrder(len(ask.texts) + len(ids), _write)
    second = Ranks.from_environment().rank > 0  # ranks hold a share of the experts each, and say the same
    heard = _silent if as_json or second else order.heard
    most = None if memory is None else int(memory * 2**30)
    report = run(resolve(ckpt, revision), ask, how, dtype=dtype.value, stream=stream, memory=most, heard=heard)
    if second:
        return
    if as_json:
        put(report.to_json(), as_json, None)
    elif (kept := report.streamed) is not None:
        sys.stderr.write(
            f"in memory: {size(kept.kept)} of {size(kept.every_token)} of what every token needs, and "
            f"{counted(kept.room, 'expert')} a layer; read: {size(kept.read)}, {kept.misses:,} of "
            f"{counted(kept.hits + kept.misses, 'expert')}\n"
        )
    for row in report.continuations:
        if row.right is False:
            sys.stderr.write(f"dsv4: {row.text!r} does not begin with {row.answer!r}\n")
    finish(report.right)


def _write(piece: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"  # a terminal may know fewer characters than the model
    sys.stdout.write(piece.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _silent(row: int, piece: str, last: bool) -> None:
    pass
