"""What the model wrote -> a message; refused, with the place, where it is not well formed."""

from ..errors import BridgeError, short
from ..strict_json import parse_json
from .messages import Message, ToolCall, to_json
from .strings import (
    ANSWER_TOKENS,
    CALLS_CLOSE,
    CALLS_OPEN,
    DSML,
    EOS,
    INVOKE_CLOSE,
    INVOKE_OPEN,
    PARAMETER_CLOSE,
    PARAMETER_OPEN,
    THINK_END,
    TURN_TOKENS,
)


def parse_completion(text: str, *, thinking: bool = True, ended: bool = True) -> Message:
    """The assistant's message that a completion says.

    Args:
        text: what came behind the tokens that open an answer (`<think>` in thinking mode, `</think>` in
            chat mode, or a task's token).
        thinking: whether it begins with thoughts, which `</think>` ends.
        ended: whether it ends with the end-of-sentence token; False takes it without, as decoding with
            `skip_special_tokens` gives it.

    Returns:
        A message with content, reasoning_content and tool_calls. A call's arguments are a JSON object
        whose values have the types that the text gives them; ids are not in the text.

    Raises:
        BridgeError: missing or misplaced tokens, a malformed tool call; with the number of the character.
    """
    scan = _Scan(text)
    thoughts = ""
    if thinking:
        thoughts = scan.until(THINK_END, "the end of the thoughts")
        scan.plain(thoughts, scan.at - len(THINK_END) - len(thoughts))
    begun = scan.at
    end = len(text)
    if ended:
        end = text.find(EOS, begun)
        if end < 0:
            raise scan.error(f"no {EOS}: cut off?", len(text))
    calls_at = text.find(CALLS_OPEN, begun, end)
    content = text[begun : end if calls_at < 0 else calls_at]
    scan.plain(content, begun)
    calls: tuple[ToolCall, ...] = ()
    scan.at = begun + len(content)
    if calls_at >= 0:
        scan.take(CALLS_OPEN)
        calls = _calls(scan)
    if ended:
        scan.take(EOS)
    if scan.at < len(text):
        raise scan.error("more text behind the end of the answer", scan.at)
    return Message("assistant", content, thoughts, calls, ended=ended)


def _calls(scan: "_Scan") -> tuple[ToolCall, ...]:
    calls = []
    while not scan.has(CALLS_CLOSE) or not calls:
        scan.take(INVOKE_OPEN)
        name = scan.name()
        scan.take(">\n")
        values: dict[str, str] = {}
        while scan.has(PARAMETER_OPEN):
            _parameter(scan, values)
        if not values and scan.has("\n"):  # the encoding writes an empty line for no parameters
            scan.take("\n")
        scan.take(INVOKE_CLOSE)
        calls.append(ToolCall(name, "{" + ", ".join(f"{to_json(k)}: {v}" for k, v in values.items()) + "}"))
    scan.take(CALLS_CLOSE)
    return tuple(calls)


def _parameter(scan: "_Scan", values: dict[str, str]) -> None:
    """Read one parameter into `values`, as JSON."""
    begun = scan.at
    scan.take(PARAMETER_OPEN)
    name = scan.name()
    if name in values:
        raise scan.error(f"the parameter {short(name)} is given twice", begun)
    scan.take(' string="')
    is_text = scan.has("true")
    scan.take("true" if is_text else "false")
    scan.take('">')
    begun = scan.at
    value = scan.until(PARAMETER_CLOSE, f"the end of the parameter {short(name)}")
    scan.plain(value, begun)
    scan.take("\n")
    if not is_text:
        try:
            one = list(parse_json(f'{{"value": {value}}}'.encode(), "it")) == ["value"]
        except BridgeError:
            one = False
        if not one:
            raise scan.error(f"the parameter {short(name)} is no JSON value: {short(value)}", begun)
    values[name] = to_json(value) if is_text else value.strip()


class _Scan:
    """A place in a text."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error("half of a surrogate pair, which is no text", error.start) from None

    def has(self, word: str) -> bool:
        return self.text.startswith(word, self.at)

    def take(self, word: str) -> None:
        """Go behind a word that must stand here."""
        if not self.has(word):
            raise self.error(f"expected {short(word)}, got {self._here(self.at)}", self.at)
        self.at += len(word)

    def until(self, word: str, what: str) -> str:
        """The text up to the next `word`; go behind it."""
        found = self.text.find(word, self.at)
        if found < 0:
            raise self.error(f"{what} ({word}) is missing behind here", self.at)
        begun, self.at = self.at, found + len(word)
        return self.text[begun:found]

    def name(self) -> str:
        """A name and the quote behind it."""
        begun = self.at
        name = self.until('"', "the end of a name")
        if not name or "\n" in name or DSML in name:
            raise self.error(f"expected a name, got {self._here(begun)}", begun)
        return name

    def plain(self, text: str, at: int) -> None:
        """Refuse a text, found at a place, that holds a token of the encoding."""
        found = [(text.find(t), t) for t in (*TURN_TOKENS, *ANSWER_TOKENS) if t in text]
        if found:
            where, token = min(found)
            raise self.error(f"{token} does not belong here", at + where)

    def error(self, what: str, at: int) -> BridgeError:
        return BridgeError(f"parsing a completion of {len(self.text)} characters: at character {at}: {what}")

    def _here(self, at: int) -> str:
        return short(self.text[at : at + 40]) if at < len(self.text) else "the end of the text"
