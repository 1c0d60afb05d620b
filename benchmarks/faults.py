"""Small faults, each planted in a copy of a toy: which are seen by `dsv4 verify`, and which by `dsv4 parity`?

    python benchmarks/faults.py                            # all of them, a table in Markdown
    python benchmarks/faults.py --only indexer --dtypes float32

Toys: F, 8-bit and 4-bit weights; B, float32 scales (Base); R, F with the real vocabulary of 129,280 and index_topk of
512. Everything is asked as by default: `verify GOOD BAD --level L`, `parity BAD --reference GOOD`.
"""

import argparse
import json
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

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from dsv4_bridge import BridgeError, make_toy
from dsv4_bridge.codec.bf16 import to_bf16
from dsv4_bridge.convert.verify import LEVELS, verify
from dsv4_bridge.parity import parity
from dsv4_bridge.spec.dtypes import DTYPES
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.store.hf import open_hf
from dsv4_bridge.store.safetensors import TensorInfo

Array = np.ndarray


class Copy:
    """A copy of a toy whose bytes can be changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        checkpoint = open_hf(folder)
        self.tensors: dict[str, TensorInfo] = dict(checkpoint.folder.tensors)
        checkpoint.close()

    def read(self, name: str) -> Array:
        info = self.tensors[name]
        kind = np.dtype(DTYPES[info.dtype].numpy)
        return np.fromfile(self.folder / info.file, kind, info.nbytes // kind.itemsize, offset=info.start).reshape(
            info.shape
        )

    def write(self, name: str, values: Array) -> None:
        info = self.tensors[name]
        raw = np.ascontiguousarray(values, DTYPES[info.dtype].numpy).tobytes()
        assert len(raw) == info.nbytes, name
        with (self.folder / info.file).open("r+b") as file:
            file.seek(info.start)
            file.write(raw)

    def change(self, name: str, how: Callable[[Array], Array]) -> None:
        before = self.read(name)
        after = how(before.copy())
        assert after.tobytes() != before.tobytes(), f"{name} is as before"
        self.write(name, after)

    def swap(self, one: str, other: str) -> None:
        """Everything whose name begins so."""
        for name in [n for n in self.tensors if n.startswith(one)]:
            mine, theirs = self.read(name), self.read(other + name.removeprefix(one))
            self.write(name, theirs)
            self.write(other + name.removeprefix(one), mine)

    def configure(self, change: Callable[[dict[str, Any]], None]) -> None:
        path = self.folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: for people.
        plant: puts it into a copy.
        toys: where it is planted.
        harmless: whether it changes nothing that is computed.
    """

    name: str
    plant: Callable[[Copy], None]
    toys: str = "F"
    harmless: bool = False


# ---------------------------------------------------------------- changes of one tensor


