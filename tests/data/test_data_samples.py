"""Samples of indexed data: the documents' own tokens in order, labels, boundaries, blends, splits, resume."""

import errno
import gc
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv4_bridge import BridgeError
from dsv4_bridge.data.datasets import Blend, PretrainingDataset, build_pretraining_datasets, parse_blend
from dsv4_bridge.train.feed import text_feed

pytestmark = pytest.mark.megatron

EOS, VOCABULARY, LENGTH = 1, 512, 24


def write_data(prefix: Path, documents: list[list[int]]) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def make_documents(seed: int, count: int, most: int = 40) -> list[list[int]]:
    source = random.Random(seed)
    return [[*source.choices(range(2, VOCABULARY), k=source.randint(0, most)), EOS] for _ in range(count)]


def build(data: object, samples: tuple[int, int, int] = (20, 0, 0), **changes: object) -> list[PretrainingDataset]:
    settings: dict = {"seq_length": LENGTH, "eos_token_id": EOS, "vocab_size": VOCABULARY, "split": "1"} | changes
    return [d for d in build_pretraining_datasets(data, samples=samples, **settings) if d is not None]  # type: ignore[arg-type]


def test_samples_are_the_documents_own_tokens_in_order(tmp_path: Path) -> None:
    # No token comes twice, so each says which document it is of, and where it stands there.
    source = random.Random(1)
    fresh = iter(source.sample(range(2, 9000), 3000))
    documents = [
        [next(fresh) for _ in range(n)] for n in (5, 1, 40, 3, 90, 24, 23, 25, *source.choices(range(1, 30), k=30))
    ]
    place = {token: (i, k) for i, document in enumerate(documents) for k, token in enumerate(document)}
    count = (sum(map(len, documents)) - 1) // LENGTH
    (train,) = build(write_data(tmp_path / "a", documents), (count, 0, 0), vocab_size=9000)
    assert len(train) == count
    seen: list[int] = []
    for sample in train:
        assert [sample[name].dtype for name in ("tokens", "labels", "cu_seqlens")] == [torch.int64] * 2 + [torch.int32]
        tokens, labels, ends = (sample[name].tolist() for name in ("tokens", "labels", "cu_seqlens"))
        assert len(tokens) == len(labels) == LENGTH
        assert (ends[0], ends[-1]) == (0, LENGTH)
        assert labels[:-1] == tokens[1:]
        for (i, k), (j, n), stop in zip(
            (place[t] for t in tokens), (place[t] for t in labels), range(1, LENGTH + 1), strict=True
        ):
            if (j, n) == (i, k + 1):
                assert stop not in ends[:-1]
            else:  # the end of a whole document, and the start of another
                assert (k, n) == (len(documents[i]) - 1, 0)
                assert stop in ends
        seen += tokens
    assert len(seen) == len(set(seen)) == count * LENGTH
    # More than one boundary in a row, and rows that begin and end inside of a document.
    assert max(len(s["cu_seqlens"]) for s in train) > 4
    assert {len(s["cu_seqlens"]) for s in train} >= {2, 3}


def test_loss_does_not_cross_a_boundary(tmp_path: Path) -> None:
    documents = make_documents(2, 60)
    data = write_data(tmp_path / "a", documents)
    (train,) = build(data, (40, 0, 0))
    (joined,) = build(data, (40, 0, 0), apart=False)
    assert sum(s["tokens"][-1] == EOS for s in train) > 0  # a document that ends with its row
    for sample, whole in zip(train, joined, strict=False):
        assert sample["loss_mask"].dtype == torch.float32
        assert torch.equal(sample["loss_mask"] == 0, sample["tokens"] == EOS)
        ends = set(sample["cu_seqlens"].tolist())
        assert ends == {0, LENGTH} | {i + 1 for i, t in enumerate(sample["tokens"].tolist()) if t == EOS}
        assert torch.equal(whole["tokens"], sample["tokens"])
        assert torch.equal(whole["labels"], sample["labels"])
        assert whole["loss_mask"].min() == 1
        assert whole["cu_seqlens"].tolist() == [0, LENGTH]


def test_the_same_numbers_give_the_same_samples_and_others_do_not(tmp_path: Path) -> None:
    data = write_data(tmp_path / "a", make_documents(3, 80))

    def rows(**changes: object) -> list[list[int]]:
        return [s["tokens"].tolist() for s in build(data, (50, 0, 0), **changes)[0]]

    one = rows(cache=tmp_path / "cache")
    assert one == rows(cache=tmp_path / "cache") == rows(cache=tmp_path / "other") == rows()
    assert one != rows(seed=5)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()].count("dataset_cache") == 1


