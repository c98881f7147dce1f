"""Unquantised linear layers: float16, bfloat16 or float32, stored in the dtype of the file."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from ..utils.errors import InvalidCheckpoint
from .common import (
    FLOAT_DTYPES,
    WRONG_FILE,
    expect,
    expect_columns,
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
    inputs: tuple[int, int] | None = None,
) -> LinearSpec:
    """Describe an unquantised layer from headers; see `formats.linear_spec`."""
    weight = checkpoint.header(f"{source}.weight")
    if transposed:
        expect(weight, FLOAT_DTYPES, (in_features if inputs is None else None, None))
        if inputs is not None and weight.shape[0] < inputs[1]:
            raise InvalidCheckpoint(
                f"{weight.name}: input features", expected=f"at least {inputs[1]}",
                actual=weight.shape[0], remedy=WRONG_FILE,
            )
        stored = weight.shape[1]
    else:
        # A tensor of several experts has a dimension more.
        experts = (None,) * (len(weight.shape) - 2) if rows is not None else ()
        expect(weight, FLOAT_DTYPES, (*experts, None, in_features))
        stored = math.prod(weight.shape[:-1])
    expect_columns(weight, stored, out_features, rows)
    sizes = DenseSizes(out_features, in_features, weight.dtype)
    biased = has_bias(checkpoint, source, out_features, rows, bias)
    return LinearSpec(name, "dense", in_features, out_features, sizes, biased, source, rows,
                      {"transposed": transposed, "unit_rows": unit_rows, "inputs": inputs})


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
    name = f"{spec.source}.weight"
    if spec.options["transposed"]:
        # The rows are strewn over the file, so it is read whole for each piece. Only GPT-2 and
        # the experts of DBRX are stored like this, whose layers are a few pieces.
        inputs = spec.options["inputs"]
        weight = checkpoint.read(name) if inputs is None else checkpoint.read_rows(name, *inputs)
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
    for low, high in spec.rows or ((0, spec.out_features),):
        begin, stop = max(first - passed, 0), min(end - passed, high - low)
        if begin < stop:
            parts.append(checkpoint.read_rows(name, low + begin, low + stop))
        passed += high - low
    return parts[0] if len(parts) == 1 else torch.cat(parts)
