"""Samples of training data with what is learned marked: by colour on a terminal, else by brackets."""

import os
import sys
from collections.abc import Sequence

from rich.text import Text

from ...data.samples_shown import Shown

OPEN, CLOSE = "⟦", "⟧"


def samples(found: Sequence[Shown]) -> Text:
    """What `dsv4 data --show` prints."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    text = Text()
    if not colour:
        text.append(f"{OPEN}learned{CLOSE}\n")
    for number, one in enumerate(found, 1):
        text.append(f"\n{number}. {one.where}: {one.tokens:,} tokens, {one.learned:,} learned\n", "bold")
        for piece, learned in one.parts:
            if colour:
                text.append(piece, "green" if learned else "dim")
            else:
                text.append(f"{OPEN}{piece}{CLOSE}" if learned else piece)
        text.append("\n")
    if not found:
        text.append("no samples\n")
    return text
