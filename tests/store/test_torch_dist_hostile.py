"""Hostile and damaged torch_dist files are refused and never run."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_dist_tools import _read_bytes, _read_item, bits, write

from dsv4_bridge.errors import BridgeError
from dsv4_bridge.store.torch_dist import reader as torch_dist
from dsv4_bridge.store.torch_dist.frames import ObjectRecord, metadata_bytes, tensor_frame
from dsv4_bridge.store.torch_dist.reader import open_torch_dist

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
        "import sys; import dsv4_bridge.store.torch_dist.reader as t, dsv4_bridge.store.torch_dist.frames as f;"
        "f.tensor_frame('BF16', (3,)); t.open_torch_dist(sys.argv[1]).read('w');"
        "print([m for m in sys.modules if m.split('.')[0] in ('megatron', 'torch')])"
    )
    run = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "[]"
