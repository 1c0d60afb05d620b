"""Megatron's notation of pipeline layouts, both ways."""

import re
from collections.abc import Sequence

from ..errors import BridgeError
from ..spec.spec import ModelSpec
from .balance import solve
from .layout import Chunk, Layout, broken_rules

_MOST_CHUNKS = 4096


_LETTERS = {"E": "embedding", "t": "decoder layer", "m": "MTP layer", "L": "loss"}


def parse_layout(text: str, pp: int, spec: ModelSpec) -> Layout:
    """Read the written form.

    Args:
        text: e.g. `Et*11|t*11|t*11|t*10mL`.
        pp: pipeline ranks.
        spec: the model, whose rules the layout must keep.

    Raises:
        BridgeError: not a layout, or a rule broken, which one and by which chunk.
    """
    return layout_of([list(part) for part in _unrolled(text).split("|")], pp, spec, text)


def _unrolled(text: str) -> str:
    plain = text.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]*)\)\*(\d{1,4})", r"([A-Za-z|])\*(\d{1,4})"):
        plain = re.sub(pattern, lambda found: found[1] * int(found[2]), plain)
        if len(plain) > _MOST_CHUNKS * 4:
            raise BridgeError(f"reading the layout {text[:60]!r}: it unrolls to more than {_MOST_CHUNKS * 4} letters")
    if strange := sorted(set(plain) - set(_LETTERS) - {"|"}):
        raise BridgeError(
            f"reading the layout {text[:60]!r}: {strange[0]!r} is no part of one; known are "
            + ", ".join(f"{letter} ({what})" for letter, what in _LETTERS.items())
            + ", | between chunks, and *n"
        )
    return plain


def layout_of(lists: Sequence[Sequence[str]], pp: int, spec: ModelSpec, text: str = "") -> Layout:
    """A layout from lists of letters, or of megatron's layer names.

    Raises:
        BridgeError: as `parse_layout`.
    """
    where = f"pipeline layout {text or lists!r}"
    letter = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"} | {x: x for x in _LETTERS}
    chunks, at = [], 0
    for number, names in enumerate(lists):
        if strange := [n for n in names if n not in letter]:
            raise BridgeError(f"{where}: {strange[0]!r} in chunk {number} is no kind of layer")
        letters = "".join(letter[n] for n in names)
        count = letters.count("t")
        chunk = Chunk(at, at + count, "E" in letters, letters.count("m"), "L" in letters)
        if letters != chunk.letters:
            raise BridgeError(f"{where}: chunk {number} is {letters!r}, expected the order {chunk.letters!r}")
        chunks.append(chunk)
        at += count
    if pp < 1 or len(chunks) % pp:
        raise BridgeError(f"{where}: {len(chunks)} chunks do not divide over {pp} pipeline ranks")
    layout = Layout(tuple(chunks), pp)
    if broken := broken_rules(layout, spec):
        raise BridgeError(
            f"{where} breaks a rule: {'; '.join(broken)}. A layout that keeps them: {solve(spec, pp, layout.vp)}"
        )
    return layout
