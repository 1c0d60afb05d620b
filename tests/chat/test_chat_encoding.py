"""The chat encoding, both ways: the released vectors, round trips, reasoning efforts, refusals."""

import itertools
import json
from typing import Any

import pytest
from chat_tools import SPECIAL, VECTORS, clean, names, values, vector
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_bridge import BridgeError
from dsv4_bridge.chat import Message, ToolCall, encode_messages, encode_segments, parse_completion, read_messages

pytestmark = pytest.mark.hf  # the helper module needs the tokenizers library

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
SYSTEM = {"role": "system", "content": "Be kind."}
ASK, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}
ASK2, ANSWER2 = (
    {"role": "user", "content": "How?"},
    {"role": "assistant", "content": "Thus.", "reasoning_content": "M."},
)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def call(name: str, arguments: Any, id: str = "") -> dict:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize("number", VECTORS)
def test_vectors_encode_exactly(number: int) -> None:
    messages, tools, text = vector(number)
    assert encode_messages(messages, thinking=VECTORS[number], tools=tools) == text
    segments = encode_segments(messages, thinking=VECTORS[number], tools=tools)
    assert "".join(s.text for s in segments) == text and all(s.text for s in segments)


@pytest.mark.parametrize("number", VECTORS)
def test_vectors_parse_back(number: int) -> None:
    """What is learned of a vector are its assistant's messages, less the thoughts that are dropped."""
    messages, tools, _ = vector(number)
    said = [s.text for s in encode_segments(messages, thinking=VECTORS[number], tools=tools) if s.trained]
    asked = [m for m in messages if m["role"] == "assistant"]
    assert len(said) == len(asked) > 0
    for k, (text, message) in enumerate(zip(said, asked, strict=True)):
        dropped = number == 2 and k == 0
        thinking = VECTORS[number] and not dropped
        parsed = parse_completion(text, thinking=thinking)
        assert parsed.content == (message.get("content") or "")
        assert parsed.reasoning_content == (message["reasoning_content"] if thinking else "")
        wanted = [c["function"] for c in message.get("tool_calls", [])]
        assert [(c.name, c.values) for c in parsed.tool_calls] == [
            (c["name"], json.loads(c["arguments"])) for c in wanted
        ]


answers = st.builds(
    Message,
    st.just("assistant"),
    clean,
    clean,
    st.lists(
        st.builds(
            ToolCall,
            names,
            st.dictionaries(names, values, max_size=3).map(lambda found: json.dumps(found, ensure_ascii=False)),
        ),
        max_size=3,
    ).map(tuple),
    ended=st.booleans(),
)


@settings(max_examples=250, deadline=None)
@given(answers, st.booleans(), clean)
def test_an_answer_returns_from_its_text(answer: Message, thinking: bool, asked: str) -> None:
    segments = encode_segments([Message("user", asked), answer], thinking=thinking)
    assert "".join(s.text for s in segments if not s.trained).endswith("<think>" if thinking else "</think>")
    said = "".join(s.text for s in segments if s.trained)
    parsed = parse_completion(said, thinking=thinking, ended=answer.ended)
    assert (parsed.content, parsed.ended) == (answer.content, answer.ended)
    assert parsed.reasoning_content == (answer.reasoning_content if thinking else "")
    assert len(parsed.tool_calls) == len(answer.tool_calls)
    for got, gave in zip(parsed.tool_calls, answer.tool_calls, strict=True):
        assert got.name == gave.name
        assert repr(got.values) == repr(gave.values)  # repr: 1, 1.0 and True are not the same
    again = encode_segments([Message("user", asked), parsed], thinking=thinking)
    assert "".join(s.text for s in again) == "".join(s.text for s in segments)


@settings(max_examples=100, deadline=None)
@given(answers, clean)
def test_a_message_returns_from_openai_s_form(answer: Message, content: str) -> None:
    messages = (Message("system", content, tools=('{"name": "look"}',), response_format="[1]"), Message("user", "?"))
    messages += (answer, Message("tool", content))
    assert read_messages(json.loads(json.dumps([m.to_openai() for m in messages]))) == messages


