"""Fuzz the readers: mutated checkpoints may be refused, and nothing else may go wrong.

    python benchmarks/fuzz.py --count 10000 --seed 1

Every input is a small sound checkpoint with one file changed: bytes flipped, cut or inserted, or the
structure of the format changed (JSON, YAML, pickle, zip). `inspect` reads it, and for a share of the
inputs `import_hf` or `export_hf` converts it. Allowed: success, or one BridgeError whose message can be
printed. Anything else is a failure: another exception, more than the time or memory limit, a file
written although the call failed, an input changed. A failing input is kept, and its number with the seed
makes it again: --only NUMBER.
"""

import argparse
import faulthandler
import io
import json
import os
import pickletools
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from dsv4_bridge import BridgeError, export_hf, import_hf, inspect, make_toy
from dsv4_bridge.render import inspect_table
from dsv4_bridge.spec import DSparkSpec, ModelSpec, replace_spec
from dsv4_bridge.store.safetensors import INDEX
from dsv4_bridge.variants import VARIANTS, tiny

SECONDS = 5.0  # an input
MEGABYTES = 1024  # by which one input may raise the peak
MESSAGE = 40_000  # characters of an error


class TooSlow(BaseException):
    """The watchdog; no handler of the package catches it."""


# ---------------------------------------------------------------- the sound checkpoints


def small(variant: str) -> ModelSpec:
    """As few tensors as hold every kind of layer."""
    spec = tiny(VARIANTS[variant])
    widths = {"hidden_size": 128, "q_lora_rank": 32, "moe_intermediate_size": 64, "vocab_size": 64}
    layers = {"num_hidden_layers": 3, "num_hash_layers": 1, "n_routed_experts": 4}
    drafts = spec.draft_blocks
    return replace_spec(
        spec,
        **widths,
        **layers,
        dspark=DSparkSpec(5, 63, (0, 1, 2), 16) if spec.dspark else None,
        compress_ratios=(0, 4, 128, *(0,) * drafts),
    )


def transformers_dialect(config: dict[str, Any]) -> dict[str, Any]:
    """A released config as transformers writes it."""
    config = dict(config)
    names = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    layers, hashed = config["num_hidden_layers"], config.pop("num_hash_layers")
    config["layer_types"] = [names[r] for r in config.pop("compress_ratios")[:layers]]
    config["compress_rates"] = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    config["mlp_layer_types"] = ["hash_moe"] * hashed + ["moe"] * (layers - hashed)
    yarn = {k: v for k, v in config.pop("rope_scaling").items() if k != "type"}
    part = config.pop("qk_rope_head_dim") / config["head_dim"]
    config["partial_rotary_factor"] = part
    config["rope_parameters"] = {
        "main": {"rope_type": "default", "rope_theta": config.pop("rope_theta"), "partial_rotary_factor": part},
        "compress": yarn | {"rope_type": "yarn", "rope_theta": config.pop("compress_rope_theta")},
    }
    return config


@dataclass(frozen=True)
class Bases:
    """The sound checkpoints that inputs are made from."""

    folder: Path
    hf: dict[str, Path]
    megatron: dict[str, Path]

    @classmethod
    def make(cls, folder: Path) -> "Bases":
        """Write them into `folder`."""
        hf, megatron = {}, {}
        for name in ("Flash", "Flash-Base", "Flash-0731"):
            hf[name] = make_toy(folder / name, name, 1, spec=small(name))
        other = hf["Flash-Base/transformers"] = folder / "dialect"
        shutil.copytree(hf["Flash-Base"], other)
        config = json.loads((other / "config.json").read_bytes())
        (other / "config.json").write_text(json.dumps(transformers_dialect(config)))
        for name in ("Flash", "Flash-0731"):
            import_hf(hf[name], folder / f"{name}-megatron")
            megatron[name] = folder / f"{name}-megatron"
            # Everything that is compiled on first use is compiled now.
            for encoding in ("source", "bf16"):
                export_hf(megatron[name], folder / "warm", hf[name], encoding)
                inspect(folder / "warm")
                shutil.rmtree(folder / "warm")
        import_hf(hf["Flash-Base"], folder / "warm")
        shutil.rmtree(folder / "warm")
        return cls(folder, hf, megatron)


