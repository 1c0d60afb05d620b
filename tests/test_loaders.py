"""Files from elsewhere: what is wrong with them is said in words, before anything trusts a number in them."""

import io
import json
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_bridge import BridgeError, inspect, ranks
from dsv4_bridge.cli.show.console import Plain, make_table
from dsv4_bridge.cli.show.tables import inspect_table
from dsv4_bridge.convert.report import Report
from dsv4_bridge.data.index_files import check_indexed
from dsv4_bridge.data.npy import read_npy
from dsv4_bridge.errors import printable
from dsv4_bridge.free_memory import free_memory
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.strict_json import read_json
from dsv4_bridge.text.safe_patterns import why_unsafe
from dsv4_bridge.text.tokenizer_files import guarded, read_tokenizer
from dsv4_bridge.toy.tokenizer import toy_tokenizer
from dsv4_bridge.train.choose import load

# ---------------------------------------------------------------- .npy


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(("dtype", "length"), [(np.int32, 7), (np.uint8, 0), (np.int64, 1)])
def test_arrays_that_numpy_writes_are_read(tmp_path: Path, dtype: Any, length: int, mapped: bool) -> None:
    values = np.arange(length, dtype=dtype)
    np.save(tmp_path / "a.npy", values)
    found = read_npy(tmp_path / "a.npy", dtype, length, mapped=mapped)
    assert found.dtype == dtype and np.array_equal(found, values)


def test_other_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"

    def refused(what: str) -> None:
        with pytest.raises(BridgeError, match=rf"a.npy: .*{what}.*; make it again"):
            read_npy(path, np.int32, 5, mapped=True)

    refused("No such file")
    path.mkdir()
    refused("not a regular file")
    path.rmdir()
    for values, what in (
        (np.zeros(5, np.float32), "float32 with 1 dimensions, expected one of int32"),
        (np.zeros((5, 1), np.int32), "header .* is none of an array of int32 with one dimension"),
        (np.zeros(4, np.int32), r"shape \(4,\), expected \(5,\)"),
        (np.array([{}] * 5), "is none of an array"),
        (np.zeros(5, ">i4"), "is none of an array"),
    ):
        np.save(path, values)
        refused(what)
    np.save(path, np.zeros(5, np.int32))
    sound = path.read_bytes()
    for raw, what in (
        (b"PK\x03\x04" + sound, "expected a .npy file"),
        (sound[:6] + b"\x02" + sound[7:], "expected a .npy file, version 1.0"),
        (sound[:-1], "bytes, its header wants"),
        (sound + b"\0", "bytes, its header wants"),
        (sound[:8] + b"\xff\xff" + sound[10:], "is none of an array"),
        (sound[:9], "is none of an array"),
        (b"", "expected a .npy file"),
    ):
        path.write_bytes(raw)
        refused(what)


# ---------------------------------------------------------------- .idx


def index(lengths: list[int], **changes: Any) -> bytes:
    array = np.array(lengths, "<i4")
    starts = (2 * (np.cumsum(array, dtype="<i8") - array)).astype("<i8")
    said = {"magic": b"MMIDIDX\0\0", "version": 1, "code": 8, "sequences": len(lengths), "boundaries": len(lengths) + 1}
    said |= {"lengths": array, "starts": starts, "edges": np.arange(len(lengths) + 1, dtype="<i8")} | changes
    head = struct.pack("<9sQBQQ", *(said[n] for n in ("magic", "version", "code", "sequences", "boundaries")))
    return head + b"".join(np.asarray(said[n]).tobytes() for n in ("lengths", "starts", "edges"))


