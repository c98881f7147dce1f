"""Launch kernels on numpy arrays."""

from __future__ import annotations

import ctypes

import numpy as np


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    """Address of an array, as an argument; the array has to outlive the launch."""
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def run(launcher, name, *args, grid=(1, 1, 1), block=32, shared=0) -> None:
    """Launch once; arrays among the arguments are passed by address."""
    launcher.prepare(name, grid, block, shared, *(
        pointer(arg) if isinstance(arg, np.ndarray) else arg for arg in args
    ))()


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 16 bytes, which is what device memory has at least."""
    raw = np.empty(array.nbytes + 16, dtype=np.uint8)
    start = -raw.ctypes.data % 16
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
