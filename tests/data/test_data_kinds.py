"""What a file of training data is, by its content: never JSON taken for a text, never a field ignored."""

import contextlib
import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from warm import Warm

pytest.importorskip("dsv4_bridge.mcore")

from conftest import dsv4, fresh_dsv4
from dsv4_bridge import BridgeError, make_toy
from dsv4_bridge.data.chat.jsonl import read_line
from dsv4_bridge.data.chat.prepare import prepare_chat
from dsv4_bridge.data.chat.store import open_chat_data
from dsv4_bridge.data.indexed import prepare_pretraining
from dsv4_bridge.data.kinds import elements, look
from dsv4_bridge.data.packed import opened
from dsv4_bridge.lock import hold
from dsv4_bridge.spec.spec import ModelSpec
from dsv4_bridge.store.hf import open_hf


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy(tmp_path_factory.mktemp("kinds") / "toy", "Flash", 5)


@pytest.fixture(scope="module")
def spec(toy: Path) -> ModelSpec:
    return open_hf(toy).spec


ROWS = [{"src": "x", "text": "The quick brown fox"}, {"text": "jumps over\nthe lazy dög"}, {"text": "  "}]
TALK = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    "enable_thinking": False,
}
SAME_TALK: dict[str, dict[str, Any]] = {
    "messages": TALK,
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "sharegpt-roles": {"conversations": TALK["messages"], "id": "7"},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "alpaca-plain": {"instruction": "Hi", "output": "Hello"},
    "prompt": {"prompt": "Hi", "completion": "Hello"},
    "prompt-lists": {"prompt": TALK["messages"][:1], "completion": TALK["messages"][1:]},  # type: ignore[index]
}


def write(path: Path, rows: list[Any], how: str) -> Path:
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    if how == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = path.with_name(path.name + ".parquet")
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        return path
    text = {
        "lines": lines,
        "array": json.dumps(rows),
        "pretty": json.dumps(rows, indent=2, ensure_ascii=False),
        "bom": "\ufeff" + json.dumps(rows),
        "gz-lines": lines,
        "gz-array": json.dumps(rows),
        "zst-lines": lines,
        "zst-array": json.dumps(rows),
    }[how]
    if how.startswith("zst"):
        import zstandard

        path = path.with_name(path.name + ".zst")
        frames = [zstandard.compress(part) for part in (text.encode()[:7], text.encode()[7:])]
        path.write_bytes(b"".join(frames))
    elif how.startswith("gz"):
        path = path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def documents(source: Path, toy: Path, spec: ModelSpec, out: Path) -> list[str]:
    from dsv4_bridge.text.tokenizer import open_tokenizer

    report = prepare_pretraining([source], out, toy, spec)
    tokens = np.fromfile(f"{out}.bin", np.dtype(report.dtype))
    ends = np.flatnonzero(tokens == spec.eos_token_id)
    tokenizer = open_tokenizer(toy, spec)
    assert tokenizer and len(ends) == report.documents
    parts = np.split(tokens, ends + 1)[:-1]
    return [tokenizer.decode(p.tolist()) for p in parts]


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c.txt", "c"])
@pytest.mark.parametrize(
    "how", ["lines", "array", "pretty", "bom", "gz-lines", "gz-array", "zst-lines", "zst-array", "parquet"]
)
def test_documents_are_found_whatever_the_file_is_called(
    how: str, name: str, toy: Path, spec: ModelSpec, tmp_path: Path
) -> None:
    if name == "c.jsonl" and how not in ("lines", "gz-lines", "zst-lines", "parquet"):
        return  # its name says lines
    source = write(tmp_path / name, ROWS, how)
    assert documents(source, toy, spec, tmp_path / "out") == [r["text"] for r in ROWS[:2]]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([source.name, "out.bin", "out.idx", "out.json"])


@pytest.mark.parametrize("kind", SAME_TALK)
@pytest.mark.parametrize("how", ["lines", "array", "pretty", "gz-array", "zst-lines", "parquet"])
def test_conversations_of_other_tools_are_the_same(how: str, kind: str, toy: Path, tmp_path: Path) -> None:
    made = []
    for number, (row, form) in enumerate(((TALK, "lines"), (SAME_TALK[kind], how))):
        source = write(tmp_path / f"chat{number}.json", [row, row], form)
        assert look(source).chat or form == "gz-array"
        prepare_chat(source, tmp_path / f"out{number}", toy, seq_length=64, thinking=False)
        made.append(open_chat_data(tmp_path / f"out{number}"))
    assert np.array_equal(made[0].tokens, made[1].tokens) and np.array_equal(made[0].mask, made[1].mask)


