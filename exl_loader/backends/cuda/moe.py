"""Mixtures of experts on a card: routing, products with the chosen experts, their sum."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...utils.integers import ceil_div
from .launcher import WARP, address, pointer
from .layout import StreamLinear, tiles_for
from .linear import (
    LEAST_DECODE_WARPS,
    QUANTIZE_THREADS,
    RING_BYTES,
    LayerStruct,
    cut_scratch,
    layer_struct,
    quantize_grid,
)
from .rows import RowOps

if TYPE_CHECKING:
    import torch

    from ..base import ExpertTable, Linear, Routing

# csrc/cuda/moe.cu: a warp a row.
_ROUTE_THREADS = 32

_I32, _I64, _F32, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class RoutingStruct(ctypes.Structure):
    """RoutingCall of csrc/cuda/moe.cu."""

    _fields_ = [("correction", _P), ("experts", _I32), ("top_k", _I32), ("sigmoid", _I32),
                ("normalize", _I32), ("factor", _F32)]


def expert_table_shape(layers: int, num_experts: int) -> tuple[int, int, int]:
    """Return the shape of the uint8 tables of all mixtures of a device.

    Args:
        layers: decoder layers on the device. Each has a table for three projections.
        num_experts: of a layer.
    """
    return layers, 3, num_experts * ctypes.sizeof(LayerStruct)


class ExpertLayers:
    """One projection of all experts, for kernels that read on the device which to run.

    Args:
        layers: of the same shape, in the order of experts.
        table: uint8 [>= len(layers) * sizeof(LayerStruct)] on the device, written here.
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
        # Kernels read the layers' tensors and the table by address, so both must stay alive.
        self.layers = tuple(layers)
        self.table = table


class MoeOps(RowOps):
    """Operations of `base.Ops` on mixtures."""

    def moe_route(self, router_logits: torch.Tensor, routing: Routing, weights: torch.Tensor,
                  experts: torch.Tensor) -> None:
        rows, num_experts = router_logits.shape
        top_k, correction = routing.top_k, routing.correction
        assert top_k <= num_experts and weights.shape == (rows, top_k) == experts.shape
        assert correction is None or correction.shape == (num_experts,)
        if rows == 0:
            return
        call = RoutingStruct(
            address(correction), num_experts, top_k, routing.score == "sigmoid",
            routing.normalize, routing.factor,
        )
        self._launch("moe_route_kernel", (rows, 1, 1), _ROUTE_THREADS, 0, pointer(router_logits),
                     call, pointer(weights), pointer(experts))

    def expert_table(self, layers: Sequence[Linear], room: torch.Tensor) -> ExpertLayers | None:
        streams = [layer for layer in layers if isinstance(layer, StreamLinear)]
        return ExpertLayers(streams, room) if len(streams) == len(layers) else None

    def linear_pairs(self, x: torch.Tensor, table: ExpertTable, experts: torch.Tensor,
                     out: torch.Tensor, scratch: torch.Tensor) -> None:
        assert isinstance(table, ExpertLayers)
        pairs, features = experts.numel(), table.in_features
        share = pairs // max(1, x.shape[0])
        assert x.is_contiguous() and x.shape == (pairs // max(1, share), features)
        assert out.is_contiguous() and out.shape == (pairs, table.out_features)
        if pairs == 0:
            return
        activations = cut_scratch(scratch, pairs, features)
        codes, scales = _P(activations.codes), _P(activations.activation_scales)
        self._launch(
            "quantize_pairs_kernel", quantize_grid(features, pairs), QUANTIZE_THREADS, 0,
            pointer(x), pointer(table.table), pointer(experts), _I32(share), _I32(features),
            codes, scales,
        )
        warps = max(LEAST_DECODE_WARPS, table.row_splits)
        blocks = ceil_div(tiles_for(table.out_features) * table.row_splits, warps)
        self._launch(
            "linear_decode_pairs_kernel", (blocks, pairs, 1), warps * WARP, warps * RING_BYTES,
            pointer(table.table), pointer(experts), codes, scales, pointer(out),
            _I64(out.stride(0)),
        )

    def moe_sum(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor,
                out: torch.Tensor) -> None:
        rows, top_k = experts.shape
        size = out.shape[1]
        assert weights.shape == experts.shape and x.shape == (rows * top_k, size)
        self._launch_rows("moe_sum_kernel", rows, size, pointer(x), pointer(weights),
                          pointer(experts), _I32(top_k), _I32(size), pointer(out))
