"""What peft calls the adapters of this model in a file, and which of them a configuration names.

| here | in the file, behind `base_model.model.` | in the configuration |
|---|---|---|
| a module's adapter | `{module}.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector` | `target_modules` |
| a bare parameter's | the same of the module that holds it | `target_parameters` |
| routed experts' | all of a layer in one: A by experts then rank, B's columns by rank then experts | the same |
| the grouped output projection's | `…self_attn.o_a_proj` either way | either |

Of several parameters of one module peft wraps the first innermost: its tensors have `.base_layer` for each
wrapper around it. Sources: peft 0.21, tuners/lora/layer.py (ParamWrapper), tuners/tuners_utils.py
(check_target_module_exists, _inject_parameters), utils/save_and_load.py.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..errors import BridgeError, short
from ..spec.lora import Target
from .peft_config import PeftConfig
from .peft_patterns import matches

PREFIX = "base_model.model."
WORDS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")


class Entry(NamedTuple):
    """One adapter in a file: of a module, of a parameter, or of all routed experts of a layer.

    Attributes:
        key: of its tensors, without the last words.
        module: what transformers calls it.
        parameter: whether that is a parameter.
        targets: one, or one an expert.
    """

    key: str
    module: str
    parameter: bool
    targets: tuple[Target, ...]

    @property
    def row(self) -> str:
        """Key of its row in the table; for gate and up of routed experts, of the gate."""
        return self.targets[0].items[0].row.key

    @property
    def layer(self) -> int | None:
        """Its layer; None for the head."""
        block = self.targets[0].items[0].block
        return block.index if block.kind == "layer" else None

    @property
    def released(self) -> str:
        """Its name in a released checkpoint, if it has one of its own."""
        items = [item for target in self.targets for item in target.items]
        return "" if self.parameter or len(items) != 1 else items[0].name.removesuffix(".weight")

    @property
    def names(self) -> tuple[tuple[bool, str], ...]:
        """What a configuration may call it, as (parameter, name)."""
        if not self.parameter:
            return tuple((False, name) for name in (self.module, self.released) if name)
        as_parameter = (True, self.module)
        holder, _, word = self.module.rpartition(".")
        return ((False, holder), as_parameter) if word == "weight" else (as_parameter,)


def entries(found: Iterable[Target]) -> tuple[Entry, ...]:
    """The adapters of a file that holds the targets `found`, in the plan's order."""
    of: dict[str, list[Target]] = {}
    for target in found:
        of.setdefault(target.module, []).append(target)
    inside: dict[str, list[str]] = {}
    for module, several in of.items():
        if several[0].parameter:
            inside.setdefault(module.rpartition(".")[0], []).append(module)
    made = []
    for module, several in of.items():
        key, parameter = module, several[0].parameter
        if parameter:
            holder = module.rpartition(".")[0]
            around = len(inside[holder]) - 1 - inside[holder].index(module)
            key = holder + ".base_layer" * around
        made.append(Entry(PREFIX + key, module, parameter, tuple(several)))
    return tuple(made)


def split(name: str) -> tuple[str, str]:
    """Key and last words of a tensor's name; no words where it is no part of an adapter."""
    word = next((w for w in WORDS if name.endswith(f".{w}")), "")
    return (name.removesuffix(f".{word}") if word else name), word


def in_our_names(names: Iterable[str], known: Sequence[Entry], where: str) -> dict[str, str]:
    """The names of a file by those of transformers: servers' adapters have released ones, or those with `model.`.

    Raises:
        BridgeError: two that mean the same tensor.
    """
    released = {PREFIX + entry.released: entry.key for entry in known if entry.released}
    found: dict[str, str] = {}
    for name in names:
        key, word = split(name)
        plain = key.replace(f"{PREFIX}model.layers.", f"{PREFIX}layers.", 1)
        ours = f"{released[plain]}.{word}" if word and plain in released else name
        if ours in found:
            raise BridgeError(f"{where}: {short(found[ours])} and {short(name)} are one tensor; remove one of them")
        found[ours] = name
    return found


class Selection(NamedTuple):
    """What a configuration names.

    Attributes:
        names: module of an entry -> the names by which it is; None: the configuration says nothing about it.
        means: name in a list -> modules of the entries that it means.
    """

    names: Mapping[str, tuple[str, ...]] | None
    means: Mapping[str, frozenset[str]]


