"""Mutated checkpoints: a small sound one with one file changed is inspected, and for a share of them converted.

Bytes are flipped, cut or inserted, or the structure of the format is changed (JSON, YAML, pickle, zip). Allowed:
success, or one BridgeError whose message can be printed. Anything else is a failure: another exception, more than the
time or memory limit, a file written although the call failed, an input changed.
"""

import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from dsv4_bridge import BridgeError, examine, export_hf, import_hf, inspect, make_toy, verify
from dsv4_bridge.cli.show.tables import inspect_table
from dsv4_bridge.convert.verify import LEVELS
from dsv4_bridge.spec.spec import DSparkSpec, ModelSpec, replace_spec
from dsv4_bridge.spec.spec_v41 import V41Spec
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.store.safetensors import INDEX
from mutations import (
    mutate_items,
    mutate_json,
    mutate_pickle,
    mutate_shard,
    mutate_tracker,
    mutate_yaml,
)

SECONDS = 5.0  # of CPU, an input
MEGABYTES = 1024  # by which one input may raise the peak
MESSAGE = 40_000  # characters of an error


class TooSlow(BaseException):
    """The watchdog; no handler of the package catches it."""


# ---------------------------------------------------------------- the sound checkpoints


def small(variant: str) -> ModelSpec:
    """As few tensors as hold every kind of layer."""
    spec = tiny(VARIANTS[variant])
    if isinstance(spec, V41Spec):
        return spec  # every kind of layer takes its seven
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
    def make(cls, folder: Path, variants: Sequence[str]) -> "Bases":
        """Write them into `folder`."""
        hf, megatron = {}, {}
        for name in variants:
            hf[name] = make_toy(folder / name, name, 1, spec=small(name))
            examine(hf[name])
        if "Flash-Base" in hf:
            other = hf["Flash-Base/transformers"] = folder / "dialect"
            shutil.copytree(hf["Flash-Base"], other)
            config = json.loads((other / "config.json").read_bytes())
            (other / "config.json").write_text(json.dumps(transformers_dialect(config)))
            import_hf(hf["Flash-Base"], folder / "warm")
            shutil.rmtree(folder / "warm")
        for name in (n for n in variants if n != "Flash-Base"):
            import_hf(hf[name], folder / f"{name}-megatron")
            megatron[name] = folder / f"{name}-megatron"
            # Everything that is compiled on first use is compiled now.
            for encoding in ("source", "bf16"):
                export_hf(megatron[name], folder / "warm", hf[name], encoding)
                inspect(folder / "warm")
                shutil.rmtree(folder / "warm")
        return cls(folder, hf, megatron)


# ---------------------------------------------------------------- one input

FUZZED = ("Flash", "Flash-Base", "Flash-0731", "V4.1-Flash")
_READ = 0.25  # of the inputs are read value by value, and compared with the sound ones
_DRAFTS = ("Flash-0731", "V4.1-Flash")  # whose draft blocks travel beside a Megatron checkpoint


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

    def __init__(self, folder: Path, seed: int, targets: Sequence[Target] = TARGETS, variants: Sequence[str] = FUZZED):
        folder.mkdir(parents=True, exist_ok=True)
        self.seed, self.folder, self._targets = seed, folder, tuple(targets)
        self.bases = Bases.make(folder / "bases", variants)
        self.outcome = Outcome()
        self._linked: dict[tuple[str, str], Path] = {}

    def run(self, numbers: range, note: Callable[[str], None] = lambda text: None) -> Outcome:
        """Run the inputs with these numbers."""
        previous = signal.signal(signal.SIGPROF, _too_slow)
        began = time.monotonic()
        try:
            for number in numbers:
                self._one(number)
                if self.outcome.inputs % 1000 == 0:
                    note(f"{self.outcome.inputs} inputs, {time.monotonic() - began:.0f} s")
        finally:
            signal.signal(signal.SIGPROF, previous)
            faulthandler.cancel_dump_traceback_later()
        self.outcome.seconds += time.monotonic() - began
        return self.outcome

    def _one(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        target = rng.choices(self._targets, [t.weight for t in self._targets])[0]
        name, source = rng.choice(sorted(getattr(self.bases, target.kind).items()))
        if target.name.startswith("along"):
            name, source = rng.choice([(n, m) for n, m in self.bases.megatron.items() if n in _DRAFTS])
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
            if rng.random() < _READ:
                self._call(f"{where}: inspect --deep", lambda: examine(checkpoint))
            if rng.random() < _READ:
                self._call(f"{where}: verify", lambda: verify(checkpoint, source, rng.choice(LEVELS)))
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
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of CPU: the machine may be busy
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
            signal.setitimer(signal.ITIMER_PROF, 0)
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
