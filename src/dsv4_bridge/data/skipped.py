"""What was left out of training data, and why: counted, and listed beside the output as JSON lines."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import BridgeError, printable
from ..files import sync

ENDING = ".skipped.jsonl"
_SHOWN = 3


@dataclass(frozen=True)
class Skipped:
    """One thing that was left out.

    Attributes:
        file: as the user named it, or found in a folder.
        reason: what is wrong with it.
        number: of the line or element, from 1; None for the whole file.
        unit: `line` or `element`.
    """

    file: str
    reason: str
    number: int | None = None
    unit: str = "line"

    def __str__(self) -> str:
        where = self.file if self.number is None else f"{self.file}, {self.unit} {self.number}"
        return f"{where}: {self.reason}"


class SkipList:
    """Written as it grows, so that memory holds a few however many they are.

    The list is `PREFIX.skipped.jsonl`: an object a line with `file`, `line` or `element` where it is one, and `reason`.
    Until `place` it is `….part`; a list of an earlier run goes then, also where nothing was left out.

    Attributes:
        count: how many.
        first: the first few, for the report.
    """

    def __init__(self, prefix: Path):
        self.path = prefix.with_name(prefix.name + ENDING)
        self._part = prefix.with_name(prefix.name + ENDING + ".part")
        self._part.unlink(missing_ok=True)  # of a run that was killed
        self._file = None
        self.count = 0
        self.first: list[Skipped] = []

    def add(self, one: Skipped) -> None:
        """Count and write one."""
        if self._file is None:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("w", encoding="utf-8")
        facts = {"file": one.file} | ({} if one.number is None else {one.unit: one.number}) | {"reason": one.reason}
        self._file.write(json.dumps(facts) + "\n")
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(one)

    def place(self) -> None:
        """Give the list its name, or take an old one away."""
        if self._file is None:
            self.path.unlink(missing_ok=True)
            return
        self._file.close()
        sync(self._part)
        self._part.replace(self.path)
        self._file = None
        sync(self.path.parent)

    def drop(self) -> None:
        """Away with what is not placed."""
        if self._file is not None:
            self._file.close()
            self._part.unlink(missing_ok=True)

    def lines(self) -> list[str]:
        """For people."""
        return report_lines(self.count, [str(one) for one in self.first], str(self.path))

    def refuse_all(self, doing: str) -> BridgeError:
        """The message where nothing else is left."""
        return BridgeError(f"{doing}: nothing is left; {self.count:,} were skipped, the first is {self.first[0]}")


def report_lines(count: int, first: Sequence[str], path: str) -> list[str]:
    """How many were left out, the first of them, and where the list is; nothing where there are none."""
    if not count:
        return []
    more = ["  …"] * (count > len(first))
    return [f"{count:,} skipped, listed in {path}:", *(f"  {printable(one)}" for one in first), *more]