# ---------------------------------------------------------------- mutations of bytes

_TOKENS = (
    b"\x00",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b'"',
    b"\\u",
    b"\\ud800",
    b"-",
    b"1e400",
    b"NaN",
    b"\n",
    b"\xef\xbb\xbf",
    b"../",
)


def mutate_bytes(data: bytes, rng: random.Random, span: int | None = None) -> bytes:
    """A few flips, cuts, insertions, copies; within the first `span` bytes."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        span_now = min(span or len(out), len(out))
        at = rng.randrange(span_now) if span_now else 0
        match rng.randrange(8):
            case 0 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at] = rng.randrange(256)
            case 2:
                out = out[:at]
            case 3:
                out[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
            case 4:
                out[at:at] = rng.choice(_TOKENS) * rng.choice((1, 1, 3, 2000))
            case 5:
                del out[at : at + rng.choice((1, 2, 8, 100))]
            case 6:
                length = rng.choice((1, 4, 16, 200))
                here = rng.randrange(span_now) if span_now else 0
                out[at : at + length] = out[here : here + length]
            case _:
                width = rng.choice((2, 4, 8))
                out[at : at + width] = rng.choice((0, 1, (1 << (8 * width - 1)) - 1, (1 << (8 * width)) - 1)).to_bytes(
                    width, "little"
                )
    return bytes(out)


# ---------------------------------------------------------------- mutations of JSON and YAML values

DEEP = 3000


class Raw(str):
    """JSON text that goes out as it is."""


def odd_value(rng: random.Random) -> Any:
    """A value that belongs nowhere."""
    text = (
        "",
        "a" * 5000,
        "\ud800",
        "é\n\x1b[31m",
        "../../x",
        "/etc/passwd",
        "nan",
        "BF16",
        "[/red]",
        "\0",
        "layers.0",
    )
    numbers = (0, -1, 1, 2, 3, 127, 1 << 31, 1 << 62, 1 << 63, (1 << 64) + 1, 10**60, -(10**30), 0.5, 1e308, -0.0)
    raws = (
        "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1" * 4000, "1" * 5000, "1e-400", "[" * DEEP + "]" * DEEP,
        '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 90 + "]" * 90, '{"a":1,"a":2}', "[1,,2]", "nul", "'x'", '"\\ud800"',
    )  # fmt: skip
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(text)
    if kind == 1:
        return rng.choice(numbers)
    if kind == 2:
        return Raw(rng.choice(raws))
    if kind == 3:
        return rng.choice((None, True, False, [], {}, [[]], {"": None}))
    if kind == 4:
        return [rng.choice(numbers) for _ in range(rng.choice((1, 2, 3, 20, 5000)))]
    return {rng.choice(text): rng.choice(numbers) for _ in range(rng.choice((1, 2, 50)))}


def places(value: Any, limit: int = 20_000) -> list[tuple[Any, Any]]:
    """(container, key) of every place in a value."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack and len(found) < limit:
        node = stack.pop()
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, inner in pairs:
            found.append((node, key))
            stack.append(inner)
    return found


