"""Unquantised linear layers: float16, bfloat16 or float32, kept in their own dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .common import (
    FLOAT_DTYPES,
    expect,
    expect_columns,
    plan_bias,
    read_bias,
    require_finite,
    tiles_for,
    weight_spec,
)
from .packed import TILE_COLUMNS, DenseLinear, LinearPlan

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint
    from ..utils.table import TensorSpec

# Read in pieces: a whole embedding beside its resident copy would double a load's peak.
PIECE_BYTES = 16 << 20


def plan_dense(
    checkpoint: Checkpoint,
    name: str,
    in_features: int,
    out_features: int,
    *,
    device: str,
    source: str,
    rows: tuple[int, int] | None,
    bias: bool | None,
) -> LinearPlan:
    """Plan an unquantised layer from headers; see `formats.plan_linear`."""
    weight = checkpoint.header(f"{source}.weight")
    expect(weight, FLOAT_DTYPES, (None, in_features))
    expect_columns(weight, weight.shape[0], out_features, rows)
    specs = dense_specs(name, weight.dtype, in_features, out_features, device)
    specs |= plan_bias(checkpoint, name, source, out_features, rows, bias, device)
    return LinearPlan(name, "dense", in_features, out_features, specs, source, rows)


def dense_specs(
    name: str, dtype: str, in_features: int, out_features: int, device: str
) -> dict[str, TensorSpec]:
    """Plan the tensors of an unquantised layer but for its bias."""
    shape = (tiles_for(out_features), in_features, TILE_COLUMNS)
    return {"weight": weight_spec(name, "weight", dtype, shape, device)}


def pack_dense_linear(
    plan: LinearPlan, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]
) -> DenseLinear:
    """Read an unquantised layer into its resident tensors; see `formats.pack_linear`."""
    name, target = f"{plan.source}.weight", tensors["weight"]
    tile_bytes = TILE_COLUMNS * plan.in_features * target.element_size()
    step = max(1, PIECE_BYTES // max(1, tile_bytes))
    base = plan.rows[0] if plan.rows else 0
    for tile in range(0, target.shape[0], step):
        first = tile * TILE_COLUMNS
        end = min(first + step * TILE_COLUMNS, plan.out_features)
        piece = checkpoint.read_rows(name, base + first, base + end)
        require_finite(name, piece)
        fill_dense(piece, tile, target)
    if "bias" in tensors:
        read_bias(plan, checkpoint, tensors["bias"])
    return DenseLinear(plan.in_features, plan.out_features, target, tensors.get("bias"))


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


def dense_weight(plan: LinearPlan, checkpoint: Checkpoint) -> torch.Tensor:
    """Decode an unquantised layer; see `formats.reference_weight`."""
    first, end = plan.rows or (0, plan.out_features)
    return checkpoint.read_rows(f"{plan.source}.weight", first, end).float().t().contiguous()
