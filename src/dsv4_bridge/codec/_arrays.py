"""Checks of the arrays that enter the kernels: caller's mistakes, not the checkpoint's."""

import numpy as np


def given(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only, aligned view of an input (a copy only where it is misaligned in memory).

    Read-only for everyone, because numba compiles a kernel once more for every combination of
    writable and read-only arguments, and tensors mapped from a file are read-only.
    """
    _check(name, array, dtype, shape)
    view = np.require(array, requirements="A").view()
    view.flags.writeable = False
    return view


def output(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """An output buffer, checked."""
    _check(name, array, dtype, shape)
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only")
    return array


def rows_columns(name: str, array: np.ndarray) -> tuple[int, int]:
    """The shape of a matrix."""
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}, expected two dimensions")
    return array.shape[0], array.shape[1]


def _check(name: str, array: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != np.dtype(dtype):
        raise ValueError(f"{name} is {array.dtype}, expected {np.dtype(dtype)}")
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not C-contiguous")
