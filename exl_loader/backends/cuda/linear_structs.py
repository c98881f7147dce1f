"""Linear layers as CUDA kernels take them: the structs of csrc/cuda/linear_layout.cuh."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .layout import MAX_SPLITS, StreamLinear, splits_for, tiles_for, windows_for

if TYPE_CHECKING:
    import torch

MAX_LAYERS = 3


class PositionStruct(ctypes.Structure):
    """`StreamPosition`."""

    _fields_ = [
        ("offset", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("state", ctypes.c_int32),
        ("header", ctypes.c_int32),
    ]


class LayerStruct(ctypes.Structure):
    """`StreamLayer`."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("groups", ctypes.c_void_p),
        ("row_blocks", ctypes.c_void_p),
        ("perm", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("tile_bytes", ctypes.c_int64),
        ("in_features", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("num_groups", ctypes.c_int32),
        ("zeros", ctypes.c_int32),
        ("row_splits", ctypes.c_int32),
        ("row_block_bytes", ctypes.c_int32),
        # The compiler aligns positions to 16 bytes; these 8 bytes do so in ctypes.
        ("unused", ctypes.c_int64),
        ("starts", PositionStruct * (MAX_SPLITS + 1)),
    ]


LAYER_BYTES = ctypes.sizeof(LayerStruct)


class RowsStruct(ctypes.Structure):
    """`QuantizedRows`."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("activation_scales", ctypes.c_void_p),
        ("rows", ctypes.c_int32),
    ]


class RowSourceStruct(ctypes.Structure):
    """`RowSource` of csrc/cuda/linear_decode.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("kind", ctypes.c_int32),
    ]


class DecodeStruct(ctypes.Structure):
    """`DecodeCall` of csrc/cuda/linear_decode.cu."""

    _fields_ = [
        ("layers", LayerStruct * MAX_LAYERS),
        ("outs", ctypes.c_void_p * MAX_LAYERS),
        ("out_strides", ctypes.c_int64 * MAX_LAYERS),
        ("first_block", ctypes.c_int32 * (MAX_LAYERS + 1)),
        ("passes", ctypes.c_int32),
        ("add", ctypes.c_int32),
        ("ring_chunks", ctypes.c_int32),
        ("x", RowsStruct),
        ("row", RowSourceStruct),
        # The size of a struct that holds positions is a multiple of 16.
        ("unused", ctypes.c_int64),
    ]


def layer_struct(w: StreamLinear) -> LayerStruct:
    """Describe a layer, once; the description is kept in `w.native` as long as its tensors."""
    if w.native is None:
        w.native = _layer_struct(w)
    struct: LayerStruct = w.native
    return struct


def _layer_struct(w: StreamLinear) -> LayerStruct:
    windows, splits = windows_for(w.in_features), splits_for(w.in_features, w.out_features)
    assert w.codes.shape[0] == tiles_for(w.out_features)
    assert len(w.host_windows) == windows + 1 == w.windows.shape[0]
    assert w.perm is None or w.perm.shape == (w.in_features,)
    offsets = [place[0] for place in w.host_windows]
    starts = (PositionStruct * (MAX_SPLITS + 1))(
        *(PositionStruct(*w.host_windows[windows * s // splits]) for s in range(splits + 1))
    )
    return LayerStruct(
        address(w.codes), address(w.groups), address(w.windows), address(w.perm),
        address(w.bias), w.codes.shape[1], w.in_features, w.out_features, w.groups.shape[0],
        w.zeros, splits, max(b - a for a, b in zip(offsets, offsets[1:], strict=False)), 0, starts,
    )  # fmt: skip


def address(tensor: torch.Tensor | None) -> int | None:
    """Return a contiguous tensor's address; None for None."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), tensor.shape
    return tensor.data_ptr()


class ExpertLayers:
    """The layers of one projection of all experts, for kernels that choose one themselves.

    Args:
        layers: of the same shape, in the order of experts.
        table: uint8 [>= len(layers) * LAYER_BYTES] of the device, written here.
    """

    def __init__(self, layers: Sequence[StreamLinear], table: torch.Tensor):
        import torch

        structs = (LayerStruct * len(layers))(*(layer_struct(w) for w in layers))
        self.in_features, self.out_features = layers[0].in_features, layers[0].out_features
        self.row_splits = structs[0].row_splits
        assert all(w.in_features == self.in_features for w in layers)
        assert all(w.out_features == self.out_features for w in layers)
        raw = torch.frombuffer(bytearray(structs), dtype=torch.uint8)
        table[: len(raw)].copy_(raw)
        # Kernels read the layers' tensors and the table by address.
        self.layers, self.table = tuple(layers), table
        self.address = ctypes.c_void_p(address(table))
