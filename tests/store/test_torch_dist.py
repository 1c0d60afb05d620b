"""The torch_dist store without Megatron: what is written is what torch reads, and what is read is safe."""

import io
import itertools
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_bridge.dtypes import DTYPES
from dsv4_bridge.errors import BridgeError
from dsv4_bridge.store import pickles, torch_dist, torch_dist_io
from dsv4_bridge.store.torch_dist import TorchDistReader, open_torch_dist
from dsv4_bridge.store.torch_dist_frames import (
    COMMON_STATE_KEY,
    METADATA_JSON,
    ChunkRecord,
    ObjectRecord,
    TensorRecord,
    common_state_item,
    extra_state_item,
    metadata_bytes,
    object_item,
    tensor_frame,
)
from dsv4_bridge.store.torch_dist_index import METADATA_GLOBALS, check_coverage

COMMON = {"iteration": 7, "checkpoint_version": 3.0, "names": ["a", "a"], "deep": {"a": None, "b": True}}


def bits(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bit patterns; 0 or 1 for BOOL, which torch wants."""
    d = DTYPES[dtype]
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == "BOOL" else 256, (*shape, d.itemsize), np.uint8)
    return np.ascontiguousarray(raw).reshape(-1).view(d.numpy).reshape(shape)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits: random ones contain NaN."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def boxes(shape: tuple[int, ...], cuts: list[list[int]]):
    """(offsets, sizes) of the blocks between ``cuts`` along each axis."""
    edges = [sorted({0, n, *c}) for n, c in zip(shape, cuts)]
    for block in itertools.product(*(itertools.pairwise(e) for e in edges)):
        yield tuple(a for a, _ in block), tuple(b - a for a, b in block)


def write(
    folder: Path,
    tensors: dict[str, tuple[str, np.ndarray, list[list[int]]]],
    objects: tuple[str, ...] = ("a._extra_state/shard_0_1",),
    files: int = 2,
    pad: int = 0,
) -> Path:
    """A checkpoint by the pieces under test, its chunks dealt out over ``files`` in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    data = [bytearray() for _ in range(files)]
    turn = itertools.cycle(range(files))

    def put(item: bytes) -> tuple[str, int, int]:
        i = next(turn)
        at = len(data[i])
        data[i] += item + bytes(pad)
        return f"__{i}_0.distcp", at, len(item)

    records = []
    for key, (dtype, array, cuts) in tensors.items():
        chunks = []
        for offsets, sizes in boxes(array.shape, cuts) if array.size else [((0,) * array.ndim, array.shape)]:
            frame = tensor_frame(dtype, sizes)
            part = array[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))]
            chunks.append(ChunkRecord(offsets, sizes, *put(frame.head + part.tobytes() + frame.tail)))
        records.append(TensorRecord(key, dtype, array.shape, tuple(chunks)))
    things = [ObjectRecord(COMMON_STATE_KEY, *put(common_state_item(COMMON)))]
    extra = put(extra_state_item())
    things += [ObjectRecord(key, *extra) for key in objects]
    for i, content in enumerate(data):
        (folder / f"__{i}_0.distcp").write_bytes(content)
    (folder / "metadata.json").write_bytes(METADATA_JSON)
    (folder / ".metadata").write_bytes(metadata_bytes(records, things))
    return folder


def torch_bits(tensor: torch.Tensor, dtype: str) -> np.ndarray:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.view(DTYPES[dtype].numpy).reshape(tuple(tensor.shape))


# ---- writing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 5), (1, 6, 70), (3, 0, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_frame_is_a_torch_save_item(dtype, shape):
    array, frame = bits(dtype, shape), tensor_frame(dtype, shape)
    item = frame.head + array.tobytes() + frame.tail
    assert len(frame.head) % 64 == 0
    tensor = torch.load(io.BytesIO(item), weights_only=True)
    again = io.BytesIO()
    torch.save(tensor, again)
    theirs = torch.load(io.BytesIO(again.getvalue()), weights_only=True)
    assert tensor.dtype == getattr(torch, DTYPES[dtype].torch)
    assert tensor.shape == theirs.shape == shape
    assert tensor.stride() == theirs.stride() == torch.empty(shape).stride()
    assert same(torch_bits(tensor, dtype), array)
    # The same things said as torch says them.
    ours, real = (torch._C.PyTorchFileReader(io.BytesIO(b)) for b in (item, again.getvalue()))
    assert set(ours.get_all_records()) <= set(real.get_all_records())
    assert ours.get_record("version") == real.get_record("version")
    plain = [r.get_record("data.pkl") for r in (ours, real)]
    assert len({repr(_Shape.of(p)) for p in plain}) == 1


