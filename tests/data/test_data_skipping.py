"""What is unusable is left out where that is asked for, counted and listed; samples are shown as they are learned."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dsv4_bridge.mcore")

from conftest import dsv4, same_files
from dsv4_bridge.data.chat.prepare import prepare_chat
from dsv4_bridge.data.chat.store import open_chat_data
from dsv4_bridge.data.indexed import prepare_pretraining
from dsv4_bridge.store.hf import open_hf

GOOD = ["The quick brown fox", "jumps över", "the lazy\ndog", "again and again"]
BAD_LINES = {
    b"{": "no valid JSON",
    b'{"txt": "x"}': "no 'text'",
    b'{"text": 3}': "expected text",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "surrogate",
    b"[1]": "expected a JSON object",
}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
BAD_TALKS: dict[str, Any] = {
    "mesages": {"mesages": TALK},
    "weight": {"messages": [TALK[0], TALK[1] | {"weight": 0.5}]},
    "role": {"messages": [{"role": "nobody", "content": "x"}]},
}


def listed(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mixed(source: random.Random) -> tuple[list[bytes], dict[int, str]]:
    """Lines, good ones among bad ones, and the bad ones' numbers with what is said of them."""
    lines = [json.dumps({"text": text}).encode() for text in GOOD for _ in range(3)] + [b""]
    lines += list(BAD_LINES)
    source.shuffle(lines)
    return lines, {n: BAD_LINES[line] for n, line in enumerate(lines, 1) if line in BAD_LINES}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_lines_are_left_out_and_listed_by_number(
    workers: str, toy_flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dsv4_bridge.data.sources

    monkeypatch.setattr(dsv4_bridge.data.sources, "_UNIT", 60)
    lines, bad = mixed(random.Random(f"lines {workers}"))
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    kept = [line for n, line in enumerate(lines, 1) if n not in bad]
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(kept) + b"\n")
    args = ("--tokenizer", toy_flash, "--workers", workers)
    spec = open_hf(toy_flash).spec
    report = prepare_pretraining(
        [tmp_path / "bad.jsonl"], tmp_path / "a" / "x", toy_flash, spec, workers=int(workers), skip=True
    )
    assert report.skipped == len(bad)
    found = listed(tmp_path / "a" / "x.skipped.jsonl")
    assert [one["line"] for one in found] == list(bad)
    assert all(said in one["reason"] and one["file"].endswith("bad.jsonl") for one, said in zip(found, bad.values()))
    assert dsv4("data", tmp_path / "good.jsonl", tmp_path / "b" / "x", *args).returncode == 0
    assert same_files(tmp_path / "a", tmp_path / "b") == ["x.json", "x.skipped.jsonl"]
    # Done again without a fault, the old list goes.
    again = ("data", tmp_path / "good.jsonl", tmp_path / "a" / "x", *args, "--overwrite")
    assert dsv4(*again).returncode == 0 and same_files(tmp_path / "a", tmp_path / "b") == []


