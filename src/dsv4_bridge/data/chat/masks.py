"""Segments -> tokens, and which of them are learned."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...chat.encode import Segment
from ...chat.strings import ANSWER_TOKENS, TURN_TOKENS
from ...errors import BridgeError
from ...text.tokenizer_files import guarded, read_tokenizer
from ...text.tokens import TOKENIZER


@dataclass(frozen=True)
class ChatTokenizer:
    """A checkpoint's tokenizer.json.

    Attributes:
        path: the file.
        library: the `tokenizers.Tokenizer`, without truncation or padding.
        sha256: of the file, in hex.
        lost: tokens of the encoding that it does not know as one token.
    """

    path: Path
    library: Any
    sha256: str
    lost: tuple[str, ...]


@dataclass(frozen=True)
class Tokens:
    """A tokenized conversation.

    Attributes:
        ids: int32 [n].
        mask: bool [n]; `mask[i]` says that token i is learned, so that it is the target at position i-1.
            The first token has nothing before it and is never learned.
        straddling: tokens that hold both learned and other text. They are not learned: where one begins is
            not the model's to say. With a tokenizer that knows the tokens of the encoding there are none.
    """

    ids: np.ndarray
    mask: np.ndarray
    straddling: int


def open_chat_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer of a checkpoint's folder, or of its tokenizer.json.

    Raises:
        BridgeError: not there, unreadable, or the `tokenizers` library is missing.
    """
    path = folder / TOKENIZER if folder.is_dir() else folder
    library, raw = read_tokenizer(path)
    known = library.get_added_tokens_decoder().values()
    whole = {token.content for token in known}
    lost = tuple(token for token in (*TURN_TOKENS, *ANSWER_TOKENS) if token not in whole)
    return ChatTokenizer(path, library, hashlib.sha256(raw).hexdigest(), lost)


def tokenize(tokenizer: ChatTokenizer, segments: Sequence[Segment]) -> Tokens:
    """Tokens of the whole text of `segments`, as one string, and the mask that the segments ask for.

    Raises:
        BridgeError: the text needs a token that the tokenizer lacks.
    """
    return tokenize_all(tokenizer, [segments])[0]


def tokenize_all(tokenizer: ChatTokenizer, conversations: Sequence[Sequence[Segment]]) -> list[Tokens]:
    """`tokenize` of several conversations at once.

    Raises:
        BridgeError: as there.
    """
    texts = ["".join(segment.text for segment in segments) for segments in conversations]
    for token in tokenizer.lost:
        if any(token in text for text in texts):
            raise BridgeError(
                f"tokenizing a conversation: {tokenizer.path} has no token {token}; give a DeepSeek-V4 checkpoint's"
            )
    encodings = guarded(
        f"tokenizing with {tokenizer.path}",
        "",
        lambda: tokenizer.library.encode_batch(texts, add_special_tokens=False),
    )
    found = []
    for encoding, segments in zip(encodings, conversations, strict=True):
        ids = np.array(encoding.ids, np.int32)
        tokens = _masked_by_edges(encoding, ids, segments)
        found.append(tokens or _masked(ids, np.array(encoding.offsets, np.int64).reshape(-1, 2), segments))
    return found


def _masked_by_edges(encoding: Any, ids: np.ndarray, segments: Sequence[Segment]) -> Tokens | None:
    """What `_masked` gives, from the few tokens where learned text begins or ends; None where one is unclear.

    The offsets of all tokens as Python values take half as long as tokenizing.
    """
    mask = np.empty(len(ids), bool)
    begun, at = 0, 0  # token and character
    for before, segment in pairwise(segments):
        at += len(before.text)
        if before.trained == segment.trained:
            continue
        token = encoding.char_to_token(at)
        if not token or encoding.token_to_chars(token)[0] != at or encoding.token_to_chars(token - 1)[1] != at:
            return None
        mask[begun:token] = before.trained
        begun = token
    mask[begun:] = segments[-1].trained
    mask[:1] = False
    return Tokens(ids, mask, 0)


def _masked(ids: np.ndarray, offsets: np.ndarray, segments: Sequence[Segment]) -> Tokens:
    """By definition: token i, of characters offsets[i, 0] up to offsets[i, 1], is learned if all of them are."""
    lengths = np.array([len(segment.text) for segment in segments], np.int64)
    trained = np.array([segment.trained for segment in segments], np.int64)
    starts = np.cumsum(lengths) - lengths  # [segments]
    before = np.cumsum(lengths * trained) - lengths * trained  # learned characters before each segment

    def learned_before(at: np.ndarray) -> np.ndarray:
        k = np.searchsorted(starts, at, "right") - 1
        return before[k] + (at - starts[k]) * trained[k]

    # A tokenizer may trim spaces off its offsets: a token begins where the one before it ended. The bytes
    # of one character share its place.
    ends = offsets[:, 1]
    begins = np.minimum(offsets[:, 0], np.concatenate(([0], np.maximum.accumulate(ends)[:-1])))
    learned = learned_before(ends) - learned_before(begins)
    mask = (learned == ends - begins) & (learned > 0)
    straddling = int(np.count_nonzero((learned > 0) & ~mask))
    mask[:1] = False
    return Tokens(ids, mask, straddling)
