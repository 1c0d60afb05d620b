"""The pages hold: generated ones are fresh, links and files are there, commands and keys exist, Python blocks run.

The blocks of a page run in order, in one namespace, in a folder that has what pages name (`shelf`). A block that is
followed by a `text` block prints that. What needs a cluster is marked `<!-- not run: why -->` and only imported.
"""

import ast
import contextlib
import doctest
import io
import re
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import generate as generated  # docs/generate.py
from conftest import dsv4, same_files
from dsv4_bridge.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
FOLDERS = ("start", "guides", "concepts", "reference")
LIBRARIES = {"parity.md": pytest.mark.hf, "export-and-serve.md": pytest.mark.hf}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def verbs() -> dict[str, Any]:
    from typer.main import get_command

    return get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", generated.NAMES)
@pytest.mark.megatron
def test_generated_page_is_fresh(name: str) -> None:
    assert (DOCS / "reference" / name).read_text() == generated.page(name), "stale: run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if target.startswith("http"):
            continue
        other = page.parent / target if target else page
        assert other.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, f"{target}#{anchor}"


def test_the_index_has_every_page_and_no_other() -> None:
    linked = re.findall(r"\]\(([^)]+\.md)\)", (DOCS / "README.md").read_text())
    pages = [str(p.relative_to(DOCS)) for folder in FOLDERS for p in (DOCS / folder).glob("*.md")]
    assert sorted(x for x in linked if not x.startswith("..")) == sorted(pages)
    assert not [p.name for p in DOCS.iterdir() if p.name not in (*FOLDERS, "README.md", "generate.py", "__pycache__")]


def test_commands_in_the_docs_exist() -> None:
    """Every `dsv4 verb --option` is a verb with that option, whatever stands around it."""
    known = {name: [o for p in verb.params for o in (*p.opts, *p.secondary_opts)] for name, verb in verbs().items()}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for verb, rest in re.findall(r"(?:(?<![\w/-])dsv4|-m dsv4_bridge) ([a-z]+)([^`\n#]*)", text):
            assert verb in known, f"{named(page)}: dsv4 {verb}"
            for option in re.findall(r"(?<!\S)(--[a-z-]+)", rest):
                assert option in (*known[verb], "--help"), f"{named(page)}: dsv4 {verb} {option}"


def test_frozen_verbs() -> None:
    """The verbs and options of the command change on purpose only."""
    listed = re.findall(r"^  ([a-z]+) ", dsv4("--help", COLUMNS="200").stdout.partition("Commands:")[2], re.MULTILINE)
    names = "demo toy inspect plan import export rename repack verify generate parity "
    names += "data recipes train report lora merge push flops doctor"
    assert listed == names.split()


def test_every_verb_and_option_is_mentioned() -> None:
    """The generated page does not count."""
    text = "\n".join(page.read_text() for page in PAGES if page.name != "commands.md")
    missing = [name for name in verbs() if not re.search(rf"dsv4 {name}\b", text)]
    for name, verb in verbs().items():
        for options in ([*p.opts, *p.secondary_opts] for p in verb.params if p.opts[0].startswith("--")):
            if "--help" not in options and not any(re.search(rf"{o}\b", text) for o in options):
                missing.append(f"{name} {options[0]}")
    assert not missing, missing


def test_keys_of_recipes_exist() -> None:
    """Every `section.key=` is a field of a recipe's section; a name alone in backticks is one, too."""
    from dsv4_bridge.train.choose import choose

    recipe = choose("flash-lora").recipe
    parts = {f.name: getattr(recipe, f.name) for f in fields(recipe)}
    keys = {f"{name}.{f.name}" for name, part in parts.items() if is_dataclass(part) for f in fields(part)}
    sections = "|".join(name for name, part in parts.items() if is_dataclass(part))
    for page in PAGES:
        for key in re.findall(
            rf"(?:(?<=[\s`])|^)((?:{sections})\.[a-z_]+)(?==[^\s=]|`)", page.read_text(), re.MULTILINE
        ):
            assert key in keys or key.endswith((".md", ".py", ".jsonl", ".json")), f"{named(page)}: {key}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_is_named_exists(page: Path) -> None:
    """Files of the repository or the package, targets of make, and variables of the environment."""
    text = page.read_text()
    tops = (ROOT, ROOT / "src/dsv4_bridge")
    for name in re.findall(r"`((?:\w+/)+\w+\.py)\b", text):
        outside = name.startswith(("inference/", "encoding/"))  # of the releases
        assert outside or any((top / name).is_file() for top in tops), name
    for name in re.findall(r"(?<![\w/.-])((?:src|tests|docs|examples|benchmarks)/[\w./-]*\w)", text):
        assert any((top / name).exists() for top in tops), name
    for name in re.findall(r"`(\w+\.py)\b", text):
        assert any(ROOT.glob(f"[bdst]*/**/{name}")), name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for variable in re.findall(r"\bDSV4_[A-Z_]+", text):
        places = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
        assert any(variable in p.read_text() for p in places if p != Path(__file__)), variable


def test_counts_in_the_readme() -> None:
    from dsv4_bridge.spec.table import ROWS

    readme, variants = (ROOT / "README.md").read_text(), (DOCS / "reference/variants.md").read_text()
    assert len(ROWS) == 60 and "Sixty rows" in readme
    assert re.search(r"^\| Pro \|.*\| 145,116 \|", variants, re.MULTILINE) and "145,116 tensors" in readme
    assert re.search(r"^\| Flash-BF16 \|.*\| 581,975,531,080 \|", variants, re.MULTILINE) and "not 582" in readme


