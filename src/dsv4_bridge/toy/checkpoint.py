"""Small (or real-shaped) random checkpoints in the released formats, for trying and testing.

Three payloads: `natural`, Gaussian weights encoded by the released rule; `random`, random codes
with plausible scales (fast, for large shapes); `extreme`, every code with scales across the whole
legal range, signs of zero, groups whose largest code is small, float32 scales that are no powers
of two. Two widths: `tiny` converts in a second; `full` has the released widths and experts, and as
many layers as asked for. A byte-level tokenizer lies beside the weights.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from ..convert.jobs import import_hf
from ..convert.prepare import check_space
from ..errors import BridgeError, files_named
from ..files import AnyPath, local
from ..progress import Progress, Silent, in_background
from ..spec.dtypes import DTYPES
from ..spec.encodings import QUANTISED, Stored
from ..spec.megatron import Naming, check_naming
from ..spec.plan import Item, Plan, expand, in_row_order, shard_name, shard_of, stored
from ..spec.spec import ModelSpec
from ..spec.variants import Variant, shortened, tiny, variant_named
from ..store.hf_config import released_config
from ..store.safetensors import INDEX, make_header, make_index
from ..store.stream import Buffers, FileStream
from .payloads import PAYLOADS, coded, plain
from .tokenizer import toy_tokenizer

WIDTHS = ("tiny", "full")
_AHEAD = 128 << 20  # bytes of tensors that are made before the first of them is written


class _Half(NamedTuple):
    """One tensor of a shard: what lies there, of which item, whether it is its scale."""

    fact: Stored
    item: Item
    is_scale: bool


class _Work(NamedTuple):
    """A piece of a shard that any thread may make, and its size in bytes."""

    make: Callable[[], list[np.ndarray]]
    nbytes: int


@files_named("making a toy")
def make_toy(
    out: AnyPath,
    variant: str = "Flash",
    seed: int = 0,
    *,
    spec: ModelSpec | None = None,
    payload: str = "natural",
    ragged: bool = False,
    width: str = "tiny",
    layers: int | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    naming: Naming | None = None,
) -> Path:
    """Write a random checkpoint in the released format of `variant`, or a Megatron checkpoint of its values.

    Args:
        out: a folder that is empty or does not exist.
        variant: name of a variant; its encodings and draft blocks are imitated.
        seed: the same seed gives the same bytes, whatever the number of workers.
        spec: numbers, by default those of `width`, which then says only how Gaussian values are drawn.
        payload: `natural`, `random` or `extreme`.
        ragged: widths that are no multiples of 128 (of a tiny model).
        width: `tiny`, a small model with every kind of layer, or `full`, the released widths and experts.
        layers: decoder layers of a full width; see `spec.variants.shortened` for which.
        workers: threads that make tensors.
        progress: told of the bytes made.
        naming: `gpt` or `hybrid`: a Megatron checkpoint with these names, by way of a released one beside it.

    Raises:
        BridgeError: unknown variant, payload or width, no such number of layers, the folder is in the way, or the
            disk has too little room.
    """
    out, kind = local(out, "writing"), variant_named(variant)
    if naming is not None:
        released = partial(make_toy, variant=variant, seed=seed, spec=spec, payload=payload, ragged=ragged)
        return _as_megatron(
            out, naming, partial(released, width=width, layers=layers, workers=workers, progress=progress)
        )
    if payload not in PAYLOADS:
        raise BridgeError(f"payload {payload!r} is not one of {', '.join(PAYLOADS)}")
    plan = expand(spec or toy_spec(variant, width, layers, ragged=ragged), kind.own_mtp_head)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BridgeError(f"writing {out}: it exists and is not an empty folder")
    shards, shown = _shards(plan, kind), in_background(progress or Silent())
    total = sum(half.fact.nbytes for halves in shards.values() for half in halves)
    check_space(out, total, f"a toy {kind.name}")
    shown.start(f"toy {kind.name}", total, 0)
    written, buffers = list[Path](), Buffers()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(workers) as pool:
            for number, halves in sorted(shards.items()):
                written.append(out / shard_name(number, plan.spec))
                work = _work(halves, kind, plan.spec, seed, payload, wide=width == "full")
                _write_shard(FileStream(written[-1], buffers), halves, _in_order(pool, work, 2 * workers), shown)
        _write_small(out, plan, kind, shards)
    except BaseException as error:
        for path in written:  # a shard too few is of no use, and these may be large
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise BridgeError(f"writing {out}: {error.strerror or error}") from None
        raise
    finally:
        shown.stop()
    return out


def _as_megatron(out: Path, naming: Naming, make: Callable[[Path], Path]) -> Path:
    """Import a toy that is made for it and taken away."""
    check_naming(naming, "making a toy")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BridgeError(f"writing {out}: it exists and is not an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as folder:
        import_hf(make(Path(folder) / "hf"), out, naming=naming)
    return out


def toy_spec(variant: str, width: str = "tiny", layers: int | None = None, *, ragged: bool = False) -> ModelSpec:
    """The numbers of a toy; arguments as of `make_toy`.

    Raises:
        BridgeError: unknown variant or width, no such number of layers, or arguments of the other width.
    """
    kind = variant_named(variant)
    if width not in WIDTHS:
        raise BridgeError(f"width {width!r} is not one of {', '.join(WIDTHS)}")
    if width == "tiny":
        if layers is not None:
            raise BridgeError("making a toy: layers are counted at full width; a tiny one has six, of every kind")
        return tiny(kind, ragged)
    if ragged:
        raise BridgeError("making a toy: ragged widths are of a tiny one; at full width they are the released ones")
    if layers is None:
        one, two = (toy_bytes(variant, shortened(kind, n)) for n in (1, 2))
        raise BridgeError(
            f"making a toy at full width: say how many decoder layers (layers, --layers), from 1 to "
            f"{kind.spec.num_hidden_layers}; each is some {(two - one) / 1e9:.1f} GB"
        )
    return shortened(kind, layers)


def toy_bytes(variant: str, spec: ModelSpec) -> int:
    """Bytes of the tensors of a toy of `spec`, stored as `variant` is."""
    kind = variant_named(variant)
    return sum(fact.nbytes for fact in expand(spec, kind.own_mtp_head).stored(kind.encodings))


def _shards(plan: Plan, kind: Variant) -> dict[int, list[_Half]]:
    """Number -> its tensors, in the order of the safetensors library: widest type first, then by name (Engram: not)."""
    shards: dict[int, list[_Half]] = {}
    for item in plan.items:
        for n, fact in enumerate(stored(item, kind.encodings[item.row.encoding])):
            shards.setdefault(shard_of(item, plan.spec), []).append(_Half(fact, item, n == 1))
    for halves in shards.values():
        if not in_row_order(halves[0].item, plan.spec):
            halves.sort(key=lambda half: (-DTYPES[half.fact.dtype].itemsize, half.fact.name))
    return shards


def _work(
    halves: Sequence[_Half], kind: Variant, spec: ModelSpec, seed: int, payload: str, *, wide: bool
) -> Iterator[_Work]:
    """What makes a shard, in the order of its bytes."""
    for _, group in groupby(halves, key=lambda half: half.item.name):  # a weight and its scale are mostly neighbours
        near = list(group)
        item, encoding = near[0].item, kind.encodings[near[0].item.row.encoding]
        nbytes = sum(half.fact.nbytes for half in near)
        if encoding in QUANTISED:
            scales = [half.is_scale for half in near]
            yield _Work(lambda i=item, e=encoding, s=scales: _joined(coded(i, e, seed, payload, wide=wide), s), nbytes)
            continue
        pieces = list(plain(item, encoding, seed, spec, wide=wide))
        for piece in pieces:
            yield _Work(lambda p=piece: [p()], nbytes // len(pieces))


def _joined(stripes: Iterable[tuple[np.ndarray, np.ndarray]], scales: Iterable[bool]) -> list[np.ndarray]:
    return [stripe[is_scale] for is_scale in scales for stripe in stripes]


def _in_order(pool: ThreadPoolExecutor, work: Iterable[_Work], most: int) -> Iterator[list[np.ndarray]]:
    """What threads make, in the order of the work; some of it is made ahead, as much as memory bears."""
    waiting: deque[tuple[Future[list[np.ndarray]], int]] = deque()
    ahead = 0
    try:
        for make, nbytes in work:
            while waiting and (len(waiting) >= most or ahead + nbytes > _AHEAD):
                made, size = waiting.popleft()
                ahead -= size
                yield made.result()
            waiting.append((pool.submit(make), nbytes))
            ahead += nbytes
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        for made, _ in waiting:
            made.cancel()


def _write_shard(
    stream: FileStream, halves: Iterable[_Half], made: Iterable[list[np.ndarray]], shown: Progress
) -> None:
    try:
        stream.write(make_header((half.fact for half in halves), {}))
        for arrays in made:
            for array in arrays:
                stream.write(array)
            shown.advance(sum(array.nbytes for array in arrays))
    except BaseException:
        stream.abort()
        raise
    stream.close()


def _write_small(out: Path, plan: Plan, kind: Variant, shards: Mapping[int, Sequence[_Half]]) -> None:
    """Index, config, generation config and tokenizer."""
    facts = [(half.fact, shard_name(number, plan.spec)) for number, halves in sorted(shards.items()) for half in halves]
    total = sum(fact.nbytes for fact, _ in facts)
    (out / INDEX).write_bytes(make_index({fact.name: name for fact, name in facts}, total))
    generation = {"_from_model_config": True, "bos_token_id": 0, "do_sample": True, "eos_token_id": 1}
    (out / "generation_config.json").write_text(json.dumps(generation | {"temperature": 1.0, "top_p": 1.0}) + "\n")
    for name, content in toy_tokenizer(plan.spec).items():
        (out / name).write_bytes(content)
    quantised = bool(set(kind.encodings.values()) & QUANTISED)
    config = released_config(plan.spec, kind.expert_dtype, quantised)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
