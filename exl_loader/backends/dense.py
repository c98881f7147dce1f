"""Unquantised layers in the layout that all kinds of devices share; see `packed.DenseLinear`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..formats.layer import PIECE_BYTES, DenseLayer
from ..formats.packed import TILE_COLUMNS, DenseLinear

if TYPE_CHECKING:
    import torch


def pack_dense(layer: DenseLayer, views: dict[str, torch.Tensor]) -> DenseLinear:
    """Read an unquantised layer into its resident tensors; see `DeviceOps.pack`."""
    target = views["weight"]
    tile_bytes = TILE_COLUMNS * layer.in_features * target.element_size()
    step = max(1, PIECE_BYTES // max(1, tile_bytes))
    for tile in range(0, target.shape[0], step):
        first = tile * TILE_COLUMNS
        end = min(first + step * TILE_COLUMNS, layer.out_features)
        fill_dense(layer.read_rows(first, end), tile, target)
    bias = place_bias(layer.bias, views)
    return DenseLinear(layer.in_features, layer.out_features, target, bias)


def place_bias(
    bias: torch.Tensor | None, views: dict[str, torch.Tensor]
) -> torch.Tensor | None:
    """Copy a bias to its resident tensor, and return that."""
    if bias is None:
        return None
    views["bias"].copy_(bias)
    return views["bias"]


def fill_dense(rows: torch.Tensor, tile: int, target: torch.Tensor) -> None:
    """Write output rows into tiles.

    Args:
        rows: [R, in_features], contiguous; R is a multiple of 16 but for a layer's last rows.
        tile: the tile of the first row.
        target: [tiles, in_features, 16], the resident weight.
    """
    in_features = rows.shape[1]
    whole = len(rows) // TILE_COLUMNS
    tiled = rows[: whole * TILE_COLUMNS].view(whole, TILE_COLUMNS, in_features)
    target[tile : tile + whole].copy_(tiled.transpose(1, 2))
    rest = rows[whole * TILE_COLUMNS :]
    if len(rest):
        # Whole on the CPU first: a copy into a part of a tile would take memory of the device.
        filled = rest.new_zeros(in_features, TILE_COLUMNS)
        filled[:, : len(rest)] = rest.t()
        target[tile + whole].copy_(filled)