def test_thinking_and_chat_mode() -> None:
    talk = [SYSTEM, ASK, ANSWER]
    assert encode_messages(talk) == f"{BOS}Be kind.{USER}Why?{ASSISTANT}<think>Hm.</think>So.{EOS}"
    assert encode_messages(talk, thinking=False) == f"{BOS}Be kind.{USER}Why?{ASSISTANT}</think>So.{EOS}"
    assert encode_messages(talk[:2]) == f"{BOS}Be kind.{USER}Why?{ASSISTANT}<think>"  # open for the answer
    assert encode_messages(talk[:2], thinking=False).endswith(f"{ASSISTANT}</think>")
    unended = [SYSTEM, ASK, ANSWER | {"wo_eos": True}]
    assert encode_messages(unended) + EOS == encode_messages(talk)


def test_generate_s_chat_form_is_this_encoding(tmp_path) -> None:
    """`dsv4 generate --chat` writes the same text by itself, since it stands below this room."""
    from dsv4_bridge import make_toy
    from dsv4_bridge.spec.variants import VARIANTS, tiny
    from dsv4_bridge.text.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(make_toy(tmp_path / "toy", "Flash", 3), tiny(VARIANTS["Flash"]))
    assert tokenizer is not None
    assert tokenizer.chat("Why?") == tokenizer.encode(encode_messages([ASK], thinking=False))


def test_thoughts_of_earlier_turns_are_dropped_unless_there_are_tools() -> None:
    talk = [SYSTEM, ASK, ANSWER, ASK2, ANSWER2]
    text = encode_messages(talk)
    assert f"{USER}Why?{ASSISTANT}</think>So.{EOS}{USER}How?{ASSISTANT}<think>M.</think>Thus." in text
    kept = f"{USER}Why?{ASSISTANT}<think>Hm.</think>So.{EOS}"
    assert kept in encode_messages(talk, drop_thinking=False)
    assert kept in encode_messages(talk, tools=[TOOL])
    assert "<think>Hm." not in text and "Hm." not in encode_messages(talk, tools=[TOOL], thinking=False)
    # A developer's turn before the last goes as a whole, with tools it stays.
    developer = [SYSTEM, ASK, ANSWER, {"role": "developer", "content": "Search."}, ANSWER, ASK2]
    assert "Search." not in encode_messages(developer)
    assert f"{USER}Search.{ASSISTANT}<think>" in encode_messages(developer, tools=[TOOL])


def test_efforts_differ_by_generation() -> None:
    def prefix(effort: str | None, generation: str | None, thinking: bool = True) -> str:
        text = encode_messages([SYSTEM, ASK], thinking=thinking, reasoning_effort=effort, generation=generation)
        assert text.startswith(BOS) and "Be kind." in text
        return text[len(BOS) : text.index("Be kind.")]

    absolute, beyond = prefix("max", "april"), prefix("max", "0731")
    assert absolute.startswith("Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very")
    assert beyond.startswith("Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\nYou MUST")
    assert absolute.endswith("is left unchecked.\n\n") and beyond.endswith("remains undiscovered.\n\n")
    assert (len(absolute), len(beyond)) == (476, 526)  # vLLM's prompt of 579 characters has 53 besides
    assert prefix("high", "0731") == absolute and prefix("high", "april") == ""
    assert prefix("low", "0731") == prefix(None, None) == prefix(None, "april") == ""
    assert prefix("max", "0731", thinking=False) == ""
    with pytest.raises(BridgeError, match="expected one of high, max in generation april"):
        prefix("low", "april")
    with pytest.raises(BridgeError, match="say which: april, 0731"):
        prefix("high", None)
    with pytest.raises(BridgeError, match="generation 'may'"):
        prefix(None, "may")


