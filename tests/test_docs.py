"""Generated pages are fresh, links lead somewhere, and the commands that the docs show exist."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from conftest import dsv4
from dsv4_bridge.cli.app import app
from generate import pages  # docs/generate.py

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("name", pages())
def test_generated_page_is_fresh(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == pages()[name], "stale: run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_commands_in_the_docs_exist() -> None:
    """Every `dsv4 verb --option` in README and docs is a verb with that option."""
    helps: dict[str, str] = {}
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for verb, rest in re.findall(r"^\s*dsv4 ([a-z]+)(.*)$", page.read_text(), re.MULTILINE):
            if verb not in helps:
                done = dsv4(verb, "--help", COLUMNS="200")
                assert done.returncode == 0, f"{page.name}: dsv4 {verb}"
                helps[verb] = done.stdout
            for option in re.findall(r"(?<!\S)(--[a-z-]+)", rest.split("#")[0]):
                assert option in helps[verb], f"{page.name}: dsv4 {verb} {option}"


def test_frozen_verbs() -> None:
    """The verbs and options of the command change on purpose only."""
    listed = re.findall(r"^  ([a-z]+) ", dsv4("--help", COLUMNS="200").stdout.partition("Commands:")[2], re.MULTILINE)
    verbs = "demo toy inspect plan import export repack verify generate parity "
    verbs += "data recipes train lora merge flops doctor"
    assert listed == verbs.split()


def test_the_transcript_in_the_readme_is_what_the_demo_prints() -> None:
    transcript = (ROOT / "README.md").read_text().split("$ dsv4 demo\n")[1].split("```")[0]
    printed = {line.rstrip() for line in dsv4("demo").stdout.splitlines()}
    missing = [x for x in transcript.splitlines() if x.rstrip() not in printed and "…" not in x]
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_import_what_there_is(page: Path) -> None:
    """Every fenced Python block parses, and each name that it imports from the package is there."""
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsv4_bridge"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    found = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert found, f"{page.name}: {node.module} has no {alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths of Python files in backticks, from the root of the repository or of the package."""
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", page.read_text()):
        outside = name.startswith(("inference/", "encoding/"))  # of the releases
        assert outside or any((top / name).is_file() for top in (ROOT, ROOT / "src/dsv4_bridge")), (
            f"{page.name}: {name}"
        )


def test_every_verb_and_option_is_mentioned() -> None:
    from typer.main import get_command

    text = "\n".join(page.read_text() for page in PAGES)
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    missing = [name for name in verbs if not re.search(rf"dsv4 {name}\b", text)]
    for name, verb in verbs.items():
        options = [next(o for o in p.opts if o.startswith("--")) for p in verb.params if p.opts[0].startswith("--")]
        missing += [f"{name} {o}" for o in options if o != "--help" and not re.search(rf"{o}\b", text)]
    assert not missing, missing
