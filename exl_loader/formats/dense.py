"""Unquantised linear layers: float16, bfloat16 or float32, stored in the dtype of the file."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from .common import (
    FLOAT_DTYPES,
    expect,
    expect_columns,
    expect_experts,
    has_bias,
    read_bias,
    read_columns,
    require_finite,
)
from .layer import DenseLayer, DenseSizes, LinearSpec, RowRanges

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
    rows: RowRanges | None,
    bias: bool | None,
    transposed: bool = False,
    unit_rows: bool = False,
    expert: int | None = None,
) -> LinearSpec:
    """Describe an unquantised layer from headers; see `formats.linear_spec`."""
    weight = checkpoint.header(f"{source}.weight")
    if transposed:
        if expert is None:
            expect(weight, FLOAT_DTYPES, (in_features, None))
        else:
            stacked = (None, in_features) if len(weight.shape) == 3 else (None,)
            expect(weight, FLOAT_DTYPES, (*stacked, None))
            expect_experts(weight, math.prod(weight.shape[:-1]) // in_features, expert)
        stored = weight.shape[-1]
    else:
        # A tensor of several experts has a dimension more.
        experts = (None,) * (len(weight.shape) - 2) if rows is not None else ()
        expect(weight, FLOAT_DTYPES, (*experts, None, in_features))
        stored = math.prod(weight.shape[:-1])
    expect_columns(weight, stored, out_features, rows)
    sizes = DenseSizes(out_features, in_features, weight.dtype)
    biased = has_bias(checkpoint, source, out_features, rows, bias, expert)
    return LinearSpec(name, "dense", in_features, out_features, sizes, biased, source, rows,
                      {"transposed": transposed, "unit_rows": unit_rows, "expert": expert})


def read_dense(spec: LinearSpec, checkpoint: Checkpoint) -> DenseLayer:
    """Read the bias of an unquantised layer; see `formats.read_linear`.

    The weight is read in pieces by `DenseLayer.read_rows`.
    """
    header = checkpoint.header(f"{spec.source}.weight")
    return DenseLayer(
        spec.in_features, spec.out_features, header.dtype,
        partial(_read_rows, spec, checkpoint), read_bias(spec, checkpoint),
        spec.options["transposed"],
    )


def _read_rows(
    spec: LinearSpec, checkpoint: Checkpoint, first: int, end: int
) -> torch.Tensor:
    """Read output rows first to end, [end - first, in_features], and check that they are finite."""
    name = f"{spec.source}.weight"
    if spec.options["transposed"]:
        # The rows are strewn over the file, so it is read whole for each piece. Only GPT-2 and
        # the experts of DBRX and GPT-OSS are stored like this, whose layers are a few pieces.
        begin = (spec.options["expert"] or 0) * spec.in_features
        weight = checkpoint.read_rows(name, begin, begin + spec.in_features)
        whole = read_columns(spec, weight)
        rows = whole[:, first:end].t().contiguous()
    else:
        rows = _read_ranges(spec, checkpoint, first, end)
    require_finite(checkpoint.header(name).name, rows)
    if spec.options["unit_rows"]:
        _divide_by_length(rows)
    return rows


def _divide_by_length(rows: torch.Tensor) -> None:
    """Divide every row by its length, in place and some rows at a time."""
    import torch

    for piece in rows.split(256):
        piece.copy_(torch.nn.functional.normalize(piece.float(), dim=1))


def _read_ranges(
    spec: LinearSpec, checkpoint: Checkpoint, first: int, end: int
) -> torch.Tensor:
    """Read output rows first to end of the layer, which may be in several parts of the source."""
    import torch

    name, parts, passed = f"{spec.source}.weight", [], 0
    for stored in spec.rows or (range(spec.out_features),):
        piece = stored[max(first - passed, 0) : max(end - passed, 0)]
        if piece:
            parts.append(checkpoint.read_rows(name, piece[0], piece[-1] + 1)[:: piece.step])
        passed += len(stored)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
