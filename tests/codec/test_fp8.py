"""FP8 against a float64 definition, over all codes and scales, and against the torch reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_bridge.codec import CodecError, EncodeStats, fp8, reference

FINITE = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
FIELD, MANTISSA = np.divmod(np.arange(127), 8)
E4M3 = np.ldexp(MANTISSA / 8 + (FIELD > 0), np.maximum(FIELD, 1) - 7)
LEGAL = np.arange(3, 247, dtype=np.uint8)


def as_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def as_bf16(values) -> np.ndarray:
    """Values that bf16 holds exactly, as bit patterns."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def decode(codes, scale):
    out = np.full(codes.shape, 0xBEEF, np.uint16)
    fp8.decode(codes, scale, out)
    return out


def encode(values, like=None, dtype: type = np.uint8):
    dtype = dtype if like is None else like.dtype.type
    codes, scale = np.full(values.shape, 0xAA, np.uint8), np.ones(fp8.scale_shape(*values.shape), dtype)
    stats = fp8.encode(values, like, codes, scale)
    return codes, scale, stats


def encode_reference(values, like=None, dtype: type = np.uint8):
    dtype = dtype if like is None else like.dtype.type
    like = None if like is None else torch.from_numpy(like)
    name = "F32" if dtype == np.float32 else "F8_E8M0"
    codes, scale = reference.encode_fp8(torch.from_numpy(values).view(torch.bfloat16), like, name)
    return codes.numpy(), scale.numpy()


def decode_reference(codes, scale):
    decoded = reference.decode_fp8(torch.from_numpy(codes), torch.from_numpy(scale))
    return decoded.view(torch.uint16).numpy()


def every_code_and_scale():
    """One row; two blocks of 128 columns for each legal E hold all 254 finite codes (and two zeros)."""
    codes = np.tile(np.concatenate([FINITE, np.zeros(2, np.uint8)]), len(LEGAL))[None]
    return codes, np.repeat(LEGAL, 2)[None]


def test_decode_every_code_and_scale():
    codes, scale = every_code_and_scale()
    exponent = np.repeat(scale.astype(int), 128, axis=1) - 127
    bits = decode(codes, scale)
    assert (np.abs(as_float(bits)) == np.ldexp(E4M3[codes & 0x7F], exponent)).all()
    assert ((bits >> 15) == (codes >> 7)).all()
    assert (decode_reference(codes, scale) == bits).all()
    powers = np.ldexp(np.float32(1), scale.astype(int) - 127)
    inside = (scale >= 10) & (scale <= 246)  # a float32 scale must keep every value a normal bf16
    wide = np.repeat(inside[0], 128)
    kept = np.ascontiguousarray(codes[:, wide])
    assert (decode(kept, powers[inside][None]) == bits[:, wide]).all()


def test_trap37_encode_like_source_is_the_identity():
    codes, scale = every_code_and_scale()
    again, scale_again, stats = encode(decode(codes, scale), scale)
    assert (again == codes).all()
    assert (scale_again == scale).all()
    assert (stats.blocks, stats.kept, stats.fresh, stats.rounded_values) == (scale.size, scale.size, 0, 0)


@pytest.mark.parametrize("byte", [3, 9, 10, 110, 134, 246])
def test_trap37_sign_of_minus_zero(byte):
    codes = np.full((2, 130), 0x80, np.uint8)
    codes[1, 5] = 0
    scale = np.full((1, 2), byte, np.uint8)
    values = decode(codes, scale)
    assert values[0, 0] == 0x8000
    assert values[1, 5] == 0
    assert (encode(values, scale)[0] == codes).all()
    fresh, fresh_scale, stats = encode(values)
    assert (fresh == codes).all()
    assert (fresh_scale == 127).all()
    assert stats.fresh_exact == 2


def test_ties_to_even_and_saturation():
    step = 2.0**-9
    given_ = [
        448,
        17,
        19,
        16.5,
        0.5 * step,
        1.5 * step,
        2.5 * step,
        7.5 * step,
        2.0**-6 * 1.0625,
        -17,
        -1.5 * step,
    ]
    wanted = [448, 16, 20, 16, 0, 2 * step, 2 * step, 8 * step, 2.0**-6, -16, -2 * step]
    values = np.zeros((1, 64), np.uint16)
    values[0, : len(given_)] = as_bf16(given_)
    codes, scale, stats = encode(values)
    assert scale[0, 0] == 127
    assert (decode(codes, scale)[0, : len(wanted)] == as_bf16(wanted)).all()
    assert stats.rounded_values == len(given_) - 1
    assert stats.max_abs_error == 1.0
    values[0, 1] = 0x7F7F  # above 448 * 2^119 only saturation is left
    codes, scale, _ = encode(values)
    assert scale[0, 0] == 246
    assert codes[0, 1] == 0x7E


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_fresh_scale_of_every_finite_amax(dtype):
    """The smallest k with amax <= 448 * 2^k, by search in float64, for all finite bf16 patterns."""
    patterns = np.arange(0x7F80, dtype=np.uint16)
    values = np.zeros((len(patterns), 128), np.uint16)
    values[:, 99] = patterns | 0x8000
    values = values.reshape(1, -1)
    _, scale, _ = encode(values, dtype=dtype)
    if dtype == np.float32:
        scale = scale.view(np.uint32) >> 23
    limits = 448 * np.ldexp(1.0, LEGAL.astype(int) - 127)
    expected = np.minimum(3 + np.searchsorted(limits, as_float(patterns)), 246)
    expected[0] = 127
    assert (scale[0] == expected).all()
    values = values[:, -(1 << 19) :]
    assert (encode_reference(values)[1] == expected[-(1 << 12) :]).all()


