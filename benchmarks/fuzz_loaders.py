"""Loaders that read a file from elsewhere, each with sound files and a way to harm them; see `fuzz`.

A loader is made once a process, in a folder of its own; `run(number)` makes input `number` and reads it.
"""

import contextlib
import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsv4_bridge import BridgeError
from fuzz_checkpoints import TARGETS, Fuzzer
from mutations import DEEP, Raw, mutate_bytes, mutate_json, mutate_value, mutate_yaml, to_json


class Loader(Protocol):
    """See above."""

    def run(self, number: int) -> None:
        """Raises BridgeError where the input is refused; returns where it is taken; else it is a failure."""
        ...


class Checkpoints:
    """Files of checkpoints, through `inspect`, `import_hf` and `export_hf`."""

    def __init__(self, folder: Path, seed: int, target: str):
        self._fuzzer = Fuzzer(folder, seed, [t for t in TARGETS if t.name == target])

    def run(self, number: int) -> None:
        outcome = self._fuzzer.run(range(number, number + 1))
        refused, outcome.refused = outcome.refused, 0
        failures, outcome.failures = outcome.failures, []
        if failures:
            raise AssertionError("\n".join(failures))
        if refused:
            raise BridgeError("refused")


class Recipes:
    """Recipes in YAML, and `key=value` words."""

    def __init__(self, folder: Path, seed: int):
        from dsv4_bridge.train.choosing import choose, dump
        from dsv4_bridge.train.recipes import RECIPES

        self._folder, self._seed = folder, seed
        self._sound = [dump(choose(name).recipe).encode() for name in RECIPES]

    def run(self, number: int) -> None:
        from dsv4_bridge.train.choosing import as_plain, choose, dump

        rng = random.Random(f"{self._seed} {number}")
        path = self._folder / "recipe.yaml"
        path.write_bytes(mutate_yaml(rng.choice(self._sound), rng))
        words = ["batch.size=" + rng.choice(_WORDS), rng.choice(_WORDS)] if rng.random() < 0.1 else []
        chosen = choose(str(path), words)
        json.dumps(as_plain(chosen.recipe))
        dump(chosen.recipe)


_WORDS = (
    "!!int ''", "2020-13-45", "1" * 5000, '"\\U00110000"', "[" * DEEP, "{a: b", "&a [*a]", "=", "a=b=c", "1e999", "\x1b[31m",
    "!!python/name:os.system", "0x" + "f" * 5000, "1:1:1:1", "lora.rank=null", "seed=.nan", "data.train=[[1]]", "~", "",
)  # fmt: skip


class ChatStores:
    """Prepared chats: `chat_data.json` and five `.npy`."""

    def __init__(self, folder: Path, seed: int):
        from dsv4_bridge.train.chat.packing import plan_packs
        from dsv4_bridge.train.chat.samples import Sample
        from dsv4_bridge.train.chat.store import write_chat_data

        self._folder, self._seed, rng = folder / "data", seed, np.random.default_rng(seed)
        lengths = [int(n) for n in rng.integers(2, 30, 40)]
        samples = [Sample(rng.integers(0, 99, n).astype(np.int32), rng.random(n) < 0.5, 7) for n in lengths]
        write_chat_data(self._folder, samples, plan_packs(lengths, 32), {"tokenizer_sha256": "a"})
        self._sound = {path.name: path.read_bytes() for path in self._folder.iterdir()}

    def run(self, number: int) -> None:
        from dsv4_bridge.train.chat.store import open_chat_data

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
    b"{'descr': '|O', 'fortran_order': False, 'shape': (5,), }", b"{'descr': '<i4', 'fortran_order': True, 'shape': (5,), }",
    b"{'descr': '<i4', 'fortran_order': False, 'shape': (-5,), }", b"{'descr': '<i4', 'fortran_order': False, 'shape': (), }",
    b"{'descr': '<i4', 'fortran_order': False, 'shape': (9999999999999,), }", b"[" * 60_000, b"(" * 9000 + b")" * 9000,
    b"{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (5,), }", b"__import__('os').getpid()", b"1" * 5000,
    b"{'descr': '<i4', 'fortran_order': False, 'shape': (5, 5), }", b"{'descr': '>i4', 'fortran_order': False, 'shape': (5,), }",
)  # fmt: skip


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
        from dsv4_bridge.train.datasets import build_pretraining_datasets
        from dsv4_bridge.train.feed import text_feed

        rng = random.Random(f"{self._seed} {number}")
        name = rng.choices(sorted(self._sound), (2, 10, 1))[0]
        for suffix, data in self._sound.items():
            if suffix == name:
                data = mutate_json(data, rng) if name == ".json" else _mutate_idx(data, rng)
            Path(f"{self._prefix}{suffix}").write_bytes(data)
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


