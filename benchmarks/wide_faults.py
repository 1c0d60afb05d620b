"""Small faults at a released width: which are found, in which layer, by parity a layer at a time, and by `--deep`?

    dsv4 toy TOY --width full --layers 6
    python benchmarks/wide_faults.py TOY

Each is planted in a folder of hard links, with the shard that it touches copied; the layer with it and the one before
are compared, on one row of 64 tokens (301 for the indexer's, with another pass in which it chooses). Then all that
statistics can tell are planted together, and `inspect --deep` reads the folder once. A table in Markdown.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_bridge import BridgeError, examine
from dsv4_bridge.parity import Inputs, parity
from dsv4_bridge.parity.inputs import token_ids
from dsv4_bridge.store.named import spec_of
from faults import Array, Copy, at, flipped, on, plus, swapped, times, ulp, yarn

INPUTS = Inputs(seq_length=64, batch=1)


class Linked(Copy):
    """A folder of hard links to another; a file is copied before it changes."""

    def __init__(self, good: Path, folder: Path):
        shutil.copytree(good, folder, copy_function=os.link)
        super().__init__(folder)

    def own(self, name: str) -> None:
        """Have the file for ourselves."""
        path = self.folder / name
        if path.stat().st_nlink > 1:
            part = path.with_name(f"{name}.part")
            shutil.copyfile(path, part)
            part.replace(path)

    def write(self, name: str, values: Array) -> None:
        self.own(self.tensors[name].file)
        super().write(name, values)

    def configure(self, change: Callable[[dict[str, Any]], None]) -> None:
        self.own("config.json")
        super().configure(change)


@dataclass(frozen=True)
class Wide:
    """A fault.

    Attributes:
        name: for people.
        plant: puts it into a copy.
        layers: first and last that are compared.
        where: the layer that the verdict should name; None: the head, or an MTP block.
        deep: whether statistics can tell.
    """

    name: str
    plant: Callable[[Copy], None]
    layers: tuple[int, int]
    where: int | None
    deep: bool = False


def transposed(values: Array) -> Array:
    """Codes of a square matrix; its scales stay."""
    return np.ascontiguousarray(values.T)


def as_numbers(scale: Array) -> Array:
    """Exponents copied as if they were numbers: half as many, wrapped."""
    return np.minimum(scale, 3)


def attention(copy: Copy, one: int, other: int) -> None:
    """Attention of two layers swapped."""
    copy.swap(f"layers.{one}.attn.", f"layers.{other}.attn.")


def faults(token: int) -> tuple[Wide, ...]:
    """All of them, for the six layers of the toy; `token` is one of the sample's."""

    def other_expert(table: Array) -> Array:
        table[token, 0] = next(e for e in range(256) if e not in table[token])
        return table

    def twice(table: Array) -> Array:
        table[token, 1] = table[token, 0]
        return table

    def doubled(copy: Copy) -> None:
        one, experts = int(copy.read("layers.1.ffn.gate.tid2eid")[token, 0]), "layers.1.ffn.experts"
        copies(copy, f"{experts}.{one}.", f"{experts}.{(one + 1) % 256}.")

    scale, shared = "layers.{}.attn.{}.scale", "layers.3.ffn.shared_experts"
    return (
        Wide("E8M0 scale of one tile of wq_a +1", on(scale.format(2, "wq_a"), at((0, 0), plus(1))), (1, 2), 2),
        Wide("w1 and w3 of the shared expert swapped", swapped(f"{shared}.w1", f"{shared}.w3"), (2, 3), 3),
        Wide("MTP e_proj transposed", on("mtp.0.e_proj.weight", transposed), (5, 5), None),
        Wide("one wrong entry of tid2eid", on("layers.1.ffn.gate.tid2eid", other_expert), (0, 1), 1),
        Wide("sink of one head 10 % more", on("layers.3.attn.attn_sink", at((17,), times(1.1))), (2, 3), 3),
        Wide("an hc scale permuted", on("layers.4.hc_attn_scale", lambda v: np.roll(v, 1)), (3, 4), 4),
        Wide("attention of layers 3 and 5 swapped", partial(attention, one=3, other=5), (2, 3), 3),
        Wide("config: YaRN factor", lambda copy: copy.configure(yarn), (1, 2), None),
        Wide("rows of the compressor's ape permuted", on("layers.2.attn.compressor.ape", flipped), (1, 2), 2),
        Wide("indexer: wq_b with rows reversed", on("layers.4.attn.indexer.wq_b.weight", flipped), (3, 4), 4),
        Wide("gate.bias of one expert +1", on("layers.4.ffn.gate.bias", at((2,), plus(1))), (3, 4), 4),
        Wide("kv_norm 1 ulp of one value", on("layers.5.attn.kv_norm.weight", at((7,), ulp)), (4, 5), 5),
        Wide("head rows swapped", on("head.weight", lambda v: v[::-1]), (5, 5), None),
        Wide("tid2eid: an expert twice in a row", on("layers.2.ffn.gate.tid2eid", twice), (1, 2), 2, True),
        Wide("scales of wkv copied as numbers", on(scale.format(5, "wkv"), as_numbers), (4, 5), 5, True),
        Wide("wo_b of layer 4 twice as large", on(scale.format(4, "wo_b"), plus(1)), (3, 4), 4),
        Wide("an expert of one of the tokens twice", doubled, (0, 1), 1, True),
    )  # fmt: skip


