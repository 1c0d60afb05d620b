"""From a recipe's name, a YAML file and `key=value` words to a `Recipe`, and back."""

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import BridgeError, short
from ..strict_json import read_small
from ..strict_yaml import parse_yaml
from .recipe import Recipe
from .recipes import RECIPES

_MOST_BYTES = 1 << 16
_LONGEST = 100  # characters of a name that others are compared with
_BASES = ("extends", "inherits", "inherit", "parent", "defaults", "recipe", "include")  # as others call `base`


@dataclass(frozen=True)
class Chosen:
    """A recipe, and where each of its values comes from.

    Attributes:
        recipe: the values.
        sources: dotted key -> source.
    """

    recipe: Recipe
    sources: Mapping[str, str]


def choose(what: str, words: Iterable[str] = ()) -> Chosen:
    """A recipe by name or YAML file, with values changed.

    Args:
        what: a name that RECIPES has, or the path of a file that `dump` wrote.
        words: `key=value`, keys dotted; values as YAML writes them.

    Raises:
        BridgeError: an unknown name or key (the nearest one is named), or a value of another type.
    """
    if what in RECIPES:
        summary, parts = RECIPES[what]
        changes = {"name": (what, "its name"), "summary": (summary, "its name")}
        for part in parts:
            changes |= part
        chosen = _change(Chosen(Recipe(), _defaults()), changes, f"recipe {what}")
    elif Path(what).suffix in (".yaml", ".yml"):
        chosen = load(Path(what))
    else:
        raise BridgeError(
            f"choosing a recipe: there is none named {short(what)}{_nearest(what, RECIPES)}; `dsv4 recipes` lists "
            "them, and FILE.yaml reads one from a file"
        )
    changes = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise BridgeError(f"reading {short(word)}: expected key=value, as batch.size=64")
        changes[key] = (_parsed(text), "given")
    return _change(chosen, changes, f"recipe {chosen.recipe.name}")


def change(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """A recipe with other values, by dotted key.

    Raises:
        BridgeError: an unknown key, or a value of another type.
    """
    named = {key: (value, "changed") for key, value in changes.items()}
    return _change(Chosen(recipe, {}), named, f"recipe {recipe.name}").recipe


def values(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value, in the order of the classes."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{inner.name}": getattr(value, inner.name) for inner in dataclasses.fields(value)}
        else:
            found[field.name] = value
    return found


def known_key(word: str) -> str:
    """The dotted key that is meant by a word, its last part perhaps, or with dashes; `""` where none is near."""
    word, known = word.replace("-", "_"), values(Recipe())
    return word if word in known else _near(word, known)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML: what `load` reads."""
    return yaml.safe_dump(as_plain(recipe), sort_keys=False, allow_unicode=True, width=120)


def as_plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe in plain types."""
    return _lists(dataclasses.asdict(recipe))


def load(path: Path) -> Chosen:
    """A recipe from YAML: the recipe that `base` names, or else `name`, with the file's values.

    What the file leaves out is that recipe's. A file that names none has to have every section itself, for nobody asks
    for values that stand nowhere.

    Raises:
        BridgeError: no such file, no YAML, unknown keys or values of another type, or sections that are nowhere.
    """
    read = parse_yaml(read_small(path, _MOST_BYTES), f"reading recipe {path}")
    if not isinstance(read, dict):
        raise BridgeError(f"reading recipe {path}: expected keys and values, found {_kind(read)}")
    base = read.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in RECIPES):
        near = _nearest(base, RECIPES) if isinstance(base, str) else ""
        raise BridgeError(
            f"reading recipe {path}: base is {short(base)}, there is no such recipe{near}; `dsv4 recipes` lists them"
        )
    named = read.get("name")
    base = base or (named if isinstance(named, str) and named in RECIPES else None)
    if other := [key for key in _BASES if key in read]:
        raise BridgeError(
            f"reading recipe {path}: there is no {short(other[0])}; write base: flash-lora, or another's name"
        )
    chosen = choose(base) if base else Chosen(Recipe(), _defaults())
    changes: dict[str, tuple[Any, str]] = {}
    for key, value in read.items():
        inner = {(key, k): v for k, v in value.items()} if isinstance(value, dict) else {(key,): value}
        for names, v in inner.items():
            if wrong := [name for name in names if not isinstance(name, str)]:
                raise BridgeError(f"reading recipe {path}: the key {short(wrong[0])} is no name")
            changes[".".join(names)] = (v, path.name)
    chosen = _change(chosen, changes, f"recipe {path}")
    if not base and (lacking := [f.name for f in dataclasses.fields(Recipe) if _is_section(f) and f.name not in read]):
        raise BridgeError(
            f"reading recipe {path}: it says nothing of {', '.join(lacking)}, and names no recipe that does; write one "
            "as base: flash-lora (`dsv4 recipes` lists them; `dsv4 recipes NAME --yaml` prints a whole one)"
        )
    return chosen