def test_an_index_is_taken_only_if_all_of_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = str(tmp_path / "a")
    (tmp_path / "a.bin").write_bytes(bytes(2 * 9))

    def check(raw: bytes) -> Any:
        (tmp_path / "a.idx").write_bytes(raw)
        return check_indexed(prefix, "opening the data")

    for piece in (1, 2, 1 << 20):
        monkeypatch.setattr("dsv4_bridge.data.index_files._PIECE", piece)
        found = check(index([4, 0, 5]))
        assert (found.tokens, found.dtype, list(found.lengths)) == (9, np.uint16, [4, 0, 5])
        for raw, what in (
            (b"", "is no index of megatron-core"),
            (index([4, 5], magic=b"MMIDIDX\0\1"), "is no index of megatron-core"),
            (index([4, 5], version=2), "of version 1 .it says 2"),
            (index([4, 5], code=9), "its tokens are of type 9"),
            (index([4, 5], code=7), "its tokens are of type float32"),
            (index([4, 5], sequences=1 << 60), "for 1,152,921,504,606,846,976 sequences"),
            (index([4, 5], boundaries=(1 << 64) - 1), "copy it again"),
            (index([4, 5])[:-1], "copy it again"),
            (index([4, 5]) + b"\0", "copy it again"),
            (index([-4, 5]), "sequence 0 -4 tokens"),
            (index([4, 5], starts=np.array([0, 10])), r"sequence 1 begins at byte 10 of the .bin, expected 8"),
            (index([4, 6]), "a.bin has 18 bytes, its index wants 20"),
            (index([4, 5], edges=np.array([0, 2, 1])), "do not rise from 0 to 2"),
            (index([4, 5], edges=np.array([0, 3, 2])), "do not rise from 0 to 2"),
            (index([0] * 2), "has 18 bytes, its index wants 0"),
        ):
            with pytest.raises(BridgeError, match=what):
                check(raw)
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(BridgeError, match="its 2 sequences have no tokens"):
        check(index([0] * 2))


# ---------------------------------------------------------------- tokenizers


RELEASED = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
OTHERS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lm}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)|\s+",
    r"(?=(\d{3})+(?!\d))",
)


