"""Products with linear layers on the CPU: the calls, the structs and the scratch memory.

A layer keeps its C struct of csrc/packed.h, so that a call only passes a few integers.
`linear_scratch_bytes` works without PyTorch.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from ...formats.layer import BLOCK_ROWS
from ...utils.integers import ceil_div, round_up
from ..kernel_structs import dtype_code
from ..layouts import TILE_COLUMNS, DenseLinear
from .layout import HALF_BYTES, PackedLinear
from .library import INT, INT64, POINTER, KernelOps, Signature, address
from .threads import default_threads

if TYPE_CHECKING:
    import torch

    from ..base import Linear

_RULE = "scratch is shorter than linear_scratch_bytes"
SIGNATURES = {
    "linear": Signature((POINTER, INT64, POINTER, POINTER, INT64, INT, POINTER, INT64), _RULE),
    "linear_dense": Signature(
        (POINTER, INT64, POINTER, POINTER, INT64, INT, POINTER, INT64), _RULE
    ),
    "pack_words": Signature(
        (POINTER, INT64, INT64, INT64, POINTER, INT64, POINTER, INT64, INT64), replayed=False
    ),
    "pack_gptq": Signature(
        (POINTER, INT64, INT64, POINTER, POINTER, INT64, POINTER, INT64, INT64), replayed=False
    ),
}

# Constants of csrc/cpu/linear.h and linear_dense.cpp, the largest value of all CPU targets.
# tests/backends/cpu/test_constants.py checks that they are equal.
PASS_ROWS = 256
DENSE_PASS_ROWS = 120
DIRECT_ROWS = 8
CHUNK_ROWS = 2048
MOST_PANEL_COLUMNS = 32
PLANES = 2
SPAN_BYTES = 28
LEVELS = 16
# A cache line, and the alignment of codes.
LINE_BYTES = 64
# Alignment of csrc/cpu/scratch.h.
CUT_ALIGNMENT = 64
_FLOAT_BYTES = 4


class _PackedStruct(ctypes.Structure):
    """ExlPackedLinear."""

    _fields_ = [
        ("in_features", INT64),
        ("out_features", INT64),
        ("tiles", INT64),
        ("tile_bytes", INT64),
        ("num_groups", INT64),
        ("codes", POINTER),
        ("scales", POINTER),
        ("scale_units", POINTER),
        ("zeros", POINTER),
        ("zero_bits", INT64),
        ("groups", POINTER),
        ("perm", POINTER),
        ("bias", POINTER),
    ]


class _DenseStruct(ctypes.Structure):
    """ExlDenseLinear."""

    _fields_ = [
        ("in_features", INT64),
        ("out_features", INT64),
        ("tiles", INT64),
        ("weight", POINTER),
        ("bias", POINTER),
        ("dtype", INT64),
    ]


class LinearStruct:
    """A layer's C struct: `address` stays valid as long as this object and the tensors do."""

    __slots__ = ("_struct", "address", "in_features", "out_features", "kernel")

    def __init__(self, w: PackedLinear | DenseLinear):
        is_packed = isinstance(w, PackedLinear)
        self.kernel = "linear" if is_packed else "linear_dense"
        self._struct = _packed_struct(w) if isinstance(w, PackedLinear) else _dense_struct(w)
        self.address = ctypes.addressof(self._struct)
        self.in_features = w.in_features
        self.out_features = w.out_features


def linear_struct(w: PackedLinear | DenseLinear) -> LinearStruct:
    """Return a layer's C struct. It is made at its first use and stored in `w.native`."""
    if not isinstance(w.native, LinearStruct):
        w.native = LinearStruct(w)
    return w.native


def _packed_struct(w: PackedLinear) -> _PackedStruct:
    tiles, num_groups = w.codes.shape[0], w.groups.shape[0]
    assert tiles * TILE_COLUMNS >= w.out_features
    zero_bits = 0
    if w.zeros is None:
        assert w.scale_units is not None and w.scale_units.shape == (num_groups,)
        assert w.scales.shape == (tiles, num_groups, HALF_BYTES)
    else:
        assert w.scale_units is None and w.scales.shape == (tiles, num_groups, TILE_COLUMNS)
        zero_bits = 8 * w.zeros.shape[2] // TILE_COLUMNS
        assert zero_bits in (4, 8) and w.zeros.shape[:2] == (tiles, num_groups)
    assert w.perm is None or w.perm.shape == (w.in_features,)
    return _PackedStruct(
        w.in_features, w.out_features, tiles, w.codes.shape[1], num_groups,
        address(w.codes), address(w.scales), address(w.scale_units), address(w.zeros), zero_bits,
        address(w.groups), address(w.perm), address(w.bias),
    )  # fmt: skip