def mutate_value(value: Any, rng: random.Random) -> Any:
    """`value` (plain, mutable) with a few places changed, added, removed or exchanged."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        found = places(value)
        if not found:
            return odd_value(rng)
        node, key = rng.choice(found)
        match rng.randrange(9):
            case 0 | 1 | 2:
                node[key] = odd_value(rng)
            case 3:
                del node[key]
            case 4:
                other, there = rng.choice(found)
                if there in other if isinstance(other, dict) else there < len(other):
                    node[key] = json.loads(json.dumps(other[there], default=str))
            case 5 if isinstance(node, dict):
                node[rng.choice(("", "x" * 300, "\ud800", "vision_config", "text_config", "layer_types", "a\nb"))] = (
                    odd_value(rng)
                )
            case 6 if isinstance(node, dict):
                node[str(key) + rng.choice(("x", ".scale", "_scale_inv", "\0", "é"))] = node.pop(key)
            case 7 if isinstance(node, list):
                node.extend([node[-1]] * rng.choice((1, 2, 100)))
            case _ if isinstance(node[key], int) and not isinstance(node[key], bool):
                node[key] += rng.choice((-1, 1, 2, 128, -(1 << 20), 1 << 40, -node[key] * 2))
            case _:
                node[key] = odd_value(rng)
    return value


def to_json(value: Any, rng: random.Random) -> bytes:
    """JSON text; `Raw` strings go out bare, and now and then a name is given twice."""

    def text(node: Any) -> str:
        if isinstance(node, Raw):
            return str(node)
        if isinstance(node, dict):
            pairs = [f"{json.dumps(k)}:{text(v)}" for k, v in node.items()]
            if pairs and rng.random() < 0.003:
                pairs.append(rng.choice(pairs))
            return "{" + ",".join(pairs) + "}"
        if isinstance(node, list):
            return "[" + ",".join(text(v) for v in node) + "]"
        return json.dumps(node)

    return text(value).encode("utf-8", "surrogatepass")


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file, changed as a value or, less often, as bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    return to_json(mutate_value(json.loads(data), rng), rng)


_YAML = (
    "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e,*e]\n"
    "g: &g [*f,*f,*f,*f,*f,*f,*f,*f]\nh: &h [*g,*g,*g,*g,*g,*g,*g,*g]\n",
    "x: !!python/object/apply:os.system ['true']\n",
    "x: !!python/name:os.system\n",
    "x: !!int ''\n",
    "x: !!float ''\n",
    "x: !!bool maybe\n",
    "x: !!timestamp x\n",
    "x: 2024-99-99\n",
    "x: !!binary '*'\n",
    "x: &x [*x]\n",
    "? [a, b]\n: c\n",
    "? {a: b}\n: c\n",
    "<<: 3\n",
    "x: " + "[" * 400 + "]" * 400 + "\n",
    "x: 0x" + "f" * 20_000 + "\n",
    "x: " + "9" * 6000 + "\n",
    "x: 1:1:1:1:1:1:1:1:1:1\n",
    'x: "\\ud800"\n',
    'x: "\\U00110000"\n',
    "--- \n---\n",
    "%YAML 9.9\n---\n",
    "\tx: y\n",
)
_BOMB_TARGETS = ("num_hidden_layers", "compress_ratios", "rope_scaling", "model_type", "variant", "format", "source")


def mutate_yaml(data: bytes, rng: random.Random) -> bytes:
    """run_config.yaml, changed as a value, as bytes, by a hostile line, or by an alias to a bomb."""
    choice = rng.random()
    if choice < 0.3:
        return mutate_bytes(data, rng)
    lines = data.decode().splitlines(keepends=True)
    if choice < 0.5:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(_YAML))
        return "".join(lines).encode()
    if choice < 0.65:
        name = rng.choice(_BOMB_TARGETS)
        text = "".join(line.split(":")[0] + ": *h\n" if line.strip().startswith(name) else line for line in lines)
        return (_YAML[0] + text).encode()
    value = mutate_value(yaml.safe_load(data), rng)
    return to_json(value, rng) if rng.random() < 0.5 else yaml.safe_dump(_bare(value)).encode("utf-8", "replace")


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _bare(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_bare(v) for v in value]
    return str(value) if isinstance(value, str) else value


# ---------------------------------------------------------------- mutations of the formats


def mutate_shard(data: bytes, rng: random.Random) -> bytes:
    """A safetensors shard: its length, its header as JSON or bytes, its data."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    choice = rng.random()
    if choice < 0.1:
        claim = rng.choice((0, 1, length - 1, length + 1, len(data), 1 << 27, 1 << 40, (1 << 64) - 1))
        return struct.pack("<Q", claim) + data[8:]
    if choice < 0.2:
        return mutate_bytes(data, rng)
    if choice < 0.35:
        header = mutate_bytes(header, rng)
    else:
        header = to_json(mutate_value(json.loads(header), rng), rng)
    if rng.random() < 0.05:
        body = body[: rng.randrange(len(body) + 1)]
    return struct.pack("<Q", len(header)) + header + body


