"""Messages of a conversation: OpenAI-style dicts read into frozen values, refused where they are wrong."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import BridgeError, short
from ..strict_json import parse_json, too_deep
from .strings import ANSWER_TOKENS, TASKS, TURN_TOKENS

_FIELDS = {
    "system": ("content", "tools", "response_format"),
    "developer": ("content", "tools", "response_format", "task"),
    "user": ("content", "task"),
    "assistant": ("content", "reasoning_content", "tool_calls", "task", "wo_eos", "weight"),
    "tool": ("content", "tool_call_id"),
    "latest_reminder": ("content",),
}
ROLES = tuple(_FIELDS)
# Known elsewhere and without a place in the encoding, as in the released encoder.
_WITHOUT_EFFECT = ("role", "name")


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool.

    Attributes:
        name: the function's.
        arguments: a JSON object as text.
        id: that its result names; "" where none was given.
    """

    name: str
    arguments: str
    id: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """The arguments by name, each of its own type."""
        return json.loads(self.arguments)


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        role: one of `ROLES`.
        content: its text.
        reasoning_content: an assistant's thoughts.
        tool_calls: an assistant's calls.
        tool_call_id: the call that a tool answers; "" where none was given.
        tools: function definitions (system, developer), each as JSON on one line.
        response_format: schema of the reply (system, developer) as JSON; "" for none.
        task: quick instruction that this message asks for, a key of `texts.TASKS`; "" for none.
        ended: whether an assistant's turn closes with the end-of-sentence token (`wo_eos` is its negation).
        trained: whether an assistant's message may be learned (`weight` 1, OpenAI's name for it).
    """

    role: str
    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    tools: tuple[str, ...] = ()
    response_format: str = ""
    task: str = ""
    ended: bool = True
    trained: bool = True

    def to_openai(self) -> dict[str, Any]:
        """The message as `read_messages` takes it; fields that say nothing are left out."""
        found: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning_content:
            found["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            found["tool_calls"] = [
                ({"id": call.id} if call.id else {})
                | {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        if self.tools:
            found["tools"] = [{"type": "function", "function": json.loads(tool)} for tool in self.tools]
        if self.response_format:
            found["response_format"] = json.loads(self.response_format)
        found |= {name: value for name in ("tool_call_id", "task") if (value := getattr(self, name))}
        return found | ({} if self.ended else {"wo_eos": True}) | ({} if self.trained else {"weight": 0})


def read_messages(
    raw: Sequence[Mapping[str, Any] | Message], where: str = "a conversation", tools: Sequence[Any] | None = None
) -> tuple[Message, ...]:
    """Read OpenAI-style messages.

    Args:
        raw: the messages; such as are read already stay as they are.
        where: what they belong to, for messages of errors.
        tools: OpenAI-style tools of the conversation. They go to the first message, as the released
            encoder puts them; before a first message that is neither system nor developer, an empty system
            message is put to hold them.

    Raises:
        BridgeError: an unknown role, field or type, a token of the encoding inside a text, turns that the
            encoding cannot express.
    """
    if isinstance(raw, str | bytes | Mapping) or not isinstance(raw, Sequence):
        raise _error(where, f"messages: got {short(raw)}, expected a list of messages")
    messages = [m if isinstance(m, Message) else _message(m, where, i) for i, m in enumerate(raw)]
    if not messages:
        raise _error(where, "no message in it")
    if tools:
        messages = _with_tools(messages, _tools(tools, where, "tools"), where)
    for i, message in enumerate(messages):
        _check_tokens(message, where, i)
    check_turns(messages, where)
    return tuple(messages)


def check_turns(messages: Sequence[Message], where: str) -> None:
    """Refuse a sequence of turns that the encoding cannot express, or would lose a part of.

    Raises:
        BridgeError: an assistant without a turn to answer, a task that nothing can answer, a tool result
            for no call.
    """
    asked, ids = False, ()
    for i, message in enumerate(messages):
        before = messages[i - 1] if i else None
        if before and before.task and message.role not in ("assistant", "latest_reminder"):
            raise _error(where, f"messages[{i - 1}]: its task {before.task!r} needs an assistant's answer right after")
        if message.role == "assistant":
            if not asked:
                raise _error(
                    where, f"messages[{i}]: an assistant's message must answer a user, developer or tool; join them"
                )
            asked = bool(message.task)
            if message.tool_calls:
                ids = tuple(call.id for call in message.tool_calls if call.id)
                if len(set(ids)) < len(ids):
                    raise _error(where, f"messages[{i}]: two tool calls have one id")
        elif message.role in ("user", "developer", "tool"):
            asked = True
        elif message.role == "system":
            asked = False
        if message.role == "tool" and ids and message.tool_call_id and message.tool_call_id not in ids:
            raise _error(
                where, f"messages[{i}]: result of call {short(message.tool_call_id)}; the calls are {', '.join(ids)}"
            )
        if message.role == "user" and message.task and before and before.role in ("user", "tool"):
            raise _error(
                where, f"messages[{i}]: it joins the turn before it, which loses its task; join them into one message"
            )


def to_json(value: Any) -> str:
    """JSON as the encoding writes it: one line, characters as they are.

    Raises:
        ValueError: no JSON value, or a number without a JSON form.
    """
    if too_deep(value):
        raise ValueError("nested too deep")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _error(where: str, what: str) -> BridgeError:
    return BridgeError(f"reading {where}: {what}")


def _message(raw: Any, where: str, i: int) -> Message:
    at = f"messages[{i}]"
    if not isinstance(raw, Mapping):
        raise _error(where, f"{at}: got {short(raw)}, expected an object")
    role = raw.get("role")
    if not isinstance(role, str) or role not in _FIELDS:
        raise _error(where, f"{at}: role {short(role)}, expected one of {', '.join(ROLES)}")
    for name, value in raw.items():
        if name == "mask" and value == 1:  # in the released test vectors; without effect in the released encoder
            continue
        if name == "mask":
            raise _error(
                where, f"{at}: mask {short(value)} has no meaning here; say weight 0 if it is not to be learned"
            )
        if name not in _FIELDS[role] and name not in _WITHOUT_EFFECT and value not in (None, "", [], {}):
            raise _error(where, f"{at}: {role} has no field {short(name)}{_nearest(name, _FIELDS[role])}")
    content = raw.get("content")
    if role == "tool" and isinstance(content, Mapping):  # a result as an object
        content = _json(content, where, f"{at}.content")
    content = _content(content, role, where, at)
    reasoning = _text(raw.get("reasoning_content"), where, f"{at}.reasoning_content")
    calls = tuple(
        _call(call, where, f"{at}.tool_calls[{k}]")
        for k, call in enumerate(_list(raw.get("tool_calls"), where, f"{at}.tool_calls"))
    )
    if content is None and not (role == "assistant" and (calls or reasoning)):
        raise _error(where, f"{at}: {role} without content")
    if role == "developer" and not content:
        raise _error(where, f"{at}: developer with empty content")
    if (task := _text(raw.get("task"), where, f"{at}.task")) and task not in TASKS:
        raise _error(where, f"{at}: task {short(task)}, expected one of {', '.join(TASKS)}")
    wanted = raw.get("response_format")
    return Message(
        role,
        content or "",
        reasoning,
        calls,
        _text(raw.get("tool_call_id"), where, f"{at}.tool_call_id"),
        _tools(raw.get("tools"), where, f"{at}.tools"),
        _json(wanted, where, f"{at}.response_format") if wanted else "",
        task,
        not _flag(raw.get("wo_eos"), False, where, f"{at}.wo_eos"),
        _flag(raw.get("weight"), True, where, f"{at}.weight"),
    )


def _content(value: Any, role: str, where: str, at: str) -> str | None:
    """Text, or parts of text: the released encoder joins those of a user or tool with an empty line."""
    if value is None or isinstance(value, str):
        return value
    texts = []
    for k, part in enumerate(_list(value, where, f"{at}.content")):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _error(where, f"{at}.content[{k}]: got {short(part)}; only parts of type text can be encoded")
        texts.append(part["text"])
    if len(texts) > 1 and role not in ("user", "tool"):
        raise _error(where, f"{at}.content: {len(texts)} parts, which {role} cannot have; join them into one text")
    return "\n\n".join(texts)


def _call(raw: Any, where: str, at: str) -> ToolCall:
    function = raw.get("function") if isinstance(raw, Mapping) else None
    if not isinstance(function, Mapping) or raw.get("type", "function") != "function":
        raise _error(where, f"{at}: got {short(raw)}, expected a call of type function with name and arguments")
    arguments = function.get("arguments")
    name = _named(function.get("name"), where, f"{at}.function.name")
    if isinstance(arguments, str):
        text = arguments if arguments.strip() else "{}"  # as models call a tool that takes nothing
    else:
        text = _json({} if arguments is None else arguments, where, f"{at}.function.arguments")
    values = parse_json(text.encode("utf-8", "surrogatepass"), f"{where}: {at}.function.arguments")
    for key, value in values.items():
        _named(key, where, f"{at}.function.arguments")
        _json(value, where, f"{at}.function.arguments[{short(key)}]")
    return ToolCall(name, text, _text(raw.get("id"), where, f"{at}.id"))


def _named(name: Any, where: str, at: str) -> str:
    if not isinstance(name, str) or not name or '"' in name or "\n" in name:
        raise _error(where, f"{at}: the name {short(name)} cannot be encoded (empty, or with a quote or line break)")
    return name


def _tools(value: Any, where: str, at: str) -> tuple[str, ...]:
    found = []
    for k, tool in enumerate(_list(value, where, at)):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _error(where, f"{at}[{k}]: got {short(tool)}, expected a tool of type function with a name")
        found.append(_json(function, where, f"{at}[{k}].function"))
    return tuple(found)


def _with_tools(messages: list[Message], tools: tuple[str, ...], where: str) -> list[Message]:
    if any(message.tools for message in messages):
        raise _error(where, "tools are given both for the conversation and in a message; keep one of them")
    first = messages[0] if messages[0].role in ("system", "developer") else None
    holder = replace(first or Message("system"), tools=tools)
    return [holder, *(messages[1:] if first else messages)]


def _check_tokens(message: Message, where: str, i: int) -> None:
    texts = {
        "content": message.content,
        "reasoning_content": message.reasoning_content,
        "response_format": message.response_format,
    }
    texts |= {f"tools[{k}]": tool for k, tool in enumerate(message.tools)}
    texts |= {f"tool_calls[{k}]": to_json([c.name, c.values]) for k, c in enumerate(message.tool_calls)}
    tokens = (*TURN_TOKENS, *ANSWER_TOKENS) if message.role == "assistant" else TURN_TOKENS
    for name, text in texts.items():
        if (found := next((t for t in tokens if t in text), None)) is not None:
            hint = "; thoughts belong into reasoning_content" if found in ANSWER_TOKENS[:2] else ""
            raise _error(where, f"messages[{i}].{name} holds {found}, a token of the encoding itself{hint}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _error(where, f"messages[{i}].{name} is no text ({error.reason})") from None


def _json(value: Any, where: str, at: str) -> str:
    try:
        return to_json(value)
    except ValueError as error:
        raise _error(where, f"{at}: no JSON value ({error})") from None


def _text(value: Any, where: str, at: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _error(where, f"{at}: got {short(value)}, expected text")
    return value


def _list(value: Any, where: str, at: str) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise _error(where, f"{at}: got {short(value)}, expected a list")
    return value


def _flag(value: Any, default: bool, where: str, at: str) -> bool:
    if value is None:
        return default
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise _error(where, f"{at}: got {short(value)}, expected 0 or 1")
    return bool(value)


def _nearest(name: Any, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else f"; it has {', '.join(known)}"
