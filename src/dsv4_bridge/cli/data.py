"""The verb `data`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BridgeError
from .app import Json, Overwrite, app, put


class Mask(StrEnum):
    """What is learned of a conversation."""

    assistant = "assistant"
    last_turn = "last_turn"
    each_turn = "each_turn"
    full = "full"


class Generation(StrEnum):
    """Generations of the released encodings, which word reasoning effort differently."""

    april = "april"
    july = "0731"


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
    pack: Annotated[bool | None, typer.Option("--pack/--no-pack", help="Chat: several samples in a pack.")] = None,
    thinking: Annotated[
        bool | None, typer.Option("--thinking/--no-thinking", help="Chat: mode of lines that do not say it.")
    ] = None,
    generation: Annotated[
        Generation | None,
        typer.Option("--generation", help="Chat: wording of reasoning effort; by default the checkpoint's encoding."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Processes that tokenize.")] = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Text or chats, as files or JSON -> training data.

    SRC are text files, folders of them, or JSON (lines or an array) with a text in each object; they become OUT.bin and
    OUT.idx. Files of conversations (messages, ShareGPT, Alpaca, prompt and completion) become the folder OUT.
    Any of them may be compressed with gzip or zstd, or be a Parquet table.
    """
    from ..data.kinds import choose_shape, look, refuse_others
    from ..data.packed import packing

    if len(paths) < 2:
        raise BridgeError(f"preparing data: only {paths[0]} is named; give SRC and OUT")
    *sources, out = paths
    zipped = any(path.is_file() and packing(path) for path in sources)  # an array in it is seen by --seq-length
    chats = [p for p in sources if key is None and p.is_file() and (look(p).chat or (zipped and seq_length))]
    of_chat: dict[str, Any] = {"--seq-length": seq_length, "--mask": mask, "--pack": pack, "--thinking": thinking}
    of_chat["--generation"] = generation
    of_text = {"--key": key, "--suffix": suffix, "--bos": bos}
    if not chats:  # before it is said that an option is for conversations: is this what it was meant to be?
        for path in sources:
            if path.is_file():
                refuse_others(path)
                choose_shape(path, key, named=True)
    said = [name for name, value in (of_text if chats else of_chat).items() if value is not None]
    if said:
        kind = "conversations" if chats else "documents"
        raise BridgeError(
            f"preparing data: {said[0]} is not for {kind}, and {(chats or sources)[0]} holds such; leave it out, or "
            f"name a file of {'documents' if chats else 'conversations (messages)'}"
        )
    if chats and len(chats) < len(sources):
        other = next(path for path in sources if path not in chats)
        raise BridgeError(f"preparing data: {chats[0]} holds conversations and {other} does not; prepare them apart")
    if chats and seq_length is None:
        raise BridgeError(f"preparing data: {chats[0]} holds conversations; give --seq-length, tokens of a pack")
    folder, spec = _tokenizer(tokenizer)
    from .show.progress import TerminalProgress

    progress = TerminalProgress()
    label = f"data {out}"
    try:
        if chats:
            from ..data.chat.prepare import prepare_chat

            progress.start(label, sum(path.stat().st_size for path in chats), 0)
            settings = {"mask": mask.value if mask else "assistant", "thinking": thinking, "pack": pack is not False}
            report: Any = prepare_chat(
                chats,
                out,
                folder,
                seq_length=seq_length or 0,
                workers=workers,
                generation=generation.value if generation else None,
                overwrite=overwrite,
                advance=progress.advance,
                **settings,
            )
        else:
            from ..data.indexed import prepare_pretraining

            report = prepare_pretraining(
                sources,
                out,
                folder,
                spec,
                key=key or "text",
                suffixes=suffix or (),
                bos=bool(bos),
                workers=workers,
                overwrite=overwrite,
                start=lambda total: progress.start(label, total, 0),
                advance=progress.advance,
            )
    finally:
        progress.stop()
    put(report.to_json() if as_json else {}, as_json, "" if as_json else "\n".join(report.lines()))


def _tokenizer(named: str) -> tuple[Path, Any]:
    """The folder of a checkpoint's small files, and the model's numbers; no tensor is read."""
    from ..store.hub import fetch_small
    from ..store.named import files_of, spec_of

    folder = fetch_small(named)
    return files_of(folder), spec_of(folder)