def test_the_command_tells_conversations_by_content(toy: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "sharegpt.json", [SAME_TALK["sharegpt"]], "array")
    done = dsv4("data", source, tmp_path / "out", "--tokenizer", toy, "--seq-length", "64")
    assert done.returncode == 2 and "--thinking on, off or auto" in done.stderr and "element 1" in done.stderr
    args = ("data", source, tmp_path / "out", "--tokenizer", toy, "--seq-length", "64", "--no-thinking", "--json")
    done = fresh_dsv4(*args)
    assert done.returncode == 0 and json.loads(done.stdout)["counts"]["samples"] == 1
    again = ["data", source, tmp_path / "out", "--tokenizer", toy, "--seq-length", "32", "--no-thinking"]
    assert "give --overwrite" in dsv4(*again).stderr
    assert dsv4(*again, "--overwrite").returncode == 0 and open_chat_data(tmp_path / "out").seq_length == 32


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "config": ("c.json", b'{"a": 1,\n "b": [1, 2]}', "holds objects with .*'a', 'b'.*no conversations.*--key.*txt"),
    "numbers": ("c.json", b"[1, 2, 3]", ""),
    "other rows": ("c.json", b'[{"body": "x"}]', r"objects with \['body'\]"),
    "preferences": (
        "c.json",
        b'[{"prompt": "x", "chosen": "y", "rejected": "z"}]',
        "nothing here trains on preferences",
    ),
    "parquet": ("c.parquet", b"PAR1 \x00\x01", "Parquet"),
    "zstd": ("c.jsonl.zst", b"\x28\xb5\x2f\xfd\x00", "zstd"),
    "arrow": ("c.arrow", b"ARROW1\x00\x00", "an Arrow file; write it as JSON"),
    "table": ("c.csv", b"text,id\nhello,1\n", "a table; write it as JSON"),
    "cut": ("c.json", b'[{"text": "x"}, {"text": "y"', r"c\.json, element 2: no valid JSON"),
    "cut gzip": ("c.json.gz", gzip.compress(b'[{"text": "x"}]' * 99)[:-20], "gz"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_text_is_refused_by_what_it_is(what: str, toy: Path, spec: ModelSpec, tmp_path: Path) -> None:
    name, content, message = REFUSED[what]
    source = tmp_path / name
    source.write_bytes(content)
    if not message:  # an array of numbers is nobody's data set: it stays a text
        assert documents(source, toy, spec, tmp_path / "out") == [content.decode()]
        return
    with pytest.raises(BridgeError, match=message):
        prepare_pretraining([source], tmp_path / "out", toy, spec)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_several_files_of_conversations_are_one_behind_the_other(toy: Path, tmp_path: Path) -> None:
    rows = [dict(TALK, messages=[*TALK["messages"], {"role": "user", "content": str(n)}]) for n in range(6)]  # type: ignore[misc]
    parts = [write(tmp_path / f"part{n}.json", rows[2 * n : 2 * n + 2], how) for n, how in enumerate(HOW)]
    whole = write(tmp_path / "whole.jsonl", rows, "lines")
    options = ("--tokenizer", toy, "--seq-length", "64", "--no-thinking", "--no-pack")
    for name, sources in (("parts", parts), ("one", [whole])):
        done = dsv4("data", *sources, tmp_path / name, *options, "--workers", "2" if name == "parts" else "1")
        assert done.returncode == 0, done.stderr
    one, other = (open_chat_data(tmp_path / name) for name in ("parts", "one"))
    assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.mask, other.mask)
    parts[1].write_bytes(b'{"messages": 3}\n')
    done = dsv4("data", *parts, tmp_path / "bad", *options)
    assert done.returncode == 2 and "part1.json" in done.stderr and not (tmp_path / "bad").exists()
    text = write(tmp_path / "text.json", ROWS, "lines")
    mixed = dsv4("data", parts[0], text, tmp_path / "bad", *options)
    assert mixed.returncode == 2 and "prepare them apart" in mixed.stderr


HOW = ("lines", "gz-lines", "parquet")


