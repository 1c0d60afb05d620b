"""Weights into a live model and out of it, a stripe or a tensor at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...convert.emitter import Emitter, Scale, Weight
from ...convert.jobs import target_encoding
from ...convert.values import HFValues, MegatronValues, Scratch, Values
from ...errors import BridgeError, files_named
from ...spec.dtypes import DTYPES
from ...spec.encodings import TILE
from ...spec.plan import Item, stored
from ...spec.spec import ModelSpec
from ...store.hf import HFCheckpoint, open_hf
from ...store.megatron import looks_megatron, open_megatron
from ...store.reading import kept_in_cache
from ...store.stream import Bytes, as_bytes
from ..model import DeepSeekV4Model
from .gather import ModelValues
from .places import Place, places

STREAM_ENCODINGS = ("bf16", "fp8", "source")


@files_named("loading weights")
def load_weights(model: DeepSeekV4Model, checkpoint: Path | str, *, allow_lossy: bool = False) -> None:
    """Fill a model from a Hugging Face folder (any encoding and naming) or a torch_dist checkpoint.

    Only what this rank holds is read, a stripe of rows at a time.

    Args:
        model: made by `build_model` for the same numbers; without MTP where it should not be loaded.
        checkpoint: the folder.
        allow_lossy: permit float32 weights to be rounded to a bf16 model's parameters.

    Raises:
        BridgeError: unreadable, other numbers, a tensor missing, or a value that would be rounded.
    """
    path = Path(checkpoint)
    if looks_megatron(path):
        megatron = open_megatron(path)
        try:
            _check_numbers(model, megatron.spec, path)
            _fill(
                model,
                MegatronValues(megatron.reader, megatron.spec),
                {i.name for i in megatron.plan.items},
                path,
                allow_lossy,
            )
        finally:
            megatron.close()
        return
    released = open_hf(path)
    try:
        _check_numbers(model, released.spec, path)
        _fill(model, HFValues(released), set(released.bound), path, allow_lossy)
    finally:
        released.close()


def _check_numbers(model: DeepSeekV4Model, spec: ModelSpec, path: Path) -> None:
    mine, theirs = model.spec.without_draft(), spec.without_draft()
    if mine != theirs:
        differing = [n for n in vars(mine) if getattr(mine, n) != getattr(theirs, n)]
        raise BridgeError(
            f"loading {path}: it has other numbers than the model: "
            + ", ".join(f"{n} {getattr(theirs, n)} (model {getattr(mine, n)})" for n in differing[:4])
        )


def _fill(model: DeepSeekV4Model, source: Values, there: set[str], path: Path, allow_lossy: bool) -> None:
    plan, found = places(model)
    if lost := [i.name for i in plan.items if i.name in found and i.name not in there]:
        raise BridgeError(
            f"loading {path}: it lacks {len(lost)} tensors of the model ({lost[0]} …); "
            "where the checkpoint has no draft block, train by flash-finetune-no-mtp (model.mtp=false), or in Python "
            "build the model without MTP (spec.without_draft())"
        )
    scratch = Scratch()
    with kept_in_cache():  # other ranks of this machine read the same
        for item in plan.items:
            _fill_item(item, found.get(item.name, ()), source, scratch, allow_lossy)


def _fill_item(item: Item, here: Sequence[Place], source: Values, scratch: Scratch, allow_lossy: bool) -> None:
    for start, stop in _spans([(p.start, p.stop) for p in here]):
        at = start // TILE * TILE  # stripes of quantised tensors begin at whole tiles
        for stripe in source.stripes(item, at, stop, scratch):
            values = _as_tensor(stripe)
            for place in here:
                low, high = max(at, place.start), min(at + len(stripe), place.stop)
                if low < high:
                    held = values[low - at : high - at]
                    if values.ndim > 1:
                        held = held[:, slice(*place.columns)]
                    _store(place.rows(low, high), held, item, allow_lossy)
            at += len(stripe)


def _spans(parts: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Contiguous row ranges, joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(parts):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _as_tensor(stripe: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(stripe)
    return tensor.view(torch.bfloat16) if stripe.dtype == np.uint16 else tensor


def _store(into: Tensor, values: Tensor, item: Item, allow_lossy: bool) -> None:
    if into.dtype is torch.bfloat16 and values.dtype is torch.float32 and not allow_lossy:
        rounded = int((values.to(torch.bfloat16).float() != values).sum())
        if rounded:
            raise BridgeError(
                f"loading {item.name} into a bf16 model would round {rounded} float32 values; "
                "allow_lossy=True accepts that"
            )
    into.copy_(values)


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
    like: Path | str | None = None,
    *,
    allow_lossy: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the model in released names, on the host, in the order of the plan.

    Where the model is cut over ranks, every rank calls this, goes through all of it, and gets the whole
    tensors. Memory holds one tensor at a time. Buffers (`tid2eid`, `gate.bias`) and scales are among them; a
    scale follows its weight. Under `like`, tensors that Megatron has no place for (a drafter, Base's
    own MTP embedding and head) come from there, byte for byte.

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
    if encoding not in STREAM_ENCODINGS:
        raise BridgeError(f"streaming weights: encoding {encoding!r} is not one of {', '.join(STREAM_ENCODINGS)}")
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
    values = ModelValues(chunks)
    if like:
        _check_numbers(chunks[0], like.spec, like.folder.path)
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