_HOSTILE = (
    b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
    b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
    b"\x80\x02]" + b"2" * 64 + b".",
    b"\x80\x02" + b"(" * 50_000 + b".",
    b"\x80\x02)" + b"\x85" * 50_000 + b".",
    b"\x80\x02]" + b"q\x00h\x00\x86" * 200 + b".",
    b"\x80\x02X\xff\xff\xff\x7f.",
    b"\x80\x02\x8d" + b"\xff" * 8 + b".",
    b"\x80\x02}" + b"(" + b"K\x01K\x02" * 1000 + b"u.",
    b"",
    b".",
)


def mutate_pickle(data: bytes, rng: random.Random) -> bytes:
    """A pickle: bytes, or opcodes deleted, doubled, exchanged, replaced, with another argument."""
    choice = rng.random()
    if choice < 0.05:
        return rng.choice(_HOSTILE)
    if choice < 0.35:
        return mutate_bytes(data, rng)
    starts = [at for _, _, at in pickletools.genops(data)]
    ops = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)])]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(ops))
        match rng.randrange(8):
            case 0:
                del ops[at]
            case 1:
                ops.insert(at, ops[at])
            case 2:
                other = rng.randrange(len(ops))
                ops[at], ops[other] = ops[other], ops[at]
            case 3:
                ops[at] = ops[rng.randrange(len(ops))]
            case 4:
                ops[at] = bytes([rng.randrange(256)]) + ops[at][1:]
            case 5:
                ops.insert(
                    at,
                    rng.choice(
                        (
                            b"\x8a\x10" + b"\x7f" * 16,
                            b"J\xff\xff\xff\xff",
                            b"N",
                            b"]",
                            b"}",
                            b")",
                            b"G" + b"\x7f\xf0" + b"\0" * 6,
                        )
                    ),
                )
            case 6:
                ops[at] = mutate_bytes(ops[at], rng)
            case _:
                # An integer becomes another: sizes, offsets, lengths.
                ints = [i for i, op in enumerate(ops) if op[:1] in (b"K", b"M", b"J", b"\x8a")]
                if ints:
                    ops[rng.choice(ints)] = rng.choice(
                        (
                            b"K\x00",
                            b"K\x01",
                            b"M\xff\xff",
                            b"J\xff\xff\xff\x7f",
                            b"J\xff\xff\xff\xff",
                            b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
                            b"\x8a\xff" + b"\x01" * 255,
                        )
                    )
        if not ops:
            return b""
    return b"".join(ops)


def mutate_items(data: bytes, rng: random.Random) -> bytes:
    """A .distcp file: bytes near the zip records of its items, or their pickles; its length stays mostly."""
    marks = [i for m in (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"\x80\x02c") for i in _find(data, m)]
    out = bytearray(data)
    for _ in range(rng.choice((1, 2, 4, 40))):
        at = max(0, rng.choice(marks) + rng.randrange(-8, 120))
        piece = mutate_bytes(bytes(out[at : at + 64]), rng)
        piece = piece[:64].ljust(min(64, len(out) - at), b"\0") if rng.random() < 0.9 else piece
        out[at : at + 64] = piece
    return bytes(out)


