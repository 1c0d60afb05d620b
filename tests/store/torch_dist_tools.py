"""Small torch_dist folders, written by torch or by this package."""

import io
import itertools
from pathlib import Path

import numpy as np
import torch

from dsv4_bridge.spec.dtypes import DTYPES
from dsv4_bridge.store.torch_dist.frames import (
    COMMON_STATE_KEY,
    METADATA_JSON,
    ChunkRecord,
    ObjectRecord,
    TensorRecord,
    common_state_item,
    extra_state_item,
    metadata_bytes,
    tensor_frame,
)
from dsv4_bridge.store.torch_dist.reader import open_torch_dist

COMMON = {"iteration": 7, "checkpoint_version": 3.0, "names": ["a", "a"], "deep": {"a": None, "b": True}}


def bits(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bit patterns; 0 or 1 for BOOL, which torch wants."""
    d = DTYPES[dtype]
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == "BOOL" else 256, (*shape, d.itemsize), np.uint8)
    return np.ascontiguousarray(raw).reshape(-1).view(d.numpy).reshape(shape)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits: random ones contain NaN."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def boxes(shape: tuple[int, ...], cuts: list[list[int]]):
    """(offsets, sizes) of the blocks between ``cuts`` along each axis."""
    edges = [sorted({0, n, *c}) for n, c in zip(shape, cuts)]
    for block in itertools.product(*(itertools.pairwise(e) for e in edges)):
        yield tuple(a for a, _ in block), tuple(b - a for a, b in block)


def write(
    folder: Path,
    tensors: dict[str, tuple[str, np.ndarray, list[list[int]]]],
    objects: tuple[str, ...] = ("a._extra_state/shard_0_1",),
    files: int = 2,
    pad: int = 0,
) -> Path:
    """A checkpoint by the pieces under test, its chunks dealt out over ``files`` in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    data = [bytearray() for _ in range(files)]
    turn = itertools.cycle(range(files))

    def put(item: bytes) -> tuple[str, int, int]:
        i = next(turn)
        at = len(data[i])
        data[i] += item + bytes(pad)
        return f"__{i}_0.distcp", at, len(item)

    records = []
    for key, (dtype, array, cuts) in tensors.items():
        chunks = []
        for offsets, sizes in boxes(array.shape, cuts) if array.size else [((0,) * array.ndim, array.shape)]:
            frame = tensor_frame(dtype, sizes)
            part = array[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]
            chunks.append(ChunkRecord(offsets, sizes, *put(frame.head + part.tobytes() + frame.tail)))
        records.append(TensorRecord(key, dtype, array.shape, tuple(chunks)))
    things = [ObjectRecord(COMMON_STATE_KEY, *put(common_state_item(COMMON)))]
    extra = put(extra_state_item())
    things += [ObjectRecord(key, *extra) for key in objects]
    for i, content in enumerate(data):
        (folder / f"__{i}_0.distcp").write_bytes(content)
    (folder / "metadata.json").write_bytes(METADATA_JSON)
    (folder / ".metadata").write_bytes(metadata_bytes(records, things))
    return folder


def torch_bits(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(DTYPES[dtype].numpy).reshape(tuple(tensor.shape))


def _read_item(folder: Path, value, dtype: str, shape=None):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return _read_bytes(folder, buffer.getvalue(), dtype, tuple(value.shape) if shape is None else shape)


def _read_bytes(folder: Path, item: bytes, dtype: str, shape: tuple[int, ...]):
    chunk = ChunkRecord((0,) * len(shape), shape, "f", 0, len(item))
    (folder / "f").write_bytes(item)
    (folder / ".metadata").write_bytes(metadata_bytes([TensorRecord("w", dtype, shape, (chunk,))], []))
    with open_torch_dist(folder) as reader:
        return reader.read("w")