def test_files_of_folders_and_files_that_are_broken(toy_flash: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (folder / "c.zip").write_bytes(b"PK\x03\x04 archive")
    args = ("--tokenizer", toy_flash, "--json")
    done = dsv4("data", folder, tmp_path / "x", *args)  # what is no text is named, whatever is asked
    assert done.returncode == 0 and json.loads(done.stdout)["documents"] == 1
    assert [(Path(one["file"]).name, set(one)) for one in listed(tmp_path / "x.skipped.jsonl")] == [
        ("b.png", {"file", "reason"}),
        ("c.zip", {"file", "reason"}),
    ]
    (folder / "d.txt").write_bytes(b"gr\xfc\xdfe")
    rows = json.dumps([{"text": text} for text in GOOD])
    (tmp_path / "cut.json").write_text(rows[:-9])
    (tmp_path / "cut.gz").write_bytes(gzip.compress(rows.encode())[:-12])
    (tmp_path / "whole.json").write_text(json.dumps([{"text": "a"}, {"txt": "b"}, {"text": "c"}]))
    sources = [folder, *(tmp_path / name for name in ("cut.json", "cut.gz", "whole.json"))]
    refused = dsv4("data", *sources, tmp_path / "y", *args)
    assert refused.returncode == 2 and not list(tmp_path.glob("y*"))
    done = dsv4("data", *sources, tmp_path / "y", *args, "--on-error", "skip")
    assert done.returncode == 0 and json.loads(done.stdout)["documents"] == 3, done.stderr
    found = {Path(one["file"]).name: one for one in listed(tmp_path / "y.skipped.jsonl")}
    assert set(found) == {"b.png", "c.zip", "d.txt", "cut.json", "cut.gz", "whole.json"}
    assert found["whole.json"]["element"] == 2 and "element 4" in found["cut.json"]["reason"]
    done = dsv4("data", folder / "d.txt", tmp_path / "z", *args, "--on-error", "skip")
    assert done.returncode == 2 and "nothing is left; 1 were skipped" in done.stderr and "not UTF-8" in done.stderr
    assert not list(tmp_path.glob("z*"))


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("how", ["lines", "array", "gz"])
def test_bad_conversations_are_left_out_and_listed(how: str, workers: str, toy_flash: Path, tmp_path: Path) -> None:
    source = random.Random(f"{how} {workers}")
    rows: list[Any] = [{"messages": [*TALK, {"role": "user", "content": str(n)}]} for n in range(6)]
    rows += BAD_TALKS.values()
    source.shuffle(rows)
    while rows[0] in BAD_TALKS.values():
        rows.append(rows.pop(0))
    bad = {n: name for n, row in enumerate(rows, 1) for name, one in BAD_TALKS.items() if row is one}

    def write(name: str, some: list[Any]) -> Path:
        text = json.dumps(some) if how == "array" else "".join(json.dumps(row) + "\n" for row in some)
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if how == "gz" else text.encode())
        return path

    src = write("bad.json", rows)
    args = ("--tokenizer", toy_flash, "--seq-length", "64", "--no-thinking", "--workers", workers)
    done = dsv4("data", src, tmp_path / "x", *args, "--on-error", "skip", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["skipped"] == 3, done.stderr
    unit = "element" if how == "array" else "line"
    found = listed(tmp_path / "x.skipped.jsonl")
    assert {one[unit]: one["file"] for one in found} == dict.fromkeys(bad, str(src))
    assert not any("reading" in one["reason"] or ".part" in one["reason"] for one in found)
    good = write("good.json", [row for n, row in enumerate(rows, 1) if n not in bad])
    assert dsv4("data", good, tmp_path / "y", *args).returncode == 0
    one, other = open_chat_data(tmp_path / "x"), open_chat_data(tmp_path / "y")
    assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.mask, other.mask)
    assert one.facts["skipped"] == 3 and sorted({*range(1, 10)} - {*one.lines.tolist()}) == sorted(bad)


