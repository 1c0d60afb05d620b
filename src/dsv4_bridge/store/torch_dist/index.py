"""What a ``torch_dist`` folder says about itself, checked: its ``.metadata``.

The file may be damaged or hostile. It is decoded by :mod:`.pickles`, which runs no code, and every number
is checked before it is used.

Sources: torch/distributed/checkpoint/{metadata,planner,filesystem}.py; files saved by megatron-core 0.19.2.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...errors import BridgeError
from ...spec.dtypes import DTYPES
from .frames import ChunkRecord, ObjectRecord, TensorRecord
from .pickle_reader import Global, Record, decode, empty_dict, int_tuple, show, size, torch_dtypes

_MAX_GRID_CELLS: Final = 1 << 16  # a chunk; more means cuts that form no grid
_MAX_IRREGULAR: Final = 2048  # chunks of a tensor compared pair by pair


def _classes(module: str, names: str, keep: bool) -> dict[tuple[str, str], Global]:
    return {(module, n): Global(n, kind=n, call=_ignore, keep=keep) for n in names.split()}


def _ignore(_: tuple) -> Record:
    """An enum member, a layout, a path: accepted, without meaning for a reader."""
    return Record("")


_DCP: Final = "torch.distributed.checkpoint"
_SHARD: Final = "torch.distributed._shard.sharded_tensor.metadata"
_MCORE: Final = "megatron.core.dist_checkpointing.strategies.torch"

# What .metadata files name: the 17 globals that torch 2.15 + megatron-core 0.19.2 write, and what older
# or newer releases put in their place.
METADATA_GLOBALS: Final[Mapping[tuple[str, str], Any]] = {
    **torch_dtypes(),
    **_classes(f"{_DCP}.metadata", "Metadata TensorStorageMetadata TensorProperties", keep=True),
    **_classes(f"{_DCP}.metadata", "ChunkStorageMetadata BytesStorageMetadata MetadataIndex", keep=True),
    **_classes(f"{_DCP}.metadata", "StorageMeta _MEM_FORMAT_ENCODING", keep=False),
    **_classes(f"{_DCP}.filesystem", "_StorageInfo", keep=True),
    **_classes(f"{_DCP}.planner", "SavePlan WriteItem WriteItemType TensorWriteData", keep=False),
    **_classes(f"{_DCP}.planner", "BytesIOWriteData", keep=False),
    **_classes(_SHARD, "TensorProperties", keep=True),
    **_classes(_SHARD, "MEM_FORMAT_ENCODING", keep=False),
    (_MCORE, "MCoreMetadata"): Global("MCoreMetadata", kind="Metadata"),
    (_MCORE, "MCoreSavePlan"): Global("MCoreSavePlan", kind="SavePlan", keep=False),
    ("torch", "Size"): Global("torch.Size", call=size),
    ("torch.serialization", "_get_layout"): Global("_get_layout", call=_ignore),
    ("pathlib", "PosixPath"): Global("PosixPath", call=_ignore),
    ("pathlib._local", "PosixPath"): Global("PosixPath", call=_ignore),
    # Python 3.11 pickles an enum member as getattr(class, name); here it names no attribute of anything.
    ("builtins", "getattr"): Global("getattr", call=_ignore),
    ("collections", "OrderedDict"): Global("OrderedDict", call=empty_dict),
}


@dataclass(frozen=True, slots=True)
class Index:
    """The content of a ``.metadata``: tensors by key, objects by key, tensors whose real shape is kept apart."""

    tensors: dict[str, TensorRecord]
    objects: dict[str, ObjectRecord]
    flattened: tuple[str, ...] = ()


def decode_index(data: bytes, what: str) -> Index:
    """Decode and check a ``.metadata``.

    Checked here: types, every chunk inside its global shape, and that the chunks of each tensor cover it
    once. Files are for the caller to check.

    Raises:
        BridgeError: names the tensor and what is wrong with it.
    """
    whole = decode(data, METADATA_GLOBALS, what)
    if type(whole) is not Record or whole.kind != "Metadata":
        raise BridgeError(f"{what}: it holds {show(whole)}; expected the Metadata of a torch_dist checkpoint")
    entries, storage = whole.field("state_dict_metadata"), whole.field("storage_data")
    if type(entries) is not dict or type(storage) is not dict:
        raise BridgeError(
            f"{what}: state_dict_metadata is {show(entries)} and storage_data {show(storage)}; "
            "expected two dicts. Was it written by another storage backend?"
        )
    tensors, objects, files = {}, {}, _Shared()
    for key, entry in entries.items():
        kind = entry.kind if type(entry) is Record else None
        try:
            if type(key) is str and kind == "TensorStorageMetadata":
                tensors[key] = _tensor(key, entry, storage, files)
            elif type(key) is str and kind == "BytesStorageMetadata":
                objects[key] = ObjectRecord(key, *_place(storage.get((key, None)), files))
            else:
                raise ValueError(f"it is {show(entry)}, expected tensor or bytes metadata")
        except ValueError as error:
            raise BridgeError(f"{what}: {show(key)}: {error}. The checkpoint is damaged") from None
    kept = whole.field("mcore_data")
    apart = tuple(k for k, v in kept.items() if type(k) is str and v) if type(kept) is dict else ()
    return Index(tensors, objects, apart)


class _Shared(dict[Any, Any]):
    """One object a distinct value: a checkpoint repeats a few shapes and file names 100,000 times."""

    def __missing__(self, value: Any) -> Any:
        self[value] = value
        return value


def _place(info: object, files: _Shared) -> tuple[str, int, int]:
    """(file, offset, length) of one item."""
    if type(info) is not Record or info.kind != "_StorageInfo":
        raise ValueError("storage_data does not say where it is stored")
    file = info.field("relative_path")
    if type(file) is not str or not file or len(file) > 4096:
        raise ValueError(f"its file is {show(file)}, expected a name")
    if (filters := info.field("transform_descriptors")) not in (None, [], ()):
        raise ValueError(f"it is stored through a filter ({show(filters)}); only plain items can be read")
    offset, length = int_tuple((info.field("offset"), info.field("length")))
    return files[file], offset, length


def _tensor(key: str, entry: Record, storage: dict, shared: _Shared) -> TensorRecord:
    properties, found = entry.field("properties"), entry.field("chunks")
    shape = shared[tuple(int_tuple(entry.field("size")))]
    state = properties.state if type(properties) is Record else None
    dtype = state[0] if type(state) is tuple and state else None
    if type(dtype) is not str or type(found) is not list:
        raise ValueError(f"dtype {show(dtype)}, chunks {show(found)}; expected a torch dtype and a list")
    chunks = []
    for chunk in found:
        if type(chunk) is not Record or chunk.kind != "ChunkStorageMetadata":
            raise ValueError(f"a chunk is {show(chunk)}")
        offsets = shared[tuple(int_tuple(chunk.field("offsets")))]
        sizes = shared[tuple(int_tuple(chunk.field("sizes")))]
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise ValueError(f"a chunk of {show(sizes)} at {show(offsets)} in a tensor of {show(shape)}")
        place = _place(storage.get((key, offsets)), shared)
        # Before anyone allocates what the shape announces.
        if dtype in DTYPES and math.prod(sizes) * DTYPES[dtype].itemsize > place[2]:
            raise ValueError(f"a chunk of {dtype} {show(sizes)} in an item of {place[2]} bytes")
        chunks.append(ChunkRecord(offsets, sizes, *place))
    chunks.sort(key=lambda c: c.offsets)
    check_coverage(shape, chunks)
    return TensorRecord(key, dtype, shape, tuple(chunks))


def check_coverage(shape: tuple[int, ...], chunks: Iterable[ChunkRecord]) -> None:
    """The chunks lie in ``shape`` and cover every element of it exactly once.

    The cuts along each axis make a grid; every chunk is a block of its cells. For the cuts that
    parallel training makes the grid has about as many cells as there are chunks.

    Raises:
        ValueError: which element is missing or stored twice.
    """
    boxes = []
    for c in chunks:
        if any(o + s > n for o, s, n in zip(c.offsets, c.sizes, shape)):
            raise ValueError(f"a chunk of {show(c.sizes)} at {show(c.offsets)} leaves the shape {show(shape)}")
        if 0 not in c.sizes:
            boxes.append((c.offsets, c.sizes))
    if 0 in shape or boxes == [((0,) * len(shape), shape)]:
        return
    if sum(math.prod(s) for _, s in boxes) != math.prod(shape):
        have = sum(math.prod(s) for _, s in boxes)
        raise ValueError(
            f"its {len(boxes)} chunks hold {have} elements, the shape {show(shape)} has {math.prod(shape)}; "
            "some are missing or overlap"
        )
    axes = range(len(shape))
    cuts = [sorted({b[0][a] for b in boxes} | {b[0][a] + b[1][a] for b in boxes}) for a in axes]
    if math.prod(len(c) - 1 for c in cuts) > max(_MAX_GRID_CELLS, 8 * len(boxes)):
        _check_pairs(boxes)
        return
    places = [{v: i for i, v in enumerate(c)} for c in cuts]
    seen = np.zeros([len(c) - 1 for c in cuts], bool)
    for offsets, sizes in boxes:
        block = seen[tuple(slice(p[o], p[o + s]) for p, o, s in zip(places, offsets, sizes))]
        if block.any():
            raise ValueError(f"the chunk of {show(sizes)} at {show(offsets)} overlaps another chunk")
        block[...] = True


def _check_pairs(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """No two boxes overlap; with the right sum of volumes they then cover everything."""
    if len(boxes) > _MAX_IRREGULAR:
        raise ValueError(f"its {len(boxes)} chunks form no grid; expected cuts along the axes")
    low = np.array([o for o, _ in boxes], np.int64)
    high = low + np.array([s for _, s in boxes], np.int64)
    for i in range(len(boxes) - 1):
        if ((low[i] < high[i + 1 :]) & (low[i + 1 :] < high[i])).all(axis=1).any():
            raise ValueError(f"the chunk at {show(boxes[i][0])} overlaps another chunk")
