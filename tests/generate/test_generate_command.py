"""`dsv4 generate`: what it prints, and its exit codes."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from conftest import fresh_dsv4
from dsv4_bridge import BridgeError
from dsv4_bridge.cli import main
from dsv4_bridge.generate.generate import Ask, generate
from dsv4_bridge.generate.stream import InOrder
from dsv4_bridge.mcore import build_model, load_weights
from dsv4_bridge.mcore.generate import complete
from dsv4_bridge.store.hf import open_hf
from dsv4_bridge.text.tokenizer import open_tokenizer

pytestmark = [pytest.mark.megatron, pytest.mark.hf]


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


Command = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process, which has megatron-core loaded already."""

    def command(*args: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["dsv4", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return Done(int(stopped.value.code or 0), *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def expected(toy_flash: Path) -> tuple[list[int], str]:
    """Greedy tokens of 'Hello' by the library's functions, and their text."""
    checkpoint = open_hf(toy_flash)
    checkpoint.close()
    spec = checkpoint.spec
    model = build_model(spec.without_draft(), initialize_weights=False)
    load_weights(model, toy_flash)
    tokenizer = open_tokenizer(toy_flash, spec)
    assert tokenizer is not None and spec.mtp_layers == 1
    (new,) = complete(model, [tokenizer.encode("Hello")], 24, stop_ids={spec.eos_token_id})
    return new, tokenizer.decode(new)


def test_text_of_both_formats(
    run: Command, toy_flash: Path, toy_megatron: Path, expected: tuple[list[int], str]
) -> None:
    assert len(expected[1].strip()) > 4
    for checkpoint in (toy_flash, toy_megatron, toy_megatron / "iter_0000000"):
        done = run("generate", checkpoint, "--prompt", "Hello", "--max-new-tokens", "24")
        assert done == (0, expected[1] + "\n", "")


def test_json_is_one_object_and_nothing_else(toy_megatron: Path, expected: tuple[list[int], str]) -> None:
    """In a process of its own, imports and all."""
    done = fresh_dsv4(
        "generate", toy_megatron, "--prompt", "Hello", "--prompt-ids", "5,6,7", "--json", "--max-new-tokens=24"
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("\n") == 1
    report = json.loads(done.stdout)
    keys = {"checkpoint", "dtype", "continuations", "new_tokens", "seconds", "tokens_per_second", "right", "streamed"}
    assert set(report) == keys | {"schema", "verb", "version"}
    text, ids = report["continuations"]
    assert text == {
        "prompt": "Hello",
        "prompt_ids": [0, 74, 103, 110, 110, 113],
        "ids": expected[0],
        "text": expected[1],
        "ended": "length",
        "answer": None,
        "right": None,
    }
    assert ids["prompt"] is None and ids["prompt_ids"] == [5, 6, 7] and len(ids["ids"]) > 1
    assert report["new_tokens"] == len(text["ids"]) + len(ids["ids"]) and report["tokens_per_second"] > 0


def test_the_answer_sets_the_exit_code(run: Command, toy_flash: Path, expected: tuple[list[int], str]) -> None:
    asked = ("generate", toy_flash, "--prompt", "Hello", "--max-new-tokens", "24", "--answer")
    beginning = expected[1].strip()[:4]
    assert run(*asked, f" {beginning}\n").code == 0
    wrong = run(*asked, beginning + "\u2603")
    assert wrong.code == 1 and wrong.out == expected[1] + "\n" and "does not begin with" in wrong.err
    both = run(*asked, beginning, "--answer", "\u2603", "--prompt", "Bye", "--json")
    assert both.code == 1
    assert [c["right"] for c in both.json["continuations"]] == [True, False] and both.json["right"] is False


def test_several_prompts_are_written_one_below_the_other(run: Command, toy_flash: Path) -> None:
    asked = ("generate", toy_flash, "--prompt", "Hello", "--prompt", "B", "--max-new-tokens", "16")
    texts = [c["text"] for c in run(*asked, "--json").json["continuations"]]
    assert run(*asked).out == f"[0] {texts[0]}\n[1] {texts[1]}\n"
    assert len(set(texts)) == 2


def test_a_stop_text_is_left_out(run: Command, toy_flash: Path, expected: tuple[list[int], str]) -> None:
    stop = expected[1][3:5]
    cut = expected[1][: expected[1].index(stop)]
    done = run("generate", toy_flash, "--prompt", "Hello", "--max-new-tokens", "24", "--stop", stop, "--json")
    (found,) = done.json["continuations"]
    assert (found["text"], found["ended"]) == (cut, "stop")
    assert found["ids"] == expected[0][: len(found["ids"])] and len(found["ids"]) < 24
    assert run("generate", toy_flash, "--prompt", "Hello", "--max-new-tokens", "24", "--stop", stop).out == cut + "\n"


def test_an_end_token_of_generation_config_ends_it(
    run: Command, toy_flash: Path, tmp_path: Path, expected: tuple[list[int], str]
) -> None:
    copy = shutil.copytree(toy_flash, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, expected[0][6]]}))
    (found,) = run("generate", copy, "--prompt", "Hello", "--json").json["continuations"]
    assert found["ended"] == "stop" and found["ids"] == expected[0][: expected[0].index(expected[0][6]) + 1]


def test_chat_and_sampling(run: Command, toy_flash: Path) -> None:
    chat = run("generate", toy_flash, "--prompt", "Hi", "--chat", "--max-new-tokens", "2", "--json").json
    assert chat["continuations"][0]["prompt_ids"] == [0, 258, 74, 107, 259, 261]
    asked = ("generate", toy_flash, "--prompt", "Hi", "--max-new-tokens", "8", "--json", "--temperature", "1.2")
    drawn = [run(*asked, "--top-p", "0.9", "--top-k", "99", "--seed", s).json["continuations"] for s in "334"]
    assert drawn[0] == drawn[1] != drawn[2]


def test_bf16(run: Command, toy_flash: Path) -> None:
    report = run("generate", toy_flash, "--prompt", "Hi", "--dtype", "bf16", "--max-new-tokens", "3", "--json").json
    assert report["dtype"] == "bf16" and report["new_tokens"] == 3


def test_without_a_tokenizer_ids_are_printed(
    run: Command, toy_flash: Path, tmp_path: Path, expected: tuple[list[int], str]
) -> None:
    bare = shutil.copytree(toy_flash, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    ids = "0,74,103,110,110,113"
    done = run("generate", bare, "--prompt-ids", ids, "--max-new-tokens", "24")
    assert done == (0, " ".join(map(str, expected[0])) + " \n", "")
    for option in ("--prompt", "--stop", "--answer"):
        refused = run("generate", bare, "--prompt-ids", ids, option, "x")
        assert refused.code == 2 and f"{option} is text, and {bare} has no tokenizer.json" in refused.err


def test_without_the_library_of_tokenizers_ids_are_continued(
    run: Command, toy_flash: Path, monkeypatch: pytest.MonkeyPatch, expected: tuple[list[int], str]
) -> None:
    """The checkpoint has a tokenizer; only the extra that reads it is not installed."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    ids = ("--prompt-ids", "0,74,103,110,110,113", "--max-new-tokens", "24")
    assert run("generate", toy_flash, *ids) == (0, " ".join(map(str, expected[0])) + " \n", "")
    hint = "pip install 'dsv4-bridge[megatron,hf]', or give --prompt-ids alone\n"
    for option in ("--prompt", "--stop", "--answer"):
        refused = run("generate", toy_flash, *ids, option, "x")
        assert refused.code == 2 and refused.err.endswith(hint), refused.err


UNUSABLE = {
    "nothing asked": ([], "nothing to continue; give --prompt TEXT"),
    "chat of ids": (["--prompt-ids", "1", "--chat"], "--chat is for texts"),
    "no ids": (["--prompt-ids", "1,x"], "'x' is none"),
    "ids beyond": (["--prompt-ids", "1,512"], "token 512, expected ids from 0 to 511"),
    "an empty stop": (["--prompt", "a", "--stop", ""], "a stop text is empty"),
    "answers": (["--prompt", "a", "--answer", "b", "--answer", "c"], "2 answers for 1 prompts"),
    "greedy with top_p": (["--prompt", "a", "--top-p", "0.5"], "set a temperature"),
    "temperature": (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0"),
    "no text": (["--prompt", "a\udcff"], "give it in UTF-8"),
    "count": (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
    "type": (["--prompt", "a", "--dtype", "fp8"], "--dtype"),
    "too many": (["--prompt", "a", "--max-new-tokens", "2000000"], "the model has 1048576"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_arguments_are_one_message_and_2(case: str, run: Command, toy_flash: Path) -> None:
    options, message = UNUSABLE[case]
    done = run("generate", toy_flash, *options)
    assert done.code == 2 and done.out == "" and message in done.err
    assert done.err.startswith("dsv4: ") and done.err.count("\n") == 1


def test_a_terminal_with_fewer_characters_gets_the_others(
    run: Command, toy_flash: Path, monkeypatch: pytest.MonkeyPatch, expected: tuple[list[int], str]
) -> None:
    assert not expected[1].isascii()
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert run("generate", toy_flash, "--prompt", "Hello", "--max-new-tokens", "24").code == 0
    narrow.flush()
    assert narrow.buffer.getvalue() == expected[1].encode("ascii", "replace") + b"\n"


def test_unusable_checkpoints(run: Command, toy_flash: Path, tmp_path: Path) -> None:
    assert run("generate", tmp_path / "none", "--prompt", "a").code == 2
    assert run("generate", tmp_path, "--prompt", "a").code == 2
    lacking = shutil.copytree(toy_flash, tmp_path / "lacking")
    (lacking / "model-00003-of-00009.safetensors").unlink()
    done = run("generate", lacking, "--prompt", "a")
    assert done.code == 2 and "model-00003-of-00009.safetensors" in done.err and done.err.count("dsv4: ") == 1


def test_too_little_memory_is_said_before_anything_is_loaded(toy_flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4_bridge.mcore.runtime.free_memory", lambda: (10_000_000, "memory"))
    message = r"takes 0\.0 GB in float32, and 0\.0 GB of memory are free; --dtype bf16 takes half"
    with pytest.raises(BridgeError, match=message):
        generate(toy_flash, Ask(texts=["a"]), stream=False)
    streamed = generate(toy_flash, Ask(texts=["a"], max_new_tokens=2)).streamed  # by itself, where it does not fit
    assert streamed is not None and streamed.kept


@pytest.mark.slow
def test_ranks_with_a_share_of_the_experts_each_say_what_one_says(toy_flash: Path) -> None:
    def start(rank: int, world: int, port: int) -> "subprocess.Popen[str]":
        places = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-W", "ignore", "-m", "dsv4_bridge", "generate", str(toy_flash), "--json"]
        command += ["--prompt-ids", "5,6,7,8,9", "--max-new-tokens", "6"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=os.environ | places, stdout=pipe, stderr=pipe, text=True)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    two = [start(rank, 2, port) for rank in range(2)]
    (first, second), one = [process.communicate(timeout=200) for process in two], start(0, 1, port).communicate()
    assert [process.returncode for process in two] == [0, 0], first[1] + second[1]
    assert second[0] == ""
    ids = json.loads(first[0])["continuations"][0]["ids"]
    assert ids == json.loads(one[0])["continuations"][0]["ids"] and len(ids) > 1


def test_missing_megatron_is_said(toy_flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dsv4_bridge.mcore", None)
    monkeypatch.delattr("dsv4_bridge.mcore", raising=False)
    with pytest.raises(BridgeError, match=r"pip install 'dsv4-bridge\[megatron\]'"):
        generate(toy_flash, Ask(texts=["a"]))


def test_texts_that_grow_side_by_side() -> None:
    written: list[str] = []
    order = InOrder(3, written.append)
    for row, piece, last in ((1, "b", False), (0, "a", False), (1, "B", True), (0, "A", True), (2, "c", True)):
        order.heard(row, piece, last)
        written.append("|")
    assert "".join(written) == "[0] |a||A\n[1] bB\n[2] |c\n|"


def test_pieces_come_as_tokens_come(toy_flash: Path, expected: tuple[list[int], str]) -> None:
    heard: list[tuple[int, str, bool]] = []
    torch.manual_seed(0)
    generate(toy_flash, Ask(["Hello"], max_new_tokens=24), heard=lambda *piece: heard.append(piece))
    assert len(heard) == 24 and "".join(piece for _, piece, _ in heard) == expected[1]
    assert [last for _, _, last in heard] == [False] * 23 + [True]
    assert sum(bool(piece) for _, piece, _ in heard) > 3
