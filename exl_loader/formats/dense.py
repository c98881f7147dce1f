"""Unquantised linear layers: float16, bfloat16 or float32, kept in their own dtype."""

from __future__ import annotations

from functools import partial
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
from .layer import DenseLayer
from .packed import TILE_COLUMNS, LinearPlan

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint
    from ..utils.table import TensorSpec

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


def read_dense(plan: LinearPlan, checkpoint: Checkpoint) -> DenseLayer:
    """Open an unquantised layer, whose weight is read in pieces; see `formats.read_linear`."""
    header = checkpoint.header(f"{plan.source}.weight")
    return DenseLayer(
        plan.in_features, plan.out_features, header.dtype,
        partial(_read_rows, plan, checkpoint), read_bias(plan, checkpoint),
    )


def _read_rows(
    plan: LinearPlan, checkpoint: Checkpoint, first: int, end: int
) -> torch.Tensor:
    """Read output rows first..end, [end - first, in_features], and check that they are finite."""
    name, base = f"{plan.source}.weight", plan.rows[0] if plan.rows else 0
    rows = checkpoint.read_rows(name, base + first, base + end)
    require_finite(name, rows)
    return rows
