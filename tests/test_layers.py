"""Who may import whom: downwards only, and each library in its own rooms."""

import ast
from functools import cache
from pathlib import Path

import conftest
import dsv4_bridge

ROOT = Path(dsv4_bridge.__file__).parent
# From the ground up. A room imports itself and lower lines; rooms of one line do not know each other.
LAYERS = (
    "errors threads",
    "strict_json strict_yaml files ranks progress free_memory web_page",
    "lock",
    "spec codec",
    "parallel store text",
    "lora planning chat",
    "convert",
    "toy mcore",
    "data generate parity",
    "train",
    "cli",
    "__init__ __main__",
)
MCORE = (
    "kernels",
    "cpu config metrics background meeting device",
    "mends",
    "layers runtime",
    "model schedule indexer_phase",
    "weights generate",
    "adapters optim",
    "checkpoints pretrained",
    "__init__",
)
ONLY = {  # a library -> the rooms that may import it, at the top of a file or inside a function
    "typer": "cli",
    "rich": "cli",
    "megatron": "mcore data train",
    "transformers": "parity",
    "matplotlib": "parity",
    "huggingface_hub": "store",
    "tokenizers": "text data",
    "torch": "codec text lora convert mcore data generate parity train cli",  # plan, inspect, import: without it
}


@cache
def statements(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """Those of a file that import, anywhere in it."""
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]


def imports(path: Path, within: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Every module that a file imports, lazily or not: ("dsv4_bridge", "spec", "table"), ("torch",)…"""
    found: list[tuple[str, ...]] = []
    for node in statements(path):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        else:
            start = within[: len(within) - node.level + 1] if node.level else ()
            base = (*start, *(node.module.split(".") if node.module else ()))
            found += [(*base, alias.name) for alias in node.names]
    return found


def upward(layers: tuple[str, ...], depth: int, under: Path) -> list[str]:
    floor = {room: number for number, line in enumerate(layers) for room in line.split()}
    wrong = []
    for path in sorted(under.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        own = parts[depth]
        assert own in floor, f"{path.relative_to(ROOT)} is in no layer: give it one in tests/test_layers.py"
        for name in imports(path, parts[:-1]):
            other = name[depth] if name[:depth] == parts[:depth] and len(name) > depth else own
            if other in floor and other != own and floor[other] >= floor[own]:
                wrong.append(f"{'/'.join(parts)} imports {'.'.join(name)}")
    return wrong


def test_downwards_only() -> None:
    assert upward(LAYERS, 1, ROOT) == []


def test_downwards_only_in_mcore() -> None:
    assert upward(MCORE, 2, ROOT / "mcore") == []


def test_libraries_stay_in_their_rooms() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        wrong += [
            f"{'/'.join(parts)} imports {name[0]}"
            for name in imports(path, parts[:-1])
            if name[0] in ONLY and parts[1] not in ONLY[name[0]].split()
        ]
    assert wrong == []


def test_a_module_keeps_its_private_names() -> None:
    """`_name` is for its own file; a file that begins with `_` is for its own folder."""
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        for name in imports(path, parts[:-1]):
            if name[0] != ROOT.name or not name[-1].startswith("_") or name[-1].startswith("__"):
                continue
            if name[:-1] != parts[:-1]:  # a private file of the same folder is no stranger
                wrong.append(f"{'/'.join(parts)} imports {'.'.join(name)}")
    assert wrong == []


def test_the_package_imports_itself_relatively() -> None:
    for path in sorted(ROOT.rglob("*.py")):
        for node in statements(path):
            assert not isinstance(node, ast.ImportFrom) or node.level or (node.module or "").split(".")[0] != ROOT.name


def test_the_long_files_of_tests_are_there() -> None:
    """Their order speeds a run of several processes up; a name that is no file has no place in it."""
    names = [Path(conftest.__file__).parent / name for name in conftest.LONG]
    assert [str(path) for path in names if not path.is_file()] == [] and len(set(names)) == len(names)
