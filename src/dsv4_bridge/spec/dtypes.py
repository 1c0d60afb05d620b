"""Element types by their safetensors names, as raw numpy types.

bf16 is handled as uint16 bit patterns, FP8 and E8M0 codes as uint8: bytes in, bytes out, so that
no value ever passes through another type by accident.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """One element type: safetensors name, size in bytes, numpy type that carries its bits."""

    name: str
    itemsize: int
    numpy: str
    torch: str


_ALL = (
    Dtype("BOOL", 1, "u1", "bool"),
    Dtype("U8", 1, "u1", "uint8"),
    Dtype("I8", 1, "u1", "int8"),
    Dtype("F8_E4M3", 1, "u1", "float8_e4m3fn"),
    Dtype("F8_E5M2", 1, "u1", "float8_e5m2"),
    Dtype("F8_E8M0", 1, "u1", "float8_e8m0fnu"),
    Dtype("I16", 2, "<i2", "int16"),
    Dtype("F16", 2, "<u2", "float16"),
    Dtype("BF16", 2, "<u2", "bfloat16"),
    Dtype("I32", 4, "<i4", "int32"),
    Dtype("F32", 4, "<f4", "float32"),
    Dtype("I64", 8, "<i8", "int64"),
    Dtype("F64", 8, "<f8", "float64"),
)
DTYPES: dict[str, Dtype] = {d.name: d for d in _ALL}
BY_TORCH: dict[str, Dtype] = {d.torch: d for d in _ALL}
