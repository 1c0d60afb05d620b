"""Weights of a checkpoint as they are stored, to be multiplied by without decoding."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..codec.multiply import EncodedMatrix
from ..spec.dtypes import DTYPES
from ..spec.encodings import ENCODINGS
from ..spec.plan import Item
from .hf import Bound
from .safetensors import TensorInfo
from .values import Scratch, Values


class Rows(NamedTuple):
    """Some rows of an item; they begin and end at whole tiles of 128, or with it."""

    item: Item
    first: int
    last: int

    @property
    def numel(self) -> int:
        """Number of values."""
        return self.item.numel // self.item.shape[0] * (self.last - self.first)


def whole(item: Item) -> Rows:
    """All rows of an item."""
    return Rows(item, 0, item.shape[0])


def infos_of(bound: Bound, rows: Rows) -> tuple[TensorInfo, ...]:
    """Where rows of a weight lie in its file, and those of its scale where it has one."""
    weight = _cut(bound.weight, rows.first, rows.last)
    if bound.scale is None:
        return (weight,)
    return weight, _cut(bound.scale, *ENCODINGS[bound.encoding].scale_rows(rows.first, rows.last))


def matrix_of(bound: Bound, rows: Rows, parts: Iterator[np.ndarray]) -> EncodedMatrix:
    """A matrix over the bytes that `infos_of` names, in its order."""
    shaped = [next(parts).view(DTYPES[info.dtype].numpy).reshape(info.shape) for info in infos_of(bound, rows)]
    return EncodedMatrix(bound.encoding, shaped[0], shaped[1] if len(shaped) > 1 else None, bound.weight_name)


def plain_matrix(values: Values, rows: Rows) -> EncodedMatrix:
    """A matrix of any checkpoint, decoded: bf16 or float32."""
    parts = [part.copy() for part in values.stripes(*rows, Scratch())]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return EncodedMatrix("bf16" if joined.dtype == np.uint16 else "f32", joined, None, rows.item.name)


def _cut(info: TensorInfo, first: int, last: int) -> TensorInfo:
    row = info.nbytes // info.shape[0]
    shape, nbytes = (last - first, *info.shape[1:]), (last - first) * row
    return info._replace(shape=shape, start=info.start + first * row, nbytes=nbytes)