def _find(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


def mutate_tracker(data: bytes, rng: random.Random) -> bytes:
    """latest_checkpointed_iteration.txt."""
    words = (b"", b"release", b"-1", b"1e9", b"9" * 30, b"../../x", b"\xff\xfe", b"0\n0", b"\xd9\xa3", b"0" * 17)
    return rng.choice(words) if rng.random() < 0.7 else mutate_bytes(data, rng)


# ---------------------------------------------------------------- one input


@dataclass(frozen=True)
class Target:
    """One kind of file to change, how, and how often it is then converted too."""

    name: str
    kind: str  # hf | megatron
    pattern: str
    mutate: Callable[[bytes, random.Random], bytes]
    weight: int
    convert: float


TARGETS = (
    Target("header", "hf", "*.safetensors", mutate_shard, 24, 0.15),
    Target("index", "hf", INDEX, mutate_json, 14, 0.15),
    Target("config", "hf", "config.json", mutate_json, 20, 0.3),
    Target(".metadata", "megatron", "iter_0000000/.metadata", mutate_pickle, 20, 0.15),
    Target(".distcp", "megatron", "iter_0000000/*.distcp", mutate_items, 8, 1.0),
    Target("run_config", "megatron", "iter_0000000/run_config.yaml", mutate_yaml, 10, 0.15),
    Target("tracker", "megatron", "latest_checkpointed_iteration.txt", mutate_tracker, 1, 0.2),
    Target("along config", "megatron", "iter_0000000/hf/config.json", mutate_json, 2, 0.5),
    Target("along header", "megatron", "iter_0000000/hf/passengers.safetensors", mutate_shard, 2, 0.5),
)


@dataclass
class Outcome:
    """The figures of a run."""

    inputs: int = 0
    calls: int = 0
    refused: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    targets: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Fuzzer:
    """Makes inputs and runs them, in this process."""

    def __init__(self, folder: Path, seed: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.seed, self.folder = seed, folder
        self.bases = Bases.make(folder / "bases")
        self.outcome = Outcome()
        self._linked: dict[tuple[str, str], Path] = {}

    def run(self, numbers: range, note: Callable[[str], None] = lambda text: None) -> Outcome:
        """Run the inputs with these numbers."""
        previous = signal.signal(signal.SIGALRM, _too_slow)
        began = time.monotonic()
        try:
            for number in numbers:
                self._one(number)
                if self.outcome.inputs % 1000 == 0:
                    note(f"{self.outcome.inputs} inputs, {time.monotonic() - began:.0f} s")
        finally:
            signal.signal(signal.SIGALRM, previous)
            faulthandler.cancel_dump_traceback_later()
        self.outcome.seconds += time.monotonic() - began
        return self.outcome

    def _one(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        target = rng.choices(TARGETS, [t.weight for t in TARGETS])[0]
        name, source = rng.choice(sorted(getattr(self.bases, target.kind).items()))
        if target.name.startswith("along"):
            name, source = "Flash-0731", self.bases.megatron["Flash-0731"]
        checkpoint = self._links(target.kind, name, source)
        file = rng.choice(sorted(checkpoint.glob(target.pattern)))
        original = source / file.relative_to(checkpoint)
        file.unlink()
        file.write_bytes(target.mutate(original.read_bytes(), rng))
        where = f"input {number} ({target.name}, {name})"
        self.outcome.inputs += 1
        self.outcome.targets[target.name] += 1
        before, failed = _listing(checkpoint), len(self.outcome.failures)
        try:
            self._call(f"{where}: inspect", lambda: self._look(checkpoint, rng))
            if rng.random() < target.convert:
                self._convert(where, checkpoint, target, name, rng)
            if _listing(checkpoint) != before:
                self._fail(where, "the input was changed")
        finally:
            if len(self.outcome.failures) > failed:
                shutil.copyfile(file, self.folder / f"failed-{self.seed}-{number}-{file.name}")
            file.unlink(missing_ok=True)
            os.link(original, file)

    def _convert(self, where: str, checkpoint: Path, target: Target, name: str, rng: random.Random) -> None:
        parent = self.folder / "new"
        out = parent / "folder" / "out"
        base = name.partition("/")[0]
        if target.kind == "hf":
            if base in self.bases.megatron and rng.random() < 0.3:
                made = self.bases.megatron[base]
                good = self._call(f"{where}: export --like", lambda: export_hf(made, out, checkpoint))
            else:
                good = self._call(f"{where}: import", lambda: import_hf(checkpoint, out))
        elif rng.random() < 0.5:
            good = self._call(f"{where}: export", lambda: export_hf(checkpoint, out, self.bases.hf[base]))
        else:
            good = self._call(f"{where}: export bf16", lambda: export_hf(checkpoint, out, None, "bf16"))
        if not good and parent.exists():
            left = ", ".join(str(p.relative_to(parent)) for p in parent.rglob("*"))
            self._fail(where, f"it failed and left {left}")
        if good and not (out / "config.json").exists() and not (out / "latest_checkpointed_iteration.txt").exists():
            self._fail(where, "it succeeded and wrote no checkpoint")
        shutil.rmtree(parent, ignore_errors=True)

    def _look(self, checkpoint: Path, rng: random.Random) -> None:
        report = inspect(checkpoint)
        if rng.random() < 0.15:  # what the command would print
            json.dumps(report.to_json())
            console = Console(file=io.StringIO(), width=140)
            console.print(inspect_table(report))
            console.file.getvalue().encode()  # type: ignore[attr-defined]

    def _call(self, where: str, call: Callable[[], Any]) -> bool:
        """Run one call under the watchdog; whether it succeeded."""
        self.outcome.calls += 1
        peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        faulthandler.dump_traceback_later(20 * SECONDS, exit=True)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            call()
            good = True
        except BridgeError as error:
            good = False
            self.outcome.refused += 1
            message = str(error)
            if not message.strip() or len(message) > MESSAGE or "Traceback" in message:
                self._fail(where, f"a message of {len(message)} characters: {message[:200]!r}")
            try:
                message.encode()
            except UnicodeEncodeError:
                self._fail(where, f"a message that cannot be printed: {message[:200]!r}")
        except TooSlow:
            good = False
            self._fail(where, f"more than {SECONDS} s\n{traceback.format_exc(limit=-6)}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            good = False
            self._fail(where, f"{type(error).__name__}\n{traceback.format_exc(limit=-6)}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.outcome.slowest = max(self.outcome.slowest, time.monotonic() - began)
        rise = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) >> 10
        if rise > MEGABYTES:
            self._fail(where, f"{rise} MB of memory")
        return good

    def _fail(self, where: str, what: str) -> None:
        self.outcome.failures.append(f"{where}: {what}")

    def _links(self, kind: str, name: str, source: Path) -> Path:
        """A copy of a base by hard links, of which one file at a time is replaced."""
        if (kind, name) not in self._linked:
            copy = self.folder / "inputs" / kind / name.replace("/", "-")
            shutil.copytree(source, copy, copy_function=os.link)
            self._linked[kind, name] = copy
        return self._linked[kind, name]


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def _too_slow(*_: Any) -> None:
    raise TooSlow


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this one input")
    parser.add_argument("--folder", type=Path, help="where inputs are made (a temporary folder)")
    parser.add_argument("--show", type=int, default=20, help="failures shown")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dsv4-fuzz-") as temporary:
        fuzzer = Fuzzer(args.folder or Path(temporary), args.seed)
        numbers = range(args.count) if args.only is None else range(args.only, args.only + 1)
        outcome = fuzzer.run(numbers, lambda text: print(text, file=sys.stderr, flush=True))
    for failure in outcome.failures[: args.show]:
        print(failure, end="\n\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(
        f"{outcome.inputs} inputs, {outcome.calls} calls, {outcome.refused} refused, {len(outcome.failures)} failures, "
        f"{outcome.seconds:.0f} s, slowest call {outcome.slowest:.2f} s, peak memory {peak} MB"
    )
    print(", ".join(f"{name} {count}" for name, count in outcome.targets.most_common()))
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