def test_data_written_anew_under_an_old_name_is_read_anew(tmp_path: Path) -> None:
    documents = make_documents(4, 40)
    data = write_data(tmp_path / "a", documents)
    build(data)
    other = [[*document[:-1], 7, EOS] if i % 2 else document for i, document in enumerate(documents[::-1])]
    write_data(tmp_path / "a", other)
    (fresh,) = build(data)
    write_data(tmp_path / "b", other)
    (expected,) = build(str(tmp_path / "b"))
    assert [s["tokens"].tolist() for s in fresh] == [s["tokens"].tolist() for s in expected]


def test_splits_share_documents_out(tmp_path: Path) -> None:
    # Each document is of one token, which says which it is.
    documents = [[2 + i] * 30 for i in range(100)]
    data = write_data(tmp_path / "a", documents)
    found = build(data, (60, 15, 9), split="80,15,5")
    ranges = [{int(t) - 2 for s in part for t in s["tokens"]} for part in found]
    assert ranges[0] <= set(range(80))
    assert ranges[1] <= set(range(80, 95))
    assert ranges[2] <= set(range(95, 100))
    assert [len(r) for r in ranges] >= [60, 10, 5]
    assert all(len(part) >= n for part, n in zip(found, (60, 15, 9), strict=True))
    # A share that is too small for a document is no matter where nothing is asked of it.
    assert len(build(write_data(tmp_path / "b", documents[:30]), (4, 0, 0), split="99,1,0")[0]) >= 4
    train, valid, test = build_pretraining_datasets(
        data, seq_length=LENGTH, samples=(3, 2, 0), eos_token_id=EOS, vocab_size=VOCABULARY, split="99,1,0"
    )
    assert train is not None
    assert valid is not None
    assert test is None


def test_blends_draw_by_weight(tmp_path: Path) -> None:
    paths = [write_data(tmp_path / n, [[token] * 29 + [EOS]] * 40) for n, token in (("a", 5), ("b", 6))]

    def shares(data: object) -> list[int]:
        (train,) = build(data, (200, 0, 0))
        assert len(train) >= 200
        firsts = [int(train[i]["tokens"][train[i]["tokens"] != EOS][0]) for i in range(200)]
        return [firsts.count(token) for token in (5, 6)]

    assert shares(f"0.3 {paths[0]} 0.7 {paths[1]}") == [60, 140]
    assert shares([3, paths[0], 1, paths[1]]) == [150, 50]
    # Without weights, by tokens.
    write_data(tmp_path / "b", [[6] * 29 + [EOS]] * 120)
    assert shares(paths) == [50, 150]


def test_blends_as_they_are_written() -> None:
    assert parse_blend("0.3 a 0.7 b/c") == Blend(("a", "b/c"), (0.3, 0.7))
    assert parse_blend("a b") == Blend(("a", "b"))
    assert parse_blend(Path("x y")) == Blend(("x y",))
    for wrong in ("", "0.3 a b", "a 0.3", "0 a", "-1 a 2 b", "nan a", "inf a", "1 2"):
        with pytest.raises(BridgeError, match="reading the data blend"):
            parse_blend(wrong)


