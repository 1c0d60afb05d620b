"""What a file was meant to be: rows of no known form, and data of the other kind, are told what to make of them."""

import json
from pathlib import Path

import pytest

from conftest import dsv4
from dsv4_bridge import BridgeError
from dsv4_bridge.data.chat.store import open_chat_data
from dsv4_bridge.data.index_files import check_indexed

CHAT = ("--seq-length", "64", "--thinking", "off")
KNOWN = "messages, conversations, instruction and output, prompt and completion"


def wrote(path: Path, row: object) -> Path:
    path.write_text(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize(
    "row", [{"question": "a", "answer": "b"}, {"conversation": [{"human": "a", "assistant": "b"}]}, {"dialog": ["a"]}]
)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_rows_of_no_known_form(row: object, suffix: str, toy_flash: Path, tmp_path: Path) -> None:
    """No advice leads to the next refusal, whose advice leads back."""
    source = wrote(tmp_path / f"rows{suffix}", row)
    for options in (CHAT, ("--mask", "full")):
        done = dsv4("data", source, tmp_path / "out", "--tokenizer", toy_flash, *options)
        assert done.returncode == 2 and "leave it out" not in done.stderr, done.stderr
        assert f"{options[0]} is for conversations, and the objects of {source} have" in done.stderr
        assert KNOWN in done.stderr
    done = dsv4("data", source, tmp_path / "out", "--tokenizer", toy_flash)
    assert done.returncode == 2 and "name the text's with --key" in done.stderr and KNOWN in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_an_option_of_conversations_with_a_text(toy_flash: Path, tmp_path: Path) -> None:
    source = wrote(tmp_path / "rows.jsonl", {"text": "words"})
    done = dsv4("data", source, tmp_path / "out", "--tokenizer", toy_flash, *CHAT)
    assert done.returncode == 2 and "leave it out" in done.stderr


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("options", [(), CHAT])
def test_preferences_are_named_as_such(suffix: str, options: tuple[str, ...], toy_flash: Path, tmp_path: Path) -> None:
    source = wrote(tmp_path / f"rows{suffix}", {"question": "a", "chosen": "b", "rejected": "c"})
    done = dsv4("data", source, tmp_path / "out", "--tokenizer", toy_flash, *options)
    assert done.returncode == 2 and "pairs of chosen and rejected answers" in done.stderr
    done = dsv4("data", source, tmp_path / "out", "--tokenizer", toy_flash, "--key", "chosen")
    assert done.returncode == 0, done.stderr


def test_a_bad_file_can_be_left_out(toy_flash: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/1.txt").write_bytes(b"good")
    (tmp_path / "texts/2.txt").write_bytes(b"\xff")
    done = dsv4("data", tmp_path / "texts", tmp_path / "out", "--tokenizer", toy_flash)
    assert done.returncode == 2 and "leave such out with --on-error skip" in done.stderr
    done = dsv4("data", tmp_path / "texts", tmp_path / "out", "--tokenizer", toy_flash, "--on-error", "skip")
    assert done.returncode == 0 and "of 4 characters" in done.stdout


def test_one_is_one(toy_flash: Path, tmp_path: Path) -> None:
    source = wrote(tmp_path / "rows.jsonl", {"text": "x"})
    assert "of 1 character " in dsv4("data", source, tmp_path / "out", "--tokenizer", toy_flash).stdout


def test_data_of_the_other_kind(toy_flash: Path, tmp_path: Path) -> None:
    text = wrote(tmp_path / "rows.jsonl", {"text": "some words"})
    talk = wrote(tmp_path / "talk.jsonl", {"prompt": "a", "completion": "b"})
    assert dsv4("data", text, tmp_path / "text", "--tokenizer", toy_flash).returncode == 0
    assert dsv4("data", talk, tmp_path / "chat", "--tokenizer", toy_flash, *CHAT).returncode == 0
    assert len(open_chat_data(str(tmp_path / "chat"))) == len(open_chat_data(tmp_path / "chat")) == 1
    for name in ("text", "text.bin", "text.idx"):
        with pytest.raises(BridgeError, match="that is data of text; conversations are a folder"):
            open_chat_data(tmp_path / name)
    with pytest.raises(BridgeError, match="a folder of conversations, and text is wanted"):
        check_indexed(str(tmp_path / "chat"), "opening")
