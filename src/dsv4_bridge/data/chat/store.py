"""Prepared chat data on disk, mapped into memory by the reader.

| file | content |
|---|---|
| `chat_data.json` | format, seq_length, mask, tokenizer's sha256, counts; what is missing in it is refused |
| `tokens.npy` | int32 [tokens]: all documents, one behind the other, in the order of the packs |
| `mask.npy` | uint8 [tokens]: 1 where the token is learned |
| `offsets.npy` | int64 [documents + 1]: where each document begins, and the end |
| `packs.npy` | int64 [packs + 1]: the number of each pack's first document, and of all documents |
| `lines.npy` | int64 [documents]: line of the JSONL that each document comes from |

A pack's documents are neighbours, so one slice of `tokens` and `mask` is a pack. Unpacked data has one
document a pack. A folder of this name is whole: it is written beside itself and renamed at the end.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BridgeError, short
from ...files import AnyPath, place_folder, scratch_folder
from ...strict_json import read_json
from ..npy import read_npy
from .packing import Pack, Packing
from .samples import Sample

NAME = "chat_data.json"
FORMAT = "dsv4 chat data 1"
_AGAIN = "prepare the data again"
_MOST_FACTS = 16 << 20
_MAPPED = ("tokens", "mask")
_ARRAYS = {"tokens": np.int32, "mask": np.uint8, "offsets": np.int64, "packs": np.int64, "lines": np.int64}


@dataclass(frozen=True)
class ChatData:
    """Prepared data: a sequence of packs.

    Attributes:
        folder: where it is.
        facts: the content of `chat_data.json`.
        tokens: int32 [tokens], mapped.
        mask: uint8 [tokens], mapped.
        offsets: int64 [documents + 1].
        packs: int64 [packs + 1].
        lines: int64 [documents].
    """

    folder: Path
    facts: Mapping[str, Any]
    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray
    packs: np.ndarray
    lines: np.ndarray

    @property
    def seq_length(self) -> int:
        """Most tokens of a pack."""
        return self.facts["seq_length"]

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.packs) - 1

    def __getitem__(self, i: int) -> Pack:
        """Pack i; negative numbers count from the end, as in a list."""
        i = range(len(self))[i]
        ends = self.offsets[self.packs[i] : self.packs[i + 1] + 1]
        part = slice(int(ends[0]), int(ends[-1]))
        return Pack(np.array(self.tokens[part]), self.mask[part] != 0, (ends - ends[0]).astype(np.int32))


def write_chat_data(
    out: Path,
    samples: Sequence[Sample],
    packing: Packing,
    facts: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
    beside: Callable[[], object] = lambda: None,
) -> ChatData:
    """Write samples in packs, see `packing.plan_packs` or `one_a_pack`.

    Args:
        out: the folder; empty, or not there yet.
        samples: may be taken by number from anywhere, each once, in the order of the packs.
        packing: of their lengths.
        facts: for `chat_data.json`, besides those that are written anyway.
        overwrite: replace chat data that is there.
        beside: called when all is written, right before it gets its name.

    Raises:
        BridgeError: something is in the way, or the disk is full.
    """
    order = [i for documents in packing.packs for i in documents]
    if sorted(order) != list(range(len(samples))):
        raise BridgeError(f"writing {out}: the packs do not hold each of {len(samples)} samples once")
    with new_folder(out, overwrite) as part:
        tokens = _Column(part, "tokens", packing.tokens)
        mask = _Column(part, "mask", packing.tokens)
        offsets, lines = [0], []
        for i in order:
            sample = samples[i]
            tokens.append(sample.tokens)
            mask.append(sample.loss_mask)
            offsets.append(tokens.filled)
            lines.append(sample.line)
        for column in (tokens, mask):
            column.close()
        packs = np.cumsum([0, *(len(documents) for documents in packing.packs)])
        for name, values in (("offsets", offsets), ("packs", packs), ("lines", lines)):
            with (part / f"{name}.npy").open("wb") as file:
                np.save(file, np.asarray(values, _ARRAYS[name]))
                _sync(file)
        found = dict(facts or {}) | {
            "format": FORMAT,
            "seq_length": packing.seq_length,
            "tokens": packing.tokens,
            "documents": len(samples),
            "packs": len(packing.packs),
            "fill_rate": packing.fill_rate,
        }
        with (part / NAME).open("wb") as file:
            file.write((json.dumps(found, ensure_ascii=False, indent=1) + "\n").encode())
            _sync(file)
        beside()
    return open_chat_data(out)


def one_a_pack(lengths: Sequence[int], seq_length: int) -> Packing:
    """Every document in a pack of its own, in order."""
    return Packing(tuple((i,) for i in range(len(lengths))), seq_length, int(sum(lengths)))


def _other_data(folder: Path) -> str:
    """What to say where a folder of conversations is wanted and text is named; "" where it is not text either."""
    prefix = folder.with_suffix("") if folder.suffix in (".bin", ".idx") else folder
    if folder.is_dir() or not Path(f"{prefix}.idx").is_file():
        return ""
    return "that is data of text; conversations are a folder, made by dsv4 data with --seq-length"


def open_chat_data(folder: AnyPath, tokenizer_sha256: str | None = None) -> ChatData:
    """Open what `write_chat_data` wrote.

    Args:
        folder: it.
        tokenizer_sha256: of the tokenizer.json that the model goes with (`masks.open_chat_tokenizer`); data
            of another is refused. None asks nothing.

    Raises:
        BridgeError: not such a folder, incomplete, damaged, or of another tokenizer.
    """
    folder = Path(folder)
    path = folder / NAME
    facts = read_json(path, _MOST_FACTS, _other_data(folder) or "name a folder that dsv4 data wrote")
    if facts.get("format") != FORMAT:
        raise BridgeError(f"reading {path}: format {short(facts.get('format'))}, expected {short(FORMAT)}")
    if tokenizer_sha256 is not None and facts.get("tokenizer_sha256") != tokenizer_sha256:
        raise BridgeError(
            f"reading {folder}: its tokens are of another tokenizer (sha256 {short(facts.get('tokenizer_sha256'))},"
            f" the checkpoint's is {tokenizer_sha256}); prepare the data with this checkpoint's"
        )
    counts: dict[str, int] = {}
    for name in ("seq_length", "tokens", "documents", "packs"):
        counts[name] = facts.get(name, -1)
        if type(counts[name]) is not int or not 0 <= counts[name] < 1 << 56:
            raise BridgeError(f"reading {path}: {name} is {short(facts.get(name))}, expected a number; {_AGAIN}")
    lengths = {
        "tokens": counts["tokens"],
        "mask": counts["tokens"],
        "offsets": counts["documents"] + 1,
        "packs": counts["packs"] + 1,
        "lines": counts["documents"],
    }
    arrays = {
        name: read_npy(folder / f"{name}.npy", kind, lengths[name], mapped=name in _MAPPED, again=_AGAIN)
        for name, kind in _ARRAYS.items()
    }
    for name, end in (("offsets", counts["tokens"]), ("packs", counts["documents"])):
        values = arrays[name]  # compared, for the difference of two hostile numbers may overflow
        if values[0] != 0 or values[-1] != end or (values[1:] <= values[:-1]).any():
            raise BridgeError(f"reading {folder}/{name}.npy: not rising from 0 to {end}; {_AGAIN}")
    if counts["documents"] and arrays["lines"].min() < 0:
        raise BridgeError(f"reading {folder}/lines.npy: line {arrays['lines'].min()}, expected 0 or more; {_AGAIN}")
    longest = np.diff(arrays["offsets"][arrays["packs"]])
    if longest.size and longest.max() > counts["seq_length"]:
        raise BridgeError(
            f"reading {folder}: a pack of {longest.max()} tokens, more than seq_length {counts['seq_length']}"
        )
    return ChatData(folder, facts, **arrays)


@contextmanager
def new_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, named `out` once the block is through; gone if it is not.

    With `overwrite`, chat data that is there goes when the new is whole.

    Raises:
        BridgeError: `out` is in the way, or an operating-system error.
    """
    check_free(out, overwrite)
    with scratch_folder(out.with_name(out.name + ".part")) as part:
        yield part
        place_folder(part, out)


def check_free(out: Path, overwrite: bool = False) -> None:
    """Refuse to write where something is already, unless it is chat data that is to be replaced.

    Raises:
        BridgeError: it exists and is not an empty folder.
    """
    try:
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        is_data = (out / NAME).is_file()
    except OSError as error:
        raise BridgeError(f"writing {out}: {error.strerror or error}") from None
    if not is_data:
        raise BridgeError(f"writing {out}: it exists and is not an empty folder; remove it, or name another")
    if not overwrite:
        raise BridgeError(f"writing {out}: it exists and is not an empty folder; name another, or give --overwrite")


class _Column:
    """A one-dimensional .npy of known length, written piece by piece."""

    def __init__(self, folder: Path, name: str, length: int):
        self._kind, self.filled, self._length = np.dtype(_ARRAYS[name]), 0, length
        self._file = (folder / f"{name}.npy").open("wb")
        header = {"descr": np.lib.format.dtype_to_descr(self._kind), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self._kind).data)
        self.filled += len(values)

    def close(self) -> None:
        _sync(self._file)
        self._file.close()
        if self.filled != self._length:
            raise BridgeError(f"writing {self._file.name}: {self.filled} values, expected {self._length}")


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
