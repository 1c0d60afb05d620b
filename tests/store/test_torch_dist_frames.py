"""What the torch_dist store writes is what torch reads, without Megatron."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_dist_tools import bits, same, torch_bits, write

from dsv4_bridge.errors import BridgeError
from dsv4_bridge.spec.dtypes import DTYPES
from dsv4_bridge.store.torch_dist import pickle_reader as pickles
from dsv4_bridge.store.torch_dist.frames import (
    ChunkRecord,
    ObjectRecord,
    TensorRecord,
    common_state_item,
    metadata_bytes,
    object_item,
    tensor_frame,
)
from dsv4_bridge.store.torch_dist.index import METADATA_GLOBALS
from dsv4_bridge.store.torch_dist.reader import open_torch_dist

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
from dsv4_bridge.store.torch_dist.frames import *
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
