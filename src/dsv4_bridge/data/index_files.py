"""megatron-core's `.idx`, checked before megatron-core maps it: it trusts every number in there.

| bytes | content |
|---|---|
| 9 | `MMIDIDX`, two zero bytes |
| 8 | version 1, uint64 |
| 1 | type of the tokens in the `.bin`, see `_TYPES` |
| 8, 8 | sequences n, document boundaries d, uint64 |
| 4 n | tokens of each sequence, int32 |
| 8 n | byte at which each begins in the `.bin`, int64 |
| 8 d | document boundaries: numbers of sequences, int64, from 0 to n |

The `.bin` is never read here, only its size.
"""

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BridgeError, short

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_PIECE = 1 << 20  # sequences that are looked at together: an index may hold a billion
_AGAIN = "make it again"


@dataclass(frozen=True)
class IndexFacts:
    """What an index says.

    Attributes:
        lengths: int32 [sequences], tokens of each, mapped.
        tokens: of all.
        dtype: of the tokens.
    """

    lengths: np.ndarray
    tokens: int
    dtype: np.dtype


def check_indexed(prefix: str, doing: str) -> IndexFacts:
    """Check `prefix`.idx against itself and against the size of `prefix`.bin.

    Args:
        prefix: of both.
        doing: for messages.

    Raises:
        BridgeError: not there, or any number that is not as megatron-core's builder writes it.
    """
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        for path in (index, tokens):
            if not path.exists():
                if (Path(prefix) / "chat_data.json").is_file():
                    raise BridgeError(
                        f"{doing}: that is a folder of conversations, and text is wanted; say data.kind=chat, or "
                        "prepare text with dsv4 data"
                    )
                raise BridgeError(f"{doing}: no {path}; name a prefix that `dsv4 data` wrote, without ending")
            if not stat.S_ISREG(path.stat().st_mode):
                raise BridgeError(f"{doing}: {path} is not a regular file")
        with index.open("rb") as file:
            head, size = file.read(_HEAD.size), os.fstat(file.fileno()).st_size
        dtype, sequences, boundaries = _head(index, head, size, doing)
        return _body(index, tokens.stat().st_size, dtype, sequences, boundaries, doing)
    except (OSError, ValueError) as error:
        what = (isinstance(error, OSError) and error.strerror) or error
        raise BridgeError(f"{doing}: {what}; {_AGAIN}") from None


def _head(index: Path, head: bytes, size: int, doing: str) -> tuple[np.dtype, int, int]:
    no = f"{doing}: {index} is no index of megatron-core"
    if len(head) < _HEAD.size or head[:9] != _MAGIC:
        raise BridgeError(f"{no} (it begins with {short(head[:9])}, expected {_MAGIC!r}); {_AGAIN}")
    _, version, code, sequences, boundaries = _HEAD.unpack(head)
    if version != 1:
        raise BridgeError(f"{no} of version 1 (it says {version}); {_AGAIN}")
    name = _TYPES.get(code, "")
    if not name or name.startswith("float"):
        raise BridgeError(f"{no} of whole numbers (its tokens are of type {name or code}); {_AGAIN}")
    wanted = _HEAD.size + 12 * sequences + 8 * boundaries
    if not sequences or size != wanted:
        raise BridgeError(
            f"{no}: {size:,} bytes, for {sequences:,} sequences and {boundaries:,} boundaries it wants {wanted:,}; "
            "copy it again"
        )
    return np.dtype(name), sequences, boundaries


def _body(index: Path, nbytes: int, dtype: np.dtype, sequences: int, boundaries: int, doing: str) -> IndexFacts:
    at = _HEAD.size
    lengths = np.memmap(index, "<i4", "r", at, (sequences,))
    starts = np.memmap(index, "<i8", "r", at + 4 * sequences, (sequences,))
    total = 0
    for first in range(0, sequences, _PIECE):
        here = lengths[first : first + _PIECE]
        if here.min() < 0:
            number = first + int(np.argmax(here < 0))
            raise BridgeError(f"{doing}: {index} gives sequence {number} {lengths[number]} tokens; {_AGAIN}")
        ends = total + np.cumsum(here, dtype=np.int64)
        expected = (ends - here) * dtype.itemsize
        if (wrong := starts[first : first + _PIECE] != expected).any():
            number = first + int(np.argmax(wrong))
            raise BridgeError(
                f"{doing}: {index} says that sequence {number} begins at byte {starts[number]:,} of the .bin, "
                f"expected {expected[number - first]:,}; {_AGAIN}"
            )
        total = int(ends[-1])
    if nbytes != total * dtype.itemsize:
        raise BridgeError(
            f"{doing}: {index.with_suffix('.bin')} has {nbytes:,} bytes, its index wants {total * dtype.itemsize:,}; "
            "copy it again"
        )
    if not total:
        raise BridgeError(f"{doing}: its {sequences:,} sequences have no tokens; {_AGAIN}")
    edges = np.memmap(index, "<i8", "r", at + 12 * sequences, (boundaries,)) if boundaries else np.zeros(0, np.int64)
    if not boundaries or edges[0] != 0 or edges[-1] != sequences or (edges[1:] < edges[:-1]).any():
        raise BridgeError(
            f"{doing}: the document boundaries in {index} do not rise from 0 to {sequences:,}, the number of its "
            f"sequences; {_AGAIN}"
        )
    return IndexFacts(lengths, total, dtype)
