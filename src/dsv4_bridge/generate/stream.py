"""Text of several rows as it is made."""

from collections.abc import Callable, Sequence

from ..text.tokenizer import BROKEN, Tokenizer


class TextStream:
    """A text that grows token by token, and may end at a stop text.

    What is given out is final: a character that lacks bytes, or the beginning of a stop text, is held
    back until it is decided.

    Args:
        tokenizer: its tokenizer.
        stops: texts that end it; they are no part of it.

    Attributes:
        text: all that was given out.
        stopped: whether a stop text came.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.text, self.stopped = "", False
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        # Tokens before `_from` are settled; those up to `_given` are decoded again for context only.
        self._from = self._given = 0
        self._held = ""

    def push(self, token: int) -> str:
        """Take a token; the text that it settles."""
        self._ids.append(token)
        fresh = self._fresh()
        if fresh.endswith(BROKEN):
            return ""
        self._from, self._given = self._given, len(self._ids)
        return self._give(self._held + fresh)

    def finish(self) -> str:
        """The text that is still held back."""
        rest = "" if self.stopped else self._held + self._fresh()
        self._from = self._given = len(self._ids)
        given = self._give(rest)
        rest, self._held = self._held, ""
        self.text += rest
        return given + rest

    def _fresh(self) -> str:
        known = self._tokenizer.decode(self._ids[self._from : self._given])
        return self._tokenizer.decode(self._ids[self._from :])[len(known) :]

    def _give(self, text: str) -> str:
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            given, self._held = text[: min(found)], ""
        else:
            kept = max((_overlap(text, stop) for stop in self._stops), default=0)
            given, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self.text += given
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop text begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


Heard = Callable[[int, str, bool], object]


class InOrder:
    """Writes texts that grow side by side one below the other: the first at once, the next when it has ended.

    Args:
        count: of texts; more than one are numbered from 0.
        write: takes pieces.
    """

    def __init__(self, count: int, write: Callable[[str], object]):
        self._waiting = [f"[{row}] " if count > 1 else "" for row in range(count)]
        self._ended = [False] * count
        self._write, self._now = write, 0

    def heard(self, row: int, piece: str, last: bool) -> None:
        """A piece of text `row`; `last`: it ends with it."""
        self._waiting[row] += piece
        self._ended[row] |= last
        while self._now < len(self._waiting):
            if self._waiting[self._now]:
                self._write(self._waiting[self._now])
                self._waiting[self._now] = ""
            if not self._ended[self._now]:
                return
            self._write("\n")
            self._now += 1