def selected(known: Sequence[Entry], config: PeftConfig, where: str) -> Selection:
    """The adapters among `known` that a configuration names, by peft's rules.

    Raises:
        BridgeError: a regular expression that cannot be used.
    """
    if config.modules is None and not config.parameters:
        return Selection(None, {})
    modules = [(entry, name) for entry in known for parameter, name in entry.names if not parameter]
    texts = [name for _, name in modules]
    wanted = [*_matching(config.modules or (), texts, where)]
    excluded = {name for _, found in _matching(config.exclude, texts, where) for name in found}
    names: dict[str, tuple[str, ...]] = {}
    means: dict[str, frozenset[str]] = {}
    for pattern, found in wanted:
        here = [(e, n) for e, n in modules if n in found and n not in excluded and _in_layers(pattern, n, config)]
        for entry, name in here:
            names[entry.module] = (*names.get(entry.module, ()), name)
        if not isinstance(config.modules, str):
            means[pattern] = frozenset(entry.module for entry, _ in here)
    for pattern in config.parameters:
        here = [(e, n) for e in known for parameter, n in e.names if parameter and _ends(n, pattern)]
        for entry, name in here:
            names[entry.module] = (*names.get(entry.module, ()), name)
        means[pattern] = means.get(pattern, frozenset()) | {entry.module for entry, _ in here}
    return Selection(names, means)


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _matching(patterns: Sequence[str] | str, names: Sequence[str], where: str) -> Iterator[tuple[str, set[str]]]:
    """Each pattern with the names that it is, ends or, as one regular expression, matches."""
    if isinstance(patterns, str):
        if not patterns:
            return
        if patterns.lower() == "all-linear":
            yield patterns, {name for name in names if name not in {"lm_head", "head"}}
            return
        (found,) = matches([(True, patterns)], names, where)
        yield patterns, {name for name, good in zip(names, found, strict=True) if good}
        return
    ends: dict[str, set[str]] = {}
    for name in names:
        words = name.split(".")
        for at in range(len(words)):
            ends.setdefault(".".join(words[at:]), set()).add(name)
    for pattern in dict.fromkeys(patterns):
        yield pattern, ends.get(pattern, set())


def _in_layers(pattern: str, name: str, config: PeftConfig) -> bool:
    """Whether `layers_to_transform` lets a name through that a list has the end of."""
    if config.layers is None or pattern == name:
        return True
    before = "|".join(config.layers_pattern) or r"[^.]*"
    found = re.match(rf"(?:^|.*?\.)(?:{before})\.(\d+)\.", name)
    return found is not None and int(found[1]) in config.layers


class Numbers(NamedTuple):
    """Rank and alpha of one adapter, and the pattern that the rank is of."""

    rank: int
    alpha: float
    pattern: str


def numbers(
    found: Sequence[Entry], config: PeftConfig, names: Mapping[str, tuple[str, ...]] | None, where: str
) -> dict[str, Numbers]:
    """Module of each entry -> its rank and alpha (peft's `get_pattern_key`: the first pattern that matches).

    Raises:
        BridgeError: a pattern that cannot be used.
    """
    if not config.ranks and not config.alphas:
        return {entry.module: Numbers(config.rank, config.alpha, "") for entry in found}
    asked = {e.module: (names or {}).get(e.module) or tuple(n for _, n in e.names) for e in found}
    texts = list(dict.fromkeys(name for several in asked.values() for name in several))
    place = {name: at for at, name in enumerate(texts)}
    ranks, alphas = list(config.ranks), list(config.alphas)
    hits = matches([(False, pattern) for pattern in (*ranks, *alphas)], texts, where)

    def first(patterns: Sequence[str], hit: Sequence[Sequence[bool]], module: str) -> str | None:
        places = [place[name] for name in asked[module]]
        return next((p for p, row in zip(patterns, hit, strict=True) if any(row[at] for at in places)), None)

    made = {}
    for entry in found:
        by_rank = first(ranks, hits[: len(ranks)], entry.module)
        by_alpha = first(alphas, hits[len(ranks) :], entry.module)
        rank = config.rank if by_rank is None else config.ranks[by_rank]
        alpha = config.alpha if by_alpha is None else float(config.alphas[by_alpha])
        made[entry.module] = Numbers(rank, alpha, by_rank or "")
    return made