class _Shape(pickle.Unpickler):
    """A pickle as nested tuples of its global names and arguments."""

    def find_class(self, module, name):
        return lambda *args: (module, name, args)

    def persistent_load(self, pid):
        return tuple(
            p(
                (),
            )
            if callable(p)
            else p
            for p in pid
        )

    @classmethod
    def of(cls, data):
        value = cls(io.BytesIO(data)).load()
        return tuple(
            v(
                (),
            )
            if callable(v)
            else v
            for v in value[2]
        ), value[:2]


@pytest.mark.parametrize("shape", [(65536, 65536), (1, 40000, 80000), (1 << 33,)])
def test_frame_beyond_4_gib(shape, tmp_path):
    """A sparse file stands for the data: torch maps it, our reader finds both ends of it."""
    frame = tensor_frame("U8", shape)
    n = int(np.prod(shape))
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        file.write(frame.head + b"\1")
        file.seek(len(frame.head) + n - 1)
        file.write(b"\2" + frame.tail)
    tensor = torch.load(path, weights_only=True, mmap=True)
    assert tuple(tensor.shape) == shape
    assert tensor.flatten()[0] == 1 and tensor.flatten()[-1] == 2
    length = path.stat().st_size
    path.rename(tmp_path / "__0_0.distcp")
    chunk = ChunkRecord((0,) * len(shape), shape, "__0_0.distcp", 0, length)
    (tmp_path / ".metadata").write_bytes(metadata_bytes([TensorRecord("x", "U8", shape, (chunk,))], []))
    with open_torch_dist(tmp_path) as reader:
        last = tuple(s - 1 for s in shape)
        assert reader.read("x", last, (1,) * len(shape)).item() == 2
        assert reader.read("x", (0,) * len(shape), (1,) * len(shape)).item() == 1


def test_bytes_do_not_depend_on_the_process_or_the_order():
    script = """
import hashlib, sys
from dsv4_bridge.store.torch_dist_frames import *
h = hashlib.sha256()
for d in ("BF16", "F32", "F8_E4M3", "F8_E8M0"):
    f = tensor_frame(d, (3, 70))
    h.update(f.head + f.tail)
h.update(extra_state_item() + common_state_item({"a": "a", "b": ["a", 1.0]}))
t = [TensorRecord("k" + str(i), "BF16", (2, 3), tuple(ChunkRecord((j, 0), (1, 3), "f" + "0", 9 * j, 9)
     for j in range(2))) for i in range(4)]
o = [ObjectRecord("o" + str(i), "f" + str(0), 5, 5) for i in range(4)]
if sys.argv[1] == "1":
    t, o = t[::-1], o[::-1]
h.update(metadata_bytes(t, o))
print(h.hexdigest())
"""
    env = os.environ | {"PYTHONHASHSEED": "random"}
    runs = [
        subprocess.run([sys.executable, "-c", script, n], env=env, capture_output=True, text=True, check=True)
        for n in "01"
    ]
    assert runs[0].stdout == runs[1].stdout
    shared = "x" * 3
    assert object_item({"p": shared, "q": shared}) == object_item({"p": "xxx", "q": "".join("xxx")})


def test_metadata_is_read_by_torch_and_by_older_torch(tmp_path):
    write(tmp_path, {"w": ("BF16", bits("BF16", (4, 6)), [[2], [3]])})
    loaded = pickle.loads((tmp_path / ".metadata").read_bytes())
    assert [c.offsets for c in loaded.state_dict_metadata["w"].chunks] == [(0, 0), (0, 3), (2, 0), (2, 3)]
    assert loaded.planner_data is None
    table = METADATA_GLOBALS
    whole = pickles.decode((tmp_path / ".metadata").read_bytes(), table, "x")
    # Releases before the strides were added unpack exactly five fields.
    assert len(whole.field("state_dict_metadata")["w"].field("properties").state) == 5


def test_writing_refuses_what_could_not_be_read():
    with pytest.raises(BridgeError, match="Path"):
        common_state_item({"args": {"load": Path("x")}})
    with pytest.raises(BridgeError, match="two chunks at"):
        chunk = ChunkRecord((0,), (1,), "f", 0, 1)
        metadata_bytes([TensorRecord("w", "F32", (2,), (chunk, chunk))], [])
    with pytest.raises(BridgeError, match="twice"):
        metadata_bytes([], [ObjectRecord("o", "f", 0, 1)] * 2)
    with pytest.raises(BridgeError, match="F4"):
        tensor_frame("F4", (2,))


# ---- reading ---------------------------------------------------------------------------------------------


