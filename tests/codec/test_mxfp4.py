"""MXFP4 against a float64 definition, over all codes and scales, and against the torch reference."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_bridge.codec import CodecError, EncodeStats, mxfp4, reference

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LEGAL = range(253)


def as_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def as_bf16(values) -> np.ndarray:
    """Values that bf16 holds exactly, as bit patterns."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def decode(packed, scale):
    out = np.full((packed.shape[0], packed.shape[1] * 2), 0xBEEF, np.uint16)
    mxfp4.decode(packed, scale, out)
    return out


def encode(values, like=None):
    rows, columns = values.shape
    packed = np.full((rows, columns // 2), 0xAA, np.uint8)
    scale = np.full((rows, columns // 32), 0xAA, np.uint8)
    stats = mxfp4.encode(values, like, packed, scale)
    return packed, scale, stats


def encode_reference(values, like=None):
    like = None if like is None else torch.from_numpy(like)
    packed, scale = reference.encode_mxfp4(torch.from_numpy(values).view(torch.bfloat16), like)
    return packed.numpy(), scale.numpy()


def every_byte_and_scale():
    """Row E: all 256 bytes under scale byte E."""
    packed = np.tile(np.arange(256, dtype=np.uint8), (len(LEGAL), 1))
    return packed, np.repeat(np.array(LEGAL, np.uint8)[:, None], 16, axis=1)


def test_trap36_nibble_order():
    packed = np.zeros((1, 16), np.uint8)
    packed[0, 0] = 0x21
    assert as_float(decode(packed, np.full((1, 1), 127, np.uint8)))[0, :2].tolist() == [0.5, 1.0]


def test_trap33_scale_byte_is_an_exponent():
    packed = np.full((1, 16), 0x22, np.uint8)
    assert (as_float(decode(packed, np.full((1, 1), 120, np.uint8))) == 2.0**-7).all()


def test_decode_every_byte_and_scale():
    packed, scale = every_byte_and_scale()
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(LEGAL), 512)
    expected = np.ldexp(E2M1[codes & 7], np.array(LEGAL)[:, None] - 127)
    bits = decode(packed, scale)
    assert (np.abs(as_float(bits)) == expected).all()
    assert ((bits >> 15) == (codes >> 3)).all()
    same = reference.decode_mxfp4(torch.from_numpy(packed), torch.from_numpy(scale))
    assert (same.view(torch.uint16).numpy() == bits).all()


def test_trap37_encode_like_source_is_the_identity():
    packed, scale = every_byte_and_scale()
    again, scale_again, stats = encode(decode(packed, scale), scale)
    assert (again == packed).all()
    assert (scale_again == scale).all()
    assert (stats.blocks, stats.kept, stats.fresh, stats.rounded_values) == (scale.size, scale.size, 0, 0)


@pytest.mark.parametrize("byte", [0, 1, 2, 110, 127, 252])
def test_trap37_sign_of_minus_zero(byte):
    packed = np.full((1, 16), 0x88, np.uint8)
    packed[0, 3] = 0x08
    scale = np.full((1, 1), byte, np.uint8)
    values = decode(packed, scale)
    assert values[0, 0] == 0x8000
    assert values[0, 7] == 0
    assert (encode(values, scale)[0] == packed).all()
    fresh, fresh_scale, _ = encode(values)
    assert (fresh == packed).all()
    assert fresh_scale[0, 0] == 127


def test_trap37_ties_to_even_and_saturation():
    given_ = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -3.5, 5.03125, 0.251953125, 0.74609375]
    wanted = [0, 1, 1, 2, 2, 4, 4, 6, -0.0, -1, -4, 6, 0.5, 0.5]
    values = np.zeros((1, 32), np.uint16)
    values[0, : len(given_)] = as_bf16(given_)
    packed, scale, stats = encode(values)
    assert scale[0, 0] == 127
    assert (decode(packed, scale)[0, : len(wanted)] == as_bf16(wanted)).all()
    assert stats.rounded_values == len(given_) - 1
    assert stats.max_abs_error == 1.0
    # Above 6 * 2^125 only saturation is left.
    values[0, 0] = 0x7F7F
    packed, scale, _ = encode(values)
    assert scale[0, 0] == 252
    assert packed[0, 0] & 15 == 7


def test_fresh_scale_of_every_finite_amax():
    """The smallest k with amax <= 6 * 2^k, by search in float64, for all finite bf16 patterns."""
    patterns = np.arange(0x7F80, dtype=np.uint16)
    values = np.zeros((len(patterns), 32), np.uint16)
    values[:, 7] = patterns | 0x8000
    _, scale, _ = encode(values)
    limits = 6 * np.ldexp(1.0, np.array(LEGAL) - 127)
    expected = np.minimum(np.searchsorted(limits, as_float(patterns)), 252)
    expected[0] = 127
    assert (scale[:, 0] == expected).all()
    assert (encode_reference(values)[1] == scale).all()


def adversarial(rng: np.random.Generator, rows: int, columns: int, like: np.ndarray) -> np.ndarray:
    """Group by group: on the grid of `like`, off by one bit, midpoints, any bits, zeros."""
    values = decode(rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8), like)
    kind = np.repeat(rng.integers(0, 6, like.shape), 32, axis=1)
    one = rng.random(values.shape) < 0.05
    values = np.where((kind == 1) & one, values ^ 1, values)
    values = np.where((kind == 2) & one, values ^ 0x40, values)
    anything = rng.integers(0, 65536, values.shape).astype(np.uint16)
    values = np.where(kind == 3, anything, values)
    values = np.where(kind == 4, anything & 0x8000, values)
    near = as_bf16(np.round(rng.normal(0, 2, values.shape) * 16) / 16)
    values = np.where(kind == 5, near, values).astype(np.uint16)
    return np.where((values & 0x7FFF) >= 0x7F80, values & 0x807F, values).astype(np.uint16)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("edge", [(0, 253), (0, 4), (110, 128), (248, 253)])
def test_same_as_reference(seed, edge):
    rng = np.random.default_rng(seed)
    like = rng.integers(*edge, (37, 6), dtype=np.uint8)
    values = adversarial(rng, 37, 192, like)
    for source in (None, like):
        packed, scale, stats = encode(values, source)
        expected, expected_scale = encode_reference(values, source)
        assert (scale == expected_scale).all()
        assert (packed == expected).all()
        check_stats(stats, values, decode(packed, scale), scale, source)


def check_stats(stats: EncodeStats, values, decoded, scale, source):
    changed = values != decoded
    exact = ~changed.reshape(*scale.shape, 32).any(axis=2)
    error = np.abs(as_float(values) - as_float(decoded))
    assert stats.blocks == scale.size == stats.kept + stats.fresh
    assert stats.kept <= exact.sum()
    assert stats.kept + stats.fresh_exact == exact.sum()
    assert source is not None or stats.kept == 0
    assert stats.rounded_values == changed.sum()
    assert stats.exact == (not changed.any())
    assert stats.max_abs_error == error.max()
    assert stats.sum_sq_error == pytest.approx((error**2).sum(), rel=1e-9)
    total = (as_float(values) ** 2).sum()
    if stats.kept == 0:
        assert stats.sum_sq == pytest.approx(total, rel=1e-9)
    else:
        assert stats.sum_sq <= total * (1 + 1e-9) if stats.fresh else stats.sum_sq == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5))