def _change(chosen: Chosen, changes: Mapping[str, tuple[Any, str]], where: str) -> Chosen:
    known, fields = values(chosen.recipe), {key: (field, kind) for key, field, kind in _nested(Recipe)}
    for key, (value, _) in changes.items():
        if key not in known:
            raise BridgeError(f"{where}: there is no {short(key)}{_nearest(key, known)}; `dsv4 recipes NAME` lists all")
        field, kind = fields[key]
        known[key] = _fitting(key, value, kind, field.metadata, where)
    top = {k: v for k, v in known.items() if "." not in k}
    for name, kind in typing.get_type_hints(Recipe).items():
        if dataclasses.is_dataclass(kind):
            inner = {f.name: known[f"{name}.{f.name}"] for f in dataclasses.fields(kind)}
            top[name] = kind(**inner)  # type: ignore[operator]
    return Chosen(Recipe(**top), dict(chosen.sources) | {key: source for key, (_, source) in changes.items()})


def _fitting(key: str, value: Any, kind: Any, bounds: Mapping[str, Any], where: str) -> Any:
    """A value as the field's type, which YAML may have read as another."""
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in allowed:
        return None
    kind = next(k for k in allowed if k is not type(None))
    fit: Any = None
    if typing.get_origin(kind) is tuple:
        of = typing.get_args(kind)[0]
        many = value.split() if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
        fit = tuple(_fitting(key, v, of, bounds, where) for v in many)
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML takes 1e-4 for a word
            fit = float(value)
    elif kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # of more digits than Python writes
            fit = str(value)
    elif type(value) is kind:
        fit = value
    if fit is None:
        names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
        raise BridgeError(f"{where}: {key} is {short(value)}, expected {names.get(kind, 'a list')}")
    choices, least, most = bounds["choices"], bounds["least"], bounds["below"]
    if choices and fit not in choices:
        raise BridgeError(f"{where}: {key} is {short(fit)}, expected one of {', '.join(choices)}")
    below = most or (1 << 63 if isinstance(fit, int) else float("inf"))
    if isinstance(fit, int | float) and not isinstance(fit, bool) and not least <= fit < below:
        limit = f", below {below}" if most or fit >= below else ""
        raise BridgeError(f"{where}: {key} is {short(fit)}, expected {least} or more{limit}")
    return fit


def _parsed(text: str) -> Any:
    try:
        return parse_yaml(text, "reading a value") if text else ""
    except BridgeError:
        return text


def _nearest(name: str, known: Iterable[str]) -> str:
    """The nearest known name, in words; `""` where none is near."""
    near = _near(name, known)
    return f" (nearest: {near})" if near else ""


def _near(name: str, known: Iterable[str]) -> str:
    """The nearest known name, `""` if none is; keys are also known by their last part."""
    if len(name) > _LONGEST:  # likeness takes a time that grows with the square
        return ""
    known = list(known)
    tails = {k.rpartition(".")[2]: k for k in reversed(known)}
    near = difflib.get_close_matches(name, known, 1) or [
        tails[t] for t in difflib.get_close_matches(name.rpartition(".")[2], tails, 1)
    ]
    return near[0] if near else ""


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _nested(cls: Any) -> Iterable[tuple[str, dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            for key, inner, inner_kind in _nested(kind):
                yield f"{field.name}.{key}", inner, inner_kind
        else:
            yield field.name, field, kind


def _is_section(field: dataclasses.Field[Any]) -> bool:
    return field.default_factory is not dataclasses.MISSING


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _defaults() -> dict[str, str]:
    return {key: field.metadata["source"] for key, field, _ in _nested(Recipe)}
