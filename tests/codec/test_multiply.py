"""Multiplying by encoded weights against decoding them by the definition and multiplying in float64."""

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv4_bridge
from dsv4_bridge.codec import CodecError, reference
from dsv4_bridge.codec.multiply import EncodedMatrix, multiply
from dsv4_bridge.errors import BridgeError
from dsv4_bridge.spec.encodings import ALLOWED, ENCODINGS

# What the linear maps of a model that is computed may be stored as.
NAMES = tuple(name for name in ENCODINGS if name in (*ALLOWED["linear"], *ALLOWED["expert"]))
LEGAL = {"mxfp4": (0, 252), "fp8": (3, 246), "fp8_f32": (12, 240)}


def weight(name: str, shape: tuple[int, int], rng: np.random.Generator, spread: int = 12) -> EncodedMatrix:
    """Every kind of code under scales of 2^-spread to 2^spread."""
    how = ENCODINGS[name]
    if name in ("bf16", "f32"):
        values = np.ldexp(rng.normal(0, 1, shape), rng.integers(-spread, spread + 1, shape)).astype(np.float32)
        return EncodedMatrix(name, values if name == "f32" else (values.view(np.uint32) >> 16).astype(np.uint16))
    codes = rng.integers(0, 256, how.weight_shape(shape), dtype=np.uint8)
    if name != "mxfp4":
        codes[(codes & 0x7F) == 0x7F] = 0x80
    low, high = LEGAL[name]
    scale = rng.integers(max(low, 127 - spread), min(high, 127 + spread) + 1, how.scale_shape(shape)).astype(np.uint8)
    if name == "fp8_f32":
        return EncodedMatrix(
            name, codes, np.ldexp(rng.uniform(1, 2, scale.shape), scale.astype(int) - 127).astype(np.float32)
        )
    return EncodedMatrix(name, codes, scale)