def test_round_trip_of_random_tensors(seed, rows, groups):
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (rows, groups * 16), dtype=np.uint8)
    scale = rng.integers(0, 253, (rows, groups), dtype=np.uint8)
    again, scale_again, stats = encode(decode(packed, scale), scale)
    assert (again == packed).all()
    assert (scale_again == scale).all()
    assert stats.kept == stats.blocks


def test_stripes_add_up():
    rng = np.random.default_rng(5)
    like = rng.integers(100, 140, (384, 4), dtype=np.uint8)
    values = adversarial(rng, 384, 128, like)
    packed, scale, whole = encode(values, like)
    parts = [encode(values[i : i + 128], like[i : i + 128]) for i in (0, 128, 256)]
    assert (np.concatenate([p[0] for p in parts]) == packed).all()
    assert (np.concatenate([p[1] for p in parts]) == scale).all()
    total = sum((p[2] for p in parts), EncodeStats())
    assert total.sum_sq_error == pytest.approx(whole.sum_sq_error)
    assert (total.blocks, total.kept, total.fresh_exact) == (whole.blocks, whole.kept, whole.fresh_exact)
    assert (total.rounded_values, total.max_abs_error) == (whole.rounded_values, whole.max_abs_error)
    assert total.relative_rms_error == pytest.approx(whole.relative_rms_error)