@pytest.mark.parametrize(("how", "library"), [("zst-lines", "zstandard"), ("parquet", "pyarrow")])
def test_a_library_that_is_not_there_is_named(
    how: str, library: str, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "c", ROWS, how)
    for name in [m for m in sys.modules if m.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BridgeError, match=rf"needs {library}.*dsv4-bridge\[data\]"):
        look(source)


@pytest.mark.parametrize("how", ["gz-lines", "zst-lines", "parquet"])
def test_a_packed_file_that_was_harmed_is_refused(how: str, toy: Path, spec: ModelSpec, tmp_path: Path) -> None:
    source = write(tmp_path / "c", [{"text": "word " * 50}] * 40, how)
    sound, rng = source.read_bytes(), random.Random(7)
    for number in range(25):
        harmed = bytearray(sound[: rng.randrange(5, len(sound))] if number % 2 else sound)
        for _ in range(1 + number % 3):
            harmed[rng.randrange(4, len(harmed))] ^= 1 << rng.randrange(8)
        source.write_bytes(harmed)
        with contextlib.suppress(BridgeError):  # what still reads has a checksum that does not cover it
            prepare_pretraining([source], tmp_path / f"out{number}", toy, spec)


def test_a_row_has_what_is_in_it(tmp_path: Path) -> None:
    """A table gives every row all columns and keys; those that a row lacks are null."""
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": "a", "when": datetime.date(2026, 1, 1), "n": None}, {"text": "b", "m": [{"x": 1}, {"y": None}]}]
    schema = pa.schema(
        [
            ("text", pa.string()),
            ("when", pa.date32()),
            ("n", pa.int64()),
            ("m", pa.list_(pa.struct([("x", pa.int64()), ("y", pa.int64())]))),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "t")
    with opened(tmp_path / "t") as file:
        found = [json.loads(line) for line in file]
    assert found == [{"text": "a", "when": None}, {"text": "b", "m": [{"x": 1}, {}]}]


def test_a_folder_of_code_keeps_its_json_as_text(toy: Path, spec: ModelSpec, tmp_path: Path) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "a.json").write_text('{"name": "x"}')
    (folder / "b.csv").write_text("a,b\n")
    (folder / "c.json").write_text('[{"text": "one"}, {"text": "two"}]')
    report = prepare_pretraining([folder], tmp_path / "out", toy, spec)
    assert report.documents == 4 and report.files == 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.text(max_size=4), st.one_of(st.text(max_size=9), st.floats(allow_nan=False), st.none()))
    ),
    st.sampled_from([None, 0, 3]),
    st.integers(1, 40),
)
def test_elements_are_those_of_json(rows: list[Any], indent: int | None, piece: int) -> None:
    import tempfile

    from dsv4_bridge.data import kinds

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "_PIECE", piece)
        path = Path(name) / "x.json"
        path.write_text(json.dumps(rows, indent=indent))
        assert list(elements(path)) == rows


MODES = [
    ({"thinking": True}, True),
    ({"thinking": {"type": "enabled"}}, True),
    ({"thinking": {"type": "enabled", "budget_tokens": 99}}, True),
    ({"thinking": {"type": "disabled"}}, False),
    ({"chat_template_kwargs": {"enable_thinking": True}}, True),
    ({"chat_template_kwargs": {"thinking": False}}, False),
    ({"chat_template_kwargs": {"thinking_mode": "chat"}}, False),
    ({"thinking": None}, None),
]


@pytest.mark.parametrize(("said", "mode"), MODES)
def test_the_mode_in_other_tools_words(said: dict[str, Any], mode: bool | None) -> None:
    row = {"messages": TALK["messages"]} | said
    assert read_line(json.dumps(row).encode(), "f", 1).thinking is mode


def test_an_effort_in_other_words() -> None:
    for said in ({"reasoning": {"effort": "high"}}, {"chat_template_kwargs": {"reasoning_effort": "high"}}):
        row = {"messages": TALK["messages"]} | said
        assert read_line(json.dumps(row).encode(), "f", 1).reasoning_effort == "high"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"thinking": {"type": "auto"}}, "thinking .*expected true, false, or type enabled or disabled"),
        ({"thinking": "yes"}, "enable_thinking 'yes', expected true or false"),
        ({"thinking": True, "enable_thinking": False}, "enable_thinking is said twice"),
        ({"thinking": True, "thinking_mode": "chat"}, "contradict each other"),
        ({"chat_template_kwargs": {"enable_thinkng": True}}, "chat_template_kwargs holds 'enable_thinkng'"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"functions": [{"name": "f"}]}, "functions.* say tools"),
        ({"weights": [0, 1]}, "say weight 0"),
        ({"images": ["a.png"]}, "only text"),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}]}, "system is given both"),
    ],
)
def test_what_would_be_ignored_is_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        read_line(json.dumps({"messages": TALK["messages"]} | said).encode(), "f", 1)