def test_every_dtype_three_readers(tmp_path):
    tensors = {f"w.{d}": (d, bits(d, (4, 6), i), [[i % 4], [2, 5]]) for i, d in enumerate(DTYPES)}
    tensors |= {"scalar": ("F32", bits("F32", ()), []), "none": ("BF16", bits("BF16", (0, 3)), [])}
    write(tmp_path, tensors, pad=100)
    state = {k: torch.empty(a.shape, dtype=getattr(torch, DTYPES[d].torch)) for k, (d, a, _) in tensors.items()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    with open_torch_dist(tmp_path) as reader:
        assert reader.tensors.keys() == tensors.keys()
        assert reader.objects == {COMMON_STATE_KEY, "a._extra_state/shard_0_1"}
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


def _read_item(folder: Path, value, dtype: str, shape=None):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return _read_bytes(folder, buffer.getvalue(), dtype, tuple(value.shape) if shape is None else shape)


def _read_bytes(folder: Path, item: bytes, dtype: str, shape: tuple[int, ...]):
    chunk = ChunkRecord((0,) * len(shape), shape, "f", 0, len(item))
    (folder / "f").write_bytes(item)
    (folder / ".metadata").write_bytes(metadata_bytes([TensorRecord("w", dtype, shape, (chunk,))], []))
    with open_torch_dist(folder) as reader:
        return reader.read("w")


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
            patch.setattr("dsv4_bridge.store.torch_dist_index._MAX_GRID_CELLS", 0)
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
        assert len(reader._files._open) <= 2 + 6
    assert not reader._files._open


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


# ---- hostile and damaged files ---------------------------------------------------------------------------


class _Gadget:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def _marker(path: Path) -> str:
    return f"open({str(path)!r}, 'w').close()"


@pytest.mark.parametrize("place", [".metadata", "tensor", "object"])
@pytest.mark.parametrize("kind", ["system", "eval", "exec", "torch.load", "getattr", "nested"])
def test_code_is_refused_and_not_run(tmp_path, kind, place):
    marker = tmp_path / "ran"
    gadget = {
        "system": _Gadget(os.system, f"touch {marker}"),
        "eval": _Gadget(eval, _marker(marker)),
        "exec": _Gadget(exec, _marker(marker)),
        "torch.load": _Gadget(torch.load, str(marker)),
        "getattr": _Gadget(getattr, _Gadget(getattr, os, "path"), "join"),
        "nested": _Gadget(pickle.loads, pickle.dumps(_Gadget(os.system, f"touch {marker}"))),
    }[kind]
    if kind == "getattr":  # modules do not pickle
        gadget = _Gadget(getattr, os.system, "__globals__")
    with pytest.raises(BridgeError, match=r"refusing to run code|damaged"):
        _plant(tmp_path, gadget, place)
    assert not marker.exists()


def _plant(folder: Path, gadget, place: str) -> None:
    if place == "tensor":
        _read_item(folder, gadget, "F32", (2,))
        return
    write(folder, {"w": ("F32", bits("F32", (2,)), [[]])})
    if place == ".metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(gadget))
        open_torch_dist(folder)
        return
    buffer = io.BytesIO()
    torch.save([gadget], buffer)
    (folder / "o").write_bytes(buffer.getvalue())
    record = ObjectRecord("o", "o", 0, len(buffer.getvalue()))
    (folder / ".metadata").write_bytes(metadata_bytes([], [record]))
    open_torch_dist(folder).read_object("o")


def test_a_refusal_names_the_global(tmp_path):
    write(tmp_path, {})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Gadget(os.system, "true")))
    with pytest.raises(BridgeError, match=r"posix\.system.*refusing to run code"):
        open_torch_dist(tmp_path)


def test_classes_of_torch_are_not_touched(tmp_path):
    """BUILD on a class sets attributes of the class; here a global is only a name."""
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    evil = b"\x80\x04" + name + b"N}X\x03\x00\x00\x00badK\x01s\x86b."
    (tmp_path / ".metadata").write_bytes(evil)
    with pytest.raises(BridgeError, match="damaged"):
        open_torch_dist(tmp_path)
    assert not hasattr(dcp.metadata.Metadata, "bad")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",  # 2^63 bytes announced
        b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x04X\xff\xff\xff\xff.",
        b"\x80\x04\x8b\xff\xff\xff\x7f.",
        b"\x80\x04Nr\xff\xff\xff\xff.",  # a memo slot far out
        b"\x80\x04\x95" + b"\xff" * 8 + b".",
        b"\x80\x04" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x04)" + b"\x85" * 300_000 + b".",
        b"\x80\x04)" + b"\x85" * 300_000 + b"}" + b"h\0" + b".",
        b"\x80\x04}" + b")" + b"\x85" * 300_000 + b"Ns.",  # hashing it would overflow the C stack
        b"\x80\x04]\x94" + b"(" + b"h\0" * 64 + b"e.",
        b"\x80\x09N.",
    ],
)
def test_bombs(tmp_path, data):
    (tmp_path / ".metadata").write_bytes(data)
    with pytest.raises(BridgeError):
        open_torch_dist(tmp_path)


