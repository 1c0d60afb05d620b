"""Messages -> the text that the model reads, and which parts of it a loss is taken on.

    BOS [effort] system <｜User｜>user<｜Assistant｜><think>thoughts</think>answer EOS <｜User｜>...

No line break stands between turns. Chat mode opens an answer with `</think>` alone. Tool results are
`<tool_result>` blocks inside a user's turn, in the order of the calls. Where no tools are defined,
thinking mode drops the thoughts of all turns before the last user's, and developers' messages there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BridgeError, short
from .messages import Message, ToolCall, read_messages, to_json
from .strings import (
    ASSISTANT,
    BOS,
    CALLS_CLOSE,
    CALLS_OPEN,
    EFFORTS,
    EOS,
    INVOKE_CLOSE,
    INVOKE_OPEN,
    PARAMETER_CLOSE,
    PARAMETER_OPEN,
    REMINDER,
    RESPONSE_FORMAT,
    TASKS,
    THINK_END,
    THINK_START,
    TOOLS_HEAD,
    TOOLS_TAIL,
    USER,
)

MASKS = ("assistant", "last_turn", "full")
_ASKING = ("user", "tool", "developer")


@dataclass(frozen=True)
class Segment:
    """A piece of an encoded conversation.

    Attributes:
        text: never empty.
        role: whose it is: a role of `messages.ROLES`, or `bos`, `effort`. A turn that holds a user's text
            besides tool results is the user's.
        trained: whether its tokens are learned.
    """

    text: str
    role: str
    trained: bool


def encode_messages(
    messages: Sequence[Mapping[str, Any] | Message],
    *,
    thinking: bool = True,
    reasoning_effort: str | None = None,
    generation: str | None = None,
    tools: Sequence[Any] | None = None,
    drop_thinking: bool = True,
) -> str:
    """The text of a conversation. One that ends with a user is left open for the model's answer.

    Args:
        messages: OpenAI-style, see `messages.read_messages`.
        thinking: thinking mode; False is chat mode, where thoughts are left out.
        reasoning_effort: a key of `texts.EFFORTS[generation]`; None adds nothing in either generation, and
            chat mode has none.
        generation: `april` or `0731`; needed where a reasoning effort is given, since the same word means
            another text in each.
        tools: tools of the whole conversation, for its first message.
        drop_thinking: whether thoughts before the last user's turn are dropped where there are no tools.

    Raises:
        BridgeError: unusable messages, effort or generation.
    """
    return "".join(
        segment.text
        for segment in encode_segments(
            messages,
            thinking=thinking,
            reasoning_effort=reasoning_effort,
            generation=generation,
            tools=tools,
            drop_thinking=drop_thinking,
        )
    )


def encode_segments(
    messages: Sequence[Mapping[str, Any] | Message],
    *,
    thinking: bool = True,
    reasoning_effort: str | None = None,
    generation: str | None = None,
    tools: Sequence[Any] | None = None,
    drop_thinking: bool = True,
    mask: str = "assistant",
) -> tuple[Segment, ...]:
    """The text in pieces, see `encode_messages`; an answer and the tokens that open it are apart.

    Args:
        messages: as there, and all other arguments.
        thinking: as there.
        reasoning_effort: as there.
        generation: as there.
        tools: as there.
        drop_thinking: as there.
        mask: what is learned. `assistant`: what every assistant's message says, from behind the tokens that
            open it to its EOS; `last_turn`: the same for the messages after the last user's (or
            developer's) message, so with all tool calls made for it; `full`: everything. Messages of
            weight 0 are only learned by `full`.

    Raises:
        BridgeError: as there, or another mask.
    """
    return segments_of(
        read_messages(messages, tools=tools),
        thinking=thinking,
        effort=effort_text(reasoning_effort, generation),
        drop_thinking=drop_thinking,
        mask=mask,
    )


def segments_of(
    messages: Sequence[Message], *, thinking: bool, effort: str, drop_thinking: bool = True, mask: str = "assistant"
) -> tuple[Segment, ...]:
    """`encode_segments` of messages that `read_messages` gave.

    Args:
        messages: as there.
        thinking: as there.
        effort: text of the reasoning effort, see `effort_text`.
        drop_thinking: as there.
        mask: as there.

    Raises:
        BridgeError: another mask.
    """
    if mask not in MASKS:
        raise BridgeError(f"encoding a conversation: mask {short(mask)}, expected one of {', '.join(MASKS)}")
    turns = _merge(messages)
    drop = thinking and drop_thinking and not any(turn.tools for turn in turns)
    if drop:
        turns = _drop_thoughts(turns)
    last_asking, last_user = _last(turns, _ASKING), _last(turns, ("user", "developer"))
    found = [Segment(BOS, "bos", False), Segment(effort if thinking else "", "effort", False)]
    for i, turn in enumerate(turns):
        thinks = thinking and not (drop and i < last_asking)
        after_task = bool(i and turns[i - 1].task)
        learned = turn.role == "assistant" and turn.trained and (mask == "assistant" or i > last_user)
        found.append(Segment(_said(turn, thinks and not after_task), turn.role, learned))
        if i + 1 == len(turns) or turns[i + 1].role in ("assistant", "latest_reminder"):
            found.append(Segment(_opening(turn, thinking if turn.task else thinks), "assistant", False))
    return tuple(replace(s, trained=True) if mask == "full" else s for s in found if s.text)


def effort_text(reasoning_effort: str | None, generation: str | None) -> str:
    """The text that a reasoning effort puts before everything else, "" for None.

    Raises:
        BridgeError: unknown, or without the generation that says what it means.
    """
    if generation is not None and generation not in EFFORTS:
        raise BridgeError(
            f"encoding a conversation: generation {short(generation)}, expected one of {', '.join(EFFORTS)}"
        )
    if reasoning_effort is None:
        return ""
    if generation is None:
        raise BridgeError(
            f"encoding a conversation: reasoning effort {short(reasoning_effort)} means another text in each"
            f" generation of releases; say which: {', '.join(EFFORTS)}"
        )
    if reasoning_effort not in EFFORTS[generation]:
        raise BridgeError(
            f"encoding a conversation: reasoning effort {short(reasoning_effort)},"
            f" expected one of {', '.join(EFFORTS[generation])} in generation {generation}"
        )
    return EFFORTS[generation][reasoning_effort]


def drops_thoughts(messages: Sequence[Message], thinking: bool) -> bool:
    """Whether thoughts before the last user's turn are dropped by default."""
    return thinking and not any(message.tools for message in messages)