def at(place: tuple[int, ...], how: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Change one element, as an array of it."""

    def change(values: Array) -> Array:
        here = tuple(slice(i, i + 1) for i in place)
        values[here] = how(values[here])
        return values

    return change


def plus(step: float) -> Callable[[Array], Array]:
    return lambda values: values + np.asarray(step).astype(values.dtype)


def times(factor: float) -> Callable[[Array], Array]:
    """Of float32, or of bf16 bits."""

    def change(values: Array) -> Array:
        if values.dtype == np.uint16:
            wide = (values.astype("<u4") << 16).view("<f4")
            return to_bf16(wide * np.float32(factor))
        return (values * np.float32(factor)).astype(values.dtype)

    return change


def ulp(values: Array) -> Array:
    """The next number away from 0."""
    kind = {2: "<u2", 4: "<u4"}[values.dtype.itemsize]
    return (np.ascontiguousarray(values).view(kind) + np.asarray(1, kind)).view(values.dtype)


def rounded(values: Array) -> Array:
    """float32 rounded to bf16."""
    return (to_bf16(values).astype("<u4") << 16).view("<f4").reshape(values.shape)


def rows(one: int, other: int) -> Callable[[Array], Array]:
    def change(values: Array) -> Array:
        values[[one, other]] = values[[other, one]]
        return values

    return change


def flipped(values: Array) -> Array:
    return values[::-1]


def halves(values: Array) -> Array:
    return np.roll(values, values.shape[1] // 2, 1)


def code(bits: int) -> Callable[[Array], Array]:
    """Other bits of the first code that is no zero."""

    def change(values: Array) -> Array:
        flat = values.reshape(-1).view(np.uint8)
        place = int(np.flatnonzero((flat & 0x70) != 0)[0])
        flat[place] ^= bits
        return values

    return change


def minus_zero(values: Array) -> Array:
    """In the low half of a byte of FP4 codes."""
    flat = values.reshape(-1).view(np.uint8)
    flat[int(np.flatnonzero((flat & 0x0F) == 0)[0])] |= 0x08
    return values


def another_expert(token: int) -> Callable[[Array], Array]:
    def change(table: Array) -> Array:
        table[token, 0] = next(e for e in range(8) if e not in table[token])
        return table

    return change


def regrouped(values: Array) -> Array:
    """Ranks of the four output groups taken for groups of ranks."""
    return values.reshape(4, -1, values.shape[1]).swapaxes(0, 1).reshape(values.shape)


def on(name: str, how: Callable[[Array], Array]) -> Callable[[Copy], None]:
    return lambda copy: copy.change(name, how)


def every(pattern: str, how: Callable[[Array], Array]) -> Callable[[Copy], None]:
    def plant(copy: Copy) -> None:
        for name in copy.tensors:
            if re.fullmatch(pattern, name):
                copy.change(name, how)

    return plant


def swapped(one: str, other: str) -> Callable[[Copy], None]:
    return lambda copy: copy.swap(one, other)


def configured(**values: Any) -> Callable[[Copy], None]:
    return lambda copy: copy.configure(lambda config: config.update(values))


def yarn(config: dict[str, Any]) -> None:
    config["rope_scaling"]["factor"] = 8


_HC = r"(layers|mtp)\.\d\.hc_(attn|ffn|head)_(fn|base|scale)|hc_head_(fn|base|scale)"
_LAST = 500  # a token that the sample of R does not have
FAULTS = (
    Fault("E8M0 scale of wq_a +1", on("layers.2.attn.wq_a.scale", at((0, 0), plus(1)))),
    Fault("E8M0 scale of wo_b +1", on("layers.3.attn.wo_b.scale", at((0, 0), plus(1)))),
    Fault("scale of one group of an expert +1", on("layers.3.ffn.experts.2.w2.scale", at((5, 1), plus(1)))),
    Fault("one FP8 code", on("layers.2.attn.wkv.weight", code(0x10))),
    Fault("one FP4 code", on("layers.4.ffn.experts.1.w1.weight", code(0x20))),
    Fault("one sign", on("layers.2.attn.wq_b.weight", code(0x80))),
    Fault("rows of wkv reversed", on("layers.3.attn.wkv.weight", flipped)),
    Fault("wo_a: groups and ranks transposed", on("layers.2.attn.wo_a.weight", regrouped)),
    Fault("w1 and w3 of an expert swapped", swapped("layers.3.ffn.experts.1.w1", "layers.3.ffn.experts.1.w3")),
    Fault(
        "w1 and w3 of the shared expert swapped",
        swapped("layers.3.ffn.shared_experts.w1", "layers.3.ffn.shared_experts.w3"),
    ),
    Fault("two experts swapped", swapped("layers.4.ffn.experts.1.", "layers.4.ffn.experts.6.")),
    Fault("layers 3 and 5 swapped", swapped("layers.3.", "layers.5.")),
    Fault("an hc scale permuted", on("layers.3.hc_attn_scale", lambda v: np.roll(v, 1))),
    Fault("all hc_* rounded to bf16", every(_HC, rounded)),
    Fault("one hc fn rounded to bf16", on("layers.2.hc_ffn_fn", rounded)),
    Fault("sink of a head 1 % more", on("layers.2.attn.attn_sink", at((3,), times(1.01)))),
    Fault("sink of a head 0", on("layers.2.attn.attn_sink", at((3,), times(0)))),
    Fault("sinks rounded to bf16", on("layers.3.attn.attn_sink", rounded)),
    Fault("q_norm 1 ulp", on("layers.3.attn.q_norm.weight", at((7,), ulp))),
    Fault("attn_norm 1 % of one value", on("layers.3.attn_norm.weight", at((7,), times(1.01)))),
    Fault("rows of ape permuted", on("layers.2.attn.compressor.ape", flipped)),
    Fault("halves of ape swapped", on("layers.2.attn.compressor.ape", halves)),
    Fault("head value 1 ulp", on("head.weight", at((77, 5), ulp))),
    Fault("head rows swapped", on("head.weight", rows(70, 71))),
    Fault("gate.bias rounded to bf16", on("layers.4.ffn.gate.bias", rounded)),
    Fault("one wrong entry of tid2eid", on("layers.1.ffn.gate.tid2eid", another_expert(_LAST)), "FR"),
    Fault("embedding rows swapped", on("embed.weight", rows(_LAST, _LAST + 1)), "FR"),
    Fault("embedding value 1 ulp", on("embed.weight", at((_LAST, 9), ulp)), "FR"),
    Fault("indexer: weights negated", on("layers.4.attn.indexer.weights_proj.weight", lambda v: v ^ 0x8000), "FR"),
    Fault("indexer: wq_b with rows reversed", on("layers.4.attn.indexer.wq_b.weight", flipped), "FR"),
    Fault("indexer: rows of ape permuted", on("layers.4.attn.indexer.compressor.ape", flipped), "FR"),
    Fault("indexer: one value of ape 1 % more", on("layers.2.attn.indexer.compressor.ape", at((1, 3), times(1.01)))),
    Fault("gate.bias of one expert +1e-3", on("layers.4.ffn.gate.bias", at((2,), plus(1e-3)))),
    Fault("gate weight 1 ulp", on("layers.4.ffn.gate.weight", at((2, 9), ulp))),
    Fault("one value of hc_base 0.1 % more", on("layers.3.hc_ffn_base", at((2,), times(1.001)))),
    Fault("sink 1 ulp", on("layers.3.attn.attn_sink", at((2,), ulp))),
    Fault("hc_head_scale 1 ulp", on("hc_head_scale", ulp)),
    Fault("compressor norm 1 ulp", on("layers.3.attn.compressor.norm.weight", at((2,), ulp))),
    Fault("order of experts in a row of tid2eid", on("layers.1.ffn.gate.tid2eid", lambda v: v[:, ::-1]), "F", True),
    Fault("-0 in place of 0", on("layers.4.ffn.experts.1.w1.weight", minus_zero), "F", True),
    Fault("MTP: e_proj and h_proj swapped", swapped("mtp.0.e_proj", "mtp.0.h_proj")),
    Fault("MTP: gate.bias of one expert +1", on("mtp.0.ffn.gate.bias", at((2,), plus(1)))),
    Fault("MTP: gate.bias +1 everywhere", on("mtp.0.ffn.gate.bias", plus(1)), "F", True),
    Fault("F32 scale of wkv 1 ulp", on("layers.3.attn.wkv.scale", at((0, 0), ulp)), "B"),
    Fault("all F32 scales times 1.0019", every(r".*\.scale", times(1.0019336)), "B"),
    Fault("config: YaRN factor", lambda copy: copy.configure(yarn)),
    Fault("config: compress_rope_theta", configured(compress_rope_theta=40000.0)),
    Fault("config: rms_norm_eps", configured(rms_norm_eps=1e-5)),
    Fault("config: swiglu_limit", configured(swiglu_limit=7.0)),
    Fault("config: routed_scaling_factor", configured(routed_scaling_factor=2.5)),
    Fault("config: index_topk", configured(index_topk=16)),
)


def make_toys(folder: Path, which: str = "FBR") -> None:
    """The toys, each in a folder of its name."""
    large = replace_spec(tiny(VARIANTS["Flash"]), vocab_size=129280, index_topk=512)
    for name in which:
        make_toy(folder / name, "Flash-Base" if name == "B" else "Flash", 3, spec=large if name == "R" else None)


@contextmanager
def planted(fault: Fault, good: Path) -> Iterator[Path]:
    """A copy with the fault, gone after the block."""
    with tempfile.TemporaryDirectory(prefix="dsv4-fault-", dir=good.parent) as folder:
        bad = Path(shutil.copytree(good, Path(folder) / "bad"))
        fault.plant(Copy(bad))
        yield bad


def by_verify(good: Path, bad: Path, level: str) -> str:
    """What a level of verify says."""
    try:
        return "same" if verify(good, bad, level).same else "SEEN"
    except BridgeError:
        return "refused"


def by_parity(good: Path, bad: Path, dtype: str) -> str:
    """What parity says: where it looks first."""
    try:
        report = parity(bad, reference_checkpoint=good, dtype=dtype)
    except BridgeError:
        return "refused"
    if report.passed:
        return "passes"
    verdict = report.verdict
    draft = "MTP block, " if verdict.text.startswith("MTP") else ""
    place = draft if verdict.layer is None else f"layer {verdict.layer}, "
    return f"SEEN ({place}{verdict.site or 'logits'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a pattern of names")
    parser.add_argument("--toys", default="FBR", help="which toys")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bf16"], help="types that parity computes in")
    told = parser.parse_args()
    dtypes = told.dtypes
    chosen = [(fault, toy) for fault in FAULTS for toy in fault.toys if toy in told.toys]
    chosen = [pair for pair in chosen if re.search(told.only, pair[0].name)]
    seen: dict[tuple[str, str], list[str]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dsv4-faults-") as folder:
        make_toys(Path(folder), "".join(sorted({toy for _, toy in chosen})))
        ways: list[Callable[[Path, Path], str]] = [partial(by_verify, level=level) for level in LEVELS]
        for stage in (ways, *([partial(by_parity, dtype=dtype)] for dtype in dtypes)):
            for toy in sorted({toy for _, toy in chosen}):
                for fault, _ in (pair for pair in chosen if pair[1] == toy):
                    with planted(fault, Path(folder) / toy) as bad:
                        found = [way(Path(folder) / toy, bad) for way in stage]
                    seen.setdefault((fault.name, toy), []).extend(found)
                    print(
                        f"{time.monotonic() - began:6.0f} s  {toy}  {fault.name}: {', '.join(found)}", file=sys.stderr
                    )
    print(f"| fault | toy | verify {' / '.join(LEVELS)} | " + " | ".join(f"parity {d}" for d in dtypes) + " |")
    print("|---" * (3 + len(dtypes)) + "|")
    for fault, toy in chosen:
        levels, rest = seen[fault.name, toy][: len(LEVELS)], seen[fault.name, toy][len(LEVELS) :]
        note = " (changes nothing)" if fault.harmless else ""
        print(f"| {fault.name}{note} | {toy} | {' / '.join(levels)} | " + " | ".join(rest) + " |")


if __name__ == "__main__":
    main()
