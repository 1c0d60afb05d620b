"""What verbs show, at the widths of terminals and in a pipe: nothing is lost, keys and numbers stay whole."""

import io
import os
import pty
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Group
from rich.text import Text
from typer.testing import CliRunner

from dsv4_bridge import export_hf, make_toy
from dsv4_bridge.cli import app
from dsv4_bridge.cli.show import console
from dsv4_bridge.cli.show.fitting import Fitting
from dsv4_bridge.cli.show.lines import folded
from dsv4_bridge.cli.show.merge import merge_table
from dsv4_bridge.convert.merge import Merged, MergeReport

LAYOUT = "--gpus 64 --gpu-memory 80"
CASES = [
    "inspect {toy}",
    "inspect {toy} --deep",
    "inspect {megatron}",
    "plan {toy}",
    "plan Flash --naming hybrid",
    f"plan Flash {LAYOUT}",
    "plan Pro --pp 16 --vp 2 --seq-length 8192 --gpu-memory 80",
    "plan Flash --mode lora --gpus 8 --gpu-memory 96",
    "train flash-finetune --dry-run --gpu-memory 80",
    "flops Flash --recompute full --tokens-per-second 2000 --gpu H100",
    "flops {toy} --lengths 100,200",
    "verify {toy} {other}",
    "verify {toy} {other} --level bytes",
    "verify {toy} --release Flash",
    "verify {back}",
    "import {toy} {out} --dry-run",
    "export {megatron} {out} --like {toy} --dry-run",
    "rename {megatron} {out} --naming hybrid --dry-run",
    "repack {toy} {out} --encoding fp8 --dry-run",
    "recipes",
    "recipes flash-lora",
    "doctor",
]
BOX = re.compile(r"[\s\u2500-\u257f]")


@pytest.fixture(scope="module")
def places(toy_flash: Path, toy_megatron: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("screens")
    export_hf(toy_megatron, folder / "back", toy_flash)
    other = make_toy(folder / "other", "Flash", 8)
    return {
        "toy": toy_flash,
        "megatron": toy_megatron,
        "other": other,
        "back": folder / "back",
        "out": folder / "o" / "ut",
    }


def shown_by(words: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a verb hands to the console."""
    shown: list[Any] = []
    monkeypatch.setattr(console, "show", shown.append)
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code in (0, 1) and shown, (done.output, done.exception)
    return shown


def drawn(what: Any, width: int) -> str:
    text = io.StringIO()
    console.Plain(width=width, highlight=False, file=text).print(what)
    return text.getvalue()


def tables(what: Any) -> list[Fitting]:
    if isinstance(what, Group):
        return [table for part in what.renderables for table in tables(part)]
    return [what] if isinstance(what, Fitting) else []


def plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def letters(text: str) -> Counter[str]:
    return Counter(BOX.sub("", text))


def hold_whole(what: Any) -> None:
    """Nothing is lost at any width, no line is wider, and in a pipe every cell stands on a line of its own."""
    wide = drawn(what, 10_000)
    lines = wide.splitlines()
    found = tables(what)
    headers: Counter[str] = Counter()
    for table in found:
        headers += letters("".join(plain(column.header) for column in table.columns))
        cells = {plain(cell) for column in table.columns for cell in column._cells}
        assert all(any(cell in line for line in lines) for cell in cells)
    for width in (60, 80, 120):
        narrow = drawn(what, width)
        assert not letters(wide) - headers - letters(narrow), width
        assert narrow.count("…") == wide.count("…")
        assert max(cell_len(line) for line in narrow.splitlines()) <= width
        for column in (column for table in found for column in table.columns if any(map(plain, column._cells))):
            if not any(column is table.columns[0] for table in found):
                assert all(word in narrow for word in plain(column.header).split())
            if column.no_wrap:
                assert all(any(plain(cell) in line for line in narrow.splitlines()) for cell in column._cells)


@pytest.mark.parametrize("words", CASES)
def test_nothing_is_lost(words: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for what in shown_by(words.format(**places), monkeypatch):
        hold_whole(what)


@pytest.mark.megatron
def test_nothing_is_lost_of_a_comparison(toy_megatron: Path) -> None:
    from dsv4_bridge.cli.show.parity import parity_table
    from dsv4_bridge.parity import Inputs, parity

    report = parity(toy_megatron, inputs=Inputs(9, 1), layers=(0, 1), replay=True)
    for what in (report, replace(report, replayed=None)):
        for every_site in (False, True):
            hold_whole(parity_table(what, every_site))
    stacked = drawn(parity_table(report), 60)
    assert "own choices error" in stacked and "choices replayed worst" in stacked


def test_a_number_that_begins_a_paragraph_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, layouts = "train flash-finetune --dry-run", f"plan Flash {LAYOUT}"
    for words, name, narrow in ((plan, "stage", 80), (layouts, "tp", 60)):
        shown = "".join(drawn(what, narrow) for what in shown_by(words, monkeypatch))
        assert re.search(rf"^{name} \d+$", shown, re.MULTILINE) and not re.search(r"^\d+$", shown, re.MULTILINE)


def test_nothing_is_lost_of_a_merge() -> None:
    draw = random.Random(5)
    tensors = tuple(
        Merged(
            f"layers.{n}.attn.wq_a.weight",
            row,
            "fp8",
            *(draw.uniform(0, 3) for _ in "abc"),
            draw.randrange(10**9),
            10**9,
            draw.choice((0, 32)),
        )
        for n, row in enumerate(["attn.wq_a", "ffn.experts.w1", "attn.indexer.compressor.wgate"] * 3)
    )
    hold_whole(merge_table(MergeReport("merged", "source", tensors, 333, 7_600_000, dry_run=True)))


def test_a_terminal_is_drawn_for(toy_flash: Path) -> None:
    """Through a terminal of its own, as wide as it says."""
    ours, theirs = pty.openpty()
    code = "import os, sys; from dsv4_bridge.cli import main; main()"
    env = os.environ | {"COLUMNS": "72", "TERM": "xterm"}
    command = [sys.executable, "-c", code, "plan", str(toy_flash)]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    said = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        said += piece
    assert process.wait(timeout=60) == 0 and b"\x1b[" in said
    shown = re.sub(r"\x1b\[[0-9;]*m", "", said.decode()).splitlines()
    assert max(map(cell_len, shown)) <= 72 and "attn.indexer.compressor.wgate" in shown


def test_a_line_of_a_run_is_folded_between_its_parts() -> None:
    line = "step 1/6  loss 6.2857  grad 14.7  lr 0.00027  left 0:09  s/step 1.89  tok/s 68"
    for width in (30, 60, 80):
        lines = folded(line, width).split("\n")
        assert max(map(len, lines)) <= width and "  ".join(part.strip() for part in lines) == line
    assert folded(line, None) == line
