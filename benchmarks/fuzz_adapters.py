"""Fuzz the reader of adapters: mutated folders of peft may be refused, and nothing else may go wrong.

    python benchmarks/fuzz_adapters.py --count 10000 --seed 1

Every input is a small sound adapter with its configuration, its tensors' header or both changed: as settings, values,
names, shapes or bytes. It is read for training and for a merge, and what can be read is now and then merged. Allowed:
success, or one BridgeError whose message can be printed. Anything else is a failure: another exception, more than the
time or memory limit. A failing input's number with the seed makes it again: --only NUMBER.
"""

import argparse
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dsv4_bridge import BridgeError, make_toy
from dsv4_bridge.convert.merge import merge
from dsv4_bridge.convert.run import Options
from dsv4_bridge.lora import peft_patterns
from dsv4_bridge.lora.adapters import Adapter, Adapters
from dsv4_bridge.lora.peft import CONFIG, WEIGHTS, export_peft, open_adapters
from dsv4_bridge.spec.lora import CARRIERS, MERGEABLE, Lora, targets
from dsv4_bridge.spec.spec import ModelSpec, replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny
from mutations import mutate_bytes, mutate_json, mutate_shard, odd_value, to_json

SECONDS = 20.0  # an input
MEGABYTES = 512  # by which one input may raise the peak
peft_patterns.SECONDS = 3.0

SPEC = replace_spec(
    tiny(VARIANTS["Flash"]),
    num_hidden_layers=2,
    compress_ratios=(0, 4, 0),
    num_hash_layers=1,
    hidden_size=128,
    q_lora_rank=32,
    moe_intermediate_size=64,
    vocab_size=64,
    n_routed_experts=4,
)
_ATTENTION = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_b")
BASES = {
    "attention": (Lora(2, 4, targets=_ATTENTION), "transformers"),
    "dora": (Lora(2, 4, targets=("attn.wq_b", "ffn.shared_experts.w1"), dora=True), "transformers"),
    "all": (Lora(2, 4, targets=CARRIERS), "transformers"),
    "released": (Lora(2, 4, targets=_ATTENTION), "released"),
    "to merge": (Lora(2, 4, targets=MERGEABLE), "transformers"),
}

_NAMES = (
    "q_a_proj",
    "self_attn.kv_proj",
    "kv_proj",
    "o_a_proj",
    "mlp.experts.down_proj",
    "wq_a",
    "lm_head",
    "nothing",
    "",
)
_REGEXES = (
    "all-linear", "ALL-LINEAR", r".*self_attn.*", r"(.*)", "(", "(?i)model.*", "(a+)+$", "((.+)+)+x", "(" * 500,
    r"(?P<n>.)(?P<n>.)", "(a{9999}){9999}", "x" * 6000, r"\d" * 500 + "(.*.*.*.*.*.*.*)*y", "[", "\\", "(?<=.*)x",
)  # fmt: skip
_NUMBERS = (0, 1, 2, 3, -1, 1 << 20, 1 << 62, 10**400, 0.5, 1e308, -0.0, float("nan"), float("inf"), True, "2", None)


def settings(rng: random.Random) -> dict[str, Any]:
    """A few of peft's settings, right, wrong or hostile."""

    def names() -> Any:
        several = [rng.choice(_NAMES) for _ in range(rng.choice((0, 1, 2, 5)))]
        return rng.choice((several, several, rng.choice(_REGEXES), odd_value(rng)))

    def pattern() -> Any:
        keys = [rng.choice((*_NAMES, *_REGEXES, "self_attn.q_b_proj")) for _ in range(rng.choice((1, 2, 4)))]
        return rng.choice(({k: rng.choice(_NUMBERS) for k in keys}, dict.fromkeys(keys, 2), odd_value(rng)))

    makers: dict[str, Callable[[], Any]] = {
        **dict.fromkeys(("target_modules", "exclude_modules", "target_parameters", "modules_to_save"), names),
        **dict.fromkeys(("rank_pattern", "alpha_pattern"), pattern),
        **dict.fromkeys(("r", "lora_alpha", "lora_dropout"), lambda: rng.choice((*_NUMBERS, odd_value(rng)))),
        **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), lambda: rng.choice(_NUMBERS)),
        "layers_to_transform": lambda: rng.choice(([0], 1, [0, 1], [-1], [10**30], odd_value(rng))),
        "layers_pattern": lambda: rng.choice(("layers", ["h", "layers"], "(a+)+", odd_value(rng))),
        "bias": lambda: rng.choice(("none", "all", "lora_only", odd_value(rng))),
        "init_lora_weights": lambda: rng.choice((True, "gaussian", "pissa", "loftq", odd_value(rng))),
        "trainable_token_indices": lambda: rng.choice((None, [1], {}, odd_value(rng))),
        "peft_type": lambda: rng.choice(("LORA", "LOHA", odd_value(rng))),
    }
    return {name: makers[name]() for name in rng.sample(sorted(makers), rng.choice((1, 1, 2, 3)))}