@pytest.mark.parametrize("pattern", [*RELEASED, *OTHERS])
def test_patterns_that_split_words_are_let_through(pattern: str) -> None:
    assert why_unsafe(pattern) == ""


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", "(a|aa)+$", "(a|ab){9}c", "(?:a?){30}", "(a{30}){30}", "a*a*a*a*b", r"(.)\1", r"(?<n>a)\g<n>"),
        *("a**", "a{999}", "(" * 3000, "[" * 3000, "(a", "a)", "[a", "\\", "*a", "(?~a)", "(?(1)a)", "x" * 3000),
        *(r"\K", "[[:alpha:]", "(?#a)"),
    ],
)
def test_patterns_that_may_not_end_are_not(pattern: str) -> None:
    assert why_unsafe(pattern)


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def written(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    body = json.loads(toy_tokenizer(tiny(VARIANTS["Flash"]))["tokenizer.json"])
    change(body)
    (folder / "tokenizer.json").write_text(json.dumps(body))
    return folder / "tokenizer.json"


def test_a_tokenizer_built_as_the_released_ones_is_read(tmp_path: Path) -> None:
    def build(body: dict[str, Any]) -> None:
        splits = [split(pattern) for pattern in RELEASED]
        body["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*splits, body["pre_tokenizer"]]}
        body["normalizer"] = {"type": "Sequence", "normalizers": []}
        body["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}

    library, raw = read_tokenizer(written(tmp_path, build))
    assert len(library.encode("twelve bytes").ids) == 12  # and not three
    assert raw == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda b: b.update(pre_tokenizer=split("(a+)+$")),
            r"the pattern '\(a\+\)\+\$' repeats what has several lengths",
        ),
        (
            lambda b: b.update(pre_tokenizer={"type": "Nope"}),
            "pre_tokenizer is 'Nope', expected one of Sequence, Split",
        ),
        (
            lambda b: b.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AA"}),
            "normalizer is 'Precompiled'",
        ),
        (lambda b: b["decoder"].update(use_regex=3), "decoder.use_regex is 3"),
        (lambda b: b["decoder"].update(x=3), "ByteLevel has 'x', expected add_prefix_space"),
        (lambda b: b["model"].update(type="Unigram"), "model.type is 'Unigram', expected 'BPE'"),
        (lambda b: b["model"].update(merges=[["a"]]), r"model.merges holds \['a'\], expected pairs"),
        (lambda b: b["model"].update(merges=[["a", "b"]]), "of which model.vocab has not all"),
        (lambda b: b["model"].update(dropout=float("nan")), "model.dropout is nan"),
        (lambda b: b["model"]["vocab"].update(a=True), "gives 'a' the id True"),
        (lambda b: b["model"]["vocab"].update(a=1 << 40), "gives 'a' the id 1099511627776"),
        (lambda b: b["added_tokens"][0].update(content=""), "added_tokens: content is ''"),
        (lambda b: b["added_tokens"][0].update(id=-1), "added_tokens: id is -1"),
        (lambda b: b.update(extra=1), "it has 'extra', expected"),
        (lambda b: b.update(model=None), "model is None, expected a byte-pair model"),
    ],
)
def test_other_tokenizers_are_refused_before_they_are_built(
    change: Callable[[dict[str, Any]], Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(
        BridgeError, match=rf"no tokenizer of a kind that is read here: .*{said}.*; fetch the file again"
    ):
        read_tokenizer(written(tmp_path, change))


def test_a_panic_becomes_words_and_an_interrupt_goes_on() -> None:
    class PanicException(BaseException):
        pass

    def raising(error: BaseException) -> Callable[[], None]:
        def call() -> None:
            raise error

        return call

    for error in (PanicException("index out of\nbounds"), ValueError("index out of bounds")):
        with pytest.raises(BridgeError, match=r"^opening x \(index out of bounds\); do y$"):
            guarded("opening x", "do y", raising(error))
    for passed in (KeyboardInterrupt(), SystemExit(), GeneratorExit()):
        with pytest.raises(type(passed)):
            guarded("opening x", "do y", raising(passed))


# ---------------------------------------------------------------- the rest


def test_small_files_are_small_and_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for make, said in (
        (lambda: None, "No such file or directory; do y"),
        (path.mkdir, "a folder; do y"),
        (lambda: (path.rmdir(), path.write_text('{"a": "' + "x" * 90 + '"}')), "99 bytes, more than the 64 taken"),
        (lambda: path.write_bytes(b'{"a": "\xff"}'), "byte 7 is not UTF-8"),
    ):
        make()
        with pytest.raises(BridgeError, match=said):
            read_json(path, 64, "do y")


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": True},
        {"tensors": -1},
        {"bytes_written": 1 << 70},
        {"encoded": []},
        {"encoded": {"a": {"blocks": 1}}},
        {"rounded": {"a": 1.5}},
        {"lacking": None},
        {"recoded": {"a": None}},
    ],
)
def test_a_report_from_a_file_is_whole_or_none(change: dict[str, Any]) -> None:
    sound = json.loads(json.dumps(Report(1, 2).to_json()))
    assert Report.from_json(sound) == Report(1, 2)
    with pytest.raises(BridgeError, match="no report"):
        Report.from_json(sound | change)


def test_what_another_process_says_of_itself_is_whole_or_nothing(tmp_path: Path) -> None:
    path, sound = tmp_path / "1.json", ranks.introduction(1, "done", {"a": "b"}) | {"result": {}}

    def said(change: dict[str, Any]) -> Any:
        path.write_text(json.dumps({k: v for k, v in (sound | change).items() if v is not None}))
        return ranks.read(path)

    assert said({}) == sound
    for change in (
        {"result": None},  # which one that is done has
        {"state": "failed"},  # and one that failed, an error
        {"state": "asleep"},
        {"facts": {"a": 1}},
        {"rank": True},
        {"beat": -1},
        {"nbytes": 1 << 63},
        {"shares": ["a"]},
        {"members": {"1": 2}},
    ):
        assert said(change) is None, change