def test_the_transcript_in_the_readme_is_what_the_demo_prints() -> None:
    transcript = (ROOT / "README.md").read_text().split("$ dsv4 demo\n")[1].split("```")[0]
    printed = {line.rstrip() for line in dsv4("demo").stdout.splitlines()}
    missing = [x for x in transcript.splitlines() if x.rstrip() not in printed and "…" not in x]
    assert not missing, missing


@pytest.mark.parametrize(
    ("page", "begins", "command"),
    [
        ("guides/finetune-flash.md", "ranks of flash-finetune", "train flash-finetune --dry-run --gpu-memory 80"),
        ("guides/lora-one-node.md", "ranks of flash-lora", "train flash-lora --dry-run --gpu-memory 96"),
        ("concepts/flops.md", "GFLOP a token", "flops Flash"),
    ],
)
def test_calculated_transcripts_are_what_is_printed(page: str, begins: str, command: str) -> None:
    """Spaces and the lines of tables aside."""
    text = (DOCS / page).read_text()
    assert f"dsv4 {command}\n" in text
    (transcript,) = re.findall(rf"^{begins}.*?(?=^```)", text, re.S | re.M)
    printed = {bare(line) for line in dsv4(*command.split()).stdout.splitlines()}
    missing = [x for x in transcript.splitlines() if bare(x) not in printed and "…" not in x]
    assert len(transcript.splitlines()) > 4 and not missing, missing


def bare(line: str) -> str:
    return " ".join(re.sub(r"[\u2500-\u257f]", " ", line).split())


def blocks(page: Path) -> list[tuple[str, str]]:
    return generated.python_blocks(page.read_text())


@pytest.fixture(scope="module")
def shelf(toy_flash: Path, toy_megatron: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages name: a toy as DeepSeek-V4-Flash, imported, and data made with its tokenizer."""
    from dsv4_bridge.data.chat.prepare import prepare_chat
    from dsv4_bridge.data.indexed import prepare_pretraining
    from dsv4_bridge.spec import ModelSpec

    folder = tmp_path_factory.mktemp("shelf")
    shutil.copytree(toy_flash, folder / "DeepSeek-V4-Flash")
    shutil.copytree(toy_megatron, folder / "flash-megatron")
    shutil.copy(toy_megatron.with_name(f"{toy_megatron.name}.checksums.json"), folder / "flash-megatron.checksums.json")
    (folder / "data").mkdir()
    spec = ModelSpec.from_pretrained(toy_flash)
    source = Path(ast.__file__).read_text()
    for name in ("code", "mine"):
        parts = [folder / f"{name}-{i}.py" for i in range(10)]
        for i, part in enumerate(parts):
            part.write_text(source[i * 2000 : (i + 1) * 2000])
        prepare_pretraining(parts, folder / "data" / name, toy_flash, spec)
    prepare_chat(ROOT / "examples/chats.jsonl", folder / "data/chat", toy_flash, seq_length=64)
    return folder


@pytest.mark.megatron
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=LIBRARIES.get(p.name, ()), id=named(p)) for p in PAGES if blocks(p)]
)
def test_python_blocks_run(page: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf)
    text, names = page.read_text(), {"__name__": "__main__"}
    for block, mark in blocks(page):
        line = text[: text.index(block)].count("\n")
        tree = ast.parse("\n" * line + block)
        if mark:
            imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), named(page), "exec"), {})
            continue
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(tree, named(page), "exec"), names)
        expected = re.match(r"```\n+```text\n(.*?)^```", text[text.index(block) + len(block) :], re.S | re.M)
        if expected:
            same = doctest.OutputChecker().check_output(expected[1], said.getvalue(), doctest.ELLIPSIS)
            assert same, f"{named(page)}, line {line}, printed:\n{said.getvalue()}"
    if page.name == "README.md":
        assert same_files(shelf / "DeepSeek-V4-Flash", shelf / "flash-tuned") == []


def test_the_first_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a newcomer types, in this process; a check that finds something would end in exit code 1."""
    monkeypatch.chdir(tmp_path)
    block = (DOCS / "start/first-conversion.md").read_text().split("```\n")[1]
    lines = [line.partition("#")[0].split() for line in block.splitlines()]
    assert [line[:2] for line in lines] == [
        ["dsv4", verb] for verb in ("toy", "inspect", "import", "verify", "export", "verify")
    ]
    for line in lines:
        assert not app(line[1:], standalone_mode=False), line


def test_few_blocks_are_not_run() -> None:
    marked = {named(page): [mark for _, mark in blocks(page) if mark] for page in PAGES}
    assert {page: marks for page, marks in marked.items() if marks} == {
        "docs/concepts/model.md": ["not run: needs four processes"],
    }
    fenced = sum(page.read_text().count("```python\n") for page in PAGES)
    assert fenced == sum(len(blocks(page)) for page in PAGES)


def test_numbers_in_names_of_tests_are_explained() -> None:
    page = (DOCS / "concepts" / "traps.md").read_text()
    explained = set(re.findall(r"^\| (\d+) \|", page, re.M))
    assert explained == {str(n) for n in range(1, 68)}
    names = [
        n for path in (ROOT / "tests").rglob("test_*.py") for n in re.findall(r"def test_trap_?(\d+)", path.read_text())
    ]
    assert len(names) > 50 and {str(int(n)) for n in names} <= explained
