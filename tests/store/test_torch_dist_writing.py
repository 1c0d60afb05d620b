"""What is composed without torch is what torch's own classes and torch.save would have written."""

import io
import pickle
import pickletools
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader, filesystem
from torch.distributed.checkpoint import metadata as dcp

from dsv4_bridge.errors import BridgeError
from dsv4_bridge.spec.dtypes import DTYPES
from dsv4_bridge.store.torch_dist import pickle_reader as pickles
from dsv4_bridge.store.torch_dist import pickle_writer
from dsv4_bridge.store.torch_dist.frames import (
    ChunkRecord,
    ObjectRecord,
    TensorRecord,
    common_state_item,
    extra_state_item,
    metadata_bytes,
    object_item,
)
from dsv4_bridge.store.torch_dist.index import decode_index
from dsv4_bridge.store.torch_dist.reader import open_torch_dist


def by_torch(tensors, objects) -> dcp.Metadata:
    """The same records said by the constructors of torch."""
    entries, storage = {}, {}
    for t in sorted(tensors, key=lambda t: t.key):
        properties = dcp.TensorProperties(dtype=getattr(torch, DTYPES[t.dtype].torch))
        chunks = []
        for c in sorted(t.chunks, key=lambda c: c.offsets):
            chunks.append(dcp.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)))
            index = dcp.MetadataIndex(t.key, c.offsets)
            storage[index] = filesystem._StorageInfo(c.file, c.offset, c.length)
        entries[t.key] = dcp.TensorStorageMetadata(properties, torch.Size(t.global_shape), chunks)
    for o in sorted(objects, key=lambda o: o.key):
        entries[o.key] = dcp.BytesStorageMetadata()
        storage[dcp.MetadataIndex(o.key)] = filesystem._StorageInfo(o.file, o.offset, o.length)
    return dcp.Metadata(entries, storage_data=storage, storage_meta=dcp.StorageMeta(), version="1.0.0")


def fields(value):
    """Every class, attribute, value and order of a structure, as nested tuples."""
    kind = type(value).__qualname__
    if isinstance(value, dict):
        return kind, [(fields(k), fields(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return kind, [fields(v) for v in value]
    if hasattr(value, "__dict__"):
        return kind, [(k, fields(v)) for k, v in vars(value).items()]
    return kind, repr(value)


names = st.text(st.characters(codec="utf-8"), max_size=12)
numbers = st.integers(0, 300) | st.integers(0, (1 << 63) - 1)


@st.composite
def records(draw):
    keys = draw(st.lists(names, unique=True, max_size=8))
    files = draw(st.lists(names, min_size=1, max_size=3))
    place = st.tuples(st.sampled_from(files), numbers, numbers)
    tensors, objects = [], []
    for key in keys:
        if draw(st.booleans()):
            objects.append(ObjectRecord(key, *draw(place)))
            continue
        dims = st.lists(numbers, min_size=(n := draw(st.integers(0, 4))), max_size=n).map(tuple)
        offsets = draw(st.lists(dims, unique=True, max_size=5))
        chunks = tuple(ChunkRecord(o, draw(dims), *draw(place)) for o in offsets)
        tensors.append(TensorRecord(key, draw(st.sampled_from(list(DTYPES))), draw(dims), chunks))
    return tensors, objects


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=records())
def test_metadata_is_what_the_classes_of_torch_hold(case):
    data, expected = metadata_bytes(*case), by_torch(*case)
    loaded = pickle.loads(data)
    assert loaded == expected
    assert fields(loaded) == fields(pickle.loads(pickle.dumps(expected)))
    assert data == metadata_bytes(case[0][::-1], case[1][::-1])
    assert max(op.proto for op, _, _ in pickletools.genops(data)) == 2


@pytest.mark.parametrize("count", [3, 250, 2000])
def test_more_shared_values_than_a_memo_opcode_has_room_for(tmp_path, count):
    chunks = tuple(ChunkRecord((i, 0), (1, 2), f"__{i % 7}_0.distcp", 1000 * i, 1000) for i in range(count))
    tensors = [TensorRecord("w", "BF16", (count, 2), chunks)]
    objects = [ObjectRecord(f"e/shard_{i}_{count}", "__0_1.distcp", 0, 700) for i in range(count)]
    data = metadata_bytes(tensors, objects)
    (tmp_path / ".metadata").write_bytes(data)
    loaded, expected = FileSystemReader(tmp_path).read_metadata(), by_torch(tensors, objects)
    assert fields(loaded.state_dict_metadata) == fields(pickle.loads(pickle.dumps(expected.state_dict_metadata)))
    assert loaded.storage_data == expected.storage_data
    index = decode_index(data, "x")
    assert index.tensors == {"w": tensors[0]}
    assert list(index.objects.values()) == sorted(objects, key=lambda o: o.key)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(1 << 2000), 1 << 2000) | st.floats() | names,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(names | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=plain)
def test_objects_are_what_torch_and_we_read(tmp_path, payload):
    item = object_item(payload)
    for only in (True, False):
        assert fields(torch.load(io.BytesIO(item), weights_only=only)) == fields([payload])
    assert fields(_read(tmp_path, item)) == fields(payload)
    assert zipfile.ZipFile(io.BytesIO(item)).testzip() is None  # the checksums are right
    theirs = io.BytesIO()
    torch.save([payload], theirs)
    ours, real = (torch._C.PyTorchFileReader(io.BytesIO(b)) for b in (item, theirs.getvalue()))
    assert set(ours.get_all_records()) <= set(real.get_all_records())


def _read(folder: Path, item: bytes):
    (folder / "f").write_bytes(item)
    (folder / ".metadata").write_bytes(metadata_bytes([], [ObjectRecord("o", "f", 0, len(item))]))
    with open_torch_dist(folder) as reader:
        return reader.read_object("o")


def test_every_width_of_integer(tmp_path):
    edges = [s * (1 << n) + d for n in (0, 7, 8, 15, 16, 31, 32, 63, 64, 2000) for s in (1, -1) for d in (-1, 0, 1)]
    assert torch.load(io.BytesIO(object_item(edges)), weights_only=True) == [edges]
    assert _read(tmp_path, object_item(edges)) == edges


def test_the_extra_state_is_an_empty_tensor(tmp_path):
    item = extra_state_item()
    for only in (True, False):
        (tensor,) = torch.load(io.BytesIO(item), weights_only=only)
        assert (tensor.dtype, tuple(tensor.shape), tensor.stride()) == (torch.uint8, (0,), (1,))
    array = _read(tmp_path, item)
    assert (array.dtype, array.shape) == (np.uint8, (0,))
    assert zipfile.ZipFile(io.BytesIO(item)).testzip() is None


def test_the_common_state_is_read_by_torch():
    state = {"iteration": 0, "checkpoint_version": 3.0, "content_metadata": {"a": [None, (1, "ü")], 3: -1}}
    assert torch.load(io.BytesIO(common_state_item(state)), weights_only=True) == [state]


class Text(str):
    """A string that is more than a string."""


ENDLESS: list = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"x", r"object\['a'\]\[0\] is a bytes"),
        ({1}, "is a set"),
        (Path("x"), "is a PosixPath"),
        (Text("x"), "is a Text"),
        (torch.Size((1,)), "is a Size"),
        (np.float32(1), "is a float32"),
        (np.empty(0, np.uint8), "is a ndarray"),
        (torch.ones(1), "is a Tensor"),
        ({True: 1}, "is a dict"),
        ({1.0: 1}, "is a dict"),
        ({(): 1}, "is a dict"),
        (1j, "is a complex"),
        (len, "is a builtin_function_or_method"),
        ("\ud800", "not Unicode"),
        (1 << 2040, "an integer of 2041 bits"),
        (ENDLESS, "more than 64 deep"),
    ],
)
def test_only_plain_data_is_written(value, message):
    with pytest.raises(BridgeError, match=message):
        object_item({"a": [value]})


