"""Ids that the model does not have are refused when the data is opened, and again in every row."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv4_bridge import BridgeError
from dsv4_bridge.data import token_ids
from dsv4_bridge.data.chat.packing import plan_packs
from dsv4_bridge.data.chat.samples import Sample
from dsv4_bridge.data.chat.store import write_chat_data
from dsv4_bridge.data.datasets import build_pretraining_datasets
from dsv4_bridge.data.token_ids import check_token_ids, stretches
from dsv4_bridge.spec.spec import replace_spec
from dsv4_bridge.spec.variants import VARIANTS, tiny
from dsv4_bridge.train.choose import change, choose
from dsv4_bridge.train.feed import Feed, Row, make_feeds

EOS, VOCABULARY = 1, 512


def place(token: int) -> str:
    return f"token {token}"


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.int64, np.uint8])
def test_the_first_wrong_id_is_named(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_ids, "STRETCH", 64)  # of several stretches
    tokens = np.arange(1000).astype(kind) % 200
    check_token_ids(tokens, 200, "opening a", place)
    if kind is np.uint8:  # the type holds no other than these
        return check_token_ids(np.full(9, 255, kind), 256, "opening a", place)
    tokens[[700, 998]] = 200
    with pytest.raises(BridgeError, match="opening a: token 200 at token 700, the model has 0 to 199; the data was"):
        check_token_ids(tokens, 200, "opening a", place)
    if kind is not np.uint16:
        tokens[3] = -1
        with pytest.raises(BridgeError, match="token -1 at token 3, which is megatron-core's padding and no token"):
            check_token_ids(tokens, 200, "opening a", place)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 640, 641, 5000, 123_457])
def test_what_is_large_is_read_in_stretches_to_both_ends(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_ids, "LIMIT", 10 * 64)
    monkeypatch.setattr(token_ids, "STRETCH", 64)
    found = list(stretches(count, 2))
    assert sum(stop - start for start, stop in found) == min(count, 320)
    assert all(a < b <= c < d for (a, b), (c, d) in pairwise(found))
    assert not found or (found[0][0], found[-1][1]) == (0, count)


@pytest.mark.megatron
@pytest.mark.parametrize(("wrong", "told"), [(515, "the model has 0 to 511"), (-1, "which is megatron-core's padding")])
def test_indexed_data_is_refused_when_it_is_opened(wrong: int, told: str, tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), np.int32)
    for number in range(40):
        ids = [2 + number] * 30 + [EOS]
        builder.add_document(torch.tensor([*ids[:7], wrong, *ids[8:]] if number == 33 else ids), [len(ids)])
    builder.finalize(str(tmp_path / "a.idx"))
    with pytest.raises(BridgeError, match=rf"opening the data .*/a: token {wrong} at token 7 of document 33, {told}"):
        build_pretraining_datasets(
            str(tmp_path / "a"), seq_length=24, samples=(3, 0, 0), eos_token_id=EOS, vocab_size=VOCABULARY, split="1"
        )
    assert not (tmp_path / "dataset_cache").exists()


@pytest.mark.megatron
def test_chats_are_refused_when_they_are_opened(tmp_path: Path) -> None:
    made = [Sample(np.arange(2, 7 + i, dtype=np.int32), np.arange(5 + i) > 2, i + 1) for i in range(6)]
    packing = plan_packs([len(s.tokens) for s in made], 16)
    recipe = change(choose("flash-finetune").recipe, {"data.train": (str(tmp_path / "chat"),), "data.seq_length": 16})
    spec = replace_spec(tiny(VARIANTS["Flash"]), vocab_size=VOCABULARY)
    for wrong, told in ((VOCABULARY, f"token {VOCABULARY} at token 4 of the conversation of line 3"), (-1, "padding")):
        made[2].tokens[4] = wrong
        shutil.rmtree(tmp_path / "chat", ignore_errors=True)
        write_chat_data(tmp_path / "chat", made, packing, {"tokenizer_sha256": "abc"})
        with pytest.raises(BridgeError, match=f"reading chats .*{told}"):
            make_feeds(recipe, spec, 6, 0)
    made[2].tokens[4] = 3
    shutil.rmtree(tmp_path / "chat")
    write_chat_data(tmp_path / "chat", made, packing, {"tokenizer_sha256": "abc"})
    assert make_feeds(recipe, spec, 6, 0)[0].count == len(packing.packs)


@pytest.mark.megatron
@pytest.mark.parametrize("which", ["tokens", "labels"])
def test_a_row_is_checked_again_when_it_is_taken(which: str) -> None:
    """Of data that is too large to be read whole; on the CPU, before it goes to a device."""
    good = torch.arange(8)
    bad = good.clone()
    bad[5] = -1

    def row(number: int) -> Row:
        tokens, labels = (bad if name == which and number == 2 else good for name in ("tokens", "labels"))
        return Row(tokens, labels, torch.ones(8), torch.tensor([0, 8], dtype=torch.int32))

    feed = Feed(4, row, False, 0, True, VOCABULARY, "a")
    assert len(feed.batches(0, 2, 1)) == 2
    with pytest.raises(BridgeError, match="reading row 2 of a: token -1 at position 5, which is megatron-core's pad"):
        feed.batches(2, 2, 1)
