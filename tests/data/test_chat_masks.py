"""Tokens and loss masks of conversations, token by token; what is learned in each mode."""

import json
import random
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tools import VECTORS as CASES
from chat_tools import conversation, vector, words, write_bpe

from dsv4_bridge import BridgeError
from dsv4_bridge.chat import Segment, encode_segments
from dsv4_bridge.chat.messages import read_messages
from dsv4_bridge.data.chat.jsonl import Conversation
from dsv4_bridge.data.chat.masks import ChatTokenizer, open_chat_tokenizer, tokenize, tokenize_all
from dsv4_bridge.data.chat.samples import SampleCounts, build_samples
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.toy.tokenizer import byte_letters, toy_tokenizer

pytestmark = pytest.mark.hf
EOS = "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="module", params=["toy", "bpe", "bpe-trimmed"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "toy":
        for name, content in toy_tokenizer(tiny(VARIANTS["Flash"])).items():
            (folder / name).write_bytes(content)
        return open_chat_tokenizer(folder)
    return open_chat_tokenizer(write_bpe(folder, trim=request.param.endswith("trimmed")))


def ids_of(tokenizer: ChatTokenizer, text: str) -> list[int]:
    return tokenizer.library.encode(text, add_special_tokens=False).ids


def check(tokenizer: ChatTokenizer, segments: tuple[Segment, ...]) -> None:
    """Tokens of the whole are those of its pieces in turn, so each token's piece is known without offsets."""
    tokens = tokenize(tokenizer, segments)
    assert tokens.ids.tolist() == ids_of(tokenizer, "".join(s.text for s in segments))
    pieces = [ids_of(tokenizer, s.text) for s in segments]
    assert tokens.ids.tolist() == list(chain.from_iterable(pieces))
    wanted = [s.trained for s, piece in zip(segments, pieces, strict=True) for _ in piece]
    assert tokens.mask.tolist() == [False, *wanted[1:]]
    assert (tokens.ids.dtype, tokens.mask.dtype, tokens.straddling) == (np.int32, np.bool_, 0)


@pytest.mark.parametrize("mask", ["assistant", "last_turn", "full"])
def test_every_token_has_its_segment_s_mask(mask: str, tokenizer: ChatTokenizer) -> None:
    rng = random.Random(11)
    for number, thinking in CASES.items():
        messages, tools, _ = vector(number)
        if number != 4 or not tokenizer.lost:
            check(tokenizer, encode_segments(messages, thinking=thinking, tools=tools, mask=mask))
    for _ in range(12):
        line = conversation(rng)
        segments = encode_segments(
            line["messages"], thinking=line["enable_thinking"], tools=line.get("tools"), mask=mask
        )
        check(tokenizer, segments)


def test_an_answer_is_learned_with_its_end_and_without_its_opening(tokenizer: ChatTokenizer) -> None:
    talk = [
        {"role": "user", "content": "hello "},
        {"role": "assistant", "content": " world ", "reasoning_content": "你好 "},
    ]
    for thinking, said in ((True, f"你好 </think> world {EOS}"), (False, f" world {EOS}")):
        tokens = tokenize(tokenizer, encode_segments(talk, thinking=thinking))
        learned = tokens.ids[tokens.mask].tolist()
        assert learned == ids_of(tokenizer, said) and tokens.mask[-1]
        assert tokenizer.library.decode(learned, skip_special_tokens=False) == said


def learned(messages: list, mask: str, **how) -> list[str]:
    return [s.text for s in encode_segments(messages, mask=mask, **how) if s.trained]


TURNS = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "A", "reasoning_content": "ra"},
    {"role": "user", "content": "b?"},
    {"role": "assistant", "content": "B", "reasoning_content": "rb", "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "C", "reasoning_content": "rc"},
]
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'


