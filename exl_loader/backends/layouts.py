"""Resident layouts that all kinds of devices use: bit planes, and unquantised layers.

The layout of quantised layers is in `cpu/layout.py` and `cuda/layout.py`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..formats.layer import (
    BLOCK_ROWS,
    LOAD_THREADS,
    PIECE_BYTES,
    DenseLayer,
    DenseSizes,
    QuantizedLayer,
)
from ..utils.errors import UnsupportedFormat
from ..utils.integers import ceil_div

if TYPE_CHECKING:
    import torch

    from .base import Shapes

TILE_COLUMNS = 16
# Held by a load's thread while a whole layer is in main memory beside the buffers, because each of
# the threads would otherwise hold one.
whole_layer = threading.Lock()
# Bits of a code -> bits of its planes, the high plane first.
BIT_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


@dataclass
class DenseLinear:
    """An unquantised linear layer on its device.

    `weight` is [tiles, in_features, 16] in the checkpoint's own dtype (float16, bfloat16 or
    float32): element (t, k, i) multiplies input k into output 16*t + i; rows beyond
    out_features are zero. `bias` is float32 [out_features] or None. `native` is the struct of the
    layer for the kernels.
    """

    in_features: int
    out_features: int
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    native: object = field(default=None, repr=False, compare=False)


def dense_shapes(sizes: DenseSizes) -> Shapes:
    """Return the resident tensors of an unquantised layer except its bias."""
    tiles = ceil_div(sizes.out_features, TILE_COLUMNS)
    return {"weight": (sizes.dtype, (tiles, sizes.in_features, TILE_COLUMNS))}


def pack_dense(layer: DenseLayer, views: dict[str, torch.Tensor]) -> DenseLinear:
    """Read an unquantised layer into its resident tensors; see `DeviceOps.pack`."""
    target = views["weight"]
    if layer.reads_whole:
        with whole_layer:
            _fill_in_pieces(layer, target, PIECE_BYTES)
    else:
        _fill_in_pieces(layer, target, PIECE_BYTES // LOAD_THREADS)
    bias = place_bias(layer.bias, views)
    return DenseLinear(layer.in_features, layer.out_features, target, bias)


def _fill_in_pieces(layer: DenseLayer, target: torch.Tensor, piece_bytes: int) -> None:
    """Read a weight into its tiles, whole tiles of about `piece_bytes` at a time."""
    tile_bytes = TILE_COLUMNS * layer.in_features * target.element_size()
    step = max(1, piece_bytes // max(1, tile_bytes))
    for tile in range(0, target.shape[0], step):
        first = tile * TILE_COLUMNS
        end = min(first + step * TILE_COLUMNS, layer.out_features)
        fill_dense(layer.read_rows(first, end), tile, target)


def place_bias(
    bias: torch.Tensor | None, views: dict[str, torch.Tensor]
) -> torch.Tensor | None:
    """Copy a bias to its resident tensor, and return the resident tensor."""
    if bias is None:
        return None
    views["bias"].copy_(bias)
    return views["bias"]


def fill_dense(rows: torch.Tensor, tile: int, target: torch.Tensor) -> None:
    """Write output rows into tiles.

    Args:
        rows: [R, in_features], contiguous; R is a multiple of 16 except for a layer's last rows.
        tile: the tile of the first row.
        target: [tiles, in_features, 16], the resident weight.
    """
    in_features = rows.shape[1]
    whole = len(rows) // TILE_COLUMNS
    tiled = rows[: whole * TILE_COLUMNS].view(whole, TILE_COLUMNS, in_features)
    target[tile : tile + whole].copy_(tiled.transpose(1, 2))
    rest = rows[whole * TILE_COLUMNS :]
    if len(rest):
        # The tile is filled on the CPU, because a copy to a part of a tile takes device memory.
        filled = rest.new_zeros(in_features, TILE_COLUMNS)
        filled[:, : len(rest)] = rest.t()
        target[tile + whole].copy_(filled)


def uneven_group(layer: QuantizedLayer, group: int) -> UnsupportedFormat:
    """Return the error for a group whose rows are not whole blocks."""
    return UnsupportedFormat(
        f"{layer.source}.g_idx: channels of group {group}",
        expected=f"a multiple of {BLOCK_ROWS}",
        actual=layer.groups[group][1],
    )
