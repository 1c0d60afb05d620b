"""Conversations from a JSONL file: one object a line, OpenAI-style messages."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...chat.encode import effort_text
from ...chat.messages import Message, read_messages
from ...errors import BridgeError, short
from ...strict_json import parse_json
from .others import as_messages

_MODES = {"thinking": True, "chat": False}
_FIELDS = ("messages", "tools", "thinking_mode", "enable_thinking", "reasoning_effort")
# Names of the same that servers and other tools have: `thinking` true or {"type": "enabled"}, `reasoning`
# {"effort": "high"}, and `chat_template_kwargs` {"enable_thinking": true}.
_OTHERS = ("thinking", "reasoning", "chat_template_kwargs")


@dataclass(frozen=True)
class Conversation:
    """One line.

    Attributes:
        messages: with the line's tools in the first of them.
        thinking: thinking mode or chat mode; None where the line does not say.
        reasoning_effort: or None.
        line: its number in the file, from 1.
    """

    messages: tuple[Message, ...]
    thinking: bool | None
    reasoning_effort: str | None
    line: int


def read_chat_jsonl(path: Path) -> Iterator[Conversation]:
    """The conversations of a file, in order; empty lines are left out.

    A line is an object with `messages` (or a row of another tool, see `others`), and optionally `tools`, the mode as
    `thinking_mode` (`thinking` or `chat`) or `enable_thinking` (true or false), and `reasoning_effort`; `thinking`,
    `reasoning` and `chat_template_kwargs` say the same where they are of the forms that servers take. Other fields are
    left alone, except such as look like one of these.

    Raises:
        BridgeError: unreadable, or an unusable line, named by its number.
    """
    for number, raw in numbered_lines(path):
        yield read_line(raw, str(path), number)


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, with their numbers from 1.

    Raises:
        BridgeError: unreadable.
    """
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise BridgeError(f"reading {path}: {error.strerror}") from None


def read_line(raw: bytes, path: str, number: int) -> Conversation:
    """One conversation of `read_chat_jsonl`.

    Raises:
        BridgeError: unusable.
    """
    where = f"{path}, line {number}"
    body = parse_json(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, where)
    body = as_messages(body, where)
    for name in body:
        if name not in (*_FIELDS, *_OTHERS) and (close := difflib.get_close_matches(name, _FIELDS, 1, 0.8)):
            raise BridgeError(f"reading {where}: unknown field {short(name)}; did you mean {close[0]}?")
    body = _in_our_words(body, where)
    tools = body.get("tools")
    if isinstance(tools, str) and tools.lstrip().startswith("["):  # some data sets keep them as text
        tools = parse_json(f'{{"tools": {tools}}}'.encode("utf-8", "surrogatepass"), f"{where}: tools").get("tools")
    if tools is not None and not isinstance(tools, list):
        raise BridgeError(f"reading {where}: tools: got {short(tools)}, expected a list")
    effort = body.get("reasoning_effort")
    if effort is not None and not isinstance(effort, str):
        raise BridgeError(f"reading {where}: reasoning_effort: got {short(effort)}, expected text")
    return Conversation(read_messages(body["messages"], where, tools), _mode(body, where), effort, number)


AUTO = "auto"


def mode_of(
    conversation: Conversation, thinking: bool | str | None, generation: str | None, where: str
) -> tuple[bool, str]:
    """Whether a conversation is in thinking mode, as it says or else as `thinking` does; its effort's text.

    `thinking` may be `auto`: thinking mode where an answer has thoughts.

    Raises:
        BridgeError: neither says it, or its reasoning effort is unknown.
    """
    mode = thinking if conversation.thinking is None else conversation.thinking
    if isinstance(mode, str):
        if mode != AUTO:
            raise BridgeError(f"reading {where}: thinking {short(mode)}, expected true, false or {AUTO}")
        mode = any(message.reasoning_content for message in conversation.messages)
    at = f"{where}, line {conversation.line}"
    if mode is None:
        raise BridgeError(
            f"reading {at}: it does not say whether the model thinks (thinking_mode, enable_thinking); say --thinking "
            "on, off or auto (on where an answer has thoughts) for all lines without"
        )
    try:
        return mode, effort_text(conversation.reasoning_effort, generation)
    except BridgeError as error:
        raise BridgeError(f"reading {at}: {error}") from None


def _in_our_words(body: dict[str, Any], where: str) -> dict[str, Any]:
    """What other tools call the mode and the effort, under our names."""
    said: list[tuple[str, Any]] = []
    thinking = body.get("thinking")
    if isinstance(thinking, dict):
        kinds = {"enabled": True, "disabled": False}
        if thinking.keys() - {"type", "budget_tokens"} or thinking.get("type") not in kinds:
            raise BridgeError(
                f"reading {where}: thinking {short(thinking)}, expected true, false, or type enabled or disabled"
            )
        thinking = kinds[thinking["type"]]
    said.append(("enable_thinking", thinking))
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict) and reasoning.keys() <= {"effort", "summary"}:
        said.append(("reasoning_effort", reasoning.get("effort")))
    elif reasoning is not None:
        raise BridgeError(f"reading {where}: reasoning {short(reasoning)}, expected an effort; say reasoning_effort")
    kwargs = body.get("chat_template_kwargs")
    if kwargs is not None:
        names = {"enable_thinking": "enable_thinking", "thinking": "enable_thinking"} | {
            name: name for name in ("thinking_mode", "reasoning_effort")
        }
        unknown = sorted(kwargs.keys() - names.keys()) if isinstance(kwargs, dict) else []
        if unknown or not isinstance(kwargs, dict):
            what = f"holds {short(unknown[0])}" if unknown else short(kwargs)
            raise BridgeError(f"reading {where}: chat_template_kwargs {what}, expected {', '.join(names)}")
        said += [(names[name], value) for name, value in kwargs.items()]
    found = {name: value for name, value in body.items() if name not in _OTHERS}
    for name, value in said:
        if value is None:
            continue
        if found.get(name) not in (None, value):
            raise BridgeError(f"reading {where}: {name} is said twice, as {short(found[name])} and as {short(value)}")
        found[name] = value
    return found


def _mode(body: dict[str, Any], where: str) -> bool | None:
    mode, enabled = body.get("thinking_mode"), body.get("enable_thinking")
    if mode is not None and (not isinstance(mode, str) or mode not in _MODES):
        raise BridgeError(f"reading {where}: thinking_mode {short(mode)}, expected thinking or chat")
    if enabled is not None and not isinstance(enabled, bool):
        raise BridgeError(f"reading {where}: enable_thinking {short(enabled)}, expected true or false")
    if mode is not None and enabled is not None and _MODES[mode] != enabled:
        raise BridgeError(
            f"reading {where}: thinking_mode {mode!r} and enable_thinking {enabled} contradict each other"
        )
    return enabled if mode is None else _MODES[mode]
