"""Weights out of a live model, a piece at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...convert.emitter import Emitter
from ...convert.segments import Scale, Weight
from ...errors import BridgeError
from ...files import AnyPath
from ...spec.dtypes import DTYPES
from ...spec.encodings import TARGETS
from ...spec.plan import stored, target_encoding
from ...store.hf import HFCheckpoint, open_hf
from ...store.stream import Bytes, as_bytes
from ...store.values import HFValues
from ..model import DeepSeekV4Model
from .gather import model_values
from .load import check_numbers


class _Memory:
    """A stream that keeps what is written."""

    def __init__(self, size: int):
        self.data = bytearray(size)
        self._at = 0

    def write(self, data: Bytes) -> None:
        flat = as_bytes(data)
        self.data[self._at : self._at + flat.size] = flat.tobytes()
        self._at += flat.size

    def patch(self, offset: int, old: bytes, new: bytes) -> None:
        self.data[offset : offset + len(new)] = new

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


def stream_weights(
    model: DeepSeekV4Model | Sequence[DeepSeekV4Model],
    encoding: str = "bf16",
    like: AnyPath | None = None,
    *,
    allow_lossy: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the model in released names, on the host, in the order of the plan.

    Where the model is cut over ranks, every rank calls this, goes through all of it, and gets the whole
    tensors. Memory holds one tensor at a time. A model on a GPU is encoded there, to the same bytes. Buffers
    (`tid2eid`, `gate.bias`) and scales are among them; a scale follows its weight. Under `like`, tensors that
    Megatron has no place for (a drafter, Base's own MTP embedding and head) come from there, byte for byte.

    Args:
        model: the model, or this rank's chunks of it.
        encoding: `bf16`; `fp8` (linears and experts, 128x128 scales); `source`, as `like` stores each.
        like: released folder whose scales are kept wherever the values still fit them.
        allow_lossy: permit rounding where the encoding is not the source's.

    Yields:
        Name and tensor: bf16, float32, int64, float8_e4m3fn, int8 (two E2M1 codes a byte), float8_e8m0fnu.

    Raises:
        BridgeError: `source` without `like`, or a tensor that cannot be represented.
    """
    if encoding not in TARGETS:
        raise BridgeError(f"streaming weights: encoding {encoding!r} is not one of {', '.join(TARGETS)}")
    if encoding == "source" and like is None:
        raise BridgeError("streaming weights in the source's encoding needs the source: like=FOLDER")
    released = open_hf(Path(like)) if like is not None else None
    try:
        yield from _stream([model] if isinstance(model, DeepSeekV4Model) else model, encoding, released, allow_lossy)
    finally:
        if released:
            released.close()


def _stream(
    chunks: Sequence[DeepSeekV4Model], encoding: str, like: HFCheckpoint | None, allow_lossy: bool
) -> Iterator[tuple[str, Tensor]]:
    values = model_values(chunks)
    if like:
        check_numbers(chunks[0], like.spec, like.folder.path)
    emitter = Emitter(values, HFValues(like) if like else None, like, allow_lossy or encoding == "bf16")
    try:
        for item in (like or values).plan.items:
            if item.passenger and not like:
                continue
            own = like.bound[item.name].encoding if like else None
            target = own if item.passenger and own else target_encoding(item, encoding, own)
            facts = stored(item, target)
            segments = tuple(kind(item, target, f.nbytes) for kind, f in zip((Weight, Scale), facts, strict=False))
            memory = _Memory(sum(f.nbytes for f in facts))
            emitter.emit(segments, memory)
            at = 0
            for fact in facts:
                dtype = getattr(torch, DTYPES[fact.dtype].torch)
                flat = torch.frombuffer(memory.data, dtype=torch.uint8, count=fact.nbytes, offset=at)
                yield fact.name, flat.view(dtype).reshape(fact.shape)
                at += fact.nbytes
    finally:
        emitter.close()
