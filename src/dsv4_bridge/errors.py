"""The one exception a user meets: input that cannot be used, said in one message."""


class BridgeError(Exception):
    """Input or environment that cannot be used (exit code 2 on the command line).

    The message says what was being done, to which tensor or file, what came, what was
    expected, and what to do.
    """


def printable(text: str) -> str:
    """Text in which no name from a file can move the cursor, set colours or reorder what is read; lines stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
