"""Generated pages are fresh, links lead somewhere, and the commands that the docs show exist."""

import re
from pathlib import Path

import pytest

from conftest import dsv4
from dsv4_bridge.docs import pages

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", pages())
def test_generated_page_is_fresh(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == pages()[name], "stale: run `make docs`"


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda p: p.name)
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
    assert missing == []