class Tokenizers:
    """tokenizer.json of a toy, and of a released tokenizer's build."""

    def __init__(self, folder: Path, seed: int):
        from dsv4_bridge.toy_tokenizer import toy_tokenizer
        from dsv4_bridge.variants import VARIANTS, tiny

        self._folder, self._seed, self._spec = folder, seed, tiny(VARIANTS["Flash"])
        toy = json.loads(toy_tokenizer(self._spec)["tokenizer.json"])
        built = json.loads(json.dumps(toy))
        splits = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|\s+(?!\S)|\s+")
        ]
        built["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, toy["pre_tokenizer"]]}
        built["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
        piece = {"Sequence": {"id": "A", "type_id": 0}}
        bos = {"SpecialToken": {"id": "a", "type_id": 0}}
        template = {
            "single": [bos, piece],
            "pair": [piece],
            "special_tokens": {"a": {"id": "a", "ids": [1], "tokens": ["a"]}},
        }
        built["post_processor"] = {"type": "TemplateProcessing", **template}
        built["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
        vocab = built["model"]["vocab"]
        built["model"]["merges"] = [["h", "e"], ["l", "l"]]
        vocab["he"], vocab["ll"] = 1 + max(vocab.values()), 2 + max(vocab.values())
        # With the small parts first: mutations choose places evenly, and most of a vocabulary is alike.
        small = json.loads(json.dumps(built))
        kept = {k: v for k, v in vocab.items() if len(k) < 3 and k.isascii()}
        small["model"]["vocab"], small["added_tokens"] = (
            kept | {"he": vocab["he"], "ll": vocab["ll"]},
            toy["added_tokens"][:2],
        )
        self._sound = [toy, built, small, small]

    def run(self, number: int) -> None:
        from dsv4_bridge.text import open_tokenizer
        from dsv4_bridge.train.chat.masks import open_chat_tokenizer

        rng = random.Random(f"{self._seed} {number}")
        body = rng.choice(self._sound)
        raw = json.dumps(body, ensure_ascii=False).encode()
        if rng.random() < 0.25:
            raw = mutate_bytes(raw, rng)
        else:
            body = json.loads(raw)
            if rng.random() < 0.2:
                body["pre_tokenizer"] = {
                    "type": "Split",
                    "pattern": {"Regex": rng.choice(_PATTERNS)},
                    "behavior": "Isolated",
                    "invert": False,
                }
            if rng.random() < 0.5:  # a part, not the vocabulary, which has most of the places
                name = rng.choice([k for k in body if k not in ("model", "added_tokens")])
                body[name] = mutate_value([body[name]], rng)
                body[name] = body[name][0] if isinstance(body[name], list) and body[name] else body[name]
            else:
                body = mutate_value(body, rng)
            raw = to_json(body, rng)
        (self._folder / "tokenizer.json").write_bytes(raw)
        chat = open_chat_tokenizer(self._folder)
        opened = open_tokenizer(self._folder, self._spec)
        assert opened is not None
        text = rng.choice((" " * 3000, "a" * 3000 + "!", "hello 12345 \n\n 中文", "\r\n\t" * 900, "0" * 3000))
        opened.decode(opened.encode(text)[:100])
        chat.library.encode_batch([text], add_special_tokens=False)


_PATTERNS = (
    "(a+)+$", "(a|aa)+$", "(?:a?){30}a{30}", r"(\s*)*x", r"(.*)*\1", "[" * 3000, "(" * 3000, "a{1000000}", "((a{99}){99}){99}",
    "(?<n>a\\g<n>?)", "(?i", "\\", "\\p{Nope}", "[z-a]", "(?~a)", "*", "x" * 100_000, r"(?<=a+)b", r"\s+$", "(?>a+)b", "[[:alpha:]]+",
)  # fmt: skip


class ChatLines:
    """Chats in JSONL, read and encoded."""

    def __init__(self, folder: Path, seed: int):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, "x"]}'}}
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
        turns = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "u"}]},
            {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "r"},
            {"role": "assistant", "content": "a"},
        ]
        self._path, self._seed = folder / "chat.jsonl", seed
        self._sound = [
            {"messages": turns, "tools": [tool], "thinking_mode": "thinking", "reasoning_effort": "high"},
            {"messages": turns[:2] + turns[4:], "enable_thinking": False},
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
            {"instruction": "i", "input": "x", "output": "o"},
            {"prompt": "p", "completion": "c", "chat_template_kwargs": {"enable_thinking": True}},
        ]

    def run(self, number: int) -> None:
        from dsv4_bridge.train.chat.encode import encode_messages
        from dsv4_bridge.train.chat.jsonl import mode_of, read_chat_jsonl

        rng = random.Random(f"{self._seed} {number}")
        lines = [json.dumps(rng.choice(self._sound)).encode() for _ in range(2)]
        lines.append(mutate_json(json.dumps(rng.choice(self._sound)).encode(), rng))
        self._path.write_bytes(b"\n".join(lines))
        for conversation in read_chat_jsonl(self._path):
            thinking, _ = mode_of(conversation, False, "0731", "chat.jsonl")
            encode_messages(conversation.messages, thinking=thinking).encode()


