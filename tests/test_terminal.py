"""What a user sees: help, versions, narrow terminals, pipes, errors as JSON, and what was meant."""

import json
import shlex
import subprocess
import sys
from enum import StrEnum
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from conftest import dsv4, fresh_dsv4
from dsv4_bridge import BridgeError, make_toy
from dsv4_bridge.cli import app
from dsv4_bridge.cli.app import QUIET, ExportEncoding, NamingOption, quiet
from dsv4_bridge.cli.check import Level, Payload, Width
from dsv4_bridge.cli.convert import RepackEncoding
from dsv4_bridge.cli.help import VERBS
from dsv4_bridge.cli.lora import Names
from dsv4_bridge.cli.plan import Mode
from dsv4_bridge.convert.verify import LEVELS
from dsv4_bridge.lora.peft import NAMES
from dsv4_bridge.planning.memory import MODES
from dsv4_bridge.spec.encodings import TARGETS
from dsv4_bridge.spec.megatron import NAMINGS
from dsv4_bridge.toy.checkpoint import WIDTHS
from dsv4_bridge.toy.payloads import PAYLOADS


def verbs() -> dict[str, object]:
    group = typer.main.get_command(app)
    return {name: group.get_command(None, name) for name in group.list_commands(None)}  # type: ignore[attr-defined]


def test_every_verb_has_a_line_an_example_and_described_arguments() -> None:
    found = verbs()
    assert list(found) == [*VERBS]
    for name, (short, example, _) in VERBS.items():
        assert len(short) <= 60 and short[-1] in ".?"
        program, verb, *words = shlex.split(example.partition(" > ")[0])
        assert (program, verb) == ("dsv4", name)
        options = {o for p in found[name].params for o in (*p.opts, *p.secondary_opts)}  # type: ignore[attr-defined]
        assert all(w in options for w in words if w.startswith("--")), example
        arguments = [p for p in found[name].params if p.param_type_name == "argument"]  # type: ignore[attr-defined]
        assert all(p.help for p in arguments), name


@pytest.mark.parametrize(
    ("offered", "known"),
    [
        (NamingOption, NAMINGS),
        (ExportEncoding, TARGETS),
        (RepackEncoding, TARGETS[1:]),
        (Payload, PAYLOADS),
        (Width, WIDTHS),
        (Level, LEVELS),
        (Mode, MODES),
        (Names, NAMES),
    ],
)
def test_options_offer_what_the_package_takes(offered: type[StrEnum], known: tuple[str, ...]) -> None:
    """Choices are spelt out in the command, which starts without the rooms that know them."""
    assert tuple(offered) == known


def test_help_is_short_and_whole() -> None:
    shown = dsv4("-h", COLUMNS="80").stdout
    assert "…" not in shown and "..." not in shown.partition("Commands:")[2]
    assert dsv4("--help", COLUMNS="80").stdout == shown
    one = dsv4("export", "-h", COLUMNS="80").stdout
    assert "Example: dsv4 export" in one and "root or an iteration folder" in one


def test_help_is_a_word_too() -> None:
    assert dsv4("help").stdout == dsv4("--help").stdout
    assert dsv4("help", "export").stdout == dsv4("export", "--help").stdout
    assert dsv4("help", "improt").returncode == 2


def test_what_was_meant_is_said_once() -> None:
    said = dsv4("improt", "a").stderr
    assert said.lower().count("did you mean") == 1 and "did you mean import?" in said


def test_version_and_completion() -> None:
    assert fresh_dsv4("--version").stdout.startswith("dsv4-bridge ")
    words = {"_DSV4_COMPLETE": "complete_bash", "COMP_WORDS": "dsv4 ren", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'dsv4'"
    assert dsv4(code=code, **words).stdout.split() == ["rename"]


def test_light_verbs_load_no_compiler_and_no_model(toy_flash: Path) -> None:
    """In a fresh interpreter, one behind the other."""
    code = """
import contextlib, io, json, sys
from dsv4_bridge.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main()
print(*sorted({"torch", "numba", "megatron", "transformers", "tokenizers", "huggingface_hub"} & sys.modules.keys()))
"""
    lines = ["--help", "import --help", f"inspect {toy_flash}", f"plan {toy_flash}", "plan Flash", "plan Flash --tp 2"]
    lines += ["flops Flash", f"flops {toy_flash}", "recipes", "recipes flash-lora", "train flash-lora --dry-run"]
    words = json.dumps([line.split() for line in lines])
    done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True, check=True, timeout=300)
    assert not done.stdout.strip(), done.stdout