def test_results_stand_in_the_order_of_their_calls() -> None:
    ids = ["c", "a", "b"]
    asks = {"role": "assistant", "content": "", "tool_calls": [call("look", "{}", i) for i in ids]}
    for order in itertools.permutations(ids):
        results = [{"role": "tool", "tool_call_id": i, "content": f"={i}"} for i in order]
        text = encode_messages([ASK, asks, *results, {"role": "user", "content": "And?"}], thinking=False)
        blocks = "".join(f"<tool_result>={i}</tool_result>\n\n" for i in ids)
        assert text.endswith(f"{EOS}{USER}{blocks}And?{ASSISTANT}</think>"), order
    anew = {"role": "assistant", "content": "", "tool_calls": [call("look", "{}")] * 2}  # without ids: as they come
    text = encode_messages([ASK, asks, ASK2, anew, *results], thinking=False)
    assert [text.index(f"={i}") for i in order] == sorted(text.index(f"={i}") for i in ids)
    between = [ASK, asks, {"role": "tool", "tool_call_id": "b", "content": "=b"}, ASK2]
    text = encode_messages([*between, {"role": "tool", "tool_call_id": "c", "content": "=c"}], thinking=False)
    assert "<tool_result>=c</tool_result>\n\nHow?\n\n<tool_result>=b</tool_result>" in text


def test_tools_stand_behind_the_system_s_text_or_alone() -> None:
    with_system = encode_messages([SYSTEM | {"response_format": {"é": 1}}, ASK], tools=[TOOL])
    assert with_system.startswith(f"{BOS}Be kind.\n\n## Tools\n")
    wanted = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
    assert f'to invoke tool calls.\n\n\n{wanted}{{"é": 1}}{USER}' in with_system
    alone = encode_messages([ASK], tools=[TOOL])
    assert alone.startswith(f"{BOS}\n\n## Tools\n") and '{"name": "look", "parameters": {"type": "object"}}' in alone
    inside = encode_messages([{"role": "system", "content": "", "tools": [TOOL]}, ASK])
    assert inside == alone


def test_tasks() -> None:
    for task, ending in {
        "action": f"{ASSISTANT}<think><｜action｜>",
        "query": "<｜query｜>",
        "read_url": "<｜read_url｜>",
    }.items():
        asked = [SYSTEM, ASK | {"task": task}, {"role": "assistant", "content": "Yes", "reasoning_content": "no"}]
        assert encode_messages(asked) == f"{BOS}Be kind.{USER}Why?{ending}Yes{EOS}"
    title = [ASK, ANSWER | {"task": "title"}, {"role": "assistant", "content": "A title"}]
    assert encode_messages(title, thinking=False).endswith(f"So.{EOS}<｜title｜>A title{EOS}")


def test_a_task_of_an_earlier_turn_keeps_its_tokens() -> None:
    earlier = [ASK | {"task": "action"}, {"role": "assistant", "content": "Yes"}, ASK2, ANSWER2]
    text = encode_messages(earlier)
    assert text.startswith(
        f"{BOS}{USER}Why?{ASSISTANT}<think><｜action｜>Yes{EOS}{USER}How?{ASSISTANT}<think>M.</think>"
    )


def test_a_reminder() -> None:
    reminder = {"role": "latest_reminder", "content": "Monday"}
    assert encode_messages([SYSTEM, reminder, ASK]).startswith(f"{BOS}Be kind.<｜latest_reminder｜>Monday{USER}Why?")
    behind = encode_messages([ASK, reminder, ANSWER], thinking=False)
    assert behind == f"{BOS}{USER}Why?{ASSISTANT}</think><｜latest_reminder｜>MondaySo.{EOS}"


def test_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert f"{USER}a\n\nb{ASSISTANT}" in encode_messages([{"role": "user", "content": parts}])
    assert f"{USER}a\n\nWhy?{ASSISTANT}" in encode_messages([{"role": "user", "content": parts[:1]}, ASK])