def test_an_object_that_doubles_itself_is_refused(tmp_path):
    value: list = []
    for _ in range(50):
        value = [value, value]
    buffer = io.BytesIO()
    torch.save([value], buffer)
    (tmp_path / "o").write_bytes(buffer.getvalue())
    record = ObjectRecord("o", "o", 0, len(buffer.getvalue()))
    (tmp_path / ".metadata").write_bytes(metadata_bytes([], [record]))
    with pytest.raises(BridgeError, match="too large"):
        open_torch_dist(tmp_path).read_object("o")


def test_a_large_metadata_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist, "MAX_METADATA_BYTES", 10)
    write(tmp_path, {})
    with pytest.raises(BridgeError, match="at most 10 for"):
        open_torch_dist(tmp_path)


def _damaged(data: st.DataObject, content: bytes) -> bytes:
    """``content`` with bytes changed, taken out, put in, or its end cut off."""
    out = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(out) - 1))
        kind = data.draw(st.sampled_from(["set", "flip", "delete", "insert", "cut"]))
        if kind == "set":
            out[at] = data.draw(st.integers(0, 255))
        elif kind == "flip":
            out[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "delete":
            del out[at : at + data.draw(st.integers(1, 20))]
        elif kind == "insert":
            out[at:at] = data.draw(st.binary(min_size=1, max_size=12))
        else:
            del out[at + 1 :]
        if not out:
            break
    return bytes(out)


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data(), real=st.booleans())
def test_damaged_metadata(tmp_path, data, real):
    write(tmp_path, {"w": ("F32", bits("F32", (4, 6)), [[2], [3]]), "b": ("BF16", bits("BF16", (3,)), [[]])})
    content = (tmp_path / ".metadata").read_bytes()
    if real:  # as torch pickles it, with the plans of a training save
        content = pickle.dumps(pickle.loads(content))
    (tmp_path / ".metadata").write_bytes(_damaged(data, content))
    try:
        with open_torch_dist(tmp_path) as reader:
            for key in reader.tensors:
                if np.prod(reader.tensors[key].shape) < 1e6:
                    reader.read(key)
            for key in reader.objects:
                reader.read_object(key)
    except BridgeError as error:
        assert str(error).encode()


@FUZZ
@given(data=st.data(), dtype=st.sampled_from(["F32", "F8_E4M3"]), ours=st.booleans())
def test_damaged_items(tmp_path, data, dtype, ours):
    array, frame = bits(dtype, (3, 5)), tensor_frame(dtype, (3, 5))
    item = frame.head + array.tobytes() + frame.tail
    if not ours:
        buffer = io.BytesIO()
        torch.save(torch.load(io.BytesIO(item)), buffer)
        item = buffer.getvalue()
    try:
        assert _read_bytes(tmp_path, _damaged(data, item), dtype, (3, 5)).shape == (3, 5)
    except BridgeError as error:
        assert str(error).encode()


def test_compressed_and_big_endian_items_are_refused(tmp_path):
    import zipfile

    frame = tensor_frame("F32", (64,))
    with zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", b"N.")
        z.writestr("archive/data/0", bytes(256))
    with pytest.raises(BridgeError, match="compressed"):
        _read_bytes(tmp_path, (tmp_path / "z").read_bytes(), "F32", (64,))
    big = frame.head.replace(b"little", b"bigbig")
    with pytest.raises(BridgeError, match="big-endian"):
        _read_bytes(tmp_path, big + bytes(256) + frame.tail, "F32", (64,))


def test_reading_needs_neither_megatron_nor_torch(tmp_path):
    write(tmp_path, {"w": ("F32", bits("F32", (4, 6)), [[2], [3]])})
    script = (
        "import sys; import dsv4_bridge.store.torch_dist as t, dsv4_bridge.store.torch_dist_frames as f;"
        "f.tensor_frame('BF16', (3,)); t.open_torch_dist(sys.argv[1]).read('w');"
        "print([m for m in sys.modules if m.split('.')[0] in ('megatron', 'torch')])"
    )
    run = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "[]"
