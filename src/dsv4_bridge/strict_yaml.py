"""Plain YAML from elsewhere, without what makes a small text large."""

import re
from typing import Any

import yaml

from .errors import BridgeError

# PyYAML lets several kinds through from scalars such as `!!int ''`, `!!timestamp x` and `2020-13-45`.
_DEEP = 100
_BRACKET = re.compile(r"[\[\]{}]")
_RAISED = (yaml.YAMLError, ValueError, LookupError, ArithmeticError, AttributeError, TypeError)


class _Tree(yaml.SafeLoader):
    """YAML without merge keys: PyYAML copies what they name, each time nine times as much."""

    def flatten_mapping(self, node: Any) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "a merge key (<<), say all keys", node.start_mark)


class _Plain(_Tree):
    """That, in which no key is said twice, and nothing by an alias."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("an alias (*), say the value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):  # a key of several parts
                continue
            if key.value in seen:
                what = f"{key.value[:80]!r} is said twice"
                raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _brackets(raw: bytes | str) -> int:
    """How deep brackets nest, those in quotes counted too: PyYAML's time grows with the square of it."""
    text = raw if isinstance(raw, str) else raw.decode("latin-1")
    depth = deepest = 0
    for found in _BRACKET.finditer(text):
        depth = depth + 1 if found[0] in "[{" else max(0, depth - 1)
        deepest = max(deepest, depth)
    return deepest


def parse_yaml(raw: bytes | str, doing: str, *, aliases: bool = False) -> Any:
    """The value of a YAML text; parts that aliases share are one object.

    Args:
        raw: UTF-8.
        doing: for messages.
        aliases: take aliases and keys that are said twice: other tools write them.

    Raises:
        BridgeError: it is none, or nests too deep.
    """
    if _brackets(raw) > _DEEP:
        raise BridgeError(f"{doing}: not plain YAML (nested too deep)")
    try:
        return yaml.load(raw, _Tree if aliases else _Plain)
    except RecursionError:
        raise BridgeError(f"{doing}: not plain YAML (nested too deep)") from None
    except _RAISED as error:
        raise BridgeError(f"{doing}: not plain YAML ({' '.join(str(error).split())[:300]})") from None
