"""The first samples of data as text, with what is learned of them; nothing is written."""

import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BridgeError, files_named
from ..spec.spec import ModelSpec
from .chat.jsonl import read_line
from .chat.masks import open_chat_tokenizer
from .chat.prepare import find_generation
from .chat.samples import build_samples, check_options
from .documents import document_tokens, needed_tokenizer
from .kinds import elements, find_chats, look, refuse_others
from .packed import opened
from .sources import BadSource, explained, find_sources, texts, units


@dataclass(frozen=True)
class Shown:
    """A sample.

    Attributes:
        where: the file and the line or element.
        tokens: of the sample.
        learned: of these, the learned ones.
        parts: its text in pieces, each with whether it is learned; special tokens are written out.
    """

    where: str
    tokens: int
    learned: int
    parts: tuple[tuple[str, bool], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self) | {"parts": [{"text": text, "learned": learned} for text, learned in self.parts]}


@files_named("showing conversations")
def show_chats(
    named: Sequence[Path],
    tokenizer_folder: Path,
    count: int,
    *,
    seq_length: int,
    mask: str = "assistant",
    too_long: str = "cut",
    thinking: bool | str | None = None,
    generation: str | None = None,
    skip: bool = False,
) -> list[Shown]:
    """The first samples that `prepare_chat` would make.

    Args:
        named: as there.
        tokenizer_folder: as there.
        count: most samples.
        seq_length: as there.
        mask: as there.
        too_long: as there.
        thinking: as there.
        generation: as there.
        skip: as there; nothing is listed.

    Raises:
        BridgeError: as there.
    """
    check_options(seq_length, mask, too_long)
    tokenizer = open_chat_tokenizer(tokenizer_folder)
    generation = generation or find_generation(tokenizer_folder)
    files, _ = find_chats(named, skip)

    def samples() -> Iterator[Shown]:
        for path in files:
            refuse_others(path)
            array = look(path).shape in ("array", "object")
            for number, raw in _rows(path):
                where = f"{path}, {'element' if array else 'line'} {number}"
                try:
                    conversation = read_line(raw, str(path), number)
                    made = list(
                        build_samples(
                            [conversation],
                            tokenizer,
                            seq_length=seq_length,
                            mask=mask,
                            too_long=too_long,
                            thinking=thinking,
                            generation=generation,
                            where=str(path),
                        )
                    )
                except BridgeError as error:
                    if skip:
                        continue
                    raise BridgeError(str(error).replace(f"{path}, line {number}", where)) from None
                for sample in made:
                    yield _shown(where, sample.tokens, sample.loss_mask, tokenizer.library)

    return list(itertools.islice(samples(), count))


@files_named("showing text")
def show_texts(
    named: Sequence[Path],
    tokenizer_folder: Path,
    spec: ModelSpec,
    count: int,
    *,
    key: str = "text",
    suffixes: Sequence[str] = (),
    bos: bool = False,
    skip: bool = False,
) -> list[Shown]:
    """The first documents that `prepare_pretraining` would write. All but the first token of each is learned.

    Args:
        named: as there.
        tokenizer_folder: as there.
        spec: as there.
        count: most documents.
        key: as there.
        suffixes: as there.
        bos: as there.
        skip: as there; nothing is listed.

    Raises:
        BridgeError: as there.
    """
    tokenizer = needed_tokenizer(tokenizer_folder, spec, "showing text")

    def samples() -> Iterator[Shown]:
        with tempfile.TemporaryDirectory() as folder:
            sources = find_sources(named, Path(folder), suffixes, key, skip=skip)
            shown = {source.path: source.shown or source.path for source in sources}
            try:
                for unit in units(sources):
                    for one in texts(unit, key, [] if skip else None):
                        if one[2].strip():
                            (tokens,) = document_tokens([one], tokenizer, spec, bos, unit.lines is not None)
                            yield _shown(str(shown[one[0]]), tokens, np.arange(len(tokens)) > 0, tokenizer.library)
            except BadSource as error:
                raise explained(error, sources) from None

    return list(itertools.islice(samples(), count))


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers from 1 and objects, of lines or of an array, packed or not; memory holds one of them."""
    shape = look(path).shape
    if shape == "array":
        for number, element in enumerate(elements(path), 1):
            yield number, json.dumps(element).encode()
        return
    with opened(path) as file:
        if shape == "object":
            yield 1, file.read()
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _shown(where: str, tokens: np.ndarray, learned: np.ndarray, library: Any) -> Shown:
    edges = [0, *(np.flatnonzero(learned[1:] != learned[:-1]) + 1).tolist(), len(tokens)]
    parts = []
    for begun, end in itertools.pairwise(edges):
        text = library.decode(tokens[begun:end].tolist(), skip_special_tokens=False)
        parts.append((text, bool(learned[begun])))
    return Shown(where, len(tokens), int(learned.sum()), tuple(parts))