def test_what_nests_as_deep_as_may_be_is_read(tmp_path):
    value: list = []
    for _ in range(64):
        value = [value]
    assert _read(tmp_path, object_item(value)) == value
    with pytest.raises(BridgeError, match="64 deep"):
        object_item([value])


def test_a_key_that_is_not_unicode_is_refused():
    with pytest.raises(BridgeError, match="not Unicode"):
        metadata_bytes([], [ObjectRecord("\udcff", "f", 0, 1)])


@given(st.integers() | st.integers(-(1 << 2030), 1 << 2030))
def test_integers_are_written_as_python_does(value):
    code = pickle_writer.dumps(pickle_writer.integer(value))
    assert pickle.loads(code) == value
    assert len(code) <= len(pickle.dumps(value, protocol=2)) + 1
    assert pickles.decode(code, {}, "x") == value


def test_a_large_checkpoint_takes_little_memory():
    """A tenth of the largest released model: 9,400 chunks, 4,700 objects at one place."""
    tensors = [
        TensorRecord(
            f"decoder.layers.{n}.mlp.experts.experts.linear_fc1.weight",
            "BF16",
            (768, 6144, 7168),
            tuple(ChunkRecord((e, 0, 0), (1, 6144, 7168), f"__0_{n}.distcp", e << 28, 1 << 28) for e in range(768)),
        )
        for n in range(12)
    ]
    objects = [ObjectRecord(f"decoder.{n}/shard_{e}_384", "f", 0, 700) for n in range(12) for e in range(384)]
    tracemalloc.start()
    try:
        data = metadata_bytes(tensors, objects)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data) < 100 * (12 * 768 + 12 * 384)
    assert peak < 6 * len(data)


def test_importing_and_exporting_need_no_torch(tmp_path):
    script = """
import sys
from pathlib import Path
from dsv4_bridge import export_hf, import_hf, make_toy
root = Path(sys.argv[1])
make_toy(root / "hf")
import_hf(root / "hf", root / "megatron")
export_hf(root / "megatron", root / "again", root / "hf")
export_hf(root / "megatron", root / "bf16", encoding="bf16")
print([m for m in sys.modules if m.split(".")[0] in ("megatron", "torch")])
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.stdout.strip().endswith("[]"), run.stdout + run.stderr
    assert (tmp_path / "megatron" / "iter_0000000" / ".metadata").is_file()