def ids_of(found: list[Any]) -> list[list[int]]:
    return [row for batch in found for row in batch.input_ids.view(-1, LENGTH).tolist()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PretrainingDataset:
    data = write_data(tmp_path_factory.mktemp("resume") / "a", make_documents(6, 70))
    return build(data, (37, 0, 0))[0]


def test_resume_at_any_count_goes_on_with_the_same_stream(dataset: PretrainingDataset) -> None:
    rows = [sample["tokens"].tolist() for sample in dataset]
    assert len({tuple(row) for row in rows}) == len(rows) >= 37
    feed = text_feed(dataset, 512, "data")
    for consumed in range(len(rows)):
        assert ids_of(feed.batches(consumed, len(rows) - consumed, 1)) == rows[consumed:]
    for micro, ranks, size in ((2, 1, 8), (1, 3, 6), (3, 2, 12)):
        for consumed in (0, 1, 6, 17):
            parts = [feed.batches(consumed, size, micro, rank, ranks) for rank in range(ranks)]
            turns = [ids_of([part[turn] for part in parts]) for turn in range(len(parts[0]))]
            assert [row for turn in turns for row in turn] == rows[consumed : consumed + size]


def test_batches_lay_rows_behind_one_another(dataset: PretrainingDataset) -> None:
    (batch,) = text_feed(dataset, 512, "data").batches(4, 3, 3)
    assert batch.input_ids.shape == batch.labels.shape == batch.loss_mask.shape == (1, 3 * LENGTH)
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.dtype == torch.int32
    ends = [0]
    for row in range(4, 7):
        ends += [len(ends) and LENGTH * (row - 4) + e for e in dataset[row]["cu_seqlens"].tolist()[1:]]
    assert batch.cu_seqlens.tolist() == ends
    assert torch.equal(batch.labels.view(3, -1)[1], dataset[5]["labels"])
    assert torch.equal(batch.loss_mask.view(3, -1)[2], dataset[6]["loss_mask"])
    whole = PretrainingDataset(dataset.rows, LENGTH, EOS, False)
    (batch,) = text_feed(whole, 512, "data").batches(4, 3, 3)
    assert batch.input_ids.shape == (3, LENGTH)
    assert batch.cu_seqlens is None


def test_with_process_groups_the_samples_are_the_same(tmp_path: Path) -> None:
    from dsv4_bridge.mcore import initialize

    documents = make_documents(7, 50)
    data, other = (write_data(tmp_path / n, documents[k:]) for k, n in enumerate("ab"))
    before = [s["tokens"].tolist() for s in build([data, other], (30, 0, 0), cache=tmp_path / "one")[0]]
    initialize()
    assert torch.distributed.is_initialized()
    after = [s["tokens"].tolist() for s in build([data, other], (30, 0, 0), cache=tmp_path / "two")[0]]
    assert before == after


def test_unusable_data_is_refused(tmp_path: Path) -> None:
    data = write_data(tmp_path / "a", make_documents(8, 30))
    with pytest.raises(BridgeError, match=r"no .*none\.idx"):
        build(str(tmp_path / "none"))
    with pytest.raises(BridgeError, match="30 documents, and the split leaves none of them for valid"):
        build(data, (5, 1, 0), split="99,1,0")
    with pytest.raises(BridgeError, match="4 test samples of a split that gives it no share"):
        build(data, (5, 0, 4), split="9,1")
    for wrong in ("", "a", "1,2,3,4", "0,0", "-1,2", "nan"):
        with pytest.raises(BridgeError, match="expected shares of train, valid and test"):
            build(data, split=wrong)
    with pytest.raises(BridgeError, match="samples"):
        build(data, (-1, 0, 0))
    (tmp_path / "a.json").write_text(json.dumps({"eos_token_id": 2, "tokenizer_sha256": "ab"}))
    with pytest.raises(BridgeError, match="its eos_token_id is 2, the model's is 1"):
        build(data)
    with pytest.raises(BridgeError, match="its tokenizer_sha256 is 'ab', the model's is 'cd'"):
        build(data, eos_token_id=2, tokenizer_sha256="cd")
    (tmp_path / "a.json").unlink()
    whole = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(whole[:-2])
    with pytest.raises(BridgeError, match=r"its index wants"):
        build(data)
    (tmp_path / "a.bin").write_bytes(whole)
    (tmp_path / "a.idx").write_bytes((tmp_path / "a.bin").read_bytes())
    with pytest.raises(BridgeError, match="is no index of megatron-core"):
        build(data)


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    data = write_data(tmp_path / "a", make_documents(9, 30))
    build(data, cache=tmp_path / "cache")
    for path in (tmp_path / "cache").glob("*index.npy"):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(BridgeError, match="remove that folder, or name another cache"):
        build(data, cache=tmp_path / "cache")


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_data_that_cannot_be_opened_is_named_and_nothing_else_is_said(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """megatron-core's readers are half made then, and their finalizers fail: nobody is told of those."""
    from megatron.core.datasets import indexed_dataset

    data, said = write_data(tmp_path / "a", make_documents(9, 30)), list[object]()

    def refused(path: str, *_: str, **__: str) -> object:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    if end == ".bin":
        monkeypatch.setattr(indexed_dataset._MMapBinReader, "__init__", lambda _, path: refused(path))
    else:
        monkeypatch.setattr(indexed_dataset, "open", refused, raising=False)
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(BridgeError) as caught:
        build(data, cache=tmp_path / "cache")
    gc.collect()
    assert str(caught.value) == f"building datasets: {tmp_path / 'a'}{end}: Permission denied"
    assert not said


def test_data_that_goes_away_meanwhile_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.datasets import gpt_dataset

    data, made = write_data(tmp_path / "a", make_documents(9, 30)), gpt_dataset.IndexedDataset

    def late(*args: Any, **more: Any) -> object:
        (tmp_path / "a.idx").unlink()
        return made(*args, **more)

    monkeypatch.setattr(gpt_dataset, "IndexedDataset", late)
    with pytest.raises(BridgeError, match=r"^building datasets: .*\.idx.*at rest$"):
        build(data, cache=tmp_path / "cache")