def adversarial(rng: np.random.Generator, rows: int, columns: int, like: np.ndarray) -> np.ndarray:
    """Block by block: on the grid of `like`, one value off, midpoints, any bits, zeros, Gaussian."""
    values = decode(rng.choice(FINITE, (rows, columns)), like)
    kind = rng.integers(0, 7, like.shape).repeat(128, axis=0).repeat(128, axis=1)[:rows, :columns]
    one = rng.random(values.shape) < 1e-4
    values = np.where((kind == 1) & one, values ^ 1, values)
    values = np.where((kind == 2) & one, values ^ 8, values)
    anything = rng.integers(0, 65536, values.shape).astype(np.uint16)
    values = np.where(kind == 3, anything, values)
    values = np.where(kind == 4, anything & 0x8000, values)
    near = as_bf16(np.round(rng.normal(0, 2, values.shape) * 16) / 16)
    values = np.where(kind == 5, near, values)
    fine = as_bf16(np.ldexp(rng.integers(-128, 129, values.shape) / 1.0, rng.integers(-14, 3, values.shape)))
    values = np.where(kind == 6, fine, values).astype(np.uint16)
    return np.where((values & 0x7FFF) >= 0x7F80, values & 0x807F, values).astype(np.uint16)


def random_scale(rng, shape, kind):
    if kind == "F32":
        return np.ldexp(rng.uniform(1, 2, shape), rng.integers(-117, 118, shape)).astype(np.float32)
    if kind == "F32 powers of two":
        return np.ldexp(np.float32(1), rng.integers(-117, 119, shape)).astype(np.float32)
    return rng.integers(*{"E8M0": (3, 247), "low": (3, 12), "high": (240, 247)}[kind], shape, dtype=np.uint8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["E8M0", "low", "high", "F32", "F32 powers of two"])
@pytest.mark.parametrize("shape", [(1, 1), (300, 200), (257, 129), (128, 512)])
def test_trap41_same_as_reference_also_where_ragged(seed, kind, shape):
    rng = np.random.default_rng(seed)
    like = random_scale(rng, fp8.scale_shape(*shape), kind)
    values = adversarial(rng, *shape, like)
    for source in (None, like):
        codes, scale, stats = encode(values, source, like.dtype.type)
        expected, expected_scale = encode_reference(values, source, like.dtype.type)
        assert (scale == expected_scale).all()
        assert (codes == expected).all()
        decoded = decode(codes, scale)
        assert (decoded == decode_reference(codes, scale)).all()
        check_stats(stats, values, decoded, scale, source)


def check_stats(stats: EncodeStats, values, decoded, scale, source):
    changed = values != decoded
    exact = sum(
        not changed[r : r + 128, k : k + 128].any()
        for r in range(0, values.shape[0], 128)
        for k in range(0, values.shape[1], 128)
    )
    error = np.abs(as_float(values) - as_float(decoded))
    assert stats.blocks == scale.size == stats.kept + stats.fresh
    assert stats.kept + stats.fresh_exact == exact
    assert source is not None or stats.kept == 0
    assert stats.rounded_values == changed.sum()
    assert stats.max_abs_error == error.max()
    assert stats.sum_sq_error == pytest.approx((error**2).sum(), rel=1e-9)
    total = (as_float(values) ** 2).sum()
    if stats.kept == 0:
        assert stats.sum_sq == pytest.approx(total, rel=1e-9)
    else:
        assert stats.sum_sq <= total * (1 + 1e-9) if stats.fresh else stats.sum_sq == 0


@settings(max_examples=150, deadline=None)
@given(st.floats(2.0**-117, 1.125 * 2.0**119, width=32))
def test_trap38_f32_scales(scale):
    """Decoding rounds once; encoding with the same scale returns every code and the scale's bits."""
    codes = np.concatenate([FINITE, FINITE[:2]])[None]
    scales = np.full((1, 2), scale, np.float32)
    bits = decode(codes, scales)
    table = torch.from_numpy(codes).view(torch.float8_e4m3fn).float()
    assert (bits == (table * scale).bfloat16().view(torch.uint16).numpy()).all()
    again, scale_again, stats = encode(bits, scales)
    assert (again == codes).all()
    assert (scale_again == scales).all()
    assert stats.kept == 2


