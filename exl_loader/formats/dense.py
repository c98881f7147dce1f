"""Unquantised linear layers: float16, bfloat16 or float32, stored in the dtype of the file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .common import (
    FLOAT_DTYPES,
    expect,
    expect_columns,
    has_bias,
    read_bias,
    require_finite,
)
from .layer import DenseLayer, DenseSizes, LinearSpec

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint


def dense_spec(
    checkpoint: Checkpoint,
    name: str,
    in_features: int,
    out_features: int,
    *,
    source: str,
    rows: tuple[int, int] | None,
    bias: bool | None,
) -> LinearSpec:
    """Describe an unquantised layer from headers; see `formats.linear_spec`."""
    weight = checkpoint.header(f"{source}.weight")
    expect(weight, FLOAT_DTYPES, (None, in_features))
    expect_columns(weight, weight.shape[0], out_features, rows)
    sizes = DenseSizes(out_features, in_features, weight.dtype)
    biased = has_bias(checkpoint, source, out_features, rows, bias)
    return LinearSpec(name, "dense", in_features, out_features, sizes, biased, source, rows)


def read_dense(spec: LinearSpec, checkpoint: Checkpoint) -> DenseLayer:
    """Read the bias of an unquantised layer; see `formats.read_linear`.

    The weight is read in pieces by `DenseLayer.read_rows`.
    """
    header = checkpoint.header(f"{spec.source}.weight")
    return DenseLayer(
        spec.in_features, spec.out_features, header.dtype,
        partial(_read_rows, spec, checkpoint), read_bias(spec, checkpoint),
    )


def _read_rows(
    spec: LinearSpec, checkpoint: Checkpoint, first: int, end: int
) -> torch.Tensor:
    """Read output rows first to end, [end - first, in_features], and check that they are finite."""
    name, base = f"{spec.source}.weight", spec.rows[0] if spec.rows else 0
    rows = checkpoint.read_rows(name, base + first, base + end)
    require_finite(name, rows)
    return rows
