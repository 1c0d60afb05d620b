"""Chat data: JSONL, packing, the prepared folder, and all of it in one go."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chat_tools import conversation, write_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import same_files
from dsv4_bridge import BridgeError
from dsv4_bridge.data.chat.jsonl import read_chat_jsonl
from dsv4_bridge.data.chat.masks import open_chat_tokenizer
from dsv4_bridge.data.chat.packing import pack, plan_packs
from dsv4_bridge.data.chat.prepare import find_generation, prepare_chat
from dsv4_bridge.data.chat.samples import Sample, build_samples
from dsv4_bridge.data.chat.store import one_a_pack, open_chat_data, write_chat_data

pytestmark = pytest.mark.hf

TALK = '"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]'


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(21)
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    lines = [json.dumps(conversation(rng, 25), ensure_ascii=False) for _ in range(60)]
    path.write_text("\n".join([*lines[:30], "", *lines[30:]]))  # an empty line counts, and is left out
    return path


# ---------------------------------------------------------------- lines


def test_lines_say_their_mode_and_tools(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    tools = '"tools": [{"type": "function", "function": {"name": "f"}}]'
    path.write_text(
        f'\ufeff{{{TALK}, "thinking_mode": "chat", "id": 7}}\n\n{{{TALK}, "enable_thinking": true, {tools}}}\n'
        f'{{{TALK}, "thinking_mode": "thinking", "enable_thinking": true, "reasoning_effort": "max"}}\n{{{TALK}}}\n'
    )
    found = list(read_chat_jsonl(path))
    assert [c.line for c in found] == [1, 3, 4, 5]
    assert [c.thinking for c in found] == [False, True, True, None]
    assert [c.reasoning_effort for c in found] == [None, None, "max", None]
    assert [m.role for m in found[1].messages] == ["system", "user", "assistant"]
    assert found[1].messages[0].tools == ('{"name": "f"}',) and found[0].messages == found[3].messages


def test_a_line_s_own_mode_goes_first(tmp_path: Path, bpe: Path) -> None:
    path, tokenizer = tmp_path / "a.jsonl", open_chat_tokenizer(bpe)
    path.write_text(f'{{{TALK}, "enable_thinking": false}}\n{{{TALK}, "enable_thinking": true}}\n{{{TALK}}}\n')
    for default in (True, False):
        found = build_samples(read_chat_jsonl(path), tokenizer, seq_length=99, thinking=default)
        texts = [tokenizer.library.decode(sample.tokens, skip_special_tokens=False) for sample in found]
        assert ["<think>" in text for text in texts] == [False, True, default]


BAD_LINES = {
    "not valid JSON": "{1}",
    "expected a JSON object, got list": "[]",
    "no messages, only \\['text'\\]": '{"text": "hello"}',
    "the name 'messages' is given twice": f"{{{TALK}, {TALK}}}",
    "messages\\[0\\]: role 'me', expected one of system": '{"messages": [{"role": "me", "content": ""}]}',
    "unknown field 'enable_thinkng'; did you mean enable_thinking": f'{{{TALK}, "enable_thinkng": true}}',
    "thinking_mode 'yes', expected thinking or chat": f'{{{TALK}, "thinking_mode": "yes"}}',
    "enable_thinking 1, expected true or false": f'{{{TALK}, "enable_thinking": 1}}',
    "thinking_mode 'chat' and enable_thinking True contradict": (
        f'{{{TALK}, "thinking_mode": "chat", "enable_thinking": true}}'
    ),
    "tools: got 'f', expected a list": f'{{{TALK}, "tools": "f"}}',
    "reasoning_effort: got 3, expected text": f'{{{TALK}, "reasoning_effort": 3}}',
    "say --thinking on, off or auto": f"{{{TALK}}}",
    "reasoning effort 'huge', expected one of high, max in generation april": (
        f'{{{TALK}, "enable_thinking": true, "reasoning_effort": "huge"}}'
    ),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_left(what: str, workers: int, tmp_path: Path, bpe: Path) -> None:
    if workers == 2 and not what.startswith("no messages"):
        workers = 1  # one is enough to see that a worker's message arrives
    path = tmp_path / "bad.jsonl"
    good = f'{{{TALK}, "enable_thinking": false}}\n'
    path.write_text(good * 6 + "\n" + BAD_LINES[what] + "\n" + good)
    with pytest.raises(BridgeError, match=what) as caught:
        prepare_chat(path, tmp_path / "out", bpe, seq_length=64, generation="april", workers=workers)
    assert str(caught.value).startswith(f"reading {path}, line 8: ")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_other_bad_arguments(tmp_path: Path, bpe: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{{TALK}, "enable_thinking": false}}\n')
    out = tmp_path / "out"
    for change, what in {
        "seq_length": (1, "seq_length 1, expected at least 2"),
        "mask": ("all", "mask 'all', expected one of assistant, last_turn, full, each_turn"),
        "generation": ("may", "generation 'may', expected one of april, 0731"),
    }.items():
        arguments = {"seq_length": 64, change: what[0]}
        with pytest.raises(BridgeError, match=what[1]):
            prepare_chat(path, out, bpe, **arguments)
    with pytest.raises(BridgeError, match="none of 1 conversations has a learned token within the length"):
        prepare_chat(path, out, bpe, seq_length=3)
    with pytest.raises(BridgeError, match="No such file"):
        prepare_chat(tmp_path / "no.jsonl", out, bpe, seq_length=64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]
    out.mkdir()
    prepare_chat(path, out, bpe, seq_length=64)  # an empty folder is no obstacle
    with pytest.raises(BridgeError, match="it exists and is not an empty folder"):
        prepare_chat(path, out, bpe, seq_length=64)


def test_the_generation_is_found_beside_the_tokenizer(tmp_path: Path, bpe: Path) -> None:
    assert find_generation(bpe) is None
    (bpe / "encoding").mkdir()
    for text, generation in (
        ("Reasoning Effort: Absolute maximum with no shortcuts permitted.", "april"),
        ("Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.", "0731"),
    ):
        with (bpe / "encoding/encoding_dsv4.py").open("a") as file:
            file.write(f'X = "{text}"\n')
        assert find_generation(bpe) == generation
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{{TALK}, "enable_thinking": true, "reasoning_effort": "low"}}\n')
    prepare_chat(path, tmp_path / "out", bpe, seq_length=64)  # April has no low
    assert open_chat_data(tmp_path / "out").facts["generation"] == "0731"
    (bpe / "encoding/encoding_dsv4.py").unlink()
    (bpe / "encoding").rmdir()
    with pytest.raises(BridgeError, match=r"line 1: .*say which: april, 0731"):
        prepare_chat(path, tmp_path / "out2", bpe, seq_length=64)


# ---------------------------------------------------------------- packing


def first_fit_decreasing(lengths: list[int], seq_length: int) -> list[list[int]]:
    """The rule word for word."""
    packs: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for members in packs:
            if sum(lengths[k] for k in members) + lengths[i] <= seq_length:
                members.append(i)
                break
        else:
            packs.append([i])
    return packs


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(30, 70))
def test_packing_is_first_fit_decreasing_and_loses_nothing(lengths: list[int], seq_length: int) -> None:
    packing = plan_packs(lengths, seq_length)
    assert packing == plan_packs(lengths, seq_length)
    assert sorted(map(sorted, first_fit_decreasing(lengths, seq_length))) == list(map(list, packing.packs))
    assert sorted(i for members in packing.packs for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= seq_length for members in packing.packs)
    assert packing.fill_rate == (sum(lengths) / (len(packing.packs) * seq_length) if lengths else 1.0)


samples = st.lists(st.integers(1, 20), min_size=1, max_size=30).map(
    lambda lengths: [
        Sample(
            np.random.default_rng([7, i, n]).integers(5, 1 << 20, n, np.int32),
            np.random.default_rng([8, i, n]).random(n) < 0.5,
            i + 1,
        )
        for i, n in enumerate(lengths)
    ]
)


@settings(max_examples=60, deadline=None)
@given(samples)
def test_packs_hold_every_sample_once_with_its_boundaries(made: list[Sample]) -> None:
    found = Counter()
    for one in pack(made, 32):
        assert one.cu_seqlens[0] == 0 and one.cu_seqlens[-1] == len(one.tokens) <= 32
        assert (one.tokens.dtype, one.loss_mask.dtype, one.cu_seqlens.dtype) == (np.int32, np.bool_, np.int32)
        for a, b in zip(one.cu_seqlens[:-1], one.cu_seqlens[1:], strict=True):
            found[(one.tokens[a:b].tobytes(), one.loss_mask[a:b].tobytes())] += 1
    assert found == Counter((s.tokens.tobytes(), s.loss_mask.tobytes()) for s in made)


def test_too_long_or_empty_documents_are_refused() -> None:
    for lengths in ([3, 9], [3, 0]):
        with pytest.raises(BridgeError, match=f"document 1 has {lengths[1]} tokens, a pack holds 8"):
            plan_packs(lengths, 8)


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mask", ["assistant", "each_turn"])
def test_prepared_data_is_the_samples(mask: str, packed: bool, chat: Path, bpe: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    seen = []
    report = prepare_chat(chat, out, bpe, seq_length=400, mask=mask, pack=packed, advance=seen.append)
    tokenizer = open_chat_tokenizer(bpe)
    made = list(build_samples(read_chat_jsonl(chat), tokenizer, seq_length=400, mask=mask))
    data = open_chat_data(out, tokenizer.sha256)
    assert isinstance(data.tokens, np.memmap) and isinstance(data.mask, np.memmap)
    assert len(data) == report.packs == data.facts["packs"] and report.counts.samples == len(made) > 40
    assert (data.seq_length, data.facts["mask"], data.facts["fill_rate"]) == (400, mask, report.fill_rate)
    planned = plan_packs if packed else one_a_pack
    packing = planned([len(s.tokens) for s in made], 400)
    assert sum(seen) == chat.stat().st_size
    assert report.counts.truncated > 0 and (packed or report.packs == len(made))
    assert data.lines.tolist() == [made[i].line for members in packing.packs for i in members]
    for i, members in enumerate(packing.packs):
        one = data[i]
        assert one.tokens.tolist() == [t for k in members for t in made[k].tokens.tolist()]
        assert one.loss_mask.tolist() == [t for k in members for t in made[k].loss_mask.tolist()]
        assert np.diff(one.cu_seqlens).tolist() == [len(made[k].tokens) for k in members]
        assert not one.loss_mask[one.cu_seqlens[:-1]].any()
    assert data[-1].tokens.tolist() == data[len(data) - 1].tokens.tolist()
    with pytest.raises(IndexError):
        data[len(data)]
    assert json.loads(json.dumps(report.to_json()))["counts"]["learned"] == int(data.mask.sum())
    assert f"{len(made):,} samples" in report.lines()[0]


def test_any_number_of_workers_writes_the_same_bytes(chat: Path, bpe: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dsv4_bridge.data.chat.prepare._CHUNK", 2000)  # several chunks
    for workers in (1, 2):
        prepare_chat(chat, tmp_path / str(workers), bpe, seq_length=200, workers=workers)
    assert same_files(tmp_path / "1", tmp_path / "2") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def small_data(folder: Path) -> Path:
    made = [Sample(np.arange(5 + i, dtype=np.int32), np.arange(5 + i) > 2, i + 1) for i in range(6)]
    write_chat_data(folder, made, plan_packs([len(s.tokens) for s in made], 16), {"tokenizer_sha256": "abc"})
    return folder


def test_damaged_or_other_data_is_refused(tmp_path: Path) -> None:
    def damage(name: str, content: bytes | None) -> Path:
        folder = small_data(tmp_path / str(len(list(tmp_path.iterdir()))))
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        return folder

    facts = json.loads((small_data(tmp_path / "whole") / "chat_data.json").read_text())
    with pytest.raises(BridgeError, match="tokens are of another tokenizer"):
        open_chat_data(tmp_path / "whole", "def")
    assert len(open_chat_data(tmp_path / "whole", "abc")) == facts["packs"] == 3
    for change, what in (
        ({"format": "2"}, "format '2', expected"),
        ({"packs": "3"}, "packs is '3', expected a number"),
        ({"documents": 5}, r"offsets.npy: shape \(7,\), expected \(6,\)"),
        ({"seq_length": 11}, "a pack of 1[0-9] tokens, more than seq_length 11"),
    ):
        with pytest.raises(BridgeError, match=what):
            open_chat_data(damage("chat_data.json", json.dumps(facts | change).encode()))
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in ("tokens.npy", "offsets.npy", "mask.npy")}
    for name, content, what in (
        ("chat_data.json", None, "chat_data.json: No such file"),
        ("lines.npy", None, "lines.npy: .*No such file"),
        ("tokens.npy", whole["tokens.npy"][:-4], "tokens.npy: .*prepare the data again"),
        ("mask.npy", whole["tokens.npy"], "mask.npy: int32 with 1 dimensions, expected one of uint8"),
        ("offsets.npy", whole["offsets.npy"][:-8] + bytes(8), "offsets.npy: not rising from 0 to 45"),
    ):
        with pytest.raises(BridgeError, match=what):
            open_chat_data(damage(name, content))


def test_a_packing_must_hold_every_sample(tmp_path: Path) -> None:
    made = [Sample(np.arange(4, dtype=np.int32), np.ones(4, bool), 1)] * 2
    with pytest.raises(BridgeError, match="do not hold each of 2 samples once"):
        write_chat_data(tmp_path / "out", made, plan_packs([4], 8))
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_nothing_that_looks_whole_and_does_not_stop_the_next(
    chat: Path, bpe: Path, tmp_path: Path
) -> None:
    out, big = tmp_path / "out", tmp_path / "big.jsonl"
    big.write_bytes((chat.read_bytes() + b"\n") * 200)
    code = (
        "from pathlib import Path; from dsv4_bridge.data.chat.prepare import prepare_chat;"
        f"prepare_chat(Path({str(big)!r}), Path({str(out)!r}), Path({str(bpe)!r}), seq_length=90)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.samples.part").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists() and (tmp_path / "out.samples.part").exists()
    with pytest.raises(BridgeError):
        open_chat_data(out)
    prepare_chat(chat, out, bpe, seq_length=90)
    assert len(open_chat_data(out)) > 5 and sorted(p.name for p in tmp_path.iterdir()) == ["big.jsonl", "out"]
