"""Rows of other tools' chat data as ours: what they say certainly, and refused where it is not certain.

| row | becomes |
|---|---|
| `messages` | itself |
| `conversations` of `from` and `value` (ShareGPT), or of `role` and `content`; `system` | `messages` |
| `instruction`, `input`, `output` (Alpaca); `system`, `history` | a user's text (a line each), an answer |
| `prompt`, `completion`: texts, or lists of messages | a user's text and an answer, or the messages of both |
"""

from collections.abc import Mapping
from typing import Any

from ...errors import BridgeError, short

PREFERENCES = frozenset({"chosen", "rejected"})
_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
# Fields of a line that say what we say otherwise, or cannot do: ignoring them would be another training.
_REFUSED = {
    "functions": "say tools",
    "function_call": "say tool_calls in the assistant's message",
    "mask": "say weight 0 in messages that are not to be learned",
    "loss_mask": "say weight 0 in messages that are not to be learned",
    "weight": "say weight 0 in messages that are not to be learned",
    "weights": "say weight 0 in messages that are not to be learned",
    "train_on_inputs": "say --mask full",
    "images": "only text can be encoded",
    "videos": "only text can be encoded",
    "audios": "only text can be encoded",
}


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation, in any form that is known."""
    return (
        "messages" in row
        or isinstance(row.get("conversations"), list)
        or {"instruction", "output"} <= row.keys()
        or {"prompt", "completion"} <= row.keys()
    )


def as_messages(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row with `messages`, and whatever else it says.

    Raises:
        BridgeError: a form that is not known, or a part of it that is not certain.
    """
    for name, instead in _REFUSED.items():
        if row.get(name) not in (None, [], {}, ""):
            raise _error(where, f"field {short(name)} has no meaning here; {instead}")
    rest = dict(row)
    if "messages" in row:
        found = row["messages"]
    elif isinstance(row.get("conversations"), list):
        found = [_spoken(turn, where, i) for i, turn in enumerate(rest.pop("conversations"))]
    elif {"instruction", "output"} <= row.keys():
        found = _alpaca(rest, where)
    elif {"prompt", "completion"} <= row.keys():
        found = [*_side(rest.pop("prompt"), "user", where), *_side(rest.pop("completion"), "assistant", where)]
    elif row.keys() >= PREFERENCES:
        raise _error(where, "chosen and rejected answers; nothing here trains on preferences")
    else:
        raise _error(where, f"no messages, only {short(list(row))}; expected a conversation in each object")
    system = rest.pop("system", None)
    if system not in (None, ""):
        found = _with_system(system, found, where)
    return rest | {"messages": found}


def _alpaca(rest: dict[str, Any], where: str) -> list[dict[str, Any]]:
    parts = [rest.pop("instruction"), rest.pop("input", None)]
    asked = "\n".join(_text(part, where, "instruction and input") for part in parts if part not in (None, ""))
    found: list[dict[str, Any]] = []
    history = rest.pop("history", None)
    for pair in history if isinstance(history, list) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _error(where, f"history: got {short(pair)}, expected pairs of question and answer")
        found += [
            {"role": role, "content": _text(said, where, "history")}
            for role, said in zip(("user", "assistant"), pair, strict=True)
        ]
    return [
        *found,
        {"role": "user", "content": asked},
        {"role": "assistant", "content": _text(rest.pop("output"), where, "output")},
    ]


def _side(said: Any, role: str, where: str) -> list[Any]:
    if isinstance(said, list):
        return said
    return [{"role": role, "content": _text(said, where, "prompt and completion")}]


def _spoken(turn: Any, where: str, i: int) -> Any:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn  # of role and content: read as messages are
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise _error(
            where, f"conversations[{i}]: from {short(speaker)}, expected one of {', '.join(_SPEAKERS)}; say `messages`"
        )
    if more := [name for name in turn if name not in ("from", "value") and turn[name] not in (None, "", [], {})]:
        raise _error(where, f"conversations[{i}]: field {short(more[0])} beside from and value; say `messages`")
    return {"role": _SPEAKERS[speaker], "content": turn.get("value")}


def _with_system(system: Any, messages: Any, where: str) -> Any:
    if not isinstance(messages, list):
        return messages  # refused where messages are read
    if messages and isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
        raise _error(where, "system is given both beside the messages and among them; keep one of them")
    return [{"role": "system", "content": _text(system, where, "system")}, *messages]


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise _error(where, f"{name}: got {short(value)}, expected text")
    return value


def _error(where: str, what: str) -> BridgeError:
    return BridgeError(f"reading {where}: {what}")