def decoded(w: EncodedMatrix) -> np.ndarray:
    """By the definition, float64."""
    if w.encoding == "f32":
        return w.codes.astype(np.float64)
    if w.scale is None:
        return (w.codes.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    decode = reference.decode_mxfp4 if w.encoding == "mxfp4" else reference.decode_fp8
    return decode(torch.from_numpy(w.codes), torch.from_numpy(w.scale)).double().numpy()


def holds(w: EncodedMatrix, x: np.ndarray, y: np.ndarray) -> None:
    """The bound of the module's documentation, with float64's own error left to spare by its factor n."""
    wide, exact = x.astype(np.float64), decoded(w)
    roundings, u = 8 * -(-w.shape[1] // 128) + 5, 2.0**-24
    bound = roundings * u / (1 - roundings * u) * (np.abs(wide) @ np.abs(exact).T)
    bound += roundings * w.shape[1] * 2.0**-149
    assert (np.abs(y - wide @ exact.T) <= bound).all()


shapes = st.tuples(st.integers(1, 300), st.integers(1, 400))


@pytest.mark.parametrize("name", NAMES)
@given(shape=shapes, tokens=st.integers(1, 19), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_is_what_decoding_and_multiplying_gives(name, shape, tokens, seed):
    rng = np.random.default_rng(seed)
    rows, columns = shape if name != "mxfp4" else (shape[0], -(-shape[1] // 32) * 32)
    w = weight(name, (rows, columns), rng)
    x = rng.normal(0, 1, (tokens, columns)).astype(np.float32)
    y = multiply(x, name, w.codes, w.scale)
    assert y.shape == (tokens, rows)
    assert y.dtype == np.float32
    holds(w, x, y)


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_gives_the_same_bits_alone_and_with_any_threads(name):
    rng = np.random.default_rng(1)
    w = weight(name, (1003, 1056), rng)
    x = rng.normal(0, 1, (17, 1056)).astype(np.float32)
    y = w.multiply(x)
    for tokens in (1, 2, 3, 4, 5, 8, 9):
        for threads in (1, 2, 3):
            assert w.multiply(x[:tokens], threads=threads).tobytes() == y[:tokens].tobytes()
    out = np.full((17, 1003), np.nan, np.float32)
    assert w.multiply(x, out) is out
    assert out.tobytes() == y.tobytes()


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("name", ["mxfp4", "fp8", "fp8_f32"])
def test_every_code_at_every_scale(name, tokens):
    """With x a unit vector, y is a column of the decoded weight, to the last bit where x is a power of two."""
    low, high = LEGAL[name]
    scale_bytes = np.arange(low, high + 1, dtype=np.uint8)
    if name == "mxfp4":  # row E: all codes at scale E
        codes = np.tile(np.arange(256, dtype=np.uint8), (len(scale_bytes), 1))
        w = EncodedMatrix(name, codes, np.repeat(scale_bytes[:, None], 16, axis=1))
    else:  # a block of 128 x 128 a scale: its first row holds the former half of all codes, its second the latter
        codes = np.zeros((2, 128 * len(scale_bytes)), np.uint8)
        codes[:] = np.tile(np.arange(256, dtype=np.uint8).reshape(2, 128), (1, len(scale_bytes)))
        codes[(codes & 0x7F) == 0x7F] = 0
        factors = np.ldexp(1.7, scale_bytes.astype(int) - 127).astype(np.float32)[None]
        w = EncodedMatrix(name, codes, scale_bytes[None] if name == "fp8" else factors)
    exact, columns = decoded(w), w.shape[1]
    step = 37 if name == "mxfp4" else 331  # relatively prime to 128: all columns of blocks, in turn
    for column in [*range(0, columns, step), *range(min(columns, 128))]:
        x = np.zeros((tokens, columns), np.float32)
        x[-1, column] = 1
        y = w.multiply(x)
        assert (y[-1] == exact[:, column]).all()
        assert not y[:-1].any()
    x = np.zeros((tokens, columns), np.float32)
    chosen = np.random.default_rng(2).integers(0, columns, 1)
    x[0, chosen] = -(2.0**-20)  # products that are subnormal or vanish are rounded as float32 is
    with np.errstate(under="ignore"):
        assert (w.multiply(x)[0] == (exact[:, chosen[0]].astype(np.float32) * np.float32(-(2.0**-20)))).all()


@pytest.mark.parametrize("name", NAMES)
def test_from_the_least_to_the_greatest(name):
    rng = np.random.default_rng(3)
    w = weight(name, (130, 256), rng, spread=60)
    x = np.ldexp(rng.normal(0, 1, (3, 256)), rng.integers(-60, 50, (3, 256))).astype(np.float32)
    holds(w, x, w.multiply(x))
    tiny = np.ldexp(rng.normal(0, 1, (3, 256)), rng.integers(-149, -100, (3, 256))).astype(np.float32)
    holds(w, tiny, w.multiply(tiny))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_in_x_stays_in_its_row(name):
    rng = np.random.default_rng(4)
    w = weight(name, (9, 160), rng)
    x = rng.normal(0, 1, (5, 160)).astype(np.float32)
    sound = w.multiply(x)
    x[2, 159] = np.inf
    x[3, 0] = np.nan
    y = w.multiply(x)
    assert not np.isfinite(y[2:4]).any()
    assert (y[[0, 1, 4]] == sound[[0, 1, 4]]).all()


@pytest.mark.parametrize("at", [(0, 0), (130, 299), (129, 256), (7, 130)])
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_refused(code, at):
    rng = np.random.default_rng(5)
    w = weight("fp8", (131, 300), rng)
    w.codes[at] = code
    x = np.zeros((2, 300), np.float32)
    with pytest.raises(CodecError, match=f"row {at[0]}, column {at[1]}: FP8 code is 0x{code:02X}"):
        w.multiply(x)
    named = EncodedMatrix("fp8", w.codes, w.scale, "layers.0.attn.wq_a.weight")
    for call in (lambda: named.multiply(x), named.decode):
        with pytest.raises(BridgeError, match=rf"layers.0.attn.wq_a.weight \(fp8\): row {at[0]}, column {at[1]}: FP8"):
            call()


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "fp8_f32"])
def test_illegal_scales_are_refused(name):
    rng = np.random.default_rng(6)
    for bad in {"mxfp4": (253, 255), "fp8": (0, 2, 247, 255), "fp8_f32": (np.nan, np.inf, 0, -1, 1e38)}[name]:
        for at in ((0, 0), (-1, -1)):
            w = weight(name, (133, 416), rng)
            assert w.scale is not None
            w.scale[at] = bad
            with pytest.raises(CodecError, match="scale"):
                w.multiply(np.zeros((1, 416), np.float32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "parts"), [(384, 3), (256, 8), (300, 4)])  # whole blocks, within one, across
def test_decode_and_cut(name, rows, parts):
    w = weight(name, (rows, 96), np.random.default_rng(7))
    exact = decoded(w)
    assert (w.decode() == exact).all()
    assert w.shape == (rows, 96)
    assert w.nbytes == w.codes.nbytes + (w.scale.nbytes if w.scale is not None else 0)
    cut = w.cut(parts)
    assert [part.shape for part in cut] == [(rows // parts, 96)] * parts
    assert (np.concatenate([part.decode() for part in cut]) == exact).all()
    x = np.random.default_rng(8).normal(0, 1, (2, 96)).astype(np.float32)
    for part in cut:
        holds(part, x, part.multiply(x))


def test_nothing_to_multiply():
    x = np.zeros((0, 64), np.float32)
    assert weight("fp8", (5, 64), np.random.default_rng(8)).multiply(x).shape == (0, 5)
    assert EncodedMatrix("bf16", np.zeros((0, 64), np.uint16)).multiply(np.zeros((3, 64), np.float32)).shape == (3, 0)
    assert not EncodedMatrix("f32", np.zeros((4, 0), np.float32)).multiply(np.zeros((3, 0), np.float32)).any()


def test_callers_mistakes():
    w = weight("fp8", (128, 256), np.random.default_rng(9))
    x = np.zeros((1, 256), np.float32)
    for wrong, words in (
        (lambda: w.multiply(x[:, :255].copy()), "expected \\(1, 256\\)"),
        (lambda: w.multiply(x.astype(np.float64)), "float64"),
        (lambda: w.multiply(x, np.zeros((1, 127), np.float32)), "out has shape"),
        (lambda: w.multiply(x, threads=0), "threads"),
        (lambda: multiply(x, "fp8", w.codes), "needs a scale"),
        (lambda: multiply(x, "fp8", w.codes, np.zeros((1, 1), np.uint8)), "scale has shape"),
        (lambda: multiply(x, "bf16", np.zeros((2, 256), np.uint16), w.scale), "no scale"),
        (lambda: multiply(x, "i64", np.zeros((2, 256), np.int64)), "i64"),
        (lambda: multiply(np.zeros((1, 48), np.float32), "mxfp4", np.zeros((2, 24), np.uint8), w.scale), "32"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()


ELSEWHERE = """
import sys
import numpy as np
from dsv4_bridge.codec.multiply import multiply
given = np.load(sys.argv[1])
names = ("mxfp4", "fp8")
ys = {name: multiply(given["x"], name, given[name], given[name + " scale"]) for name in names}
np.savez(sys.argv[2], **ys)
"""


@pytest.mark.parametrize(("processor", "features"), [("x86-64", ""), ("haswell", "+avx,+avx2,+f16c,+fma")])
def test_other_processors(processor, features, tmp_path):
    """What is compiled for a processor that knows less: other ways to decode, fewer registers."""
    host = llvm.get_host_cpu_features()
    if "x86_64" not in llvm.get_process_triple() or not all(host.get(f[1:]) for f in features.split(",") if f):
        pytest.skip("cannot pass for one")
    rng = np.random.default_rng(10)
    weights = [weight(name, (9, 416), rng, spread=130) for name in ("mxfp4", "fp8")]
    x = rng.normal(0, 2.0**-9, (3, 416)).astype(np.float32)
    arrays = {"x": x} | {w.encoding: w.codes for w in weights} | {f"{w.encoding} scale": w.scale for w in weights}
    np.savez(tmp_path / "given.npz", **arrays)
    passing = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE, tmp_path / "given.npz", tmp_path / "found.npz"],
        env=os.environ | passing | {"PYTHONPATH": str(Path(dsv4_bridge.__file__).parents[1])},
        check=True,
    )
    found = np.load(tmp_path / "found.npz")
    for w in weights:
        holds(w, x, found[w.encoding])
