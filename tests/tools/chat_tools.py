"""Material for the tests of chat data: a tokenizer with merges, strategies, random conversations."""

import json
import random
from pathlib import Path

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from conftest import DATA
from dsv4_bridge.chat.strings import ANSWER_TOKENS, TURN_TOKENS

SPECIAL = (*TURN_TOKENS, *ANSWER_TOKENS)
VECTORS = {1: True, 2: True, 3: True, 4: False}  # number -> thinking


def vector(number: int) -> tuple[list, list | None, str]:
    """Messages, tools and text of an encoding vector."""
    raw = json.loads((DATA / f"chat/test_input_{number}.json").read_text())
    text = (DATA / f"chat/test_output_{number}.txt").read_text()
    return (raw["messages"], raw["tools"], text) if isinstance(raw, dict) else (raw, None, text)


def write_bpe(folder: Path, trim: bool = False, without: str = "") -> Path:
    """A byte-level BPE tokenizer with merges, trained on the vectors; DeepSeek-V4's tokens in it."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.post_processor = processors.ByteLevel(trim_offsets=trim)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([vector(n)[2] for n in VECTORS] + ["hello world hello\n\n. "] * 50, trainer)
    library.add_tokens([AddedToken(t, normalized=False, special=False) for t in SPECIAL if t != without])
    folder.mkdir(exist_ok=True, parents=True)
    library.save(str(folder / "tokenizer.json"))
    return folder


# Text that the encoding can hold, with pieces that look like its own.
_pieces = st.sampled_from(
    ["</tool_result>", '" string="true">', "\n\n<", "invoke", "{", "｜", "</", "é你🤗", "hello", " "]
)
texts = st.lists(_pieces | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=6).map("".join)
clean = texts.filter(lambda text: not any(token in text for token in SPECIAL))
names = st.text(st.characters(categories=["L", "N"], include_characters="_-. "), min_size=1, max_size=8)
floats = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | floats | clean,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)


def words(rng: random.Random, most: int) -> str:
    """Random words, a few of many bytes a character."""
    kinds = ["hello ", "world", ".\n\n", " ", "你好", "🤗", "x = 3\n", "Straße"]
    return "".join(rng.choice(kinds) for _ in range(rng.randrange(1, most)))


def conversation(rng: random.Random, most: int = 30, tools: bool | None = None) -> dict:
    """A random line of a chat's JSONL, in thinking or chat mode, perhaps with tools."""
    messages = [{"role": "system", "content": words(rng, most)}] if rng.random() < 0.5 else []
    with_tools = rng.random() < 0.3 if tools is None else tools
    for turn in range(rng.randrange(1, 4)):
        messages.append({"role": "user", "content": words(rng, most)})
        answer = {"role": "assistant", "content": words(rng, most), "reasoning_content": words(rng, most)}
        if with_tools:
            arguments = {"a": rng.randrange(99), "b": words(rng, 4)}
            call = {"id": f"c{turn}", "function": {"name": "look", "arguments": arguments}}
            messages.append(answer | {"tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": f"c{turn}", "content": words(rng, most)})
        messages.append(answer | {"content": words(rng, most)})
    line: dict = {"messages": messages, "enable_thinking": rng.random() < 0.6}
    if with_tools:
        line["tools"] = [{"type": "function", "function": {"name": "look", "parameters": {"x": words(rng, 4)}}}]
    return line