def test_trap37_rederived_scales_change_bytes_but_not_values():
    packed = np.full((1, 16), 0x11, np.uint8)  # largest code 0.5
    scale = np.full((1, 1), 120, np.uint8)
    values = decode(packed, scale)
    fresh, fresh_scale, stats = encode(values)
    assert fresh_scale[0, 0] == 117
    assert (decode(fresh, fresh_scale) == values).all()
    assert (stats.fresh, stats.fresh_exact, stats.exact) == (1, 1, True)


@pytest.mark.parametrize("byte", [253, 254, 255])
def test_trap39_scale_bytes_above_252_are_refused(byte):
    packed, scale = np.zeros((3, 48), np.uint8), np.full((3, 3), 120, np.uint8)
    scale[2, 1] = byte
    problem = mxfp4.first_problem(packed, scale)
    assert problem is not None
    assert (problem.row, problem.column) == (2, 32)
    assert str(byte) in problem.what
    assert "0..252" in problem.what
    assert problem.shifted(128).row == 130
    with pytest.raises(CodecError) as caught:
        decode(packed, scale)
    assert caught.value.problem == problem
    with pytest.raises(CodecError):
        encode(np.zeros((3, 96), np.uint16), scale)


@pytest.mark.parametrize(
    ("bits", "name"), [(0x7F80, "infinity"), (0xFF80, "infinity"), (0x7FC0, "NaN"), (0xFFFF, "NaN")]
)
def test_nan_and_infinity_are_not_encoded(bits, name):
    values = np.zeros((2, 64), np.uint16)
    values[1, 40] = bits
    for like in (None, np.full((2, 2), 120, np.uint8), np.zeros((2, 2), np.uint8)):
        with pytest.raises(CodecError, match=name) as caught:
            encode(values, like)
        assert (caught.value.problem.row, caught.value.problem.column) == (1, 40)


def test_read_only_misaligned_and_empty_arrays():
    raw = bytes(range(256)) * 3
    packed = np.frombuffer(raw, np.uint8, 64, 1).reshape(2, 32)
    scale = np.full((2, 2), 120, np.uint8)
    buffer = np.zeros(2 * 64 * 2 + 1, np.uint8)
    out = buffer[1:].view(np.uint16).reshape(2, 64)
    mxfp4.decode(packed, scale, out)
    assert (out == decode(packed.copy(), scale)).all()
    assert (encode(out, scale)[0] == packed).all()
    nothing = np.zeros((0, 32), np.uint8)
    assert encode(decode(nothing, np.zeros((0, 2), np.uint8)))[2].blocks == 0


def test_wrong_arrays_are_the_callers_mistake():
    good = np.zeros((2, 32), np.uint8), np.zeros((2, 2), np.uint8), np.zeros((2, 64), np.uint16)
    with pytest.raises(ValueError, match="scale has shape"):
        mxfp4.decode(good[0], np.zeros((2, 1), np.uint8), good[2])
    with pytest.raises(ValueError, match="out is int16"):
        mxfp4.decode(good[0], good[1], good[2].view(np.int16))
    with pytest.raises(ValueError, match="contiguous"):
        mxfp4.decode(np.zeros((2, 64), np.uint8)[:, ::2], good[1], good[2])
    with pytest.raises(ValueError, match="multiple of 32"):
        mxfp4.scale_shape(2, 48)


def test_stripes_in_threads():
    rng = np.random.default_rng(9)
    packed = rng.integers(0, 256, (512, 128), dtype=np.uint8)
    scale = rng.integers(0, 253, (512, 8), dtype=np.uint8)
    out = np.zeros((512, 256), np.uint16)
    again, scale_again = np.zeros_like(packed), np.zeros_like(scale)

    def there_and_back(start: int) -> EncodeStats:
        rows = slice(start, start + 128)
        mxfp4.decode(packed[rows], scale[rows], out[rows])
        return mxfp4.encode(out[rows], scale[rows], again[rows], scale_again[rows])

    with ThreadPoolExecutor(4) as pool:
        stats = sum(pool.map(there_and_back, range(0, 512, 128)), EncodeStats())
    assert stats.kept == stats.blocks == scale.size
    assert (again == packed).all()
    assert (scale_again == scale).all()
