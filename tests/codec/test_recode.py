"""MXFP4 to FP8: the certificate against brute force, and the codes against the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_bridge.codec import (
    Certificate,
    CodecError,
    fp8,
    mxfp4,
    mxfp4_to_fp8,
    reference,
)

E4M3 = reference.e4m3_magnitudes().numpy()


def as_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def values_of(packed, scale):
    out = np.zeros((packed.shape[0], packed.shape[1] * 2), np.uint16)
    mxfp4.decode(packed, scale, out)
    return out


def recode(packed, scale, allow_lossy=False):
    rows, columns = packed.shape[0], packed.shape[1] * 2
    codes, block_scale = (
        np.full((rows, columns), 0xAA, np.uint8),
        np.zeros(fp8.scale_shape(rows, columns), np.uint8),
    )
    return codes, block_scale, mxfp4_to_fp8(packed, scale, codes, block_scale, allow_lossy)


def fits_some_power_of_two(values: np.ndarray) -> bool:
    """Brute force: is there any legal E8M0 scale under which every value is an E4M3 value?"""
    magnitudes = np.unique(np.abs(as_float(values)))
    return any(np.isin(magnitudes / 2.0 ** (e - 127), E4M3).all() for e in range(3, 247))


def block(scales, codes=(1, 7)):
    """One row of groups with these scale bytes, each holding all the given E2M1 codes."""
    packed = np.resize(np.array(codes, np.uint8), (len(scales), 32))
    packed = (packed[:, 0::2] | packed[:, 1::2] << 4).reshape(1, -1)
    return packed, np.array([scales], np.uint8)


@pytest.mark.parametrize(("spread", "lossless"), [(0, True), (13, True), (14, True), (15, False), (40, False)])
@pytest.mark.parametrize("base", [3, 100, 112, 200])
def test_trap40_spread_14_is_lossless_and_15_is_not(spread, lossless, base):
    packed, scale = block([base, base + spread, base + spread, base + spread])
    certificate = recode(packed, scale)[2]
    assert certificate.lossless == lossless == fits_some_power_of_two(values_of(packed, scale))
    assert certificate.spread == spread
    assert certificate.spreads[min(spread, 15)] == 1
    assert certificate.first_failing_block == (None if lossless else (0, 0))


def test_trap40_published_counterexample():
    """A scale byte of 110 in a block whose largest is 127 is not lossless (vllm issue 53709)."""
    packed, scale = block([127, 120, 110, 121], codes=(1, 9, 3, 7))
    codes, block_scale, certificate = recode(packed, scale)
    assert not certificate.lossless
    assert certificate.spread == 17
    assert block_scale[0, 0] == 121
    assert (codes == 0x7F).all()  # refused: output that cannot pass for weights
    codes, block_scale, lossy = recode(packed, scale, allow_lossy=True)
    assert lossy == certificate
    assert 0 < lossy.max_abs_error <= 2.0**-10 * 2.0**-6


def test_trap40_groups_of_zeros_do_not_count():
    packed, scale = block([60, 120, 121, 252])
    packed[0, :16], packed[0, 48:] = 0x08, 0x80
    codes, block_scale, certificate = recode(packed, scale)
    assert certificate.lossless
    assert certificate.spread == 1
    out = np.zeros((1, 128), np.uint16)
    fp8.decode(codes, block_scale, out)
    assert (out == values_of(packed, scale)).all()


def test_groups_without_halves_allow_one_more_step():
    packed, scale = block([100, 115], codes=(2, 6))
    assert recode(packed, scale)[2].lossless


def test_a_block_of_zeros():
    packed, scale = np.full((1, 16), 0x80, np.uint8), np.full((1, 1), 9, np.uint8)
    codes, block_scale, certificate = recode(packed, scale)
    assert block_scale[0, 0] == 127
    assert (codes[0] == [0, 0x80] * 16).all()
    assert certificate == Certificate(1, 1, 0, (1, *[0] * 15))


@settings(max_examples=200, deadline=None)
@given(
    base=st.integers(0, 230),
    offsets=st.lists(st.integers(0, 22), min_size=1, max_size=4),
    codes=st.lists(st.integers(0, 15), min_size=1, max_size=6),
    last=st.lists(st.integers(0, 15), min_size=1, max_size=2),
)
def test_trap40_exact_iff_brute_force_finds_a_scale(base, offsets, codes, last):
    packed, scale = block([base + o for o in offsets], codes)
    packed[0, -16:] = block([0], last)[0]
    values = values_of(packed, scale)
    recoded, block_scale, certificate = recode(packed, scale)
    assert certificate.lossless == fits_some_power_of_two(values)
    if certificate.lossless:
        out = np.zeros_like(values)
        fp8.decode(recoded, block_scale, out)
        assert (out == values).all()


@pytest.mark.parametrize("shape", [(128, 128), (300, 416), (1, 32)])
@pytest.mark.parametrize("lowest", [0, 90, 104, 110])
def test_same_as_encoding_the_decoded_values(shape, lowest):
    rng = np.random.default_rng(lowest)
    packed = rng.integers(0, 256, (shape[0], shape[1] // 2), dtype=np.uint8)
    packed *= rng.integers(0, 2, packed.shape, dtype=np.uint8)
    scale = rng.integers(lowest, 124, mxfp4.scale_shape(*shape), dtype=np.uint8)
    codes, block_scale, certificate = recode(packed, scale, allow_lossy=True)

    values = values_of(packed, scale)
    expected, expected_scale = reference.encode_fp8(torch.from_numpy(values).view(torch.bfloat16))
    assert (codes == expected.numpy()).all()
    assert (block_scale == expected_scale.numpy()).all()
    out, stats_codes, stats_scale = np.zeros_like(values), np.zeros_like(codes), np.zeros_like(block_scale)
    stats = fp8.encode(values, None, stats_codes, stats_scale)
    assert (stats_codes == codes).all()
    fp8.decode(codes, block_scale, out)
    error = np.abs(as_float(values) - as_float(out))
    assert certificate.rounded_values == stats.rounded_values == (values != out).sum()
    assert certificate.exact == stats.fresh_exact
    assert certificate.max_abs_error == error.max()
    assert certificate.sum_sq_error == pytest.approx((error**2).sum())
    assert certificate.sum_sq == pytest.approx((as_float(values) ** 2).sum())
    assert certificate.relative_rms_error == pytest.approx(stats.relative_rms_error)
    assert sum(certificate.spreads) == certificate.blocks


def test_certificates_of_stripes_add_up():
    packed, scale = np.full((384, 128), 0x71, np.uint8), np.full((384, 8), 110, np.uint8)
    scale[300, 5] = 90
    whole = recode(packed, scale)[2]
    parts = [recode(packed[i : i + 128], scale[i : i + 128])[2].shifted(i) for i in (0, 128, 256)]
    assert sum(parts, Certificate()) == whole
    assert whole.first_failing_block == (2, 1)
    assert (whole.blocks, whole.exact, whole.rounded_values) == (6, 5, 32)
    assert whole.shifted(256).first_failing_block == (4, 1)


def test_illegal_scales_are_refused():
    packed, scale = block([120, 253])
    with pytest.raises(CodecError, match="253"):
        recode(packed, scale)