def reshaped(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header stays sound, with other names, shapes and types."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 2, 4))):
        tensors = [n for n in header if n != "__metadata__"]
        if not tensors:
            break
        name = rng.choice(tensors)
        entry = header[name]
        match rng.randrange(6):
            case 0:
                entry["shape"] = entry["shape"][::-1]
            case 1:
                entry["shape"] = [1, *entry["shape"]]
            case 2:
                entry["dtype"] = rng.choice(("I32", "F32", "U32"))
            case 3:
                other = rng.choice(tensors)
                header[name], header[other] = header[other], entry
            case 4:
                new = name.replace(*rng.choice((("lora_A", "lora_B"), ("self_attn", "self_attn.compressor"), ("0", "1"),
                                                ("model.model.", "model."), ("_proj", "_proj.base_layer"),
                                                ("lora_A", "lora_embedding_A"), (".weight", ".bias"))))  # fmt: skip
                header[new] = header.pop(name)
            case _:
                header["base_model.model.lm_head.weight"] = header.pop(name)
    raw = to_json(header, rng)
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data[8 + length :]


@dataclass
class Outcome:
    """The figures of a run."""

    inputs: int = 0
    calls: int = 0
    refused: int = 0
    merged: int = 0
    slowest: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)


class Fuzzer:
    """Makes inputs and reads them, in this process."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.outcome = folder, seed, Outcome()
        folder.mkdir(parents=True, exist_ok=True)
        self.toy = make_toy(folder / "toy", "Flash-BF16", 1, spec=SPEC)
        self.bases = {name: _base(folder / name, SPEC, *made) for name, made in BASES.items()}
        merge(self.toy, self.bases["all"], folder / "warm")  # what is compiled on first use is compiled now

    def run(self, numbers: range) -> Outcome:
        """Run the inputs with these numbers."""
        for number in numbers:
            self._one(number)
        return self.outcome

    def _one(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        base = self.bases[rng.choice(sorted(self.bases))]
        here = self.folder / "input"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(base, here)
        kind = rng.choice(("settings", "settings", "config", "header", "shapes", "shapes", "bytes", "both"))
        config, weights = (base / CONFIG).read_bytes(), (base / WEIGHTS).read_bytes()
        if kind in ("settings", "both"):
            (here / CONFIG).write_bytes(to_json(json.loads(config) | settings(rng), rng))
        elif kind == "config":
            (here / CONFIG).write_bytes(mutate_json(config, rng))
        if kind in ("shapes", "both"):
            (here / WEIGHTS).write_bytes(reshaped(weights, rng))
        elif kind == "header":
            (here / WEIGHTS).write_bytes(mutate_shard(weights, rng))
        elif kind == "bytes":
            (here / WEIGHTS).write_bytes(mutate_bytes(weights, rng))
        self.outcome.inputs += 1
        self.outcome.kinds[kind] += 1
        where = f"input {number} ({kind}, {base.name})"
        self._call(f"{where}: training", lambda: open_adapters(here, SPEC))
        if self._call(f"{where}: merging", lambda: open_adapters(here, SPEC, merging=True)) and rng.random() < 0.3:
            dry = Options(dry_run=True)
            self.outcome.merged += self._call(
                f"{where}: merge", lambda: merge(self.toy, here, self.folder / "out", options=dry)
            )

    def _call(self, where: str, call: Callable[[], Any]) -> bool:
        self.outcome.calls += 1
        peak, began, good = _peak(), time.monotonic(), True
        try:
            call()
        except BridgeError as error:
            good = False
            self.outcome.refused += 1
            message = str(error)
            if not message.strip() or len(message) > 4000 or "Traceback" in message or "\ud800" in message:
                self._fail("message", f"{where}: {message[:300]!r}")
        except Exception:
            good = False
            self._fail("traceback", f"{where}\n{traceback.format_exc(limit=-6)}")
        seconds, rise = time.monotonic() - began, (_peak() - peak) >> 10
        self.outcome.slowest = max(self.outcome.slowest, seconds)
        if seconds > SECONDS:
            self._fail("hang", f"{where}: {seconds:.1f} s")
        if rise > MEGABYTES:
            self._fail("memory", f"{where}: {rise} MB")
        return good

    def _fail(self, kind: str, what: str) -> None:
        self.outcome.failures[kind] += 1
        self.outcome.told.append(what)


def _base(folder: Path, spec: ModelSpec, lora: Lora, names: str) -> Path:
    generator, values = torch.Generator().manual_seed(3), {}
    for target in targets(spec, lora.targets if "head" in lora.targets else lora.keys):
        out, into = target.shape
        a, b = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((lora.rank, into), (out, lora.rank)))
        values[target.name] = Adapter(a, b, torch.ones(out) if lora.dora else None)
    export_peft(Adapters(lora, values), spec, folder, names=names)
    if "head" in lora.targets:  # peft saves what the head's adapter is of
        state = load_file(folder / WEIGHTS)
        shape = (spec.vocab_size, spec.hidden_size)
        save_file(state | {"base_model.model.lm_head.base_layer.weight": torch.ones(shape)}, folder / WEIGHTS)
    return folder


def _peak() -> int:
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this one input")
    parser.add_argument("--show", type=int, default=20, help="failures shown")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsv4-fuzz-") as temporary:
        fuzzer = Fuzzer(Path(temporary), args.seed)
        outcome = fuzzer.run(range(args.count) if args.only is None else range(args.only, args.only + 1))
    for told in outcome.told[: args.show]:
        print(told, end="\n\n")
    failures = ", ".join(f"{kind} {outcome.failures[kind]}" for kind in ("traceback", "hang", "memory", "message"))
    print(
        f"{outcome.inputs} inputs, {outcome.calls} calls, {outcome.refused} refused, {outcome.merged} merged; "
        f"{failures}; slowest call {outcome.slowest:.2f} s, peak memory {_peak() >> 10} MB"
    )
    print(", ".join(f"{name} {count}" for name, count in outcome.kinds.most_common()))
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
