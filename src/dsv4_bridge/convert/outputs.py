"""The files of an output, as data: which segments each holds, at which offset, how large.

Everything is known before the first byte is written, so disk space is checked beforehand, a
restart finds the same layout, and several workers write the same bytes as one.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from ..spec.dtypes import DTYPES
from ..spec.encodings import TILE, Stored, of_dtype
from ..spec.megatron import Naming, extra_state_keys, megatron_dtype, regions
from ..spec.plan import Item, Plan, shard_name, shard_of, stored
from ..store.hf import HFCheckpoint
from ..store.safetensors import make_header, make_index
from ..store.torch_dist.frames import (
    COMMON_STATE_KEY,
    ChunkRecord,
    ObjectRecord,
    TensorRecord,
    common_state_item,
    extra_state_item,
    tensor_frame,
)
from .segments import Copy, Frame, Literal, Rows, Scale, Segment, Weight

_CHUNK_BYTES = 64 << 20  # a Megatron tensor larger than this is cut by rows into several chunks
_FILE_BYTES = 4 << 30  # and a new .distcp file is begun


@dataclass(frozen=True)
class OutFile:
    """One output file: name relative to the output folder and its segments in order."""

    name: str
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return sum(s.nbytes for s in self.segments)


# ---------------------------------------------------------------- Hugging Face folders


@dataclass(frozen=True)
class HFLayout:
    """A folder to be written: shards, and the index (None for one file without an index)."""

    files: tuple[OutFile, ...]
    index: bytes | None


def hf_layout(plan: Plan, encode: Callable[[Item], str]) -> HFLayout:
    """Released names in released shards, a weight before its scale.

    Args:
        plan: items to write.
        encode: item -> encoding.
    """
    shards: dict[int, list[tuple[Stored, Segment]]] = {}
    for item in plan.items:
        tensors = shards.setdefault(shard_of(item, plan.spec), [])
        encoding = encode(item)
        for fact, kind in zip(stored(item, encoding), (Weight, Scale), strict=False):
            tensors.append((fact, kind(item, encoding, fact.nbytes)))
    files, weight_map, total = [], {}, 0
    for number, tensors in sorted(shards.items()):
        name = shard_name(number, plan.spec)
        header = make_header((fact for fact, _ in tensors), {"format": "pt"})
        files.append(OutFile(name, (Literal(header), *(segment for _, segment in tensors))))
        weight_map |= {fact.name: name for fact, _ in tensors}
        total += sum(fact.nbytes for fact, _ in tensors)
    return HFLayout(tuple(files), make_index(weight_map, total))


def hf_layout_like(like: HFCheckpoint) -> HFLayout:
    """The very files of `like`, which has released names: its shards, their headers, its index."""
    names = like.names()
    files = []
    for file, shard in like.folder.shards.items():
        segments: list[Segment] = [Literal(shard.header)]
        for name, info in shard.tensors.items():
            bound, is_scale = names[name]
            segments.append((Scale if is_scale else Weight)(bound.item, bound.encoding, info.nbytes))
        files.append(OutFile(file, tuple(segments)))
    return HFLayout(tuple(files), like.folder.index)


def passengers_file(checkpoint: HFCheckpoint, file: str) -> OutFile | None:
    """One safetensors file with the passengers of a checkpoint, byte for byte; None if it has none."""
    tensors = [
        (fact, info)
        for item in checkpoint.plan.items
        if item.passenger
        for bound in (checkpoint.bound[item.name],)
        for fact, info in zip(stored(item, bound.encoding), (bound.weight, bound.scale), strict=False)
        if info is not None
    ]
    if not tensors:
        return None
    header = make_header((fact for fact, _ in tensors), {"format": "pt"})
    return OutFile(file, (Literal(header), *(Copy(checkpoint.folder, info) for _, info in tensors)))


# ---------------------------------------------------------------- Megatron checkpoints


@dataclass(frozen=True)
class Chunk:
    """One chunk of a global tensor: its box, and the item rows it is made of, in order."""

    key: str
    dtype: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: tuple[tuple[Item, int, int], ...]


@dataclass(frozen=True)
class MegatronLayout:
    """A torch_dist checkpoint to be written: its .distcp files and what .metadata says of them."""

    files: tuple[OutFile, ...]
    tensors: tuple[TensorRecord, ...]
    objects: tuple[ObjectRecord, ...]


def megatron_chunks(plan: Plan, naming: Naming = "gpt") -> Iterable[Chunk]:
    """Every chunk of the checkpoint, in plan order; stacked parts (gate and up) share one."""
    waiting: dict[tuple[str, tuple[int, ...]], list[tuple[Item, int, int]]] = {}
    for item in plan.items:
        found = regions(item, plan.spec, naming)
        at = 0
        for region in found:
            rows = region.sizes[-len(item.shape)]
            index, count = item.row.part
            if count > 1:
                box = (region.key, region.offsets[:-2])
                waiting.setdefault(box, []).append((item, 0, rows))
                if index + 1 < count:
                    continue
                parts = tuple(waiting.pop(box))
                offsets = (*region.offsets[:-2], 0, 0)
                sizes = (*region.sizes[:-2], *region.global_shape[-2:])
                yield Chunk(region.key, megatron_dtype(item), region.global_shape, offsets, sizes, parts)
                continue
            yield from _cut_chunks(item, region.key, region.global_shape, region.offsets, region.sizes, at, rows)
            at += rows
    assert not waiting


def _cut_chunks(
    item: Item,
    key: str,
    global_shape: tuple[int, ...],
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    at: int,
    rows: int,
) -> Iterable[Chunk]:
    dtype = megatron_dtype(item)
    row_bytes = item.numel // item.shape[0] * DTYPES[dtype].itemsize
    step = max(TILE, _CHUNK_BYTES // row_bytes // TILE * TILE)
    axis = len(sizes) - len(item.shape)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        low = (*offsets[:axis], offsets[axis] + first, *offsets[axis + 1 :])
        size = (*sizes[:axis], last - first, *sizes[axis + 1 :])
        yield Chunk(key, dtype, global_shape, low, size, ((item, at + first, at + last),))


def megatron_layout(
    plan: Plan, common_state: Mapping[str, object], prefix: str, naming: Naming = "gpt"
) -> MegatronLayout:
    """Lay out a torch_dist checkpoint: one file a block, a new one every 4 GiB.

    Args:
        plan: the model; passengers are left out.
        common_state: the object that Megatron stores as `common_state`.
        prefix: folder of the .distcp files inside the output, e.g. `iter_0000000/`.
        naming: of its keys; the .distcp files are the same.
    """
    files: list[OutFile] = []
    chunks: dict[str, tuple[str, tuple[int, ...], list[ChunkRecord]]] = {}
    segments: list[Segment] = []
    at, block = 0, None

    def flush() -> None:
        nonlocal segments, at
        if segments:
            files.append(OutFile(f"{prefix}__0_{len(files)}.distcp", tuple(segments)))
        segments, at = [], 0

    for chunk in megatron_chunks(plan, naming):
        item = chunk.rows[0][0]
        if item.block != block or at >= _FILE_BYTES:
            flush()
            block = item.block
        file = f"__0_{len(files)}.distcp"
        sizes = _frame_sizes(chunk.dtype, chunk.sizes)
        data = []
        for part, start, stop in chunk.rows:
            size = (stop - start) * (part.numel // part.shape[0]) * DTYPES[chunk.dtype].itemsize
            data.append(Rows(part, of_dtype(chunk.dtype, None) or "", start, stop, size))
        head = Frame(partial(_frame_part, chunk.dtype, chunk.sizes, "head"), sizes[0])
        tail = Frame(partial(_frame_part, chunk.dtype, chunk.sizes, "tail"), sizes[1])
        length = sum(sizes) + sum(d.nbytes for d in data)
        segments += [head, *data, tail]
        known = chunks.setdefault(chunk.key, (chunk.dtype, chunk.global_shape, []))
        known[2].append(ChunkRecord(chunk.offsets, chunk.sizes, file, at, length))
        at += length
    flush()
    objects = _objects(extra_state_keys(plan, naming), common_state, f"__0_{len(files)}.distcp")
    files.append(OutFile(f"{prefix}__0_{len(files)}.distcp", objects[1]))
    tensors = tuple(TensorRecord(k, dtype, shape, tuple(c)) for k, (dtype, shape, c) in chunks.items())
    return MegatronLayout(tuple(files), tensors, objects[0])


def _frame_sizes(dtype: str, sizes: tuple[int, ...]) -> tuple[int, int]:
    frame = tensor_frame(dtype, sizes)
    return len(frame.head), len(frame.tail)


def _frame_part(dtype: str, sizes: tuple[int, ...], part: str) -> bytes:
    return getattr(tensor_frame(dtype, sizes), part)


def _objects(
    states: Iterable[str], common_state: Mapping[str, object], file: str
) -> tuple[tuple[ObjectRecord, ...], tuple[Segment, ...]]:
    # One item serves every key: an empty state, what Transformer Engine stores without FP8 buffers.
    state, common = extra_state_item(), common_state_item(dict(common_state))
    records = [ObjectRecord(key, file, 0, len(state)) for key in states]
    records.append(ObjectRecord(COMMON_STATE_KEY, file, len(state), len(common)))
    return tuple(records), (Literal(state), Literal(common))
