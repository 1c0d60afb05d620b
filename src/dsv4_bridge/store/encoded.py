"""Weights of a Hugging Face folder as they are stored, to be multiplied by without decoding."""

from ..codec.multiply import EncodedMatrix
from ..spec.plan import Item
from .values import HFValues, Scratch


def encoded_matrix(values: HFValues, item: Item, scratch: Scratch | None = None) -> EncodedMatrix:
    """A matrix of a folder, codes and scale read at once.

    Args:
        values: the folder.
        item: a matrix of numbers, not of ids.
        scratch: buffers to read into: what they held before is gone. By default memory of its own, whose first touch
            takes longer than a copy: a caller that reads many matrices one after the other should reuse buffers.

    Raises:
        BridgeError: The file ends early, or cannot be read.
    """
    bound = values.checkpoint.bound[item.name]
    scratch = scratch or Scratch()
    rows = item.shape[0]
    raw = values.raw(bound, 0, rows, scratch)
    scale = None if bound.scale is None else values.scale(bound, 0, rows, scratch)
    return EncodedMatrix(bound.encoding, raw, scale, bound.weight_name)