def test_trap38_dense_sweep_of_mantissas():
    mantissas = np.random.default_rng(0).integers(0, 1 << 23, 8192, dtype=np.uint32)
    scale = (mantissas | (120 << 23)).view(np.float32)[None]
    codes = np.tile(FINITE[:128], 8192)[None].copy()
    codes[0, ::128] = 0x7E
    codes[0, 127::128] = 1
    again, scale_again, _ = encode(decode(codes, scale), scale)
    assert (again == codes).all()
    assert (scale_again == scale).all()


def test_trained_blocks_get_fresh_scales_and_the_others_keep_theirs():
    rng = np.random.default_rng(1)
    codes, scale = rng.choice(FINITE, (256, 256)), np.full((2, 2), 0.0123, np.float32)
    values = decode(codes, scale)
    values[200, 200] ^= 0x40
    again, scale_again, stats = encode(values, scale)
    assert (scale_again == [[scale[0, 0]] * 2, [scale[0, 0], 2.0**-6]]).all()
    assert (again[:128] == codes[:128]).all()
    assert (stats.kept, stats.fresh, stats.fresh_exact) == (3, 1, 0)
    assert 0 < stats.relative_rms_error < 0.05


@pytest.mark.parametrize("byte", [0, 2, 247, 252, 255])
def test_trap39_scale_bytes_outside_3_to_246_are_refused(byte):
    codes, scale = np.zeros((200, 300), np.uint8), np.full((2, 3), 120, np.uint8)
    scale[1, 2] = byte
    check_refused(codes, scale, (128, 256), f"scale byte is {byte}; legal are 3..246")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 5e-36, 1e-40, 7.62e35, 1e38])
def test_trap39_f32_scales_outside_bf16_are_refused(value):
    codes, scale = np.zeros((200, 300), np.uint8), np.full((2, 3), 0.01, np.float32)
    scale[1, 2] = value
    check_refused(codes, scale, (128, 256), "448 [*] s a finite one")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("scale", [np.uint8(120), np.float32(0.01)])
def test_trap39_nan_codes_are_refused(code, scale):
    codes = np.full((200, 300), 0xFE, np.uint8)
    codes[150, 299] = code
    check_refused(codes, np.full((2, 3), scale), (150, 299), f"0x{code:02X}", encoding=False)


def check_refused(codes, scale, place, what, encoding=True):
    with pytest.raises(CodecError, match=what) as caught:
        decode(codes, scale)
    assert (caught.value.problem.row, caught.value.problem.column) == place
    assert fp8.first_problem(codes, scale) == caught.value.problem
    if encoding:
        with pytest.raises(CodecError, match=what):
            encode(np.zeros(codes.shape, np.uint16), scale)


def test_first_problem_of_a_legal_tensor_is_none():
    assert fp8.first_problem(np.zeros((3, 3), np.uint8), np.full((1, 1), 3, np.uint8)) is None
    assert fp8.first_problem(np.zeros((3, 3), np.uint8), np.full((1, 1), 2.0**-117, np.float32)) is None


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81])
def test_nan_and_infinity_are_not_encoded(bits):
    values = np.zeros((130, 140), np.uint16)
    values[129, 130] = bits
    scales = (
        None,
        np.full((2, 2), 120, np.uint8),
        np.full((2, 2), 0.01, np.float32),
        np.full((2, 2), 3, np.uint8),
    )
    for like in scales:
        with pytest.raises(CodecError, match="only finite") as caught:
            encode(values, like)
        assert (caught.value.problem.row, caught.value.problem.column) == (129, 130)


def test_stripes_add_up():
    rng = np.random.default_rng(5)
    like = rng.integers(100, 140, (3, 2), dtype=np.uint8)
    values = adversarial(rng, 300, 200, like)
    codes, scale, whole = encode(values, like)
    cuts = [(0, 128), (128, 256), (256, 300)]
    parts = [encode(values[a:b], like[a // 128 : -(-b // 128)]) for a, b in cuts]
    assert (np.concatenate([p[0] for p in parts]) == codes).all()
    assert (np.concatenate([p[1] for p in parts]) == scale).all()
    total = sum((p[2] for p in parts), EncodeStats())
    assert (total.kept, total.fresh_exact, total.rounded_values) == (
        whole.kept,
        whole.fresh_exact,
        whole.rounded_values,
    )


def test_wrong_arrays_are_the_callers_mistake():
    codes, out = np.zeros((200, 300), np.uint8), np.zeros((200, 300), np.uint16)
    with pytest.raises(ValueError, match=r"scale has shape \(1, 3\)"):
        fp8.decode(codes, np.ones((1, 3), np.uint8), out)
    with pytest.raises(ValueError, match="scale is float64"):
        fp8.decode(codes, np.ones((2, 3)), out)
    with pytest.raises(ValueError, match="like_scale is float32"):
        fp8.encode(out, np.ones((2, 3), np.float32), codes, np.ones((2, 3), np.uint8))
