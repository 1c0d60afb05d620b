"""The verb `data`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BridgeError, short
from .app import Json, app, put


class Mask(StrEnum):
    """What is learned of a conversation."""

    assistant = "assistant"
    last_turn = "last_turn"
    each_turn = "each_turn"
    full = "full"


class TooLong(StrEnum):
    """What becomes of conversations longer than a pack."""

    cut = "cut"
    several = "split"  # str has a split of its own
    skip = "skip"
    refuse = "refuse"


class Generation(StrEnum):
    """Generations of the released encodings, which word reasoning effort differently."""

    april = "april"
    july = "0731"


class Thinking(StrEnum):
    """Mode of conversations that do not say it."""

    on = "on"
    off = "off"
    auto = "auto"


class OnError(StrEnum):
    """What becomes of unusable documents."""

    stop = "stop"
    skip = "skip"


_MODES = {Thinking.on: True, Thinking.off: False, Thinking.auto: "auto", None: None}


@app.command()
def data(
    paths: Annotated[list[Path], typer.Argument(metavar="SRC... OUT", help="What to read, and where to.")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="Checkpoint or hub id whose tokenizer it is.")],
    key: Annotated[str | None, typer.Option("--key", help="Where a JSONL's objects have their text.")] = None,
    suffix: Annotated[
        list[str] | None, typer.Option("--suffix", help="Take these files of folders, as .py; may be repeated.")
    ] = None,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help="Begin every document with BOS.")] = None,
    seq_length: Annotated[int | None, typer.Option("--seq-length", min=2, help="Chat: tokens of a pack.")] = None,
    mask: Annotated[Mask | None, typer.Option("--mask", help="Chat: what is learned; assistant by default.")] = None,
    too_long: Annotated[
        TooLong | None,
        typer.Option("--too-long", help="Chat: what becomes of samples longer than a pack; cut by default."),
    ] = None,
    pack: Annotated[bool | None, typer.Option("--pack/--no-pack", help="Chat: several samples in a pack.")] = None,
    thinking: Annotated[
        Thinking | None,
        typer.Option("--thinking", help="Chat: mode of lines without one; auto: on where an answer has thoughts."),
    ] = None,
    no_thinking: Annotated[bool, typer.Option("--no-thinking", help="Chat: the same as --thinking off.")] = False,
    generation: Annotated[
        Generation | None,
        typer.Option("--generation", help="Chat: wording of reasoning effort; by default the checkpoint's encoding."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Processes that tokenize.")] = 1,
    on_error: Annotated[
        OnError, typer.Option("--on-error", help="Leave unusable documents and files out, listed beside OUT, or stop.")
    ] = OnError.stop,
    show: Annotated[
        int, typer.Option("--show", min=0, help="Print so many samples, what is learned marked, and write nothing.")
    ] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace data that is in the way.")] = False,
    as_json: Json = False,
) -> None:
    """Text or chats, as files or JSON -> training data.

    SRC are text files, folders of them, or JSON (lines or an array) with a text in each object; they become OUT.bin and
    OUT.idx. Files of conversations (messages, ShareGPT, Alpaca, prompt and completion), and with --seq-length folders
    of them, become the folder OUT. Any of them may be compressed with gzip or zstd, or be a Parquet table.
    """
    if no_thinking and thinking not in (None, Thinking.off):
        raise BridgeError(f"preparing data: --no-thinking and --thinking {thinking} contradict each other")
    thinking = Thinking.off if no_thinking else thinking
    sources, out = (paths, None) if show else (paths[:-1], paths[-1])
    if show and len(paths) > 1 and _is_out(paths[-1]):  # the command as it will run, with --show behind it
        sources = paths[:-1]
    if not sources:
        raise BridgeError(f"preparing data: only {paths[0]} is named; give SRC and OUT")
    of_chat: dict[str, Any] = {"--seq-length": seq_length, "--mask": mask, "--pack": pack, "--thinking": thinking}
    of_chat |= {"--generation": generation, "--too-long": too_long}
    of_text = {"--key": key, "--suffix": suffix, "--bos": bos}
    skip = on_error is OnError.skip
    chats = _chats(sources, key, seq_length, of_chat, of_text, skip)
    folder, spec = _tokenizer(tokenizer)
    chat_options: dict[str, Any] = {
        "seq_length": seq_length or 0,
        "mask": mask.value if mask else "assistant",
        "too_long": too_long.value if too_long else "cut",
        "thinking": _MODES[thinking],
        "generation": generation.value if generation else None,
        "skip": skip,
    }
    text_options: dict[str, Any] = {"key": key or "text", "suffixes": suffix or (), "bos": bool(bos), "skip": skip}
    if out is None:
        from ..data.samples_shown import show_chats, show_texts
        from .show.samples import samples

        if chats:
            found = show_chats(sources, folder, show, **chat_options)
        else:
            found = show_texts(sources, folder, spec, show, **text_options)
        put({"samples": [one.to_json() for one in found]}, as_json, samples(found))
        return
    from .show.progress import TerminalProgress

    progress = TerminalProgress()
    common: dict[str, Any] = {
        "workers": workers,
        "overwrite": overwrite,
        "start": lambda total: progress.start(f"data {out}", total, 0),
        "advance": progress.advance,
    }
    try:
        if chats:
            from ..data.chat.prepare import prepare_chat

            report: Any = prepare_chat(sources, out, folder, pack=pack is not False, **chat_options, **common)
        else:
            from ..data.indexed import prepare_pretraining

            report = prepare_pretraining(sources, out, folder, spec, **text_options, **common)
    finally:
        progress.stop()
    put(report.to_json() if as_json else {}, as_json, "" if as_json else "\n".join(report.lines()))


def _is_out(path: Path) -> bool:
    """Whether a path is where data goes, or lies already."""
    from ..data.chat.store import NAME

    return not path.exists() or (path / NAME).is_file()


def _chats(
    sources: list[Path],
    key: str | None,
    seq_length: int | None,
    of_chat: dict[str, Any],
    of_text: dict[str, Any],
    skip: bool,
) -> bool:
    """Whether the sources hold conversations; options that do not go with what they hold are refused."""
    from ..data.kinds import choose_shape, look, refuse_others

    chats, usable = [], []
    for path in sources:
        try:
            chat = look(path).chat if path.is_file() else path.is_dir() and seq_length is not None
        except BridgeError:
            if not skip:
                raise
            continue
        usable.append(path)
        if chat and key is None:
            chats.append(path)
    if not any(path.is_file() for path in chats) and len(chats) < len(usable):
        chats = []  # folders beside a text are folders of text
    if not chats:  # before it is said that an option is for conversations: is this what it was meant to be?
        for path in usable:
            if path.is_file() and not skip:
                refuse_others(path)
                choose_shape(path, key, named=True)
    said = [name for name, value in (of_text if chats else of_chat).items() if value is not None]
    if said:
        if not chats and (odd := _of_neither(usable, key)):
            raise BridgeError(f"preparing data: {said[0]} is for conversations, and {odd}")
        kind = "conversations" if chats else "documents"
        raise BridgeError(
            f"preparing data: {said[0]} is not for {kind}, and {(chats or sources)[0]} holds such; leave it out, or "
            f"name a file of {'documents' if chats else 'conversations (messages)'}"
        )
    if chats and len(chats) < len(usable):
        other = next(path for path in usable if path not in chats)
        raise BridgeError(f"preparing data: {chats[0]} holds conversations and {other} does not; prepare them apart")
    if chats and seq_length is None:
        raise BridgeError(f"preparing data: {chats[0]} holds conversations; give --seq-length, tokens of a pack")
    return bool(chats)


def _of_neither(sources: list[Path], key: str | None) -> str:
    """The file that holds objects with neither a conversation nor a text in them, and what it has; `""` if none."""
    from ..data.kinds import CONVERSATIONS, look

    for path in sources:
        first = look(path).first if path.is_file() else None
        if first is not None and (key or "text") not in first:
            has = f"the objects of {path} have {short(list(first))}"
            return f"{has}, which is of no form that is known ({CONVERSATIONS}); rewrite it in one of them"
    return ""


def _tokenizer(named: str) -> tuple[Path, Any]:
    """The folder of a checkpoint's small files, and the model's numbers; no tensor is read."""
    from ..store.hub import fetch_small
    from ..store.named import files_of, spec_of

    folder = fetch_small(named)
    return files_of(folder), spec_of(folder)
