"""`dsv4 data` on text: the documents' own tokens in order, the same bytes for any number of workers, refusals."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dsv4_bridge import BridgeError
from dsv4_bridge.cli.app import app
from dsv4_bridge.data import sources as text_sources
from dsv4_bridge.data.indexed import prepare_pretraining
from dsv4_bridge.data.sources import find_sources, texts, units
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.store.named import spec_of
from dsv4_bridge.text.tokenizer import open_tokenizer

pytestmark = pytest.mark.megatron

EOS, BOS = 1, 0
LETTERS = "abc xyz\n\té€\U0001f600中<｜end▁of▁sentence｜>"


def make_text(source: random.Random, most: int = 60) -> str:
    return "x" + "".join(source.choices([*LETTERS, "<｜end▁of▁sentence｜>"], k=source.randint(0, most)))


def write_lines(path: Path, documents: Iterable[str], key: str = "text") -> Path:
    lines = (json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder of two text files around a JSONL, in the order of their names; and their documents."""
    folder, source = tmp_path_factory.mktemp("corpus"), random.Random(5)
    documents = [make_text(source) for _ in range(300)]
    (folder / "a").mkdir()
    (folder / "a" / "first.txt").write_bytes(b"\xef\xbb\xbf" + documents[0].encode())
    write_lines(folder / "b.jsonl", documents[1:-1])
    (folder / "c.md").write_text(documents[-1])
    (folder / ".hidden").write_text("not this")
    return folder, documents


def run(*args: str | Path) -> Any:
    return CliRunner().invoke(app, ["data", *map(str, args)])


