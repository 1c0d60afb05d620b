"""Loaders that read a file from elsewhere, each with sound files and a way to harm them; see `fuzz`.

A loader is made once a process, in a folder of its own; `run(number)` makes input `number` and reads it.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from dsv4_bridge import BridgeError
from fuzz_args import StoredArgs
from fuzz_arrays import ChatStores, Indexed
from fuzz_checkpoints import TARGETS, Fuzzer
from fuzz_runs import Journals, Progress, RankFiles
from fuzz_texts import ChatLines, Recipes, Texts
from fuzz_tokenizers import Tokenizers


class Loader(Protocol):
    """See above."""

    def run(self, number: int) -> None:
        """Raises BridgeError where the input is refused; returns where it is taken; else it is a failure."""
        ...


class Checkpoints:
    """Files of checkpoints, through `inspect`, `import_hf` and `export_hf`."""

    def __init__(self, folder: Path, seed: int, target: str):
        self._fuzzer = Fuzzer(folder, seed, [t for t in TARGETS if t.name == target])

    def run(self, number: int) -> None:
        outcome = self._fuzzer.run(range(number, number + 1))
        refused, outcome.refused = outcome.refused, 0
        failures, outcome.failures = outcome.failures, []
        if failures:
            raise AssertionError("\n".join(failures))
        if refused:
            raise BridgeError("refused")


def hub(folder: Path, seed: int) -> Loader:
    """Answers of a server that should be the Hub."""
    from fuzz_hub import Answers

    return Answers(folder, seed)


class Broken:
    """Does, input by input, what `fuzz` counts: a check of the fuzzer itself."""

    def __init__(self, folder: Path, seed: int):
        self._held = b""

    def run(self, number: int) -> None:
        match number:
            case 1:
                raise BridgeError("refused")
            case 2:
                raise ValueError("a traceback")
            case 3:
                time.sleep(3600)
            case 4:
                self._held = b"x" * (600 << 20)
            case 5:
                os.abort()


LOADERS: dict[str, Callable[[Path, int], Loader]] = {
    "recipe": Recipes,
    **{
        name: (lambda folder, seed, target=target: Checkpoints(folder, seed, target))
        for name, target in {
            "config": "config",
            "index": "index",
            "run_config": "run_config",
            "header": "header",
            "metadata": ".metadata",
            "distcp": ".distcp",
        }.items()
    },
    "npy": ChatStores,
    "idx": Indexed,
    "tokenizer": Tokenizers,
    "args": StoredArgs,
    "journal": Journals,
    "ranks": RankFiles,
    "state": Progress,
    "chat": ChatLines,
    "text": Texts,
    "hub": hub,
    "broken": Broken,
}