def _dense_struct(w: DenseLinear) -> _DenseStruct:
    tiles = w.weight.shape[0]
    assert tiles * TILE_COLUMNS >= w.out_features
    assert w.weight.shape == (tiles, w.in_features, TILE_COLUMNS)
    return _DenseStruct(
        w.in_features, w.out_features, tiles,
        address(w.weight), address(w.bias), dtype_code(w.weight.dtype),
    )  # fmt: skip


class LinearOps(KernelOps):
    """Products with the layers of a model, and packing of layers at load."""

    def linear(self, x: torch.Tensor, w: Linear, out: torch.Tensor, scratch: torch.Tensor,
               add: bool = False) -> None:
        assert isinstance(w, (PackedLinear, DenseLinear))
        struct = linear_struct(w)
        rows, in_features = x.shape
        out_stride, step = out.stride()
        assert in_features == struct.in_features and x.is_contiguous()
        assert out.shape[0] == rows and out.shape[1] >= struct.out_features and step == 1
        self._call(struct.kernel, x.data_ptr(), rows, struct.address, out.data_ptr(), out_stride,
                   add, scratch.data_ptr(), scratch.nbytes)

    def pack_words(self, words: torch.Tensor, first: int, groups: torch.Tensor,
                   codes: torch.Tensor) -> None:
        assert words.is_contiguous() and groups.is_contiguous() and _is_lines(codes)
        self._call("pack_words", words.data_ptr(), *words.shape, first, groups.data_ptr(),
                   groups.shape[0], codes.data_ptr(), *codes.shape)

    def pack_gptq(self, qweight: torch.Tensor, bits: int, perm: torch.Tensor | None,
                  groups: torch.Tensor, codes: torch.Tensor) -> None:
        assert qweight.is_contiguous() and groups.is_contiguous() and _is_lines(codes)
        assert all(width == bits for width in groups[:, 0].tolist())
        self._call("pack_gptq", qweight.data_ptr(), *qweight.shape, address(perm),
                   groups.data_ptr(), groups.shape[0], codes.data_ptr(), *codes.shape)


def _is_lines(codes: torch.Tensor) -> bool:
    """Return whether rows begin at multiples of 64 bytes, as stores of whole cache lines need."""
    aligned: bool = codes.data_ptr() % LINE_BYTES == 0 and codes.shape[1] % LINE_BYTES == 0
    return codes.is_contiguous() and aligned


def linear_scratch_bytes(rows: int, in_features: int) -> int:
    """Return the bytes of scratch that `Ops.linear` needs for up to `rows` rows.

    The result is the larger of two needs. The product with a quantised layer stores the
    activations in at most two planes of int8, with a scale and a sum for each 32 inputs, the
    scales of a group's 16 levels for each 32 inputs, and a buffer of unpacked codes and float32
    sums for each thread. The product with an unquantised layer stores regrouped float32
    activations.
    """
    return max(packed_scratch_bytes(rows, in_features), dense_scratch_bytes(rows, in_features))


def packed_scratch_bytes(rows: int, in_features: int) -> int:
    """Return the scratch of a product of up to `rows` rows with a quantised layer."""
    blocks = ceil_div(in_features, BLOCK_ROWS)
    held_rows = min(round_up(rows, DIRECT_ROWS), PASS_ROWS)
    codes = held_rows * blocks * BLOCK_ROWS * PLANES
    table = held_rows * blocks * _FLOAT_BYTES
    levels = blocks * LEVELS * _FLOAT_BYTES
    total = sum(map(cut_bytes, (blocks * SPAN_BYTES, levels, codes, table, table)))
    if rows > 1:
        buffer = CHUNK_ROWS * MOST_PANEL_COLUMNS + PASS_ROWS * MOST_PANEL_COLUMNS * _FLOAT_BYTES
        total += default_threads() * buffer
    return total


def dense_scratch_bytes(rows: int, in_features: int) -> int:
    """Return the scratch of a product of up to `rows` rows with an unquantised layer."""
    return min(rows, DENSE_PASS_ROWS) * in_features * _FLOAT_BYTES if rows > 1 else 0


def cut_bytes(nbytes: int) -> int:
    """Return the bytes of scratch that an array of `nbytes` bytes takes."""
    return round_up(nbytes, CUT_ALIGNMENT)