def test_modes() -> None:
    """The last turn is all that is said for the last user, calls of tools among it."""
    said = [f"ra</think>A{EOS}", f"rb</think>B{CALL}{EOS}", f"rc</think>C{EOS}"]
    assert learned(TURNS, "assistant", tools=[TOOL]) == said
    assert learned(TURNS, "last_turn", tools=[TOOL]) == said[1:]
    assert learned(TURNS, "assistant", thinking=False) == [f"A{EOS}", f"B{CALL}{EOS}", f"C{EOS}"]
    assert learned(TURNS, "assistant") == [f"A{EOS}", f"B{CALL}{EOS}", f"rc</think>C{EOS}"]
    assert "".join(learned(TURNS, "full")).startswith("<｜begin▁of▁sentence｜><｜User｜>a?")
    with pytest.raises(BridgeError, match="mask 'all', expected one of assistant, last_turn, full"):
        learned(TURNS, "all")
    light = [*TURNS[:1], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    assert learned(light, "assistant", tools=[TOOL]) == said[1:]
    assert learned(light, "full") == learned(TURNS, "full")


def samples_of(tokenizer: ChatTokenizer, messages: list, mask: str, thinking: bool, tools: list | None = None) -> list:
    talk = Conversation(read_messages(messages, tools=tools), thinking, None, 1)
    decode = tokenizer.library.decode
    return [
        (decode(s.tokens, skip_special_tokens=False), decode(s.tokens[s.loss_mask], skip_special_tokens=False))
        for s in build_samples([talk], tokenizer, seq_length=4096, mask=mask)
    ]


def test_each_turn_learns_what_the_model_says_where_thoughts_are_dropped(tokenizer: ChatTokenizer) -> None:
    """One sample an answer, its context exactly the prompt that the model gets there."""
    from dsv4_bridge.chat import encode_messages

    found = samples_of(tokenizer, TURNS, "each_turn", True)
    answers = [1, 3, 5]
    assert [said for _, said in found] == [f"ra</think>A{EOS}", f"rb</think>B{CALL}{EOS}", f"rc</think>C{EOS}"]
    assert [text.removesuffix(said) for text, said in found] == [encode_messages(TURNS[:i]) for i in answers]
    for thinking, tools in ((False, None), (True, [TOOL])):  # nothing is dropped: one sample holds it all
        assert samples_of(tokenizer, TURNS, "each_turn", thinking, tools) == samples_of(
            tokenizer, TURNS, "assistant", thinking, tools
        )


def test_cutting_takes_ids_and_mask_together(tokenizer: ChatTokenizer) -> None:
    rng = random.Random(5)
    lines = [conversation(rng, 12) for _ in range(25)]
    talks = [
        Conversation(read_messages(x["messages"], tools=x.get("tools")), x["enable_thinking"], None, i)
        for i, x in enumerate(lines, 1)
    ]
    whole = {s.line: s for s in build_samples(talks, tokenizer, seq_length=1 << 20)}
    assert len(whole) == 25
    for seq_length in (2, 3, 17, 40, 150):
        counts = SampleCounts()
        cut = {s.line: s for s in build_samples(talks, tokenizer, seq_length=seq_length, counts=counts)}
        for line, sample in whole.items():
            tokens, mask = sample.tokens[:seq_length], sample.loss_mask[:seq_length]
            assert (line in cut) == mask.any()
            if line in cut:
                assert np.array_equal(cut[line].tokens, tokens) and np.array_equal(cut[line].loss_mask, mask)
        assert (counts.samples, counts.samples + counts.dropped) == (len(cut), 25)
        assert counts.truncated == sum(len(s.tokens) > seq_length for s in whole.values())
        assert counts.tokens + counts.cut_tokens == sum(len(s.tokens) for s in whole.values())
        assert counts.learned + counts.cut_learned == sum(s.loss_mask.sum() for s in whole.values())
        assert counts.learned == sum(s.loss_mask.sum() for s in cut.values())
    for wrong in (1, 0, "4"):
        with pytest.raises(BridgeError, match="expected at least 2 tokens"):
            list(build_samples(talks, tokenizer, seq_length=wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", ["assistant", "each_turn", "full"])
def test_too_long_ones_are_split_left_out_or_refused(tokenizer: ChatTokenizer, mask: str) -> None:
    """Split, every learned token is learned once, behind the token that was in front of it."""
    rng = random.Random(6)
    lines = [conversation(rng, 12) for _ in range(25)]
    talks = [
        Conversation(read_messages(x["messages"], tools=x.get("tools")), x["enable_thinking"], None, i)
        for i, x in enumerate(lines, 1)
    ]
    whole = list(build_samples(talks, tokenizer, seq_length=1 << 20, mask=mask))
    for seq_length in (2, 3, 17, 150, 1 << 20):
        longer = [s for s in whole if len(s.tokens) > seq_length]
        counts = SampleCounts()
        found = list(build_samples(talks, tokenizer, seq_length=seq_length, mask=mask, too_long="split", counts=counts))
        rest = iter(found)
        for sample in whole:
            learned = np.flatnonzero(sample.loss_mask)
            while len(learned):
                part = next(rest)
                assert part.line == sample.line and 2 <= len(part.tokens) <= seq_length and not part.loss_mask[0]
                first = learned[0] - np.flatnonzero(part.loss_mask)[0]  # of the part, in the sample
                assert first % max(1, seq_length - 1) == 0 or first == 0
                own = slice(first, first + len(part.tokens))
                assert np.array_equal(part.tokens, sample.tokens[own])
                assert np.array_equal(part.loss_mask[1:], sample.loss_mask[own][1:])
                learned = learned[part.loss_mask.sum() :]
        assert next(rest, None) is None
        assert (counts.split, counts.too_long, counts.truncated, counts.dropped) == (len(longer), 0, 0, 0)
        assert counts.learned == sum(int(s.loss_mask.sum()) for s in whole) and counts.cut_learned == 0
        assert counts.samples == len(found) and counts.tokens == sum(len(s.tokens) for s in found)

        counts, left_out = SampleCounts(), list[tuple[int, str]]()
        options: dict[str, Any] = {"seq_length": seq_length, "mask": mask, "counts": counts, "left_out": left_out}
        found = list(build_samples(talks, tokenizer, too_long="skip", **options))
        kept = [s for s in whole if len(s.tokens) <= seq_length]
        assert [s.tokens.tolist() for s in found] == [s.tokens.tolist() for s in kept]
        assert [line for line, _ in left_out] == [s.line for s in longer] and counts.too_long == len(longer)
        assert [reason.split()[0] for _, reason in left_out] == [f"{len(s.tokens):,}" for s in longer]
        assert (counts.cut_tokens, counts.samples) == (sum(len(s.tokens) for s in longer), len(kept))

        refused = build_samples(talks, tokenizer, seq_length=seq_length, mask=mask, too_long="refuse", where="talks")
        if longer:
            size = f"{len(longer[0].tokens):,}"
            with pytest.raises(
                BridgeError, match=rf"talks, line {longer[0].line}: {size} tokens, more than .*--too-long"
            ):
                list(refused)
        else:
            assert len(list(refused)) == len(whole)
    with pytest.raises(BridgeError, match="too_long 'trim', expected one of cut, split, skip, refuse"):
        list(build_samples(talks, tokenizer, seq_length=9, too_long="trim"))


def test_a_token_over_a_boundary_is_not_learned_and_counted(tmp_path: Path) -> None:
    tokenizer = open_chat_tokenizer(write_bpe(tmp_path))
    assert len(ids_of(tokenizer, "hello")) == 1
    for first, second in ((False, True), (True, False)):
        tokens = tokenize(tokenizer, [Segment("world hel", "x", first), Segment("lo world", "x", second)])
        assert tokens.straddling == 1
        assert tokens.mask.tolist() == [False, first, False, second]  # w|orld| hello| world


def test_bytes_of_one_character_are_learned_together(tokenizer: ChatTokenizer) -> None:
    rng = random.Random(3)
    for _ in range(20):
        text = "".join(rng.choice("𐍈🫠龘ÿa") for _ in range(6))
        tokens = tokenize(tokenizer, [Segment("\n", "x", False), Segment(text, "x", True), Segment("\n", "x", False)])
        assert tokens.straddling == 0
        assert tokenizer.library.decode(tokens.ids[tokens.mask].tolist()) == text


def test_a_token_of_halves_of_two_characters_is_not_learned(tmp_path: Path) -> None:
    """`éé` as bytes C3, A9 C3, A9: the middle token belongs to both characters."""
    body = json.loads(toy_tokenizer(tiny(VARIANTS["Flash"]))["tokenizer.json"])
    vocabulary = body["model"]["vocab"]
    first, second = (byte_letters()[byte] for byte in "é".encode())
    vocabulary[second + first] = max(vocabulary.values()) + 1
    body["model"]["merges"] = [[second, first]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    tokenizer = open_chat_tokenizer(tmp_path)
    for learned_first in (False, True):
        tokens = tokenize(tokenizer, [Segment("\né", "x", learned_first), Segment("é", "x", not learned_first)])
        assert tokens.ids.tolist()[1:] == [vocabulary[x] for x in (first, second + first, second)]
        assert tokens.mask.tolist() == [False, learned_first, False, not learned_first] and tokens.straddling == 1


def test_a_space_that_offsets_leave_out_makes_its_neighbour_unclear(tmp_path: Path) -> None:
    """Offsets trimmed of `a␣` do not say whose the space is: the token behind is left out, and counted."""
    body = json.loads(toy_tokenizer(tiny(VARIANTS["Flash"]))["tokenizer.json"])
    vocabulary, space = body["model"]["vocab"], byte_letters()[32]
    vocabulary["a" + space] = max(vocabulary.values()) + 1
    body["model"]["merges"] = [["a", space]]
    body["post_processor"] = body["pre_tokenizer"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    tokens = tokenize(open_chat_tokenizer(tmp_path), [Segment("\na ", "x", False), Segment("bc", "x", True)])
    assert tokens.ids.tolist()[1:] == [vocabulary[x] for x in ("a" + space, "b", "c")]
    assert tokens.mask.tolist() == [False, False, False, True] and tokens.straddling == 1


def test_several_at_once_are_the_same(tokenizer: ChatTokenizer) -> None:
    rng = random.Random(8)
    talks = [encode_segments([{"role": "user", "content": words(rng, 40)}]) for _ in range(9)]
    for one, many in zip((tokenize(tokenizer, t) for t in talks), tokenize_all(tokenizer, talks), strict=True):
        assert np.array_equal(one.ids, many.ids) and np.array_equal(one.mask, many.mask)


def test_the_quick_way_is_the_definition(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(9)
    lines = [conversation(rng, 12) for _ in range(15)]
    talks = [encode_segments(x["messages"], thinking=x["enable_thinking"]) for x in lines]
    for before, behind in (("hel", "lo"), ("hello ", "\nworld"), ("hello  ", " \n"), ("world", " hello")):
        talks.append((Segment(before, "x", False), Segment(behind, "x", True)))
    quick = tokenize_all(tokenizer, talks)
    monkeypatch.setattr("dsv4_bridge.data.chat.masks._masked_by_edges", lambda *_: None)
    for one, defined in zip(quick, tokenize_all(tokenizer, talks), strict=True):
        assert np.array_equal(one.mask, defined.mask) and one.straddling == defined.straddling


def test_a_tokenizer_s_own_truncation_and_padding_are_off(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = write_bpe(tmp_path) / "tokenizer.json"
    library = Tokenizer.from_file(str(path))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(path))
    short, long = Segment("hello", "x", True), Segment("hello world " * 20, "x", True)
    found = tokenize_all(open_chat_tokenizer(tmp_path), [[short], [long]])
    assert len(found[0].ids) == 1 and len(found[1].ids) > 20


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=r"tokenizer.json: No such file or directory; give the folder"):
        open_chat_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BridgeError, match="no tokenizer"):
        open_chat_tokenizer(tmp_path)
    lacking = open_chat_tokenizer(write_bpe(tmp_path / "base", without="</think>"))
    talk = [{"role": "user", "content": "hello"}]
    assert lacking.lost == ("</think>",)
    tokenize(lacking, encode_segments(talk))
    with pytest.raises(BridgeError, match="has no token </think>; give a DeepSeek-V4 checkpoint's"):
        tokenize(lacking, encode_segments(talk, thinking=False))
