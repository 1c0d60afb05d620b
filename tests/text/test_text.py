"""Tokens and text: the toy's tokenizer, BOS, one turn of chat, text that grows."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest

from dsv4_bridge import BridgeError, export_hf, import_hf, make_toy
from dsv4_bridge.generate.stream import TextStream
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.text.tokenizer import Tokenizer, end_tokens, open_tokenizer, parse_ids
from dsv4_bridge.toy.tokenizer import toy_tokenizer

pytestmark = pytest.mark.hf

SPEC = tiny(VARIANTS["Flash"])
TEXTS = ("Hello, World!", "Straße – 你好 🤗\n\ttab\0", "", " a  b ", "\x7f\x80ÿĀ𐍈")


@pytest.fixture(scope="module")
def tokenizer(toy_flash: Path) -> Tokenizer:
    found = open_tokenizer(toy_flash, SPEC)
    assert found is not None
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_text_returns_from_its_bytes(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == SPEC.bos_token_id
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_byte_has_its_token_and_special_ones_the_model_s_ids(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.library.get_vocab()
    assert len(set(vocabulary.values())) == len(vocabulary) == 256 + 9
    assert max(vocabulary.values()) < SPEC.vocab_size
    assert vocabulary["<｜begin▁of▁sentence｜>"] == SPEC.bos_token_id
    assert vocabulary["<｜end▁of▁sentence｜>"] == SPEC.eos_token_id
    data = bytes(range(256))
    assert len(set(tokenizer.encode(data.decode("latin-1")))) == 1 + 128 + 2 + 64  # ASCII, two leads, 64 tails


def test_transformers_reads_the_toy_s_tokenizer(toy_flash: Path, tokenizer: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(toy_flash)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (SPEC.bos_token_id, SPEC.eos_token_id)
    assert [SPEC.bos_token_id, *theirs("Grüße").input_ids] == tokenizer.encode("Grüße")


def test_other_ids_and_small_vocabularies() -> None:
    body = json.loads(toy_tokenizer(replace_spec(SPEC, bos_token_id=7, eos_token_id=300))["tokenizer.json"])
    added = {t["content"]: t["id"] for t in body["added_tokens"]}
    assert (added["<｜begin▁of▁sentence｜>"], added["<｜end▁of▁sentence｜>"]) == (7, 300)
    assert len(set(body["model"]["vocab"].values())) == len(body["model"]["vocab"])
    fitting = json.loads(toy_tokenizer(replace_spec(SPEC, vocab_size=260))["tokenizer.json"])
    assert [t["content"] for t in fitting["added_tokens"]][2:] == ["<｜User｜>", "<｜Assistant｜>"]
    assert toy_tokenizer(replace_spec(SPEC, vocab_size=257)) == {}


def test_bos_stands_once(toy_flash: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Written out in the text, or added by the tokenizer itself, it is not added again."""
    plain = tokenizer.encode("ab")
    assert tokenizer.encode("<｜begin▁of▁sentence｜>ab") == plain
    body = json.loads((toy_flash / "tokenizer.json").read_text())
    name = "<｜begin▁of▁sentence｜>"
    body["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [SPEC.bos_token_id], "tokens": [name]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    adding = open_tokenizer(tmp_path, SPEC)
    assert adding is not None and adding.library.encode("ab").ids == plain
    assert adding.encode("ab") == plain


def test_chat_is_one_turn_in_the_released_form(tokenizer: Tokenizer) -> None:
    named = tokenizer.library.token_to_id
    inner = tokenizer.encode("Hi\n你")[1:]
    expected = [SPEC.bos_token_id, named("<｜User｜>"), *inner, named("<｜Assistant｜>"), named("</think>")]
    assert tokenizer.chat("Hi\n你") == expected
    assert tokenizer.decode(expected) == "Hi\n你</think>"


def test_chat_needs_its_tokens(toy_flash: Path, tmp_path: Path) -> None:
    body = json.loads((toy_flash / "tokenizer.json").read_text())
    body["added_tokens"] = [t for t in body["added_tokens"] if t["content"] != "</think>"]
    del body["model"]["vocab"]["</think>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    base = open_tokenizer(tmp_path, SPEC)
    assert base is not None
    with pytest.raises(BridgeError, match="it has no token </think>"):
        base.chat("Hi")


def test_growing_text_is_the_whole_text(tokenizer: Tokenizer) -> None:
    """Random bytes, broken characters and special tokens among them, and real text: nothing is given out twice."""
    rng = random.Random(3)
    noise = [[rng.randrange(SPEC.vocab_size) for _ in range(200)] for _ in range(20)]
    for ids in [*(tokenizer.encode(t) for t in TEXTS), *noise]:
        stream = TextStream(tokenizer)
        pieces = [stream.push(i) for i in ids]
        assert not any(piece.endswith("\ufffd") for piece in pieces)
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids) == stream.text
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in tokenizer.encode("é你b")[1:]] == ["", "é", "", "", "你", "b"]


def test_a_stop_text_ends_it_and_no_part_of_it_is_given_out(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["STOP", "\nUser:"])
    pieces = []
    for token in tokenizer.encode("aST b\nUsSTOP more")[1:]:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    assert pieces[:6] == ["a", "", "", "ST ", "b", ""]
    assert "".join(pieces) + stream.finish() == "aST b\nUs" == stream.text and stream.stopped
    held = TextStream(tokenizer, ["STOP"])
    assert "".join(held.push(t) for t in tokenizer.encode("xSTO")[1:]) == "x"
    assert held.finish() == "STO" and held.text == "xSTO" and not held.stopped


def test_ends_of_text(tmp_path: Path, toy_flash: Path) -> None:
    assert end_tokens(tmp_path, SPEC) == {SPEC.eos_token_id} == end_tokens(toy_flash, SPEC)
    named = tmp_path / "generation_config.json"
    named.write_text('{"eos_token_id": [5, 9]}')
    assert end_tokens(tmp_path, SPEC) == {SPEC.eos_token_id, 5, 9}
    for content, message in (
        ('{"eos_token_id": "x"}', "holds 'x', expected token ids"),
        ('{"eos_token_id": true}', "holds True"),
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
    ):
        named.write_text(content)
        with pytest.raises(BridgeError, match=message):
            end_tokens(tmp_path, SPEC)


def test_unusable_tokenizers(tmp_path: Path, toy_flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_tokenizer(tmp_path, SPEC) is None
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(BridgeError, match=r"no tokenizer .*fetch the file again"):
        open_tokenizer(tmp_path, SPEC)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BridgeError, match=r"library is missing; pip install 'dsv4-bridge\[hf\]'$"):
        open_tokenizer(toy_flash, SPEC)


def test_written_ids() -> None:
    assert parse_ids(" 1,22, 3") == [1, 22, 3]
    for wrong in ("", "1,,2", "1;2", "-1", "1.0", "٣", "9" * 12):
        with pytest.raises(BridgeError, match="give numbers with commas"):
            parse_ids(wrong)


def test_the_tokenizer_travels_both_ways(toy_flash: Path, toy_megatron: Path, tmp_path: Path) -> None:
    export_hf(toy_megatron, tmp_path / "back", toy_flash)
    alone = make_toy(tmp_path / "again", "Flash", 7)
    import_hf(alone, tmp_path / "megatron")
    shutil.rmtree(alone)
    export_hf(tmp_path / "megatron", tmp_path / "alone", encoding="bf16")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for folder in (toy_megatron / "iter_0000000" / "hf", tmp_path / "back", tmp_path / "alone"):
            assert (folder / name).read_bytes() == (toy_flash / name).read_bytes()