def _last(turns: Sequence[Message], roles: Sequence[str]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.role in roles), default=-1)


def _merge(messages: Sequence[Message]) -> tuple[Message, ...]:
    """User texts and tool results that follow each other, in one turn; results in the order of their calls."""
    turns: list[Message] = []
    order: dict[str, int] = {}
    at = 0
    while at < len(messages):
        message = messages[at]
        if message.tool_calls:
            order = {call.id: k for k, call in enumerate(message.tool_calls) if call.id}
        if message.role not in ("user", "tool"):
            turns.append(message)
            at += 1
            continue
        end = at + 1
        while end < len(messages) and messages[end].role in ("user", "tool"):
            end += 1
        turns.append(_joined(messages[at:end], order))
        at = end
    return tuple(turns)


def _joined(blocks: Sequence[Message], order: Mapping[str, int]) -> Message:
    results = [block for block in blocks if block.role == "tool"]
    if len(results) > 1:
        results.sort(key=lambda block: order.get(block.tool_call_id, 0))
    in_order = iter(results)
    texts = [
        f"<tool_result>{next(in_order).content}</tool_result>" if block.role == "tool" else block.content
        for block in blocks
    ]
    role = "tool" if len(results) == len(blocks) else "user"
    return Message(role, "\n\n".join(texts), task=blocks[0].task)


def _drop_thoughts(turns: Sequence[Message]) -> tuple[Message, ...]:
    last = _last(turns, _ASKING)
    kept = (turn for i, turn in enumerate(turns) if i >= last or turn.role != "developer")
    return tuple(kept)


def _said(turn: Message, thinks: bool) -> str:
    """What a turn says, with the token that says whose it is; an assistant's is in `_opening`."""
    if turn.role == "assistant":
        thoughts = turn.reasoning_content + THINK_END if thinks else ""
        return thoughts + turn.content + _calls(turn.tool_calls) + (EOS if turn.ended else "")
    if turn.role == "latest_reminder":
        return REMINDER + turn.content
    text = turn.content if turn.role == "system" else USER + turn.content
    if turn.tools:
        text += "\n\n" + TOOLS_HEAD + "\n".join(turn.tools) + TOOLS_TAIL
    return text + ("\n\n" + RESPONSE_FORMAT + turn.response_format if turn.response_format else "")


def _opening(turn: Message, thinks: bool) -> str:
    """The tokens behind a turn that ask for an answer to it."""
    thought = THINK_START if thinks else THINK_END
    if turn.task == "action":
        return ASSISTANT + thought + TASKS["action"]
    if turn.task:
        return TASKS[turn.task]
    return ASSISTANT + thought if turn.role in _ASKING else ""


def _calls(calls: Sequence[ToolCall]) -> str:
    if not calls:
        return ""
    return CALLS_OPEN + "".join(map(_invoke, calls)) + CALLS_CLOSE


def _invoke(call: ToolCall) -> str:
    lines = "\n".join(
        f'{PARAMETER_OPEN}{name}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else to_json(value)}{PARAMETER_CLOSE}"
        for name, value in json.loads(call.arguments).items()
    )
    return f'{INVOKE_OPEN}{call.name}">\n{lines}\n{INVOKE_CLOSE}'