def test_a_messages_mask_is_refused_and_small_forms_are_read() -> None:
    def talk(*messages: dict[str, Any]) -> bytes:
        return json.dumps({"messages": [{"role": "user", "content": "q"}, *messages]}).encode()

    with pytest.raises(BridgeError, match="mask 0 has no meaning here; say weight 0"):
        read_line(talk({"role": "assistant", "content": "a", "mask": 0}), "f", 1)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    found = read_line(
        talk(
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": {"t": 20}},
            {"role": "assistant", "content": "a", "weight": 0.0},
        ),
        "f",
        1,
    ).messages
    assert found[1].tool_calls[0].values == {} and found[2].content == '{"t": 20}' and not found[3].trained
    with pytest.raises(BridgeError, match=r"got 0\.5, expected 0 or 1"):
        read_line(talk({"role": "assistant", "content": "a", "weight": 0.5}), "f", 1)


def test_thoughts_that_are_left_out_or_lacking_are_counted(toy: Path, tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "a", "reasoning_content": "because"}
    plain = {"role": "assistant", "content": "a"}
    rows = [{"messages": [{"role": "user", "content": "q"}, m]} for m in (thought, thought, plain)]
    source = write(tmp_path / "c.jsonl", rows, "lines")
    counts = [
        prepare_chat(source, tmp_path / f"o{mode}", toy, seq_length=99, thinking=mode).counts for mode in (False, True)
    ]
    assert [(c.lost_thoughts, c.empty_thoughts) for c in counts] == [(2, 0), (0, 1)]


@pytest.mark.parametrize("how", ["truncation", "padding"])
def test_a_tokenizer_saved_for_batches_cuts_and_pads_nothing(
    how: str, toy: Path, spec: ModelSpec, tmp_path: Path
) -> None:
    from dsv4_bridge.text.tokenizer import open_tokenizer

    changes = {
        "truncation": {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    }
    folder = tmp_path / "tok"
    folder.mkdir()
    body = json.loads((toy / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(body | {how: changes[how]}))
    source = write(tmp_path / "c.jsonl", [{"text": "abc " * 300}, {"text": "x"}], "lines")
    for where in (folder, toy):
        prepare_pretraining([source], tmp_path / where.name, where, spec)
    assert (tmp_path / "tok.bin").read_bytes() == (tmp_path / "toy.bin").read_bytes()
    ours, theirs = open_tokenizer(folder, spec), open_tokenizer(toy, spec)
    assert ours and theirs and ours.encode("abc " * 300) == theirs.encode("abc " * 300)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_two_at_once_make_one_whole(kind: str, toy: Path, tmp_path: Path) -> None:
    rows = [TALK if kind == "chat" else {"text": f"word{i} " * 50} for i in range(400)]
    source = write(tmp_path / "c.jsonl", rows, "lines")
    command = ["-m", "dsv4_bridge", "data", source, tmp_path / "out", "--tokenizer", toy]
    command += ["--seq-length", "64"] if kind == "chat" else []
    (tmp_path / "said").mkdir()
    runs = [Warm(*command, out=tmp_path / "said" / str(n)) for n in range(3)]
    codes = [run.wait(timeout=120) for run in runs]
    said = [run.out.read_text() for run in runs]
    assert sorted(codes) == [0, 2, 2], said
    refused = [s for s, code in zip(said, codes, strict=True) if code]
    assert all("another run is writing" in s or "in the way" in s or "not an empty folder" in s for s in refused), (
        refused
    )
    assert not [p for p in tmp_path.iterdir() if "part" in p.name or "lock" in p.name]


def test_a_held_output_is_refused(toy: Path, spec: ModelSpec, tmp_path: Path) -> None:
    source = write(tmp_path / "c.jsonl", ROWS, "lines")
    with hold(tmp_path / "out", "x"), pytest.raises(BridgeError, match="another run is writing"):
        prepare_pretraining([source], tmp_path / "out", toy, spec)
