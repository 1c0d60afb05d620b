"""Tokenizers, and the patterns in them; see `fuzz`."""

import json
import random
from pathlib import Path

from mutations import mutate_bytes, mutate_value, to_json


class Tokenizers:
    """tokenizer.json of a toy, and of a released tokenizer's build."""

    def __init__(self, folder: Path, seed: int):
        from dsv4_bridge.spec.variants import VARIANTS, tiny
        from dsv4_bridge.toy.tokenizer import toy_tokenizer

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
        from dsv4_bridge.data.chat.masks import open_chat_tokenizer
        from dsv4_bridge.text.tokenizer import open_tokenizer

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
    "(a+)+$",
    "(a|aa)+$",
    "(?:a?){30}a{30}",
    r"(\s*)*x",
    r"(.*)*\1",
    "[" * 3000,
    "(" * 3000,
    "a{1000000}",
    "((a{99}){99}){99}",
    "(?<n>a\\g<n>?)",
    "(?i",
    "\\",
    "\\p{Nope}",
    "[z-a]",
    "(?~a)",
    "*",
    "x" * 100_000,
    r"(?<=a+)b",
    r"\s+$",
    "(?>a+)b",
    "[[:alpha:]]+",
)