@pytest.mark.parametrize(
    "text",
    [
        *("a: &a [1]\nb: *a\n", "<<: {a: 1}\n", "a: 1\na: 2\n", "!!int ''", "2020-13-45", '"\\U00110000"', "1" * 5000),
        *(
            "[" * 50_000,
            "? {a: b}\n: c\n",
            "- " * 20_000,
            "\ta: b",
            "!!python/name:os.system",
            "\x00",
            "%YAML 9.9\n---\n",
        ),
    ],
)
def test_yaml_that_could_grow_or_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(BridgeError, match=r"a.yaml: "):
        load(tmp_path / "a.yaml")
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "text", ["? 0x" + "f" * 9000 + "\n: 1", "name: 0x" + "f" * 9000, "x" * 900 + ": 1", "data: {1: 2}"]
)
def test_keys_and_values_of_a_recipe_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(BridgeError, match=r"the key .* is no name|name is a huge integer|there is no 'xxx"):
        load(tmp_path / "a.yaml")


def test_names_from_files_cannot_steer_a_terminal(toy_flash: Path, tmp_path: Path) -> None:
    hostile = "\x1b[2J\x9b31m\u202e[red]"
    assert printable(f"{hostile}\n") == r"\x1b[2J\x9b31m\u202e[red]" + "\n"
    folder = tmp_path / f"a{hostile}"
    folder.mkdir()
    for path in toy_flash.iterdir():
        (folder / path.name).symlink_to(path)
    out = io.StringIO()
    Plain(file=out, width=200, force_terminal=False).print(inspect_table(inspect(folder)))
    Plain(file=out, width=200).print(make_table("[/red]", "a"))
    text = out.getvalue()
    assert r"\x1b[2J\x9b31m\u202e" in "".join(text.split()) and not set(text) & set("\x1b\x9b\u202e")


def test_free_memory_is_the_least_that_anything_leaves(tmp_path: Path) -> None:
    home, proc = tmp_path / "cgroup", tmp_path / "proc"
    inner = home / "a" / "b"
    inner.mkdir(parents=True)
    proc.mkdir()
    machine = free_memory(home, proc)

    def say(folder: Path, **files: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text + "\n")

    say(proc, cgroup="0::/a/b")
    say(inner, memory__max="max", memory__current="5")
    say(home / "a", memory__max="9000", memory__current="5000", memory__stat="anon 1\ninactive_file 2000")
    assert free_memory(home, proc) == 6000  # its page cache can be taken back
    say(home / "a", memory__max="100")
    assert free_memory(home, proc) == 0
    say(proc, cgroup="5:cpu:/a\n4:memory:/c\n0::/")
    say(home / "memory", memory__limit_in_bytes="7000", memory__usage_in_bytes="1000")
    assert free_memory(home, proc) == 6000  # a container that does not see its own path
    say(home / "memory", memory__limit_in_bytes=str((1 << 63) - 4096))
    assert free_memory(home, proc) > 100 or machine < 100

    before = resource.getrlimit(resource.RLIMIT_AS)
    say(proc, statm="10 5 1 1 0 1 0")
    try:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 45, before[1]))
        assert free_memory(home, proc) <= (1 << 45) - 10 * resource.getpagesize()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(("dtype", "nbytes"), [("U16", 2), ("U32", 4), ("U64", 8), ("C64", 8), ("F4", 0.5)])
def test_a_dtype_that_the_model_has_no_use_for_is_a_finding(
    toy_flash: Path, tmp_path: Path, dtype: str, nbytes: float
) -> None:
    for path in toy_flash.iterdir():
        (tmp_path / path.name).symlink_to(path)
    weight_map = json.loads((toy_flash / "model.safetensors.index.json").read_text())["weight_map"]
    name = "norm.weight"
    shard = tmp_path / weight_map[name]
    raw = shard.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    begin, end = header[name]["data_offsets"]
    header[name] |= {"dtype": dtype, "shape": [int((end - begin) / nbytes)]}
    made = json.dumps(header).encode()
    shard.unlink()
    shard.write_bytes(struct.pack("<Q", len(made)) + made + raw[8 + length :])
    report = inspect(tmp_path)
    (finding,) = report.findings
    assert name in str(finding) and f"is {dtype}, expected BF16 or F32" in str(finding)
