"""Loaders of what people write and other tools make: recipes, chats, text; see `fuzz`."""

import json
import random
from pathlib import Path

from mutations import DEEP, mutate_bytes, mutate_json, mutate_value, mutate_yaml, to_json


class Recipes:
    """Recipes in YAML, and `key=value` words."""

    def __init__(self, folder: Path, seed: int):
        from dsv4_bridge.train.choose import choose, dump
        from dsv4_bridge.train.recipes import RECIPES

        self._folder, self._seed = folder, seed
        self._sound = [dump(choose(name).recipe).encode() for name in RECIPES]

    def run(self, number: int) -> None:
        from dsv4_bridge.train.choose import as_plain, choose, dump

        rng = random.Random(f"{self._seed} {number}")
        path = self._folder / "recipe.yaml"
        path.write_bytes(mutate_yaml(rng.choice(self._sound), rng))
        words = ["batch.size=" + rng.choice(_WORDS), rng.choice(_WORDS)] if rng.random() < 0.1 else []
        chosen = choose(str(path), words)
        json.dumps(as_plain(chosen.recipe))
        dump(chosen.recipe)


_WORDS = (
    "!!int ''",
    "2020-13-45",
    "1" * 5000,
    '"\\U00110000"',
    "[" * DEEP,
    "{a: b",
    "&a [*a]",
    "=",
    "a=b=c",
    "1e999",
    "\x1b[31m",
    "!!python/name:os.system",
    "0x" + "f" * 5000,
    "1:1:1:1",
    "lora.rank=null",
    "seed=.nan",
    "data.train=[[1]]",
    "~",
    "",
)


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
        from dsv4_bridge.chat.encode import encode_messages
        from dsv4_bridge.data.chat.jsonl import mode_of, read_chat_jsonl

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
        from dsv4_bridge.data.sources import BadSource, explained, find_sources, texts, units

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
