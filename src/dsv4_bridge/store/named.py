"""What a user may name where the numbers of a model are wanted: a checkpoint, a repository on the Hub, a variant."""

import os
from pathlib import Path

from ..errors import BridgeError
from ..files import AnyPath
from ..spec.spec import ModelSpec
from ..spec.variants import VARIANTS, known_variant, nearest_variant
from .checkpoint import open_checkpoint
from .hf_config import read_config, spec_from_config
from .hub import describe
from .megatron import ALONG, looks_megatron
from .torch_dist.reader import find_iteration


def spec_of(name: AnyPath, revision: str | None = None, doing: str = "opening") -> ModelSpec:
    """The numbers of what a user named; no tensor is read.

    Args:
        name: a folder with config.json, a Megatron checkpoint, `owner/name` on the Hub, or a variant's name.
        revision: branch, tag or commit on the Hub.
        doing: for messages.

    Raises:
        BridgeError: none of these, or another model.
    """
    text, path = os.fspath(name), Path(name)
    if not path.exists() and not revision and (variant := known_variant(text)):
        return variant.spec
    if not path.exists() and "/" not in text:
        raise BridgeError(
            f"{doing} {text}: no such folder, and no variant of that name ({', '.join(VARIANTS)})"
            + nearest_variant(text)
        )
    folder = describe(text, revision)[0]
    if looks_megatron(folder):
        with open_checkpoint(folder, strict=False) as opened:
            return opened.spec
    return spec_from_config(read_config(folder / "config.json"), str(folder / "config.json"))


def files_of(checkpoint: Path) -> Path:
    """Where a checkpoint's tokenizer and its other small files are: the folder, or what lies beside an iteration.

    Raises:
        BridgeError: a Megatron checkpoint without an iteration.
    """
    return find_iteration(checkpoint)[0] / ALONG if looks_megatron(checkpoint) else checkpoint