class Texts:
    """Text files, and JSONL and arrays of documents."""

    def __init__(self, folder: Path, seed: int):
        self._folder, self._seed = folder, seed
        rows = [{"text": f"a line {i} é 中", "n": [i, None, 1.5]} for i in range(6)]
        self._sound = {
            "a.jsonl": "\n".join(map(json.dumps, rows)).encode(),
            "a.json": json.dumps(rows).encode(),
            "a.txt": "plain text é\n中文\n".encode() * 5,
        }

    def run(self, number: int) -> None:
        from dsv4_bridge.train.text_sources import BadSource, explained, find_sources, texts, units

        rng = random.Random(f"{self._seed} {number}")
        name = rng.choice(sorted(self._sound))
        data = self._sound[name]
        if name == "a.json" and rng.random() < 0.6:
            data = to_json(mutate_value(json.loads(data), rng), rng)
        elif name == "a.jsonl" and rng.random() < 0.6:
            one, _, rest = data.partition(b"\n")
            data = mutate_json(one, rng) + b"\n" + rest
        else:
            data = mutate_bytes(data, rng)
        path, unpack = self._folder / name, self._folder / "unpacked"
        path.write_bytes(data)
        unpack.mkdir(exist_ok=True)
        sources = find_sources([path], unpack)
        try:
            for unit in units(sources):
                for _, _, text in texts(unit, "text"):
                    text.encode()
        except BadSource as bad:
            raise explained(bad, sources) from None


class Journals:
    """What a conversion that was stopped has left of itself."""

    def __init__(self, folder: Path, seed: int):
        from dsv4_bridge import journal
        from dsv4_bridge.codec import Certificate, EncodeStats
        from dsv4_bridge.emit import Report

        self._folder, self._seed = folder, seed
        report = Report(3, 99, {"a": EncodeStats(4, 1, 3)}, {"b": Certificate(4, 4)}, {"c": 5}, 1)
        (folder / "x").write_bytes(b"x" * 9)
        journal.begin(folder, "0" * 64, "import")
        journal.enter(folder, 0, "x", folder / "x", report.to_json())
        journal.enter(folder, 1, "y", folder / "x", report.to_json())
        journal.place(folder)
        self._sound = {path.name: path.read_bytes() for path in folder.glob("journal*")}

    def run(self, number: int) -> None:
        from dsv4_bridge import journal
        from dsv4_bridge.emit import Report

        rng = random.Random(f"{self._seed} {number}")
        for name, data in self._sound.items():
            lines = data.splitlines()
            for at in rng.sample(range(len(lines)), min(len(lines), rng.choice((0, 1, 1, 3)))):
                lines[at] = mutate_json(lines[at], rng)
            (self._folder / name).write_bytes(b"\n".join(lines))
        header, total = journal.header(self._folder), Report()
        if header is not None:
            assert isinstance(header["identity"], str) and isinstance(header["label"], str)
        for line in journal.lines(self._folder):
            with contextlib.suppress(ValueError):  # a name with a zero byte is of no file
                journal.is_of(line, self._folder / "x")
            total.merge(Report.from_json(line["report"]))
        json.dumps(total.to_json())
        journal.placing(self._folder)
        if header is None:
            raise BridgeError("no journal")


