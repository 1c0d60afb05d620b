"""A document as tokens: its own and the end-of-document token, the model's EOS; BOS in front where it is asked for.

Special tokens that are written out in a text stay text: else any text could end a document.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import BridgeError
from ..spec.spec import ModelSpec
from ..text.tokenizer import Tokenizer, open_tokenizer
from ..text.tokenizer_files import guarded
from ..text.tokens import TOKENIZER
from .sources import BadSource


def needed_tokenizer(folder: Path, spec: ModelSpec, doing: str, extras: str = "hf") -> Tokenizer:
    """The tokenizer of a folder that must have one; `extras` are those to install where the library is missing.

    Raises:
        BridgeError: it has none, or it cannot be read.
    """
    tokenizer = open_tokenizer(folder, spec, extras)
    if tokenizer is None:
        raise BridgeError(f"{doing}: {folder} has no {TOKENIZER}; put the released one there")
    return tokenizer


def document_tokens(
    found: Sequence[tuple[Path, int, str]], tokenizer: Tokenizer, spec: ModelSpec, bos: bool, lines: bool
) -> list[np.ndarray]:
    """Tokens of documents, int64.

    Args:
        found: the file, the byte it begins at and the text of each.
        tokenizer: of the model.
        spec: the model: its vocabulary, BOS and EOS.
        bos: whether BOS stands in front of every document.
        lines: whether they are lines of their files.

    Raises:
        BadSource: a token that the model does not have, or more than the format holds.
    """
    library = tokenizer.library
    library.encode_special_tokens = True  # written out in a text, they are text
    start = [tokenizer.bos] if bos and tokenizer.bos is not None else []
    encoded = guarded(
        f"tokenizing with {tokenizer.path}",
        "",
        lambda: library.encode_batch_fast([text for _, _, text in found], add_special_tokens=False),
    )
    documents = [np.array([*start, *done.ids, spec.eos_token_id], np.int64) for done in encoded]
    for (path, offset, _), ids in zip(found, documents, strict=True):
        if ids.max() >= spec.vocab_size:
            what = f"the tokenizer gives token {ids.max()}, the model has {spec.vocab_size}"
            raise BadSource(path, offset, f"{what}; is {tokenizer.path} another model's?", lines)
        if len(ids) > np.iinfo(np.int32).max:
            raise BadSource(path, offset, f"a document of {len(ids):,} tokens; the format holds 2^31 - 1", lines)
    return documents
