"""What an output file is made of, as data."""

from collections.abc import Callable
from typing import NamedTuple

from ..spec.plan import Item
from ..store.safetensors import SafetensorsFolder, TensorInfo
from ..store.torch_dist.boxes import Files


class Literal(NamedTuple):
    """Bytes known beforehand: headers, frames, objects."""

    data: bytes

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return len(self.data)


class Frame(NamedTuple):
    """Bytes made when they are needed: heads and tails of Megatron items, thousands of them alike."""

    make: Callable[[], bytes]
    nbytes: int


class Rows(NamedTuple):
    """Rows `start` to `stop` of an item, plain."""

    item: Item
    encoding: str
    start: int
    stop: int
    nbytes: int


class Weight(NamedTuple):
    """The stored weight of an item under an encoding."""

    item: Item
    encoding: str
    nbytes: int


class Scale(NamedTuple):
    """The stored scale of an item under an encoding."""

    item: Item
    encoding: str
    nbytes: int


class Copy(NamedTuple):
    """The bytes of a tensor of a folder, as they are."""

    folder: SafetensorsFolder
    info: TensorInfo

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.info.nbytes


class File(NamedTuple):
    """A file of a torch_dist folder, as it is; `tensors` begin in it."""

    files: Files
    name: str
    nbytes: int
    tensors: int


Segment = Literal | Frame | Rows | Weight | Scale | Copy | File
