"""Text to tokens and back, by a checkpoint's tokenizer.json; streamed text; one turn of chat."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BridgeError, short
from ..spec.spec import ModelSpec
from ..strict_json import read_json
from .tokenizer_files import guarded, read_tokenizer
from .tokens import ASSISTANT, GENERATION, THOUGHT, TOKENIZER, USER

CONFIG = "config.json"
_MOST_CONFIG = 64 << 20
BROKEN = "\ufffd"  # stands at the end of a text while its last character lacks bytes


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
        path: its tokenizer.json.
        library: the `tokenizers.Tokenizer`.
        bos: token that a text begins with.
    """

    path: Path
    library: Any
    bos: int | None

    def encode(self, text: str) -> list[int]:
        """Tokens of a text behind exactly one BOS; special tokens written out in it count as such.

        Raises:
            BridgeError: bytes that are no text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BridgeError(f"reading the text {short(text)}: {error.reason}; give it in UTF-8") from None
        doing = f"tokenizing with {self.path}"
        ids = guarded(doing, "", lambda: self.library.encode(text, add_special_tokens=True).ids)
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without the special ones."""
        return guarded(
            f"decoding with {self.path}", "", lambda: self.library.decode(list(ids), skip_special_tokens=True)
        )

    def chat(self, text: str) -> list[int]:
        """Tokens of one user turn that the model is to answer without thinking aloud.

        The released form: BOS, user token, text, assistant token, end of (no) thought; no line breaks.

        Raises:
            BridgeError: the tokenizer does not know these tokens.
        """
        if lost := [name for name in (USER, ASSISTANT, THOUGHT) if self.library.token_to_id(name) is None]:
            raise BridgeError(
                f"chatting with {self.path}: it has no token {lost[0]}; a base model's? Give a plain --prompt"
            )
        return self.encode(f"{USER}{text}{ASSISTANT}{THOUGHT}")


def open_tokenizer(folder: Path, spec: ModelSpec, extras: str = "hf", hint: str = "") -> Tokenizer | None:
    """The tokenizer of a folder, None where it has no tokenizer.json.

    Args:
        folder: of a checkpoint's small files.
        spec: the model's numbers.
        extras: to install where the library is missing.
        hint: what else to do there.

    Raises:
        BridgeError: unreadable, or the `tokenizers` library is missing.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    library, _ = read_tokenizer(path, extras, hint)
    return Tokenizer(path, library, spec.bos_token_id)


def end_tokens(folder: Path, spec: ModelSpec) -> frozenset[int]:
    """Tokens that end a text: config.json's, and those of generation_config.json.

    Raises:
        BridgeError: unreadable, or no token ids.
    """
    found = {spec.eos_token_id}
    for path in (folder / CONFIG, folder / GENERATION):
        if not path.is_file():
            continue
        named = read_json(path, _MOST_CONFIG).get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if wrong := [i for i in ids if type(i) is not int]:
            raise BridgeError(f"reading {path}: eos_token_id holds {short(wrong[0])}, expected token ids")
        found.update(ids)
    return frozenset(found)


def parse_ids(text: str) -> list[int]:
    """Token ids written as `1,2,3`.

    Raises:
        BridgeError: anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not (part.isascii() and part.isdecimal() and len(part) < 10)]:
        raise BridgeError(f"reading token ids: {short(wrong[0])} is none; give numbers with commas, as 1,2,3")
    return [int(part) for part in parts]