def copies(copy: Copy, one: str, other: str) -> None:
    """Everything whose name begins so becomes a copy of the other."""
    for name in [n for n in copy.tensors if n.startswith(one)]:
        copy.write(name, copy.read(other + name.removeprefix(one)))


@contextmanager
def planted(chosen: tuple[Wide, ...], good: Path) -> Iterator[Path]:
    """A folder with faults, gone after the block."""
    with tempfile.TemporaryDirectory(prefix="dsv4-wide-", dir=good.parent) as folder:
        copy = Linked(good, Path(folder) / "bad")
        for fault in chosen:
            fault.plant(copy)
        yield copy.folder


def by_parity(fault: Wide, good: Path, bad: Path) -> str:
    """What parity says."""
    try:
        inputs = Inputs(batch=1) if fault.name.startswith("indexer") else INPUTS
        report = parity(bad, reference_checkpoint=good, inputs=inputs, layers=fault.layers)
    except BridgeError as error:
        return f"refused: {str(error).split(': ', 1)[1][:60]}"
    if report.passed:
        return "PASSES"
    verdict = report.verdict
    place = (
        "MTP block" if verdict.text.startswith("MTP") else "head" if verdict.layer is None else f"layer {verdict.layer}"
    )
    right = "" if fault.where is None or verdict.layer == fault.where else " (ELSEWHERE)"
    return f"{place}, {verdict.site}{right}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="a pattern of names")
    parser.add_argument("--no-deep", action="store_true")
    told = parser.parse_args()
    spec = spec_of(told.folder)
    ids, _ = token_ids(INPUTS, spec, ())
    chosen = tuple(f for f in faults(int(ids[0, 40])) if re.search(told.only, f.name))
    print("| fault | parity a layer at a time | `inspect --deep` |\n|---|---|---|")
    seen = {}
    for fault in chosen:
        began = time.monotonic()
        with planted((fault,), told.folder) as bad:
            seen[fault.name] = by_parity(fault, told.folder, bad)
        print(f"{time.monotonic() - began:6.0f} s  {fault.name}: {seen[fault.name]}", file=sys.stderr, flush=True)
    deep = "not asked"
    if not told.no_deep and any(f.deep for f in chosen):
        with planted(tuple(f for f in chosen if f.deep), told.folder) as bad:
            deep = "; ".join(str(finding) for finding in examine(bad).findings)
    for fault in chosen:
        print(f"| {fault.name} | {seen[fault.name]} | {'planted' if fault.deep else '-'} |")
    print(f"\nAll planted ones together, by `inspect --deep`: {deep}")


if __name__ == "__main__":
    main()
