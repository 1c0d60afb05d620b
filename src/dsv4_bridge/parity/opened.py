"""A checkpoint of either format, as decoded values."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BridgeError
from ..spec import ModelSpec
from ..store.hf import open_hf
from ..store.megatron import looks_megatron, open_megatron
from ..values import HFValues, MegatronValues, Values


@contextmanager
def opened(path: Path) -> Iterator[tuple[ModelSpec, Values]]:
    """The numbers (without draft blocks, which are no part of a comparison) and values of a checkpoint.

    Raises:
        BridgeError: it cannot be read, or its tensors are not those of its model.
    """
    if not path.exists():
        raise BridgeError(f"opening {path}: no such file or folder")
    if looks_megatron(path):
        megatron = open_megatron(path)
        try:
            yield megatron.spec.without_draft(), MegatronValues(megatron.reader, megatron.spec)
        finally:
            megatron.close()
        return
    released = open_hf(path)
    try:
        yield released.spec.without_draft(), HFValues(released)
    finally:
        released.close()


def spec_of(path: Path) -> ModelSpec:
    """The numbers of a checkpoint, without draft blocks."""
    with opened(path) as (spec, _):
        return spec