def test_the_default_in_the_help_of_flops_is_the_default() -> None:
    from dsv4_bridge.planning.activations import LOSS_CHUNK

    assert f"{LOSS_CHUNK} by default" in " ".join(dsv4("flops", "--help").stdout.split())


def test_names_from_anywhere_do_not_steer_a_terminal(tmp_path: Path) -> None:
    out = tmp_path / "to\x1b[31my"
    shown = dsv4("toy", out).stdout
    assert "\x1b" not in shown and "[31my: a toy Flash" in shown


@pytest.mark.parametrize("words", [("plan", "Flash"), ("flops", "Flash"), ("plan", "Flash", "--gpus", "8")])
def test_no_name_or_number_is_lost_at_any_width(words: tuple[str, ...]) -> None:
    wide = dsv4(*words).stdout
    for columns in ("60", "100"):
        narrow = dsv4(*words, DSV4_WIDTH=columns).stdout
        assert "…" not in narrow
        whole = "".join(narrow.split())
        for line in (line for line in wide.splitlines() if line.startswith("│")):
            key, *others = (cell.strip() for cell in line.strip("│").split("│"))
            numbers = [cell for cell in others if cell.replace(",", "").replace(".", "").isdigit()]
            assert all("".join(cell.split()) in whole for cell in (key, *numbers)), line


def test_nothing_is_cut_in_a_pipe() -> None:
    shown = dsv4("plan", "Flash", "--naming", "hybrid").stdout
    assert "decoder.layers.4.inner_layer.self_attention.core_attention.indexer.compressor.linear_wgate.weight" in shown
    assert "…" not in shown


def test_errors_are_json_where_json_is_asked_for(tmp_path: Path) -> None:
    for words in (["inspect", tmp_path / "none"], ["plan", "Falsh"], ["flops", "Flash", "--sequence", "3"]):
        done = dsv4(*words, "--json")
        found = json.loads(done.stdout)
        assert done.returncode == 2 == found["exit_code"] and found["error"] in done.stderr
        assert found["schema"] == 1 and found["verb"] == words[0] and found["version"]


def test_json_says_what_it_is(toy_flash: Path) -> None:
    for words in (
        ["inspect", toy_flash],
        ["plan", "Flash"],
        ["flops", "Flash"],
        ["recipes"],
        ["verify", toy_flash, toy_flash],
    ):
        found = json.loads(dsv4(*words, "--json").stdout)
        assert (found["schema"], found["verb"]) == (1, words[0])


