"""Loaders of arrays: prepared chats, and megatron-core's indexed data; see `fuzz`."""

import json
import random
import struct
from pathlib import Path

import numpy as np

from mutations import mutate_bytes, mutate_json


class ChatStores:
    """Prepared chats: `chat_data.json` and five `.npy`."""

    def __init__(self, folder: Path, seed: int):
        from dsv4_bridge.data.chat.packing import plan_packs
        from dsv4_bridge.data.chat.samples import Sample
        from dsv4_bridge.data.chat.store import write_chat_data

        self._folder, self._seed, rng = folder / "data", seed, np.random.default_rng(seed)
        lengths = [int(n) for n in rng.integers(2, 30, 40)]
        samples = [Sample(rng.integers(0, 99, n).astype(np.int32), rng.random(n) < 0.5, 7) for n in lengths]
        write_chat_data(self._folder, samples, plan_packs(lengths, 32), {"tokenizer_sha256": "a"})
        self._sound = {path.name: path.read_bytes() for path in self._folder.iterdir()}

    def run(self, number: int) -> None:
        from dsv4_bridge.data.chat.store import open_chat_data

        rng = random.Random(f"{self._seed} {number}")
        name = rng.choice(sorted(self._sound))
        mutate = mutate_json if name.endswith(".json") else mutate_npy
        (self._folder / name).write_bytes(mutate(self._sound[name], rng))
        try:
            data = open_chat_data(self._folder, "a")
            for pack in data:
                assert len(pack.tokens) <= data.seq_length and pack.cu_seqlens[-1] == len(pack.tokens)
        finally:
            (self._folder / name).write_bytes(self._sound[name])


_HEADERS = (
    b"{'descr': '|O', 'fortran_order': False, 'shape': (5,), }",
    b"{'descr': '<i4', 'fortran_order': True, 'shape': (5,), }",
    b"{'descr': '<i4', 'fortran_order': False, 'shape': (-5,), }",
    b"{'descr': '<i4', 'fortran_order': False, 'shape': (), }",
    b"{'descr': '<i4', 'fortran_order': False, 'shape': (9999999999999,), }",
    b"[" * 60_000,
    b"(" * 9000 + b")" * 9000,
    b"{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (5,), }",
    b"__import__('os').getpid()",
    b"1" * 5000,
    b"{'descr': '<i4', 'fortran_order': False, 'shape': (5, 5), }",
    b"{'descr': '>i4', 'fortran_order': False, 'shape': (5,), }",
)


def mutate_npy(data: bytes, rng: random.Random) -> bytes:
    """Of an array's file: bytes, the header, its length, the values; or another container in its place."""
    end = 10 + struct.unpack("<H", data[8:10])[0]
    match rng.randrange(7):
        case 0:
            return mutate_bytes(data, rng)
        case 1:
            return data[:10] + mutate_bytes(data[10:end], rng) + data[end:]
        case 2:
            header = rng.choice(_HEADERS)[: (1 << 16) - 2] + b"\n"
            return data[:8] + struct.pack("<H", len(header)) + header + data[end:]
        case 3:
            return data[:8] + rng.randbytes(2) + data[10:]
        case 4:
            return rng.choice(
                (b"PK\x03\x04" + data, b"\x80\x04]", data[:6] + b"\x02\x00" + data[8:10] + b"\0\0" + data[10:])
            )
        case 5:
            return data + data[end:]
        case _:
            return data[:end] + mutate_numbers(data[end:], rng)


def mutate_numbers(data: bytes, rng: random.Random) -> bytes:
    """Some aligned numbers become extreme ones, or change places."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 6))):
        width = rng.choice((1, 4, 8))
        count = len(out) // width
        if not count:
            return bytes(out)
        at = rng.randrange(count) * width
        value = rng.choice((0, 1, 2, 255, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1))
        piece = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        if rng.random() < 0.3:
            other = rng.randrange(count) * width
            piece, out[other : other + width] = out[other : other + width], out[at : at + width]
        out[at : at + width] = piece
    return bytes(out)


class Indexed:
    """megatron-core's `.idx` and `.bin`, with our `.json` beside; megatron-core opens what was let through."""

    def __init__(self, folder: Path, seed: int):
        from dsv4_bridge.mcore import cpu

        cpu.install()
        self._prefix, self._seed, rng = folder / "text", seed, np.random.default_rng(seed)
        lengths = rng.integers(1, 40, 30).astype("<i4")
        starts = 2 * np.cumsum([0, *lengths[:-1]]).astype("<i8")
        head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(lengths) + 1)
        edges = np.arange(len(lengths) + 1, dtype="<i8")
        tokens = rng.integers(2, 512, int(lengths.sum())).astype("<u2")
        self._sound = {
            ".idx": head + lengths.tobytes() + starts.tobytes() + edges.tobytes(),
            ".bin": tokens.tobytes(),
            ".json": json.dumps({"eos_token_id": 1, "vocab_size": 512}).encode(),
        }

    def run(self, number: int) -> None:
        from dsv4_bridge.data.datasets import build_pretraining_datasets
        from dsv4_bridge.train.feed import text_feed

        rng = random.Random(f"{self._seed} {number}")
        name = rng.choices(sorted(self._sound), (2, 10, 1))[0]
        for suffix, data in self._sound.items():
            mutate = mutate_json if suffix == ".json" else _mutate_idx
            Path(f"{self._prefix}{suffix}").write_bytes(mutate(data, rng) if suffix == name else data)
        rows, _, _ = build_pretraining_datasets(
            str(self._prefix),
            seq_length=16,
            samples=(4, 0, 0),
            eos_token_id=1,
            vocab_size=512,
            split="1",
            cache=self._prefix.parent / f"cache-{number % 8}",
        )
        assert rows is not None
        text_feed(rows, 512, "x").batches(0, 4, 2)


def _mutate_idx(data: bytes, rng: random.Random) -> bytes:
    choice = rng.random()
    if choice < 0.3:
        return mutate_bytes(data, rng)
    if choice < 0.5:
        return mutate_bytes(data, rng, 34)
    return data[:34] + mutate_numbers(data[34:], rng)