class RankFiles:
    """What processes that share a conversion say of themselves: others' files while this one joins, and locks."""

    def __init__(self, folder: Path, seed: int):
        from dsv4_bridge import ranks, team

        ranks._STALE, ranks.BEAT, team._PARTING = 0.05, 0.01, 0.05  # type: ignore[misc]
        self._folder, self._seed = folder, seed
        (folder / "kept").touch()  # folders that are empty go at the end of a run

    def run(self, number: int) -> None:
        from dsv4_bridge import lock, ranks
        from dsv4_bridge.emit import Report
        from dsv4_bridge.team import Team

        rng = random.Random(f"{self._seed} {number}")
        state = rng.choice(("joining", "working", "done", "finished", "failed", "holding"))
        more = {
            "members": {"1": "w"},
            "shares": [["a"], ["b"]],
            "result": Report(1, 2).to_json(),
            "made": ["/nowhere/x"],
        }
        entry = ranks.introduction(rng.randrange(2), state, {"a": "b"}) | more
        entry |= {"error": "e", "told": False, "discard": False, "session": rng.choice(("", "s"))}
        if rng.random() < 0.7:
            entry["pid"] = 1 << 22  # nobody
        raw = mutate_json(json.dumps(entry).encode(), rng)
        if rng.random() < 0.4:
            out = self._folder / "out"
            lock.lock_path(out).write_bytes(raw)
            with lock.hold(out, "writing"):
                return
        work = self._folder / f"out{number}" / "work" / "ranks"
        work.mkdir(parents=True)
        (work / f"{entry['rank']}.json").write_bytes(raw)
        if found := ranks.read(work / f"{entry['rank']}.json"):
            ranks.who(found)
            if "result" in found:
                Report.from_json(found["result"])
        team = Team(work, ranks.Ranks(1 - entry["rank"], 2, 0.05), {"a": "b"}, "import")
        try:
            team.claim()
            try:
                team.meet()
            except BaseException as error:
                team.fail(error, discard=False)
                raise
        finally:
            team.close()


class Progress:
    """How far a training run was, beside its checkpoint; and its log."""

    def __init__(self, folder: Path, seed: int):
        self._path, self._seed = folder / "training.json", seed

    def run(self, number: int) -> None:
        from dsv4_bridge.train.resuming import _progress
        from dsv4_bridge.train.telling import Teller

        rng = random.Random(f"{self._seed} {number}")
        sound = {"step": 3, "rows": 12, "tokens": 4096}
        raw = json.dumps(sound).encode()
        values: list[Any] = [
            True,
            4.5,
            -1,
            1 << 63,
            "3",
            None,
            [],
            Raw("1" * 5000),
            Raw("NaN"),
            Raw("1e400"),
            Raw('1,"step":2'),
        ]
        if rng.random() < 0.5:
            raw = to_json(sound | {rng.choice([*sound, "x"]): rng.choice(values)}, rng)
        else:
            raw = mutate_json(raw, rng)
        self._path.write_bytes(raw)
        lines = [mutate_json(b'{"step": 3, "loss": 1.5}', rng) for _ in range(3)]
        (self._path.parent / "log.jsonl").write_bytes(b"\n".join(lines))
        Teller(self._path.parent, 1, 1, lambda line: None, False, 2).close()
        state = _progress(self._path, "resuming")
        assert all(type(n) is int and 0 <= n < 1 << 63 for n in vars(replace(state)).values())


def hub(folder: Path, seed: int) -> Loader:
    """Answers of a server that should be the Hub."""
    from fuzz_hub import Answers

    return Answers(folder, seed)


LOADERS: dict[str, Callable[[Path, int], Loader]] = {
    "recipe": Recipes,
    **{
        name: (lambda folder, seed, target=target: Checkpoints(folder, seed, target))
        for name, target in {
            "config": "config",
            "index": "index",
            "run_config": "run_config",
            "header": "header",
            "metadata": ".metadata",
            "distcp": ".distcp",
        }.items()
    },
    "npy": ChatStores,
    "idx": Indexed,
    "tokenizer": Tokenizers,
    "journal": Journals,
    "ranks": RankFiles,
    "state": Progress,
    "chat": ChatLines,
    "text": Texts,
    "hub": hub,
}