BAD = {
    "expected a list of messages": "hello",
    "no message in it": [],
    "messages\\[1\\]: got 3": [ASK, 3],
    "role 'direct_search_results', expected one of system": [{"role": "direct_search_results", "content": "x"}],
    "user without content": [{"role": "user"}],
    "assistant without content": [ASK, {"role": "assistant", "content": None}],
    "assistant has no field 'reasoning'; did you mean reasoning_content": [ASK, ANSWER | {"reasoning": "x"}],
    "user has no field 'tools'": [ASK | {"tools": [TOOL]}],
    "only parts of type text": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    "2 parts, which system cannot have": [{"role": "system", "content": [{"type": "text", "text": "a"}] * 2}],
    "task 'sing', expected one of action": [ASK | {"task": "sing"}],
    "messages\\[0\\]: its task 'query' needs an assistant's answer": [ASK | {"task": "query"}, ASK2],
    "joins the turn before it, which loses its task": [ASK, ASK2 | {"task": "query"}],
    "messages\\[0\\]: an assistant's message must answer": [ANSWER],
    "messages\\[2\\]: an assistant's message must answer": [ASK, ANSWER, ANSWER2],
    "arguments: expected a JSON object, got list": [ASK, {"role": "assistant", "tool_calls": [call("f", "[1]")]}],
    "arguments: not valid JSON": [ASK, {"role": "assistant", "tool_calls": [call("f", "{1}")]}],
    "arguments: the name 'a' is given twice": [
        ASK,
        {"role": "assistant", "tool_calls": [call("f", '{"a": 1, "a": 2}')]},
    ],
    "arguments\\['a'\\]: no JSON value": [ASK, {"role": "assistant", "tool_calls": [call("f", '{"a": NaN}')]}],
    "arguments: no JSON value": [ASK, {"role": "assistant", "tool_calls": [call("f", {"a": {1}})]}],
    "the name 'f\"' cannot be encoded": [ASK, {"role": "assistant", "tool_calls": [call('f"', "{}")]}],
    "the name 'a\\\\n' cannot be encoded": [ASK, {"role": "assistant", "tool_calls": [call("f", {"a\n": 1})]}],
    "expected a call of type function": [ASK, {"role": "assistant", "tool_calls": [{"name": "f"}]}],
    "two tool calls have one id": [ASK, {"role": "assistant", "tool_calls": [call("f", "{}", "x")] * 2}],
    "result of call 'y'; the calls are x": [
        ASK,
        {"role": "assistant", "tool_calls": [call("f", "{}", "x")]},
        {"role": "tool", "tool_call_id": "y", "content": "1"},
    ],
    "weight: got 2, expected 0 or 1": [ASK, ANSWER | {"weight": 2}],
    "is no text \\(surrogates not allowed\\)": [{"role": "user", "content": "\ud800"}],
    "thoughts belong into reasoning_content": [ASK, {"role": "assistant", "content": "<think>a</think>b"}],
    "expected a tool of type function": [{"role": "system", "content": "", "tools": [{"name": "f"}]}],
}


@pytest.mark.parametrize("what", BAD)
def test_bad_messages_are_refused(what: str) -> None:
    with pytest.raises(BridgeError, match=what) as caught:
        encode_messages(BAD[what])  # type: ignore[arg-type]
    assert str(caught.value).startswith("reading a conversation: ")


@pytest.mark.parametrize("token", SPECIAL)
def test_tokens_of_the_encoding_are_refused_inside_texts(token: str) -> None:
    places = [
        [ASK, ANSWER | {"content": f"a{token}b"}],
        [ASK, ANSWER | {"reasoning_content": f"a{token}b"}],
        [ASK, ANSWER | {"tool_calls": [call("f", {"x": [f"a{token}"]})]}],
    ]
    if token not in ("<think>", "</think>", "｜DSML｜"):
        places += [[{"role": "user", "content": token}], [SYSTEM | {"response_format": [token]}, ASK]]
    for messages in places:
        with pytest.raises(BridgeError, match="a token of the encoding itself"):
            encode_messages(messages)