def test_a_folder_of_conversations(toy_flash: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    (folder / "more").mkdir(parents=True)
    row = json.dumps({"messages": TALK})
    (folder / "a.jsonl").write_text(f"{row}\n{row}\n")
    (folder / "more" / "b.json.gz").write_bytes(gzip.compress(f"[{row}]".encode()))
    (folder / "README.md").write_text("# Chats")
    (folder / ".hidden").write_text(row)
    args = ("--tokenizer", toy_flash, "--seq-length", "64", "--no-thinking", "--json")
    done = dsv4("data", folder, tmp_path / "x", *args)
    assert done.returncode == 0 and json.loads(done.stdout)["counts"]["conversations"] == 3, done.stderr
    assert [Path(one["file"]).name for one in listed(tmp_path / "x.skipped.jsonl")] == ["README.md"]
    (tmp_path / "none").mkdir()
    done = dsv4("data", tmp_path / "none", tmp_path / "y", *args)
    assert done.returncode == 2 and "none in 0 files" in done.stderr


def test_thinking_auto_is_the_mode_that_answers_have(toy_flash: Path, tmp_path: Path) -> None:
    thought = [TALK[0], TALK[1] | {"reasoning_content": "greet"}]
    made = {}
    for name, rows, mode in (
        ("auto", [{"messages": thought}, {"messages": TALK}, {"messages": thought, "enable_thinking": False}], "auto"),
        (
            "said",
            [
                {"messages": thought, "enable_thinking": True},
                {"messages": TALK, "enable_thinking": False},
                {"messages": thought, "enable_thinking": False},
            ],
            None,
        ),
    ):
        src = tmp_path / f"{name}.jsonl"
        src.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare_chat(src, tmp_path / name, toy_flash, seq_length=64, thinking=mode)
        made[name] = open_chat_data(tmp_path / name)
    assert np.array_equal(made["auto"].tokens, made["said"].tokens)
    assert np.array_equal(made["auto"].mask, made["said"].mask)
    both = dsv4(
        "data", tmp_path / "auto.jsonl", "x", "--tokenizer", toy_flash, "--seq-length", "9", "--thinking", "auto",
        "--no-thinking",
    )  # fmt: skip
    assert both.returncode == 2 and "contradict" in both.stderr


@pytest.mark.parametrize("how", ["plain", "gz", "array"])
def test_packed_files_are_counted_as_packed(how: str, toy_flash: Path, tmp_path: Path) -> None:
    row = json.dumps({"messages": TALK})
    text = f"[{', '.join([row] * 90)}]" if how == "array" else f"{row}\n\n" * 90
    src = tmp_path / "chats.json"
    src.write_bytes(gzip.compress(text.encode()) if how == "gz" else text.encode())
    started, seen = [], []
    prepare_chat(
        src, tmp_path / "x", toy_flash, seq_length=64, thinking=False, start=started.append, advance=seen.append
    )
    assert started == [src.stat().st_size] and sum(seen) == src.stat().st_size and min(seen) >= 0


def test_samples_are_shown_as_they_are_learned(toy_flash: Path, tmp_path: Path) -> None:
    src = tmp_path / "talk.jsonl"
    talk = [*TALK, {"role": "user", "content": "Wörd?"}, {"role": "assistant", "content": "Größe 語"}]
    src.write_text("".join(json.dumps({"messages": talk[:n]}) + "\n" for n in (4, 2, 4)))
    args = ("--tokenizer", toy_flash, "--seq-length", "64", "--no-thinking")
    done = dsv4("data", src, tmp_path / "x", *args, "--show", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("⟦") == 1 + 2 + 1 and "⟦Größe 語<｜end▁of▁sentence｜>⟧" in done.stdout
    assert sorted(tmp_path.iterdir()) == [src]
    shown = json.loads(dsv4("data", src, *args, "--show", "9", "--json").stdout)["samples"]
    prepare_chat(src, tmp_path / "x", toy_flash, seq_length=64, thinking=False, pack=False)
    data = open_chat_data(tmp_path / "x")
    counts = [(len(pack.tokens), int(pack.loss_mask.sum())) for pack in (data[i] for i in range(3))]
    assert [(one["tokens"], one["learned"]) for one in shown] == counts
    again = dsv4("data", src, tmp_path / "x", *args, "--show", "9", "--json")  # OUT is there, and is not shown
    assert json.loads(again.stdout)["samples"] == shown
    text = tmp_path / "text.txt"
    text.write_text("abc")
    done = dsv4("data", text, "--tokenizer", toy_flash, "--show", "3")
    assert done.returncode == 0 and "a⟦bc<｜end▁of▁sentence｜>⟧" in done.stdout


@pytest.mark.parametrize("how", ["jsonl", "array"])
def test_conversations_longer_than_a_pack(how: str, toy_flash: Path, tmp_path: Path) -> None:
    """Cut, split, left out and listed, or refused, as is asked for; refused ones may be skipped as others are."""
    long = [TALK[0], {"role": "assistant", "content": "x" * 300}]
    rows, unit = [{"messages": talk} for talk in (TALK, long, TALK)], {"array": "element"}.get(how, "line")
    src = tmp_path / "talks.json"
    src.write_text(json.dumps(rows) if how == "array" else "".join(json.dumps(row) + "\n" for row in rows))
    args = ("--tokenizer", toy_flash, "--seq-length", "64", "--no-thinking")

    def made(name: str, *more: str) -> dict[str, Any]:
        done = dsv4("data", src, tmp_path / name, *args, *more, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    cut, split, skip = (made(way, "--too-long", way) for way in ("cut", "split", "skip"))
    assert made("default")["counts"] == cut["counts"] and same_files(tmp_path / "default", tmp_path / "cut") == []
    assert (cut["counts"]["truncated"], cut["counts"]["samples"]) == (1, 3)
    learned = cut["counts"]["learned"] + cut["counts"]["cut_learned"]
    assert (split["counts"]["split"], split["counts"]["learned"], split["counts"]["cut_learned"]) == (1, learned, 0)
    assert split["counts"]["samples"] > 6 and open_chat_data(tmp_path / "split").facts["too_long"] == "split"
    assert (skip["counts"]["too_long"], skip["counts"]["samples"], skip["skipped"]) == (1, 2, 1)
    (one,) = listed(tmp_path / "skip.skipped.jsonl")
    assert one[unit] == 2 and one["file"] == str(src) and "tokens, more than a sample's 64" in one["reason"]
    refused = dsv4("data", src, tmp_path / "refused", *args, "--too-long", "refuse")
    assert refused.returncode == 2 and not (tmp_path / "refused").exists()
    assert f"{src}, {unit} 2: {one['reason']}" in refused.stderr and "--too-long" in refused.stderr
    again = made("again", "--too-long", "refuse", "--on-error", "skip")
    assert again["counts"]["samples"] == 2 and listed(tmp_path / "again.skipped.jsonl")[0][unit] == 2
    text = dsv4("data", "--tokenizer", toy_flash, "--too-long", "cut", __file__, tmp_path / "text")
    assert text.returncode == 2 and "--too-long is not for documents" in text.stderr