def test_quiet_is_quiet(toy_flash: Path, tmp_path: Path) -> None:
    for number, words in enumerate((["-q", "import"], ["import", "-q"], ["import", "--quiet"])):
        done = dsv4(*words, toy_flash, tmp_path / f"out-{number}")
        assert done.returncode == 0 and not done.stderr and "tensors" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_what_stands_before_a_verb_may_stand_behind_it(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in ("-q", "--quiet"):
        for words in ([option, verb, "--version"], [verb, option, "--version"]):
            monkeypatch.setenv(QUIET, "")
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0 and done.stdout.startswith("dsv4-bridge ") and quiet()
    assert "--quiet" in CliRunner().invoke(app, [verb, "--help"]).stdout


def test_an_option_is_not_taken_for_a_text(toy_flash: Path) -> None:
    done = dsv4("generate", toy_flash, "--prompt", "-q", "--stop", "--version", "--max-new-tokens", "1", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["continuations"][0]["prompt"] == "-q", done.stderr


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["plan", "Falsh"], "did you mean Flash?"),
        (["flops", "flash-bse"], "did you mean Flash-Base?"),
        (["inspect", "Flash"], "deepseek-ai/DeepSeek-V4-Flash"),
        (["inspect", "Pro-0813"], "deepseek-ai/DeepSeek-V4-Pro-0813"),
        (["toy", "out", "--variant", "Flush"], "did you mean Flash?"),
        (["recipes", "flash-lor"], "flash-lora"),
    ],
)
def test_what_was_meant(words: list[str], meant: str) -> None:
    done = dsv4(*words)
    assert done.returncode == 2 and meant in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["improt", "a", "b"], "did you mean import? (dsv4 --help"),
        (["import", "a"], "(dsv4 import --help lists its options)"),
        (["rename", "a", "b"], "Missing option '--naming'. Choose from: gpt, hybrid (dsv4 rename --help"),
        (["rename", "a", "b", "--naming", "gtp"], "for '--naming': 'gtp' is not one of 'gpt', 'hybrid'"),
        (["export", "DeepSeek-V4-Flash", "b"], "opening DeepSeek-V4-Flash: no such folder; a Megatron checkpoint"),
        (["train", "flash-lora", "--optimizer.lr", "1e-4"], "keys of a recipe have no dashes: optimizer.lr=VALUE"),
        (["train", "flash-lora", "--lora.rank=4"], "have no dashes: lora.rank=4"),
        (["train", "flash-lora", "--lr", "1e-4"], "have no dashes: optimizer.lr=VALUE"),
        (["train", "flash-lora", "--seq-length=64"], "have no dashes: data.seq_length=64"),
        (["train", "flash-lora", "--tiny", "--gpu-memory", "80"], "say --dry-run with it"),
        (["train", "flash-lora", "start=DeepSeek-V4-Flash"], "hf download deepseek-ai/DeepSeek-V4-Flash --local-dir"),
        (["train", "flash-lora", "start=TOY", "tokenizer=Pro"], "hf download deepseek-ai/DeepSeek-V4-Pro --local-dir"),
        (["version"], "dsv4 --version prints it"),
        (["-V"], "dsv4 --version prints it"),
        (["data", "a.txt", "out", "--tokenizer", "TOY/tokenizer.json"], "name the folder that it is in"),
        (["train", "flash-lora", "start=some-one/Some", "--dry-run"], "hf download some-one/Some --local-dir Some"),
        (["inspect", "TOY/model.gguf"], "GGUF files are not read"),
        (["export", "TOY", "OUT", "--like", "MEGATRON"], "look swapped; dsv4 export MEGATRON OUT --like TOY"),
    ],
)
def test_what_to_do_instead(
    words: list[str], meant: str, toy_flash: Path, toy_megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, path in (("TOY", toy_flash), ("MEGATRON", toy_megatron)):
        (tmp_path / name).mkdir()
        for part in path.iterdir():
            (tmp_path / name / part.name).symlink_to(part)
    (tmp_path / "TOY/model.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    done = dsv4(*words)
    assert done.returncode == 2 and meant in done.stderr, done.stderr


def test_without_a_word_the_help_is_shown() -> None:
    done = dsv4()
    assert done.returncode == 2 and done.stderr.startswith("Usage: ") and not done.stdout
    assert done.stderr.strip() == dsv4("--help").stdout.strip()


@pytest.mark.parametrize("scheme", ["s3", "gs", "memory", "hf", "file"])
def test_addresses_are_no_folders(scheme: str, toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    """None is made of that name, by any verb that writes, nor by a function."""
    there = f"{scheme}://bucket/folder"
    (tmp_path / "a.txt").write_text("text")
    code = f"import os; os.chdir({str(tmp_path)!r})"
    for words in (
        ["inspect", there],
        ["import", there, "out"],
        ["import", toy_flash, there],
        ["export", toy_megatron, there, "--like", toy_flash],
        ["export", there, "out", "--encoding", "bf16"],
        ["rename", toy_megatron, there, "--naming", "hybrid"],
        ["repack", toy_flash, there, "--encoding", "bf16"],
        ["verify", toy_flash, there],
        ["merge", toy_flash, toy_flash, there],
        ["toy", there],
        ["data", "a.txt", there, "--tokenizer", toy_flash],
        ["train", "flash-lora", "--tiny", f"start={toy_flash}", "data.train=x", f"out={there}"],
        ["train", "flash-lora", "--tiny", f"start={there}", "data.train=x", "out=out"],
    ):
        done = dsv4(*words, code=code)
        assert done.returncode == 2 and there in done.stderr, (words, done.stderr)
        assert "addresses are neither read nor written; name a folder" in done.stderr
    with pytest.raises(BridgeError, match="addresses are neither read nor written"):
        make_toy(there)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_of_nearly_that_name(toy_flash: Path) -> None:
    done = dsv4("inspect", toy_flash.with_name("flahs"))
    assert done.returncode == 2 and f"did you mean {toy_flash}?" in done.stderr


def test_a_folder_without_a_tokenizer_is_noted(toy_flash: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in toy_flash.iterdir():
        if not path.name.startswith("tokenizer"):
            (bare / path.name).symlink_to(path)
    for source, noted in ((bare, True), (toy_flash, False)):
        done = dsv4("repack", source, tmp_path / f"out-{noted}", "--encoding", "bf16")
        assert done.returncode == 0 and ("has no tokenizer.json" in done.stderr) == noted, done.stderr


def test_a_page_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    from dsv4_bridge.parity.report import can_report

    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(BridgeError, match=r"an index\.html that is of no comparison"):
        can_report(tmp_path)
    (tmp_path / "parity.json").write_text("{}")
    can_report(tmp_path)