CALLS = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">[1, 2.0]'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def test_a_well_formed_completion() -> None:
    parsed = parse_completion(f"Hm.</think>So.{CALLS}{EOS}")
    assert (parsed.reasoning_content, parsed.content) == ("Hm.", "So.")
    assert parsed.tool_calls == (ToolCall("f", '{"a": [1, 2.0]}'),)
    assert parse_completion(f"So.{CALLS}", thinking=False, ended=False).tool_calls == parsed.tool_calls
    none = CALLS[: CALLS.index("<｜DSML｜parameter")] + "\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    assert parse_completion(none + EOS, thinking=False).tool_calls == (ToolCall("f", "{}"),)


BROKEN = {
    "at character 0: the end of the thoughts": f"So.{EOS}",
    "at character 14: no <｜end": "Hm.</think>So.",
    "at character 29: more text behind the end": f"a</think>b{EOS}ccc",
    "at character 12: <think> does not belong": f"Hm.</think>a<think>{EOS}",
    "at character 1: <｜User｜> does not belong": f"H<｜User｜></think>a{EOS}",
    "at character 9: ｜DSML｜ does not belong": f"</think><｜DSML｜tool_calls>{EOS}",
    "at character 29: expected '<｜DSML｜invoke name": "</think>\n\n<｜DSML｜tool_calls>\n"
    + f"    </｜DSML｜tool_calls>{EOS}",
    "at character 29: expected '<｜DSML｜invoke name=\"', got '</｜DSML｜tool": (
        f"</think>\n\n<｜DSML｜tool_calls>\n</｜DSML｜tool_calls>{EOS}"
    ),
    "expected 'false', got 'maybe": f"</think>{CALLS.replace('false', 'maybe')}{EOS}",
    "the parameter 'a' is no JSON value: '\\[1, 2.0'": f"</think>{CALLS.replace('2.0]', '2.0')}{EOS}",
    "the parameter 'a' is no JSON value: '1, \"b\": 2'": f"</think>{CALLS.replace('[1, 2.0]', '1, "b": 2')}{EOS}",
    "the parameter 'a' is no JSON value: 'NaN,": f"</think>{CALLS.replace('[1, 2.0]', 'NaN, ')}{EOS}",
    "expected a name, got '\">": f"</think>{CALLS.replace('name="f"', 'name=""')}{EOS}",
    "expected a name, got 'f｜DSML｜": f"</think>{CALLS.replace('"f"', '"f｜DSML｜"')}{EOS}",
    r"expected '</｜DSML｜invoke>\\n', got '</｜DSML": f"</think>{CALLS.replace('</｜DSML｜invoke>\n', '')}{EOS}",
    "expected '<｜end▁of▁sentence｜>', got ' and": f"</think>{CALLS} and{EOS}",
    "the end of the parameter 'a'": f"</think>{CALLS.replace('</｜DSML｜parameter>', '')}{EOS}",
    "｜DSML｜ does not belong here": f"</think>{CALLS.replace('2.0]', '2.0<｜DSML｜]')}{EOS}",
    "the parameter 'a' is given twice": "</think>"
    + CALLS.replace(
        "</｜DSML｜invoke>",
        CALLS[CALLS.index("<｜DSML｜parameter") : CALLS.index("</｜DSML｜invoke>")] + "</｜DSML｜invoke>",
    )
    + EOS,
    "half of a surrogate pair": "\ud800</think>" + EOS,
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_completions_are_refused_with_the_place(what: str) -> None:
    with pytest.raises(BridgeError, match=what) as caught:
        parse_completion(BROKEN[what])
    assert "at character " in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_completion_is_refused_or_says_something_else(data: st.DataObject) -> None:
    """Whatever one cuts out of a completion: no traceback, and never the same message."""
    whole = f"Hm.</think>So.{CALLS}{EOS}"
    begun = data.draw(st.integers(0, len(whole) - 1))
    end = data.draw(st.integers(begun + 1, len(whole)))
    try:
        assert parse_completion(whole[:begun] + whole[end:]) != parse_completion(whole)
    except BridgeError as error:
        assert "at character " in str(error)
