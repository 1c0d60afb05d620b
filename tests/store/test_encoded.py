"""Matrices of a folder as they are stored, against the same decoded."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from dsv4_bridge.codec.multiply import EncodedMatrix
from dsv4_bridge.errors import BridgeError
from dsv4_bridge.spec.plan import Item
from dsv4_bridge.store.direct import DirectReader, aligned_memory
from dsv4_bridge.store.encoded import infos_of, matrix_of, plain_matrix, whole
from dsv4_bridge.store.hf import open_hf
from dsv4_bridge.store.values import HFValues, Scratch


def stored(values: HFValues, item: Item) -> EncodedMatrix:
    """A matrix as it lies in its folder."""
    bound, reader = values.checkpoint.bound[item.name], DirectReader(values.checkpoint.folder.path)
    infos = infos_of(bound, whole(item))
    parts = iter(reader.read(infos, aligned_memory(reader.size(infos))))
    reader.close()
    return matrix_of(bound, whole(item), parts)


def test_every_matrix_of_a_toy(toy_flash: Path) -> None:
    checkpoint, rng = open_hf(toy_flash), np.random.default_rng(0)
    values, seen = HFValues(checkpoint), set()
    for item in checkpoint.plan.items:
        if len(item.shape) != 2 or item.row.encoding == "int":
            continue
        stripes = [s.copy() for s in values.stripes(item, 0, item.shape[0], Scratch())]
        bits = np.concatenate(stripes)
        exact = bits if bits.dtype == np.float32 else (bits.astype(np.uint32) << 16).view(np.float32)
        matrix = stored(values, item)
        seen.add(matrix.encoding)
        assert matrix.shape == item.shape
        assert (matrix.decode() == exact).all()
        assert (plain_matrix(values, whole(item)).decode() == exact).all()
        # A power of two in one column: nothing is rounded.
        x = np.zeros((1, item.shape[1]), np.float32)
        column = int(rng.integers(item.shape[1]))
        x[0, column] = 0.5
        assert (matrix.multiply(x)[0] == exact[:, column] / 2).all()
    assert seen >= {"mxfp4", "fp8", "bf16"}
    checkpoint.close()


def test_a_nan_code_is_named(toy_flash: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(toy_flash, copy)
    name = "layers.0.attn.wq_a.weight"
    checkpoint = open_hf(copy)
    place = checkpoint.folder.extent(checkpoint.bound[name].weight)
    file = Path(f"/proc/self/fd/{place[0]}").resolve()
    checkpoint.close()
    with open(file, "r+b") as stream:
        stream.seek(place[1] + 5)
        stream.write(b"\xff")
    checkpoint = open_hf(copy)
    item = checkpoint.plan.by_name[name]
    matrix = stored(HFValues(checkpoint), item)
    with pytest.raises(BridgeError, match=rf"{name} \(fp8\): row 0, column 5: FP8 code is 0xFF"):
        matrix.multiply(np.zeros((1, item.shape[1]), np.float32))
    checkpoint.close()
