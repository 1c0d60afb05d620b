"""Small (or real-shaped) random checkpoints in the released formats, for trying and testing.

Three payloads: `natural`, Gaussian weights encoded by the released rule; `random`, random codes
with plausible scales (fast, for large shapes); `extreme`, every code with scales across the whole
legal range, signs of zero, groups whose largest code is small, float32 scales that are no powers
of two. A byte-level tokenizer lies beside the weights.
"""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..codec import CODECS
from ..codec.bf16 import to_bf16
from ..errors import BridgeError, files_named
from ..files import AnyPath
from ..spec.dtypes import DTYPES
from ..spec.encodings import ENCODINGS, QUANTISED, Stored
from ..spec.plan import Item, Plan, expand, shard_name, shard_of, stored
from ..spec.spec import ModelSpec
from ..spec.variants import Variant, tiny, variant_named
from ..store.hf_config import released_config
from ..store.safetensors import INDEX, make_header, make_index
from ..store.stream import Buffers, FileStream
from ..store.values import cuts
from .tokenizer import toy_tokenizer

PAYLOADS = ("natural", "random", "extreme")
_ROWS = 1024  # rows made at a time; a multiple of 128


@files_named("making a toy")
def make_toy(
    out: AnyPath,
    variant: str = "Flash",
    seed: int = 0,
    *,
    spec: ModelSpec | None = None,
    payload: str = "natural",
    ragged: bool = False,
) -> Path:
    """Write a random checkpoint in the released format of `variant`.

    Args:
        out: a folder that is empty or does not exist.
        variant: name of a variant; its encodings and draft blocks are imitated.
        seed: the same seed gives the same bytes.
        spec: numbers, by default a tiny model with every kind of layer.
        payload: `natural`, `random` or `extreme`.
        ragged: widths that are no multiples of 128 (with the default spec).

    Raises:
        BridgeError: unknown variant or payload, or the folder is in the way.
    """
    out, kind = Path(out), variant_named(variant)
    if payload not in PAYLOADS:
        raise BridgeError(f"payload {payload!r} is not one of {', '.join(PAYLOADS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BridgeError(f"writing {out}: it exists and is not an empty folder")
    plan = expand(spec or tiny(kind, ragged), kind.own_mtp_head)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_shards(out, plan, kind, seed, payload)
    except OSError as error:
        raise BridgeError(f"writing {out}: {error.strerror or error}") from None
    return out


def _write_shards(out: Path, plan: Plan, kind: Variant, seed: int, payload: str) -> None:
    shards: dict[int, list[tuple[Stored, Item, bool]]] = {}
    for item in plan.items:
        for n, fact in enumerate(stored(item, kind.encodings[item.row.encoding])):
            shards.setdefault(shard_of(item, plan.spec), []).append((fact, item, n == 1))
    weight_map, buffers, total = {}, Buffers(), 0
    for number, tensors in sorted(shards.items()):
        # The order of the safetensors library: widest type first, then by name.
        tensors.sort(key=lambda t: (-DTYPES[t[0].dtype].itemsize, t[0].name))
        name = shard_name(number, plan.spec)
        stream = FileStream(out / name, buffers)
        stream.write(make_header((fact for fact, _, _ in tensors), {}))
        made, halves = "", list[tuple[np.ndarray, np.ndarray]]()  # a weight and its scale are mostly neighbours
        for fact, item, is_scale in tensors:
            encoding = kind.encodings[item.row.encoding]
            if encoding not in QUANTISED:
                stream.write(_plain(item, encoding, _generator(seed, item), plan.spec))
            else:
                if made != item.name:
                    made, halves = item.name, list(_coded(item, encoding, seed, payload))
                for half in halves:
                    stream.write(half[is_scale])
            weight_map[fact.name] = name
            total += fact.nbytes
        stream.close()
    (out / INDEX).write_bytes(make_index(weight_map, total))
    generation = {"_from_model_config": True, "bos_token_id": 0, "do_sample": True, "eos_token_id": 1}
    (out / "generation_config.json").write_text(json.dumps(generation | {"temperature": 1.0, "top_p": 1.0}) + "\n")
    for name, content in toy_tokenizer(plan.spec).items():
        (out / name).write_bytes(content)
    quantised = kind.encodings["linear"] in QUANTISED
    config = released_config(plan.spec, kind.expert_dtype, quantised)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _generator(seed: int, item: Item, *more: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(item.name.encode()), *more])


def _coded(item: Item, encoding: str, seed: int, payload: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Codes and scales of one tensor, a stripe of rows at a time."""
    make = {"natural": _natural, "random": _random, "extreme": _extreme}[payload]
    for first, last in cuts(0, item.shape[0], _ROWS):
        yield make(encoding, (last - first, item.shape[1]), _generator(seed, item, first))


def _plain(item: Item, encoding: str, rng: np.random.Generator, spec: ModelSpec) -> np.ndarray:
    shape = item.shape
    if item.row.role == "ids":
        # Distinct experts for every token, as the released tables have.
        order = rng.random((shape[0], spec.n_routed_experts), dtype=np.float32).argsort(axis=1)
        return np.ascontiguousarray(order[:, : shape[1]]).astype("<i8")
    values = rng.standard_normal(shape, dtype=np.float32)
    values = 1 + 0.2 * values if item.row.role == "norm" else values * np.float32(0.5 if len(shape) == 1 else 0.05)
    return values.astype("<f4") if encoding == "f32" else to_bf16(values)


def _natural(encoding: str, shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    codes, scale = _empty(encoding, shape)
    values = to_bf16(rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05))
    CODECS[encoding].encode(values, None, codes, scale)
    return codes, scale


def _random(encoding: str, shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    codes, scale = _empty(encoding, shape)
    codes[...] = np.frombuffer(rng.bytes(codes.size), np.uint8).reshape(codes.shape)
    low, high = (112, 124) if encoding == "mxfp4" else (110, 122)
    exponents = rng.integers(low, high, scale.shape, dtype=np.uint8)
    scale[...] = np.exp2(exponents - 127.0) if encoding == "fp8_f32" else exponents
    if encoding != "mxfp4":
        codes[(codes & 0x7F) == 0x7F] ^= 0x55
    return codes, scale


def _extreme(encoding: str, shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    codes, scale = _random(encoding, shape, rng)
    low, high = (0, 253) if encoding == "mxfp4" else (3, 247)
    exponents = rng.integers(low, high, scale.shape, dtype=np.uint8)
    if encoding == "fp8_f32":
        mantissas = 1 + rng.random(scale.shape, dtype=np.float32)
        scale[...] = np.ldexp(mantissas, exponents.clip(20, 240).astype(np.int32) - 127)
    else:
        scale[...] = exponents
    # Every fourth row holds only small codes or zeros of either sign, where a fresh scale would differ.
    if encoding == "mxfp4":
        codes[::4] &= 0x99
        codes[1::8] &= 0x88
    else:
        codes[::4] &= 0x87
        codes[1::8] &= 0x80
    return codes, scale


def _empty(encoding: str, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    how = ENCODINGS[encoding]
    scale = np.empty(how.scale_shape(shape), DTYPES[how.scale_dtype or "U8"].numpy)
    return np.empty(how.weight_shape(shape), np.uint8), scale
