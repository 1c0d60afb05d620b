"""adapter_config.json of peft: read by type and range, nothing believed and nothing allocated before.

What decides what an adapter computes is here, or refused by name where it is something else than a low-rank sum on a
weight. Source: peft 0.21, tuners/lora/config.py.
"""

import math
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BridgeError, short
from ..strict_json import parse_json

CONFIG = "adapter_config.json"
_MAX_CONFIG = 16 << 20
_MAX_NAMES, _MAX_PATTERNS = 20_000, 4096
MAX_RANK, MAX_ALPHA = 1 << 20, 1 << 31
SAVED = {"lm_head": "lm_head", "embed_tokens": "model.embed_tokens", "model.embed_tokens": "model.embed_tokens"}

_PEFT = "merge it with peft's merge_and_unload, and `dsv4 import` the result"
# Settings that change what an adapter computes, the values that leave it as it is here, and what to do.
_NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none",), f"trained biases are no low-rank sums: {_PEFT}"),
    "fan_in_fan_out": ((False, None), "no weight of this model is stored that way"),
    "lora_bias": ((False, None), "no weight of this model has a bias"),
    "layer_replication": ((None, []), "the model would have other layers"),
    "trainable_token_indices": ((None, [], {}), f"rows of the embedding are no low-rank sums: {_PEFT}"),
    "use_qalora": ((False, None), _PEFT),
    "use_bdlora": ((None, False), _PEFT),
    "arrow_config": ((None,), "it chooses among several adapters for each token; take one of them"),
    "alora_invocation_tokens": ((None,), "it adapts part of a text only; serve adapter and base apart"),
    "velora_config": ((None,), _PEFT),
    "monteclora_config": ((None,), _PEFT),
    "kasa_config": ((None,), _PEFT),
    "mica": ((None, False), _PEFT),
}
# Beginnings that write the base anew (PiSSA, OLoRA …) leave adapters of another base.
_BEGINNINGS = ("gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class PeftConfig:
    """The settings that matter.

    Attributes:
        rank, alpha, dropout, rslora, dora: as peft's.
        modules: names, one regular expression, or None where nothing is said.
        exclude: names or one regular expression.
        layers: those that names are of; None: all.
        layers_pattern: what stands before a layer's number, if said.
        parameters: names of bare parameters.
        saved: modules whose whole weights are in the file.
        ranks: pattern -> rank of the modules that it matches; the first that matches counts.
        alphas: pattern -> alpha.
    """

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    dora: bool
    modules: tuple[str, ...] | str | None
    exclude: tuple[str, ...] | str
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    parameters: tuple[str, ...]
    saved: tuple[str, ...]
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]


def read_config(folder: Path) -> PeftConfig:
    """Read and check a folder's adapter_config.json.

    Raises:
        BridgeError: unreadable, no LoRA, a setting that is not supported, or of another type or out of range.
    """
    path = folder / CONFIG
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise BridgeError(f"reading {path}: not a regular file; expected a folder that peft saved")
        if facts.st_size > _MAX_CONFIG:
            raise BridgeError(f"reading {path}: {facts.st_size} bytes are too many for a configuration")
        raw = path.read_bytes()
    except OSError as error:
        whole = (folder / "config.json").is_file()
        hint = "this is a whole model, and adapters are wanted" if whole else "expected a folder that peft saved"
        raise BridgeError(f"reading {path}: {error.strerror or error}; {hint}") from None
    except ValueError as error:  # a path with a null character
        raise BridgeError(f"reading {short(str(path))}: {error}") from None
    return _checked(parse_json(raw, str(path)), f"reading {path}")


