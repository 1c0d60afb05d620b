"""FP8 in tiles of 32x32 and in rows of 32: every code under every legal scale, and equal to the torch reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_bridge.codec import CODECS, RECODERS, CodecError, EncodeStats, fp8, reference
from dsv4_bridge.spec.encodings import ENCODINGS

SMALL = ("fp8_32x32", "fp8_1x32")
FINITE = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
E4M3 = reference.e4m3_magnitudes().numpy()
LEGAL = np.arange(3, 247, dtype=np.uint8)


def as_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def decode(name: str, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    out = np.full(codes.shape, 0xBEEF, np.uint16)
    CODECS[name].decode(codes, scale, out)
    return out


def encode(name: str, values: np.ndarray, like: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, EncodeStats]:
    shape = ENCODINGS[name].scale_shape(values.shape)
    codes, scale = np.full(values.shape, 0xAA, np.uint8), np.full(shape, 0xBB, np.uint8)
    return codes, scale, CODECS[name].encode(values, like, codes, scale)


def spread(scale: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    high, wide = ENCODINGS[name].block
    return scale.repeat(high, 0)[: shape[0]].repeat(wide, 1)[:, : shape[1]].astype(int)


def every_code_and_scale(name: str) -> tuple[np.ndarray, np.ndarray]:
    """All 254 finite codes in eight blocks of 32 columns, under each of the 244 legal scales."""
    high, _ = ENCODINGS[name].block
    row = np.concatenate([FINITE, np.zeros(2, np.uint8)])
    codes = np.stack([np.roll(row, r) for r in range(len(LEGAL) * high)])
    return codes, np.repeat(LEGAL[:, None], 8, axis=1)


@pytest.mark.parametrize("name", SMALL)
def test_every_code_under_every_legal_scale(name: str) -> None:
    codes, scale = every_code_and_scale(name)
    bits = decode(name, codes, scale)
    assert (np.abs(as_float(bits)) == np.ldexp(E4M3[codes & 0x7F], spread(scale, codes.shape, name) - 127)).all()
    assert ((bits >> 15) == (codes >> 7)).all()
    again, scale_again, stats = encode(name, bits, scale)
    assert (again == codes).all() and (scale_again == scale).all()
    assert (stats.kept, stats.fresh, stats.rounded_values) == (scale.size, 0, 0)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(1, 1), (33, 31), (64, 96), (130, 70), (5, 257), (160, 224)])
@pytest.mark.parametrize("seed", range(3))
def test_same_as_the_reference_also_where_ragged(name: str, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    block = ENCODINGS[name].block
    like = rng.integers(*[(3, 247), (110, 126), (3, 14)][seed], ENCODINGS[name].scale_shape(shape), dtype=np.uint8)
    values = decode(name, rng.choice(FINITE, shape), like)
    where = rng.random(shape)
    values = np.where(where < 0.01, values ^ 1, values)
    values = np.where(where > 0.99, rng.integers(0, 0x7F80, shape), values).astype(np.uint16)
    for source in (None, like):
        codes, scale, stats = encode(name, values, source)
        given_ = None if source is None else torch.from_numpy(source)
        wanted = reference.encode_fp8(torch.from_numpy(values).view(torch.bfloat16), given_, block=block)
        assert (codes == wanted[0].numpy()).all() and (scale == wanted[1].numpy()).all()
        back = decode(name, codes, scale)
        again = reference.decode_fp8(torch.from_numpy(codes), torch.from_numpy(scale), block)
        assert (back == again.view(torch.uint16).numpy()).all()
        error = np.abs(as_float(values) - as_float(back))
        assert stats.rounded_values == (values != back).sum() and stats.max_abs_error == error.max()
        assert stats.blocks == scale.size == stats.kept + stats.fresh


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_codes_and_scales_return(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(SMALL))
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    codes = rng.choice(FINITE, (rows, columns))
    low = data.draw(st.integers(3, 246))
    scale = rng.integers(low, 247, ENCODINGS[name].scale_shape((rows, columns)), dtype=np.uint8)
    again, scale_again, _ = encode(name, decode(name, codes, scale), scale)
    assert (again == codes).all() and (scale_again == scale).all()
    values = decode(name, codes, scale)
    fresh, fresh_scale, stats = encode(name, values, None)
    assert stats.fresh_exact == stats.blocks  # the smallest scale holds whatever any scale holds
    assert (decode(name, fresh, fresh_scale) == values).all()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("byte", [0, 2, 247, 255])
def test_illegal_scales_and_codes_are_refused_at_their_place(name: str, byte: int) -> None:
    codes = np.zeros((70, 80), np.uint8)
    scale = np.full(ENCODINGS[name].scale_shape(codes.shape), 120, np.uint8)
    scale[2, 1] = byte
    high, wide = ENCODINGS[name].block
    with pytest.raises(CodecError, match=f"scale byte is {byte}; legal are 3..246") as caught:
        decode(name, codes, scale)
    assert (caught.value.problem.row, caught.value.problem.column) == (2 * high, wide)
    with pytest.raises(CodecError, match=f"scale byte is {byte}"):
        encode(name, np.zeros(codes.shape, np.uint16), scale)
    scale[2, 1], codes[69, 79] = 120, 0xFF
    with pytest.raises(CodecError, match="0xFF") as caught:
        decode(name, codes, scale)
    assert (caught.value.problem.row, caught.value.problem.column) == (69, 79)


@pytest.mark.parametrize("name", SMALL)
def test_stripes_add_up(name: str) -> None:
    rng = np.random.default_rng(5)
    codes = rng.choice(FINITE, (300, 90))
    scale = rng.integers(100, 140, ENCODINGS[name].scale_shape(codes.shape), dtype=np.uint8)
    whole = decode(name, codes, scale)
    for first, last in ((0, 128), (128, 256), (256, 300)):
        low, high = ENCODINGS[name].scale_rows(first, last)
        assert (decode(name, codes[first:last], scale[low:high]) == whole[first:last]).all()


# ---------------------------------------------------------------- to blocks of 128 x 128


def regroup(name: str, codes: np.ndarray, scale: np.ndarray, allow_lossy: bool = False):
    out, out_scale = np.full(codes.shape, 0xAA, np.uint8), np.zeros(fp8.scale_shape(*codes.shape), np.uint8)
    return out, out_scale, RECODERS[name, "fp8"](codes, scale, out, out_scale, allow_lossy=allow_lossy)


def fits_some_power_of_two(values: np.ndarray) -> bool:
    magnitudes = np.unique(np.abs(as_float(values)))
    return any(np.isin(magnitudes / 2.0 ** (e - 127), E4M3).all() for e in range(3, 247))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(128, 128), (140, 200), (31, 33), (384, 130)])
@pytest.mark.parametrize("kept", [0xFF, 0xFC, 0xF8])  # without low bits of the mantissa more survives
@pytest.mark.parametrize("seed", range(3))
def test_the_certificate_is_what_brute_force_finds(name: str, shape: tuple[int, int], kept: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.choice(FINITE, shape) & np.uint8(kept)
    codes[: shape[0] // 2] &= 0x80 if seed == 2 else 0xFF  # small blocks of zeros do not count
    scale = rng.integers(112, 113 + 2 * seed, ENCODINGS[name].scale_shape(shape), dtype=np.uint8)
    values = decode(name, codes, scale)
    strict, strict_scale, certificate = regroup(name, codes, scale)
    lossy, lossy_scale, same = regroup(name, codes, scale, allow_lossy=True)
    assert certificate == same and (strict_scale == lossy_scale).all()
    back, exact, first, spreads = decode("fp8", lossy, lossy_scale), 0, None, []
    wide = spread(scale, shape, name)
    for r in range(0, shape[0], 128):
        for k in range(0, shape[1], 128):
            here = (slice(r, r + 128), slice(k, k + 128))
            fits = fits_some_power_of_two(values[here])
            assert (back[here] == values[here]).all() == fits
            assert (strict[here] == (lossy[here] if fits else 0x7F)).all()
            exact += fits
            first = (r // 128, k // 128) if first is None and not fits else first
            high, across = ENCODINGS[name].block
            held = [
                int(wide[a, b])
                for a in range(r, min(r + 128, shape[0]), high)
                for b in range(k, min(k + 128, shape[1]), across)
                if (codes[a : a + high, b : b + across] & 0x7F).any()
            ]
            spreads.append(max(held) - min(held) if held else 0)
    assert (certificate.blocks, certificate.exact, certificate.first_failing_block) == (len(spreads), exact, first)
    assert certificate.spread == max(spreads)
    assert certificate.spreads == tuple(sum(min(s, 15) == n for s in spreads) for n in range(16))
    assert certificate.rounded_values == (back != values).sum()
