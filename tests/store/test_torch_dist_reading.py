"""What the torch_dist store reads is what torch wrote, without Megatron."""

import io
import os
import threading

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_dist_tools import COMMON, _read_bytes, _read_item, bits, boxes, same, torch_bits, write

from dsv4_bridge.errors import BridgeError
from dsv4_bridge.spec.dtypes import DTYPES
from dsv4_bridge.store.torch_dist import boxes as torch_dist_io
from dsv4_bridge.store.torch_dist.frames import COMMON_STATE_KEY, ChunkRecord, TensorRecord, metadata_bytes, object_item
from dsv4_bridge.store.torch_dist.index import check_coverage
from dsv4_bridge.store.torch_dist.reader import TorchDistReader, open_torch_dist

# ---- reading ---------------------------------------------------------------------------------------------


def test_every_dtype_three_readers(tmp_path):
    tensors = {f"w.{d}": (d, bits(d, (4, 6), i), [[i % 4], [2, 5]]) for i, d in enumerate(DTYPES)}
    tensors |= {"scalar": ("F32", bits("F32", ()), []), "none": ("BF16", bits("BF16", (0, 3)), [])}
    write(tmp_path, tensors, pad=100)
    state = {k: torch.empty(a.shape, dtype=getattr(torch, DTYPES[d].torch)) for k, (d, a, _) in tensors.items()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    with open_torch_dist(tmp_path) as reader:
        assert reader.tensors.keys() == tensors.keys()
        assert set(reader.objects) == {COMMON_STATE_KEY, "a._extra_state/shard_0_1"}
        assert reader.read_object(COMMON_STATE_KEY) == COMMON
        assert reader.read_object("a._extra_state/shard_0_1").shape == (0,)
        for key, (dtype, array, _) in tensors.items():
            assert (reader.tensors[key].dtype, reader.tensors[key].shape) == (dtype, array.shape)
            assert reader.read(key).tobytes() == array.tobytes()
            assert torch_bits(state[key], dtype).tobytes() == array.tobytes()
            for chunk in reader.tensors[key].chunks:
                item = (tmp_path / chunk.file).read_bytes()[chunk.offset : chunk.offset + chunk.length]
                assert tuple(torch.load(io.BytesIO(item), weights_only=True).shape) == chunk.sizes


@st.composite
def cut_tensors(draw):
    """A tensor, cuts along every axis, a box of it, and where the box goes in a larger array."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=0, max_size=4)))
    cuts = [draw(st.lists(st.integers(0, n), max_size=3)) for n in shape]
    low = [draw(st.integers(0, n)) for n in shape]
    sizes = [draw(st.integers(0, n - o)) for n, o in zip(shape, low)]
    axes = draw(st.permutations(range(len(shape))))
    return shape, cuts, tuple(low), tuple(sizes), axes, draw(st.sampled_from(list(DTYPES)))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cut_tensors(), window=st.sampled_from([16, 64, 4 << 20]), near=st.sampled_from([0, 40, 1 << 15]))
def test_any_box_of_any_cuts(case, window, near, tmp_path, monkeypatch):
    shape, cuts, low, sizes, axes, dtype = case
    array = bits(dtype, shape)
    write(tmp_path, {"w": (dtype, array, cuts)}, files=3, pad=3)
    expected = array[(*(slice(o, o + s) for o, s in zip(low, sizes)), ...)]
    with monkeypatch.context() as patch:
        patch.setattr(torch_dist_io, "_WINDOW", window)  # small tensors take the paths of large ones
        patch.setattr(torch_dist_io, "_NEAR", near)
        with open_torch_dist(tmp_path) as reader:
            assert same(reader.read("w", low, sizes), expected)
            # A destination in another order, with gaps.
            room = np.zeros([2 * sizes[a] + 1 for a in axes], array.dtype)
            view = room[(*(slice(1, 2 * sizes[a] + 1, 2) for a in axes), ...)].transpose(np.argsort(axes))
            assert reader.read("w", low, sizes, out=view) is view
            assert same(view, expected)
            assert np.count_nonzero(room) == np.count_nonzero(expected)


def test_strided_and_viewed_items(tmp_path):
    """What torch saves itself: transposed parameters, views of a larger storage, parameters."""
    base = torch.arange(24, dtype=torch.float32)
    cases = {
        "transposed": base.reshape(4, 6).t(),
        "permuted": base.reshape(2, 3, 4).permute(1, 2, 0),
        "view": base[4:16].reshape(3, 4),
        "parameter": torch.nn.Parameter(base.reshape(4, 6)),
        "fp8": base.reshape(4, 6).to(torch.float8_e4m3fn),
        "ones": base.reshape(1, 24, 1).transpose(0, 2),
    }
    data, records = bytearray(), []
    for key, tensor in cases.items():
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        shape = tuple(tensor.shape)
        chunk = ChunkRecord((0,) * len(shape), shape, "f", len(data), len(buffer.getvalue()))
        records.append(TensorRecord(key, "F8_E4M3" if key == "fp8" else "F32", shape, (chunk,)))
        data += buffer.getvalue()
    (tmp_path / "f").write_bytes(data)
    (tmp_path / ".metadata").write_bytes(metadata_bytes(records, []))
    with open_torch_dist(tmp_path) as reader:
        for key, tensor in cases.items():
            expected = torch_bits(tensor.detach(), reader.tensors[key].dtype)
            assert same(reader.read(key), expected), key
            low = tuple(n // 2 for n in expected.shape)
            assert same(reader.read(key, low), expected[tuple(slice(o, None) for o in low)]), key


@pytest.mark.parametrize("tensor", [torch.zeros(3).expand(4, 3), torch.zeros(4, 6)[:, ::2]])
def test_items_that_are_not_dense_are_refused(tmp_path, tensor):
    with pytest.raises(BridgeError, match="expected a dense one"):
        _read_item(tmp_path, tensor, "F32")


def test_the_item_must_be_what_metadata_says(tmp_path):
    with pytest.raises(BridgeError, match=r"holds F32 \(2, 3\), .metadata says BF16 \(2, 3\)"):
        _read_item(tmp_path, torch.zeros(2, 3), "BF16")
    with pytest.raises(BridgeError, match=r"holds F32 \(3, 2\)"):
        _read_item(tmp_path, torch.zeros(3, 2), "F32", (2, 3))
    with pytest.raises(BridgeError, match=r"a chunk of F32 \(1152921504606846976,\) in an item of"):
        _read_item(tmp_path, torch.zeros(2, 3), "F32", (1 << 60,))
    with pytest.raises(BridgeError, match="a list; expected one tensor"):
        _read_bytes(tmp_path, object_item(1), "F32", (1,))


def test_a_dtype_without_a_name_is_listed_and_not_read(tmp_path):
    """A training checkpoint may hold random states of uint64 beside the weights."""
    state = {"w": torch.ones(3), "rng": torch.ones(3, dtype=torch.uint64)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    with open_torch_dist(tmp_path) as reader:
        assert reader.tensors["rng"].dtype == "torch.uint64"
        assert reader.read("w").tolist() == [1, 1, 1]
        with pytest.raises(BridgeError, match=r"dtype torch\.uint64 is not one of"):
            reader.read("rng")


@pytest.fixture
def folder(tmp_path):
    """A root with one iteration, one tensor in four chunks over two files."""
    root = tmp_path / "ckpt"
    write(root / "iter_0000012", {"w": ("F32", bits("F32", (4, 6)), [[2], [3]])})
    (root / "latest_checkpointed_iteration.txt").write_text("12\n")
    return root


def test_finding_the_iteration(folder):
    for path in (folder, folder / "iter_0000012", str(folder)):
        with open_torch_dist(path) as reader:
            assert reader.iteration == 12
            assert reader.path == folder / "iter_0000012"
    (folder / "iter_0000012").rename(folder / "release")
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    assert open_torch_dist(folder).iteration is None
    for word in ("13", "../x", "", "9" * 60):
        (folder / "latest_checkpointed_iteration.txt").write_text(word)
        with pytest.raises(BridgeError):
            open_torch_dist(folder)
    with pytest.raises(BridgeError, match=r"neither \.metadata nor"):
        open_torch_dist(folder.parent)


def test_wrong_questions(folder):
    with open_torch_dist(folder) as reader:
        with pytest.raises(BridgeError, match="no tensor 'x'"):
            reader.read("x")
        with pytest.raises(BridgeError, match="no object"):
            reader.read_object("x")
        for low, sizes in [((0,), (1,)), ((0, 0), (5, 6)), ((-1, 0), (1, 1)), ((0, 0), (-1, 1))]:
            with pytest.raises(BridgeError, match="expected one inside"):
                reader.read("w", low, sizes)
        for out in (np.zeros((4, 6)), np.zeros((6, 4), np.float32)):
            with pytest.raises(BridgeError, match="expected a writable float32"):
                reader.read("w", out=out)


def test_common_pt_is_never_opened(folder, monkeypatch):
    (folder / "iter_0000012" / "common.pt").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with open_torch_dist(folder) as reader:
        assert reader.read("w").shape == (4, 6)


def test_files_must_be_there_and_inside(folder, tmp_path):
    iteration = folder / "iter_0000012"
    file = iteration / "__1_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(BridgeError, match="truncated"):
        open_torch_dist(folder)
    file.unlink()
    with pytest.raises(BridgeError, match="not there"):
        open_torch_dist(folder)
    (tmp_path / "outside").write_bytes(content)
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(BridgeError, match="leads out of the folder"):
        open_torch_dist(folder)
    file.unlink()
    file.write_bytes(content)
    for name in ("/etc/passwd", "../outside", "a/../../outside", "", "a\\b", "\0"):
        record = TensorRecord("w", "F32", (1,), (ChunkRecord((0,), (1,), name, 0, 1),))
        (iteration / ".metadata").write_bytes(metadata_bytes([record], []))
        with pytest.raises(BridgeError):
            open_torch_dist(folder)


@pytest.mark.parametrize(
    ("shape", "found", "message"),
    [
        ((4, 6), [((0, 0), (2, 6))], "missing or overlap"),
        ((4, 6), [((0, 0), (4, 3)), ((0, 2), (4, 3))], "overlaps"),
        ((4, 6), [((0, 0), (4, 6)), ((1, 0), (1, 6))], "missing or overlap"),
        ((4, 6), [((0, 0), (4, 7))], "leaves the shape"),
        ((4,), [], "missing"),
        ((4, 4), [((0, 0), (2, 2)), ((2, 2), (2, 2)), ((1, 1), (2, 2)), ((3, 3), (1, 4))], "leaves"),
        ((4, 4), [((0, 0), (2, 4)), ((1, 0), (1, 4)), ((3, 0), (1, 4))], "overlaps"),
    ],
)
def test_coverage(shape, found, message):
    with pytest.raises(ValueError, match=message):
        check_coverage(shape, [ChunkRecord(o, s, "f", 0, 0) for o, s in found])


@settings(max_examples=100, deadline=None)
@given(case=cut_tensors(), pairs=st.booleans(), data=st.data())
def test_coverage_of_any_cuts(case, pairs, data):
    shape, cuts = case[:2]
    found = [ChunkRecord(o, s, "f", 0, 0) for o, s in boxes(shape, cuts)]
    with pytest.MonkeyPatch.context() as patch:
        if pairs:
            patch.setattr("dsv4_bridge.store.torch_dist.index._MAX_GRID_CELLS", 0)
        check_coverage(shape, found)
        if len(found) > 1:
            i, j = data.draw(st.permutations(range(len(found))))[:2]
            moved = [*found[:j], found[i], *found[j + 1 :]]
            with pytest.raises(ValueError, match=r"overlap|missing"):
                check_coverage(shape, moved)


def test_many_experts_in_a_key_are_quick():
    found = [ChunkRecord((e, g * 8, 0), (1, 8, 4), "f", 0, 0) for e in range(384) for g in range(2 * 8)]
    check_coverage((384, 128, 4), found)


def test_threads_read_at_once_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist_io, "_OPEN_FILES", 2)
    array = bits("BF16", (64, 40))
    write(tmp_path, {"w": ("BF16", array, [list(range(64)), [20]])}, files=7)
    wrong = []
    with TorchDistReader(tmp_path) as reader:

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(60):
                row, rows = int(rng.integers(0, 60)), int(rng.integers(1, 4))
                if not same(reader.read("w", (row, 0), (rows, 40)), array[row : row + rows]):
                    wrong.append(row)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong
        assert len(reader.files._open) <= 2 + 6
    assert not reader.files._open


def test_only_the_wanted_rows_are_read(tmp_path, monkeypatch):
    array = bits("F32", (1024, 1024))
    write(tmp_path, {"w": ("F32", array, [[], []])}, files=1)
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: read.append(sum(map(len, b))) or preadv(fd, b, at))
    with open_torch_dist(tmp_path) as reader:
        reader.read("w", (5, 0), (3, 1024))
        assert sum(read) <= 3 * 4096 + 4096
        read.clear()
        reader.read("w", (5, 0), (3, 1024))
        assert read == [3 * 4096]  # the layout is known, the rows go where they belong