def _checked(config: Mapping[str, Any], where: str) -> PeftConfig:
    if config.get("peft_type") != "LORA":
        raise BridgeError(f"{where}: peft_type is {short(config.get('peft_type'))}, expected 'LORA'")
    for name, (allowed, do) in _NEUTRAL.items():
        if name in config and not any(config[name] == a and type(config[name]) is type(a) for a in allowed):
            raise BridgeError(
                f"{where}: {name} is {short(config[name])}, and only {short(allowed[0])} is supported; {do}"
            )
    begin = config.get("init_lora_weights")
    if not (begin is None or type(begin) is bool or (isinstance(begin, str) and begin.lower() in _BEGINNINGS)):
        raise BridgeError(
            f"{where}: init_lora_weights is {short(begin)}, which changes the base; convert it to plain LoRA with peft "
            "(save_pretrained, path_initial_model_for_weight_conversion)"
        )
    take = _Taker(config, where)
    modules, layers = take.names("target_modules", None), take.layers()
    if isinstance(modules, str) and layers is not None:
        raise BridgeError(
            f"{where}: layers_to_transform beside target_modules {short(modules)}: peft takes layers with a list of "
            "names only; write one"
        )
    parameters = take.names("target_parameters", ())
    if isinstance(parameters, str) or parameters is None:
        raise BridgeError(f"{where}: target_parameters is {short(parameters)}, expected a list of names")
    return PeftConfig(
        rank=take.one("r", 8, _rank),
        alpha=float(take.one("lora_alpha", 8, _alpha)),
        dropout=float(take.one("lora_dropout", 0.0, _share)),
        rslora=take.one("use_rslora", False, _yes_or_no),
        dora=take.one("use_dora", False, _yes_or_no),
        modules=modules,
        exclude=take.names("exclude_modules", ()) or (),
        layers=layers,
        layers_pattern=take.layers_pattern(),
        parameters=parameters,
        saved=take.saved(),
        ranks=take.patterns("rank_pattern", _rank),
        alphas=take.patterns("alpha_pattern", _alpha),
    )


# Each says what is wrong with a value, or nothing.
def _rank(value: Any) -> str:
    return "" if type(value) is int and 1 <= value <= MAX_RANK else f"a whole number from 1 to {MAX_RANK}"


def _alpha(value: Any) -> str:
    good = type(value) in (int, float) and 0 <= value <= MAX_ALPHA  # NaN is not
    return "" if good else f"a number from 0 to {MAX_ALPHA}"


def _share(value: Any) -> str:
    return "" if type(value) in (int, float) and 0 <= value <= 1 else "a number from 0 to 1"


def _yes_or_no(value: Any) -> str:
    return "" if type(value) is bool else "true or false"


@dataclass(frozen=True)
class _Taker:
    """Takes settings out of a configuration; what is null is as if it were not said."""

    config: Mapping[str, Any]
    where: str

    def wrong(self, key: str, value: Any, expected: str) -> BridgeError:
        return BridgeError(f"{self.where}: {key} is {short(value)}, expected {expected}")

    def one(self, key: str, default: Any, check: Callable[[Any], str]) -> Any:
        value = self.config.get(key, default)
        if expected := check(value):
            raise self.wrong(key, value, expected)
        return value

    def names(self, key: str, default: tuple[str, ...] | None) -> tuple[str, ...] | str | None:
        value = self.config.get(key)
        if value is None:
            return default
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not all(isinstance(n, str) for n in value) or len(value) > _MAX_NAMES:
            raise self.wrong(key, value, f"a list of at most {_MAX_NAMES:,} names")
        return tuple(value)

    def layers(self) -> frozenset[int] | None:
        value = self.config.get("layers_to_transform")
        if value is None or value == []:
            return None
        several = value if isinstance(value, list) else [value]
        if len(several) > _MAX_NAMES or not all(type(n) is int and 0 <= n < 1 << 31 for n in several):
            raise self.wrong("layers_to_transform", value, "numbers of layers")
        return frozenset(several)

    def layers_pattern(self) -> tuple[str, ...]:
        value = self.config.get("layers_pattern")
        several = [value] if isinstance(value, str) and value else value or []
        plain = isinstance(several, list) and all(isinstance(n, str) and n.isidentifier() for n in several)
        if not plain or len(several) > 100:
            raise self.wrong("layers_pattern", value, "a name such as 'layers', or a list of names")
        return tuple(several)

    def saved(self) -> tuple[str, ...]:
        names = self.names("modules_to_save", ()) or ()
        several = (names,) if isinstance(names, str) else names
        if others := [name for name in several if name not in SAVED]:
            raise BridgeError(
                f"{self.where}: modules_to_save names {short(others[0])}, and whole weights of lm_head and "
                f"embed_tokens alone are taken; {_PEFT}"
            )
        return tuple(dict.fromkeys(SAVED[name] for name in several))

    def patterns(self, key: str, check: Callable[[Any], str]) -> dict[str, Any]:
        value = self.config.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or len(value) > _MAX_PATTERNS:
            raise self.wrong(key, value, f"an object of at most {_MAX_PATTERNS:,} patterns")
        for pattern, number in value.items():
            if expected := check(number):
                raise self.wrong(f"{key} of {short(pattern)}", number, expected)
        return value


def scaled(alpha: float, rank: int, rslora: bool) -> float:
    """The alpha of which alpha / rank is the factor: rsLoRA divides by the square root (arXiv:2312.03732)."""
    return alpha * math.sqrt(rank) if rslora else alpha
