"""Read Megatron ``torch_dist`` checkpoints, without Megatron, torch or a process group.

A reader answers one question: the elements of tensor K in this box, please. The box may span chunks that
different ranks wrote, cut along any axes, into different files. Data goes from the file to its place in
the result by ``preadv``; only where rows are interleaved does it pass a bounce buffer of 4 MiB. Nothing
in the folder is executed, and ``common.pt`` of older checkpoints is never opened.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from ...errors import BridgeError
from ...files import AnyPath
from ...spec.dtypes import DTYPES
from .boxes import Extent, Files, read_box
from .frames import ChunkRecord, ObjectRecord
from .index import Index, decode_index
from .items import TensorItem, object_payload, tensor_item
from .pickle_reader import show

MAX_METADATA_BYTES: Final = 512 << 20  # Pro with optimizer state is about 150 MB
_TRACKER: Final = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of the checkpoint.

    ``dtype`` is a safetensors name (``torch.NAME`` where there is none: listed, not readable). ``chunks``
    are sorted by offsets and cover ``shape`` exactly once.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[ChunkRecord, ...]


NEMO = (
    "a checkpoint of NeMo 2 (weights/ and context/), which has no DeepSeek-V4; of Megatron-Bridge, which follows it, "
    "name the folder that holds latest_checkpointed_iteration.txt"
)


def looks_nemo(path: Path) -> bool:
    """Whether a folder has the layout of NeMo 2."""
    return (path / "weights" / ".metadata").is_file()


def find_iteration(path: AnyPath) -> tuple[Path, int | None]:
    """The folder that holds ``.metadata``, and its iteration number (None for a release or unknown).

    Args:
        path: a checkpoint root with ``latest_checkpointed_iteration.txt``, or the iteration folder itself.

    Raises:
        BridgeError: neither.
    """
    path = Path(path)
    if (path / ".metadata").is_file():
        return path, _iteration(path.name)
    if not path.exists():
        raise BridgeError(
            f"opening {path}: no such folder; a Megatron checkpoint is wanted, as `dsv4 import` makes one of a "
            "released folder"
        )
    tracker = path / _TRACKER
    if not tracker.is_file() and (path / "config.json").is_file():
        raise BridgeError(
            f"opening {path}: a Hugging Face folder, and a Megatron checkpoint is wanted; `dsv4 import` makes one of it"
        )
    if not tracker.is_file() and any(path.glob("iter_*/.metadata")):
        raise BridgeError(
            f"opening {path}: it has iterations and no {_TRACKER}; write the number of one into that file, or name its "
            "folder"
        )
    if not tracker.is_file() and looks_nemo(path):
        raise BridgeError(f"opening {path}: {NEMO}")
    if not tracker.is_file():
        raise BridgeError(
            f"opening {path}: neither .metadata nor {_TRACKER} there; expected a Megatron torch_dist "
            "checkpoint, or its iteration folder"
        )
    with tracker.open("rb") as file:
        word = file.read(64).decode("ascii", "replace").strip()
    if word != "release" and not (word.isdecimal() and len(word) <= 18):
        raise BridgeError(f"reading {tracker}: it says {show(word)}; expected a number or 'release'")
    folder = path / (word if word == "release" else f"iter_{int(word):07d}")
    if not (folder / ".metadata").is_file():
        raise BridgeError(
            f"opening {path}: {_TRACKER} says {word}, but {folder.name}/.metadata is not there; "
            "an unfinished or another kind of checkpoint? Only the torch_dist format can be read"
        )
    return folder, _iteration(folder.name)


def last_iteration(root: Path) -> Path | None:
    """The folder of the last checkpoint that a run completed in `root`; None if there is none.

    That is the one the tracker names, or a later one that was completed behind it: a run may be killed between the
    two. Where the tracker is the younger, somebody set the run back.

    Raises:
        BridgeError: the tracker names a checkpoint that is not there.
    """
    tracker, named, since = root / _TRACKER, None, -1
    if tracker.is_file():
        named, since = find_iteration(root)[0], tracker.stat().st_mtime_ns
    whole = [p for p in root.glob("iter_*") if _iteration(p.name) is not None and (p / ".metadata").is_file()]
    later = [p for p in whole if named is None or (_iteration(p.name) or 0) > (_iteration(named.name) or 0)]
    behind = [p for p in later if p.stat().st_mtime_ns > since]
    return max(behind, key=lambda p: _iteration(p.name) or 0) if behind else named


def _iteration(name: str) -> int | None:
    digits = name.removeprefix("iter_")
    return int(digits) if name.startswith("iter_") and digits.isdecimal() and len(digits) <= 18 else None


def open_torch_dist(path: AnyPath) -> "TorchDistReader":
    """Open a checkpoint root or iteration folder; see :class:`TorchDistReader`."""
    return TorchDistReader(path)


class TorchDistReader:
    """An open ``torch_dist`` checkpoint. Thread safe; close it, or use it as a context manager.

    Attributes:
        path: the folder of ``.metadata``.
        iteration: from the name of the folder; None for a release or any other name.
        tensors: key -> :class:`TensorEntry`.
        objects: key of a stored object (``…/shard_i_n``) -> where it lies.
        flattened: keys whose shape on disk is not that of the tensor, as releases before 0.15 stored some.
        files: its files, open while they are read.

    Raises:
        BridgeError: on opening, where anything in ``.metadata`` does not hold: types, chunks that leave
            or do not cover their tensor, files that are missing, too short or outside the folder.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path, self.iteration = find_iteration(path)
        metadata = self.path / ".metadata"
        try:
            if (size := metadata.stat().st_size) > MAX_METADATA_BYTES:
                raise BridgeError(
                    f"reading {metadata}: {size} bytes; expected at most {MAX_METADATA_BYTES} for any model"
                )
            data = metadata.read_bytes()
        except OSError as error:
            raise BridgeError(f"reading {metadata}: {error.strerror}") from None
        index = decode_index(data, f"reading {metadata}")
        self.files = Files(self.path)
        _check_files(self.files, index)
        self.tensors = {k: TensorEntry(t.dtype, t.global_shape, t.chunks) for k, t in index.tensors.items()}
        self.objects: Mapping[str, ObjectRecord] = index.objects
        self.flattened = index.flattened
        self._within = f"{self.path / '_'}"[:-1]  # for messages, which are made ready at every read
        self._starts: dict[str, tuple[list[int], int]] = {}
        self._layouts: dict[ChunkRecord, tuple[str, int, tuple[int, ...] | None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; a read after this opens them again."""
        self.files.close()

    def read(
        self,
        key: str,
        offsets: tuple[int, ...] | None = None,
        sizes: tuple[int, ...] | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """The box of ``sizes`` at ``offsets`` of a tensor, as bit patterns.

        Args:
            key: of the tensor.
            offsets: first element of the box; None for the origin.
            sizes: of the box; None for everything from ``offsets`` on.
            out: array to fill, of shape ``sizes`` and dtype ``DTYPES[dtype].numpy``; any strides.

        Returns:
            ``out``, or a new C-contiguous array.

        Raises:
            BridgeError: unknown key or dtype, a box outside the tensor, an unusable ``out``, a damaged item.
        """
        entry = self._entry(key)
        shape = entry.shape
        offsets = (0,) * len(shape) if offsets is None else tuple(offsets)
        if sizes is None:
            sizes = tuple(n - o for n, o in zip(shape, offsets))
        sizes = tuple(sizes)
        same = len(offsets) == len(sizes) == len(shape)
        if not same or any(o < 0 or s < 0 or o + s > n for o, s, n in zip(offsets, sizes, shape)):
            raise BridgeError(
                f"{self._what(key)}: a box of {show(sizes)} at {show(offsets)}; expected one inside {show(shape)}"
            )
        dtype = np.dtype(DTYPES[entry.dtype].numpy)
        if out is None:
            out = np.empty(sizes, dtype)
        elif out.shape != sizes or out.dtype != dtype or not out.flags.writeable:
            raise BridgeError(
                f"{self._what(key)}: out is {out.dtype} {show(out.shape)}; expected a writable {dtype} {show(sizes)}"
            )
        if out.size:
            for chunk in self._touched(key, entry, offsets, sizes):
                low = tuple(max(o, c) for o, c in zip(offsets, chunk.offsets))
                high = tuple(min(o + s, c + n) for o, s, c, n in zip(offsets, sizes, chunk.offsets, chunk.sizes))
                if all(a < b for a, b in zip(low, high)):
                    # The ellipsis keeps a scalar's result a view.
                    target = out[(*(slice(a - o, b - o) for a, b, o in zip(low, high, offsets)), ...)]
                    first = tuple(a - c for a, c in zip(low, chunk.offsets))
                    self._read_chunk(key, entry.dtype, chunk, first, target)
        return out

    def extents(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
        """Descriptor, first byte and size of about what a read of that box will touch, for reading ahead."""
        for chunk in self._touched(key, self.tensors[key], offsets, sizes):
            axis = next((a for a, n in enumerate(chunk.sizes) if n > 1), 0)
            low = max(0, offsets[axis] - chunk.offsets[axis]) if chunk.sizes else 0
            high = min(chunk.sizes[axis], offsets[axis] + sizes[axis] - chunk.offsets[axis]) if chunk.sizes else 1
            rows = chunk.sizes[axis] if chunk.sizes else 1
            if low < high:
                with self.files.borrow(chunk.file) as fd:
                    yield fd, chunk.offset + chunk.length * low // rows, chunk.length * (high - low) // rows

    def read_object(self, key: str) -> Any:
        """A stored object of numbers, strings, lists, tuples, dicts and tensors (as numpy bit patterns).

        Raises:
            BridgeError: unknown key, or anything else in it: Megatron's ``common_state`` may hold
                arguments of any class, which are not loaded.
        """
        if key not in self.objects:
            raise BridgeError(f"reading {self.path}: no object {show(key)} among its {len(self.objects)}")
        record = self.objects[key]
        with self.files.borrow(record.file) as fd:
            where = f"reading object {show(key)} of {self.path / record.file} at byte {record.offset}"
            return object_payload(Extent(fd, record.offset, where), record.length)

    def item(self, record: ObjectRecord) -> bytes:
        """The bytes of a stored object, as torch.save wrote them."""
        with self.files.borrow(record.file) as fd:
            where = f"reading {self.path / record.file} at byte {record.offset}"
            return Extent(fd, record.offset, where).bytes(0, record.length)

    def _entry(self, key: str) -> TensorEntry:
        entry = self.tensors.get(key)
        if entry is None:
            near = [k for k in self.tensors if k.rpartition(".")[2] == key.rpartition(".")[2]][:3]
            hint = f", such as {', '.join(map(show, near))}" if near else ""
            raise BridgeError(f"reading {self.path}: no tensor {show(key)}; it has {len(self.tensors)} tensors{hint}")
        if entry.dtype not in DTYPES:
            raise BridgeError(
                f"reading {show(key)} of {self.path}: dtype {entry.dtype} is not one of {', '.join(DTYPES)}"
            )
        return entry

    def _what(self, key: str) -> str:
        return f"reading {show(key)} of {self.path}"

    def _touched(
        self, key: str, entry: TensorEntry, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> tuple[ChunkRecord, ...]:
        """Chunks that may meet the box, found by their first axis: experts are many chunks a key."""
        if len(entry.chunks) == 1 or not offsets:
            return entry.chunks
        if key not in self._starts:
            longest = max(c.sizes[0] for c in entry.chunks)
            self._starts[key] = ([c.offsets[0] for c in entry.chunks], longest)
        starts, longest = self._starts[key]
        begin = bisect_left(starts, offsets[0] - longest + 1)
        return entry.chunks[begin : bisect_left(starts, offsets[0] + sizes[0])]

    def _read_chunk(self, key: str, dtype: str, chunk: ChunkRecord, first: tuple[int, ...], target: np.ndarray) -> None:
        """Fill ``target`` from the box of its shape at ``first`` of one chunk."""
        where = f"reading {show(key)} of {self._within}{chunk.file} at byte {chunk.offset}"
        with self.files.borrow(chunk.file) as fd:
            layout = self._layouts.get(chunk)
            if layout is None or layout[0] != dtype:
                item = tensor_item(Extent(fd, chunk.offset, where), chunk.length)
                if (item.dtype, item.shape) != (dtype, chunk.sizes):
                    raise BridgeError(
                        f"{where}: the item holds {item.dtype} {show(item.shape)}, .metadata says "
                        f"{dtype} {show(chunk.sizes)}. The checkpoint is damaged; save it again"
                    )
                layout = dtype, chunk.offset + item.start, _axes_on_disk(item, where)
                self._layouts[chunk] = layout
            _, start, axes = layout
            shape = chunk.sizes
            if axes is not None:
                shape, first = tuple(shape[a] for a in axes), tuple(first[a] for a in axes)
                target = target.transpose(axes)
            read_box(Extent(fd, start, where), shape, first, target)


def _axes_on_disk(item: TensorItem, where: str) -> tuple[int, ...] | None:
    """The order of the axes on disk, slowest first; None for C order.

    Megatron stores a transposed parameter with its strides. Anything but a permutation of a dense
    array (an expanded or sliced view) is refused: torch copies those before it saves.
    """
    axes = tuple(sorted(range(len(item.shape)), key=lambda a: (-item.strides[a], a)))
    step = 1
    for a in reversed(axes):
        if item.shape[a] != 1 and item.strides[a] != step and 0 not in item.shape:
            raise BridgeError(
                f"{where}: a tensor of {show(item.shape)} with strides {show(item.strides)}; "
                "expected a dense one. Save it again from a contiguous tensor"
            )
        step *= item.shape[a]
    return None if axes == tuple(range(len(axes))) else axes


def _check_files(files: Files, index: Index) -> None:
    """Every item lies inside a file of the folder."""
    sizes: dict[str, int] = {}
    records: Iterable[tuple[str, ChunkRecord | ObjectRecord]] = [
        *((t.key, c) for t in index.tensors.values() for c in t.chunks),
        *((o.key, o) for o in index.objects.values()),
    ]
    for key, record in records:
        if record.file not in sizes:
            path = files.path(record.file)
            if not path.is_file():
                raise BridgeError(f"reading {path}: not there, but it holds {show(key)}; copy it again")
            sizes[record.file] = files.note(record.file)
        if record.offset + record.length > sizes[record.file]:
            raise BridgeError(
                f"reading {files.path(record.file)}: {sizes[record.file]} bytes, but {show(key)} ends at "
                f"byte {record.offset + record.length}; the file is truncated, copy it again"
            )
    _check_apart(files, ((t.key, c) for t in index.tensors.values() for c in t.chunks))


def _check_apart(files: Files, records: Iterable[tuple[str, ChunkRecord]]) -> None:
    """No two tensors lie on the same bytes: one of them would be read as the other. Objects may be shared."""
    last: tuple[str, ChunkRecord] | None = None
    for key, record in sorted(records, key=lambda pair: (pair[1].file, pair[1].offset)):
        if last and last[1].file == record.file and record.offset < last[1].offset + last[1].length:
            raise BridgeError(
                f"reading {files.path(record.file)}: .metadata has {show(last[0])} and {show(key)} on the same bytes, "
                f"from {record.offset} on; expected each on its own. The checkpoint is damaged; save it again"
            )
        last = key, record
