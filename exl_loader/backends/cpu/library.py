"""What crosses from Python to the compiled kernels: layers as C structs, and thread counts.

The structs mirror `csrc/packed.h`. A layer is described once and keeps its description, so
that a call passes a few integers.
"""

from __future__ import annotations

import ctypes
import os
import re
from typing import TYPE_CHECKING

from ...formats.packed import DenseLinear, PackedLinear
from ...utils.errors import InvalidSettings, shown
from ...utils.system.processors import physical_cores, processor_quota

if TYPE_CHECKING:
    import torch

    from ..base import Linear

THREADS_ENV = "EXL_LOADER_THREADS"
# More than any machine has; each one has a stack and scratch space of its own.
MAX_THREADS = 1024


class _PackedStruct(ctypes.Structure):
    _fields_ = [
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("tiles", ctypes.c_int64),
        ("tile_bytes", ctypes.c_int64),
        ("num_groups", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("perm", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    ]


class _DenseStruct(ctypes.Structure):
    _fields_ = [
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("tiles", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
    ]


class NativeLinear:
    """A layer's C struct: `address` stays valid as long as this object and the tensors do."""

    __slots__ = ("_struct", "address", "in_features", "out_features", "packed")

    def __init__(self, w: Linear):
        self.packed = isinstance(w, PackedLinear)
        self._struct = _packed_struct(w) if isinstance(w, PackedLinear) else _dense_struct(w)
        self.address = ctypes.addressof(self._struct)
        self.in_features = w.in_features
        self.out_features = w.out_features


def native_linear(w: Linear) -> NativeLinear:
    """Return a layer's description, made at its first use and kept in `w.native`."""
    if w.native is None:
        w.native = NativeLinear(w)
    native: NativeLinear = w.native
    return native


def _pointer(tensor: torch.Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.device.type == "cpu", tensor.shape
    return tensor.data_ptr()


def _packed_struct(w: PackedLinear) -> _PackedStruct:
    tiles, num_groups = w.codes.shape[0], w.groups.shape[0]
    assert tiles * 16 >= w.out_features and w.scales.shape == (tiles, num_groups, 16)
    assert w.zeros is None or w.zeros.shape == w.scales.shape
    assert w.perm is None or w.perm.shape == (w.in_features,)
    return _PackedStruct(
        w.in_features, w.out_features, tiles, w.codes.shape[1], num_groups,
        _pointer(w.codes), _pointer(w.scales), _pointer(w.zeros), _pointer(w.groups),
        _pointer(w.perm), _pointer(w.bias),
    )  # fmt: skip


def _dense_struct(w: DenseLinear) -> _DenseStruct:
    tiles = w.weight.shape[0]
    assert tiles * 16 >= w.out_features and w.weight.shape == (tiles, w.in_features, 16)
    return _DenseStruct(
        w.in_features, w.out_features, tiles,
        _pointer(w.weight), _pointer(w.bias), dtype_code(w.weight.dtype),
    )  # fmt: skip


def dtype_code(dtype: torch.dtype) -> int:
    """Return the number that `ExlDtype` of `csrc/packed.h` gives a dtype."""
    import torch

    return {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype]


def default_threads() -> int:
    """Return how many threads the kernels use: EXL_LOADER_THREADS, or the physical cores.

    Only cores that this process may run on count, and a container's processor limit is kept
    to: a thread that waits for its turn holds up all others.

    Raises:
        InvalidSettings: EXL_LOADER_THREADS is no number from 1 to `MAX_THREADS`.
    """
    setting = os.environ.get(THREADS_ENV, "").strip()
    if not setting:
        return max(1, min(physical_cores(), processor_quota()))
    if not re.fullmatch("[0-9]{1,9}", setting) or not 1 <= int(setting) <= MAX_THREADS:
        raise InvalidSettings(
            f"environment variable {THREADS_ENV}",
            expected=f"a number from 1 to {MAX_THREADS}",
            actual=shown(setting),
        )
    return int(setting)