def read(prefix: Path) -> Iterator[list[int]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    held = IndexedDataset(str(prefix))
    assert held.document_indices.tolist() == list(range(len(held) + 1))
    for i in range(len(held)):
        yield held[i].tolist()


def test_documents_are_their_own_tokens_in_order(
    corpus: tuple[Path, list[str]], toy_flash: Path, tmp_path: Path
) -> None:
    folder, documents = corpus
    done = run(folder, tmp_path / "out", "--tokenizer", toy_flash, "--json")
    report = {k: v for k, v in json.loads(done.stdout).items() if k not in ("schema", "verb", "version")}
    found = list(read(tmp_path / "out"))
    tokenizer = open_tokenizer(toy_flash, spec_of(toy_flash))
    assert tokenizer is not None
    assert [tokenizer.library.decode(ids[:-1], skip_special_tokens=False) for ids in found] == documents
    # An end that is written out in a text is text.
    assert all(ids[-1] == EOS and EOS not in ids[:-1] for ids in found)
    assert any("<｜end▁of▁sentence｜>" in text for text in documents)
    assert (report["documents"], report["empty"], report["files"]) == (len(documents), 0, 3)
    assert report["tokens"] == sum(map(len, found)) == sum(len(d.encode()) + 1 for d in documents)
    assert report["characters"] == sum(map(len, documents))
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts == {"format": "dsv4 pretraining data 1"} | {k: v for k, v in report.items() if k != "out"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.bin", "out.idx", "out.json"]


def test_any_number_of_workers_writes_the_same_bytes(
    corpus: tuple[Path, list[str]], toy_flash: Path, tmp_path: Path
) -> None:
    folder, _ = corpus
    for workers in (1, 3):
        assert run(folder, tmp_path / str(workers), "--tokenizer", toy_flash, "--workers", str(workers)).exit_code == 0
    for ending in ("bin", "idx", "json"):
        one, three = (tmp_path / f"{n}.{ending}" for n in (1, 3))
        assert one.stat().st_size > 100
        assert one.read_bytes() == three.read_bytes()


def test_units_hold_every_document_once(corpus: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, documents = corpus
    for size in (1, 7, 64, 1000, 1 << 20):
        monkeypatch.setattr(text_sources, "_UNIT", size)
        sources = find_sources([folder], folder)
        parts = list(units(sources))
        assert [text for part in parts for _, _, text in texts(part, "text")] == documents
        assert sum(part.nbytes for part in parts) == sum(s.nbytes for s in sources)
        assert size > 2000 or len(parts) > 10


def test_bos_in_front_if_asked(toy_flash: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.ndjson", ["one", "two"], "body")
    assert run(source, tmp_path / "out", "--tokenizer", toy_flash, "--bos", "--key", "body").exit_code == 0
    assert [(ids[0], ids[-1], len(ids)) for ids in read(tmp_path / "out")] == [(BOS, EOS, 5)] * 2


def test_a_megatron_checkpoint_s_tokenizer(toy_megatron: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["one"])
    assert run(source, tmp_path / "out", "--tokenizer", toy_megatron).exit_code == 0
    assert [len(ids) for ids in read(tmp_path / "out")] == [4]


@pytest.mark.parametrize(("vocab_size", "name"), [(512, "uint16"), (65499, "uint16"), (65500, "int32")])
def test_token_type_is_megatron_s_for_the_vocabulary(
    vocab_size: int, name: str, toy_flash: Path, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["one", "zwei €"])
    spec = replace_spec(spec_of(toy_flash), vocab_size=vocab_size)
    report = prepare_pretraining([source], tmp_path / "out", toy_flash, spec)
    assert report.dtype == name
    assert (tmp_path / "out.bin").stat().st_size == report.tokens * np.dtype(name).itemsize
    assert [len(ids) for ids in read(tmp_path / "out")] == [4, 9]


def test_empty_documents_are_left_out_and_counted(toy_flash: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["one", "", " \n\t", "two", ""])
    source.write_text(source.read_text() + "\n\n")
    done = run(source, tmp_path / "out", "--tokenizer", toy_flash)
    assert "2 documents of 1 file, 3 empty ones left out" in done.stdout
    assert len(list(read(tmp_path / "out"))) == 2


BAD = {
    "not JSON": (b'{"text": "a"', "line 4: no valid JSON"),
    "no object": (b'["text"]', "line 4: expected a JSON object, got ['text']"),
    "no key": (b'{"txt": "a"}', "line 4: no 'text', only ['txt']; name the text's with --key"),
    "no text": (b'{"text": 5}', "line 4: 'text' is 5, expected text"),
    "no UTF-8": (b'{"text": "\xff"}', "is not UTF-8"),
    "half a character": (b'{"text": "\\ud800"}', "line 4: 'text' holds half of a surrogate pair"),
    "nested": (b"[" * 100_000, "line 4: no usable JSON"),
}


@pytest.mark.parametrize("unit", [1 << 20, 9])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_and_nothing_is_left(
    name: str, unit: int, toy_flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sources, "_UNIT", unit)
    refuse_bad_line(name, toy_flash, tmp_path)


def test_a_worker_s_bad_line_is_named_too(toy_flash: Path, tmp_path: Path) -> None:
    refuse_bad_line("no key", toy_flash, tmp_path, "--workers", "2")


def refuse_bad_line(name: str, toy_flash: Path, folder: Path, *options: str) -> None:
    line, message = BAD[name]
    source = folder / "a.jsonl"
    source.write_bytes(b'{"text": "a"}\n\n{"text": "b"}\n' + line + b'\n{"text": "c"}\n')
    done = run(source, folder / "new" / "out", "--tokenizer", toy_flash, *options)
    assert isinstance(done.exception, BridgeError)
    assert f"{source}, line 4: " in str(done.exception)
    assert message in str(done.exception)
    assert list((folder / "new").iterdir()) == []


def test_a_failure_leaves_what_was_there(toy_flash: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = write_lines(tmp_path / "a.jsonl", ["one"]), tmp_path / "b.jsonl"
    bad.write_text("{}\n")
    assert run(good, tmp_path / "out", "--tokenizer", toy_flash).exit_code == 0
    before = {p: p.read_bytes() for p in tmp_path.glob("out.*")}
    refused = run(good, tmp_path / "out", "--tokenizer", toy_flash)
    assert "out.bin is in the way" in str(refused.exception)
    assert run(bad, tmp_path / "out", "--tokenizer", toy_flash, "--overwrite").exit_code == 1
    assert {p: p.read_bytes() for p in tmp_path.glob("out.*")} == before
    refused = run(good, good / "out", "--tokenizer", toy_flash)  # a folder that is a file
    assert isinstance(refused.exception, BridgeError) and "preparing" in str(refused.exception)
    # Killed between two renames, there is no dataset, rather than one of two halves.
    other = write_lines(tmp_path / "c.jsonl", ["three", "four"])
    replaced = []

    def die(self: Path, target: Path) -> Path:
        if replaced:
            raise OSError(5, "gone")
        replaced.append(target)
        return self.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        assert "gone" in str(run(other, tmp_path / "out", "--tokenizer", toy_flash, "--overwrite").exception)
    assert not (tmp_path / "out.idx").exists()
    assert run(other, tmp_path / "out", "--tokenizer", toy_flash, "--overwrite").exit_code == 0
    assert [len(ids) for ids in read(tmp_path / "out")] == [6, 5]


def test_unusable_arguments_are_refused(toy_flash: Path, tmp_path: Path) -> None:
    text = tmp_path / "in" / "a.txt"
    text.parent.mkdir()
    text.write_text("one")
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((text,), "only"),
        ((tmp_path / "none", "out"), "no such file or folder"),
        ((text.parent, "out", "--suffix", ".py"), "1 file, none with .py"),
        ((text, text.parent, "out"), "is named twice"),
        ((text, tmp_path / "out.bin"), "OUT is a prefix"),
        ((text.parent, text.parent / "out"), "would be read as text"),
        ((text, "out", "--seq-length", "9"), "--seq-length is not for documents"),
        ((chat, "out"), "give --seq-length"),
        ((chat, "out", "--seq-length", "9", "--bos"), "--bos is not for conversations"),
        ((chat, text, "out", "--seq-length", "9"), "prepare them apart"),
    ]
    for args, message in cases:
        done = run(*args, "--tokenizer", toy_flash)
        assert isinstance(done.exception, BridgeError), args
        assert message in str(done.exception), args
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((toy_flash / "config.json").read_bytes())
    assert "has no tokenizer.json" in str(run(text, tmp_path / "o", "--tokenizer", tmp_path / "bare").exception)
    nothing = write_lines(tmp_path / "e.jsonl", ["", " "])
    assert "2 documents, and all are empty" in str(run(nothing, tmp_path / "o", "--tokenizer", toy_flash).exception)


def test_a_tokenizer_of_another_model_is_refused(toy_flash: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["a", "é€"])
    spec = replace_spec(spec_of(toy_flash), vocab_size=200)
    with pytest.raises(BridgeError, match=r"a\.jsonl, line 2: the tokenizer gives token \d+, the model has 200"):
        prepare_pretraining([source], tmp_path / "out", toy_flash, spec)


def test_chat_goes_to_the_chat_encoding(toy_flash: Path, tmp_path: Path) -> None:
    from dsv4_bridge.data.chat.store import open_chat_data

    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    chat.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns}) + "\n")
    args = ("--tokenizer", toy_flash, "--seq-length", "64", "--no-thinking", "--json")
    report = json.loads(run(chat, tmp_path / "out", *args, "--mask", "last_turn", "--no-pack").stdout)
    assert (report["packs"], report["mask"], report["seq_length"]) == (2, "last_turn", 64)
    assert len(open_chat_data(tmp_path / "out")) == 2
    assert json.loads(run(chat, tmp_path / "packed", *args).stdout)["packs"] == 1
