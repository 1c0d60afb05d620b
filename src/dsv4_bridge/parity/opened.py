"""A checkpoint of either format, as decoded values."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..spec.spec import ModelSpec
from ..store.checkpoint import open_checkpoint
from ..store.values import Values


@contextmanager
def opened_whole(path: Path) -> Iterator[tuple[ModelSpec, Values]]:
    """The numbers and values of a checkpoint, draft blocks among them.

    Raises:
        BridgeError: it cannot be read, or its tensors are not those of its model.
    """
    with open_checkpoint(path) as checkpoint:
        yield checkpoint.spec, checkpoint.source


@contextmanager
def opened(path: Path) -> Iterator[tuple[ModelSpec, Values]]:
    """The same with the numbers of the trunk alone."""
    with opened_whole(path) as (spec, values):
        yield spec.without_draft(), values


def whole_spec_of(path: Path) -> ModelSpec:
    """The numbers of a checkpoint, with draft blocks."""
    with opened_whole(path) as (spec, _):
        return spec


def spec_of(path: Path) -> ModelSpec:
    """The numbers of a checkpoint, without draft blocks."""
    return whole_spec_of(path).without_draft()
