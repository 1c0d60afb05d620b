"""The tokens both models read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BridgeError
from ..spec.spec import ModelSpec
from ..store.megatron import ALONG
from ..store.named import files_of
from ..text.tokenizer import open_tokenizer

LENGTH = 301


@dataclass(frozen=True)
class Inputs:
    """Where tokens come from: `text`, else `prompt_ids`, else seeded random ids.

    Attributes:
        seq_length: of random ids. None: 301, which leaves blocks of both compressors unfinished; where they are too
            few for an indexer to choose from, the comparison has another pass, with a smaller choice.
        batch: rows of random ids; two rows show a mixed-up batch dimension.
        seed: of random ids.
        prompt_ids: one row of ids.
        text: one row, by the checkpoint's tokenizer.json.
    """

    seq_length: int | None = None
    batch: int = 2
    seed: int = 0
    prompt_ids: tuple[int, ...] | None = None
    text: str | None = None

    @property
    def own(self) -> bool:
        """Whether nothing was said about the tokens but how many rows."""
        return self.seq_length is None and self.prompt_ids is None and self.text is None


def token_ids(inputs: Inputs, spec: ModelSpec, folders: tuple[Path, ...]) -> tuple[Tensor, dict[str, Any]]:
    """The ids, and facts of them.

    Args:
        inputs: where they come from.
        spec: the model's numbers.
        folders: where a tokenizer.json may be.

    Returns:
        [b, s] int64; batch, seq_length, source, seed (None unless random).

    Raises:
        BridgeError: no tokens, ids beyond the vocabulary, or no tokenizer.
    """
    if inputs.text is not None and inputs.prompt_ids is not None:
        raise BridgeError("choosing tokens: both a text and prompt ids are given, expected one of them")
    if inputs.text is None and inputs.prompt_ids is None:
        length = LENGTH if inputs.seq_length is None else inputs.seq_length
        if length < 1 or inputs.batch < 1:
            raise BridgeError(f"choosing tokens: {inputs.batch} rows of {length}, expected at least 1 each")
        generator = torch.Generator().manual_seed(inputs.seed)
        ids = torch.randint(0, spec.vocab_size, (inputs.batch, length), generator=generator)
        return ids, _facts(ids, "random", inputs.seed)
    source = "text" if inputs.text is not None else "prompt ids"
    row = _tokenised(inputs.text, spec, folders) if inputs.text is not None else inputs.prompt_ids or ()
    if not row:
        raise BridgeError(f"choosing tokens: the {source} has none, expected at least 1")
    if wrong := [i for i in row if not 0 <= i < spec.vocab_size]:
        raise BridgeError(f"choosing tokens: id {wrong[0]} is not one of the model's 0 to {spec.vocab_size - 1}")
    ids = torch.tensor([row])
    return ids, _facts(ids, source, None)


def _facts(ids: Tensor, source: str, seed: int | None) -> dict[str, Any]:
    return {"batch": ids.shape[0], "seq_length": ids.shape[1], "source": source, "seed": seed}


def _tokenised(text: str, spec: ModelSpec, folders: tuple[Path, ...]) -> tuple[int, ...]:
    places = [place for folder in folders for place in (folder, folder / ALONG, files_of(folder))]
    for place in places:
        if tokenizer := open_tokenizer(place, spec, "megatron,hf", ", or give --prompt-ids"):
            return tuple(tokenizer.encode(text))
    raise BridgeError(f"reading the text: no tokenizer.json in {places[0]}; give ids with --prompt-ids")
