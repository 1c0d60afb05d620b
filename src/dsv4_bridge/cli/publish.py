"""The verb `push`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import counted, size
from .app import Json, Workers, app, put


@app.command()
def push(
    folder: Path,
    repo: str,
    base: Annotated[str | None, typer.Option("--base", help="Repository that it was made from, for the card.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Commit of that repository, for the card.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository, if it is new.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and the files, and send nothing.")] = False,
    workers: Workers = 1,
    as_json: Json = False,
) -> None:
    """A checkpoint or adapters -> repository on the Hub, with a model card.

    Refused where a conversion has not ended, or files are not as they were written. Started again, it goes on.
    """
    from ..convert.publish import prepare_push
    from ..convert.publish import push as send
    from .show.progress import TerminalProgress

    found = prepare_push(folder, repo, base=base, revision=revision, workers=workers, progress=TerminalProgress())
    total = f"{counted(len(found.files) + 1, 'file')}, {size(sum(found.files.values()) + len(found.card.encode()))}"
    if dry_run:
        listed = [f"{nbytes:>16,}  {name}" for name, nbytes in sorted(found.files.items())]
        text = "\n".join([found.card, "files:", *listed, f"would go to {repo}: {total}; nothing was sent"])
        put(found.to_json() | {"sent": False}, as_json, text)
        return
    url = send(found, private=private)
    put(found.to_json() | {"sent": True, "url": url}, as_json, f"{url}: {total}\n{found.verified}")
