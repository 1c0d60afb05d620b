"""What a wheel would hold: the package whole, typed, and nothing of the repository besides."""

import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import dsv4_bridge

ROOT = Path(dsv4_bridge.__file__).parents[2]
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools", "77")
    copy = tmp_path_factory.mktemp("wheel") / "source"  # for setuptools leaves its own folders in a source
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", "docs", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-c", BUILD, str(copy.parent)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(copy.parent.glob("*.whl")))


def test_it_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    source = ROOT / "src"
    files = (p for p in (source / "dsv4_bridge").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == {str(p.relative_to(source)) for p in files} and "dsv4_bridge/py.typed" in packed


def test_its_page_works_on_an_index(wheel: zipfile.ZipFile) -> None:
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    facts = message_from_bytes(wheel.read(name))
    page = str(facts.get_payload())
    assert page.startswith("# dsv4-bridge") and facts["Keywords"] and facts.get_all("Classifier")
    assert "](" not in page.replace("](https://", "")  # no link that leads to a file of the repository


@pytest.mark.slow
@pytest.mark.hf
@pytest.mark.megatron
def test_the_script_of_make_dist_uses_it(wheel: zipfile.ZipFile) -> None:
    """Named as make names it, from the folder above; dependencies are those of this environment."""
    file = Path(str(wheel.filename))
    command = [sys.executable, ROOT / ".ci/try_wheel.py", f"{file.parent.name}/{file.name}", "megatron,hf"]
    done = subprocess.run(
        [*command, "--beside", sys.prefix], cwd=file.parent.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "megatron,hf: identical: 357 tensors" in done.stdout
