"""Formats of linear layers: specs from the headers of a checkpoint, then values read and checked.

Importing this package imports neither PyTorch nor numpy. Functions that read values import them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..utils.errors import InvalidCheckpoint
from ..utils.integers import round_up
from .common import WRONG_FILE
from .dense import dense_spec, read_dense
from .exl2 import COLUMN_PADDING, exl2_spec, read_exl2
from .gptq import gptq_spec, read_gptq
from .layer import DenseLayer, LinearSpec, QuantizedLayer, RowRanges

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

__all__ = [
    "LINEAR_TENSORS",
    "DenseLayer",
    "LinearSpec",
    "QuantizedLayer",
    "check_fused",
    "has_linear",
    "linear_spec",
    "read_linear",
]

# Last part of the name of a layer's weight tensor -> the spec of its format. One checkpoint has
# several formats: EXL2 and GPTQ leave routers unquantised, and GPTQ the head as well.
SPECS = {"q_weight": exl2_spec, "qweight": gptq_spec, "weight": dense_spec}
# The same -> the tensor that has an element for each output in its last dimension.
COLUMNS = {"q_weight": "q_weight", "qweight": "scales", "weight": "weight"}
# Last part of the name of every tensor that belongs to a linear layer.
LINEAR_TENSORS = frozenset(
    {"weight", "bias", "qweight", "qzeros", "scales", "g_idx",
     "q_weight", "q_groups", "q_scale", "q_scale_max", "q_invperm", "q_perm", "q_group_map"}
)


def has_linear(checkpoint: Checkpoint, source: str) -> bool:
    """Return whether the checkpoint has a linear layer of this name, in any format."""
    return any(f"{source}.{tensor}" in checkpoint.headers for tensor in SPECS)


def linear_spec(
    checkpoint: Checkpoint,
    name: str,
    in_features: int,
    out_features: int,
    *,
    source: str | None = None,
    rows: RowRanges | None = None,
    bias: bool | None = None,
    transposed: bool = False,
    unit_rows: bool = False,
    expert: int | None = None,
) -> LinearSpec:
    """Describe a linear layer from headers alone. The tensors that exist determine its format.

    The sizes depend on headers only, because memory is reserved before any value is read.

    Args:
        checkpoint: the open model folder.
        name: the layer's own name.
        in_features: K.
        out_features: N, without padding columns.
        source: prefix of the layer's tensors; None is `name`.
        rows: output rows of a fused source tensor; None is all rows.
        bias: True requires a bias, False ignores a stored one, None reads one that exists.
        transposed: an unquantised weight is [in_features, out_features].
        unit_rows: every output row of an unquantised weight is divided by its length.
        expert: number of the layer among those in an unquantised source tensor of all experts,
            whose bias is [experts, output features]; None where it has one layer.

    Returns:
        The spec, for `read_linear`.

    Raises:
        InvalidCheckpoint: a tensor is missing, or its shape contradicts another tensor's shape
            or the model's dimensions.
        UnsupportedFormat: the engine does not support a dtype or the packing.
    """
    source = name if source is None else source
    for tensor, describe in SPECS.items():
        if f"{source}.{tensor}" in checkpoint.headers:
            if describe is dense_spec:
                describe = partial(
                    dense_spec, transposed=transposed, unit_rows=unit_rows, expert=expert
                )
            return describe(
                checkpoint,
                name,
                in_features,
                out_features,
                source=source,
                rows=rows,
                bias=bias,
            )
    raise InvalidCheckpoint(
        f"{source}: no weight in the checkpoint",
        expected=" or ".join(f"{source}.{tensor}" for tensor in SPECS),
        remedy="Check that all weight files are there and belong to this config.json",
    )


def check_fused(
    checkpoint: Checkpoint, source: str, out_features: int, transposed: bool = False
) -> None:
    """Check that a fused source tensor has the outputs of its layers and no others.

    Otherwise the numbers of heads in the config would be another model's, and rows of queries,
    keys and values would be taken for each other's.

    Args:
        checkpoint: the open model folder, in which `linear_spec` found the layers.
        source: prefix of the tensors.
        out_features: those of all its layers.
        transposed: see `linear_spec`.

    Raises:
        InvalidCheckpoint: it has more or fewer.
    """
    format = next(tensor for tensor in SPECS if f"{source}.{tensor}" in checkpoint.headers)
    header = checkpoint.header(f"{source}.{COLUMNS[format]}")
    stored = header.shape[0 if format == "weight" and not transposed else -1]
    if stored not in (out_features, round_up(out_features, COLUMN_PADDING)):
        raise InvalidCheckpoint(
            f"{header.name}: output features of all layers that are fused in it",
            expected=out_features, actual=stored, remedy=WRONG_FILE,
        )


def read_linear(spec: LinearSpec, checkpoint: Checkpoint) -> QuantizedLayer | DenseLayer:
    """Read a layer and check its values.

    The weight of an unquantised layer is read and checked later, in pieces.

    Args:
        spec: from `linear_spec`.
        checkpoint: the open model folder.

    Returns:
        The layer on the CPU, in the order of its file.

    Raises:
        InvalidCheckpoint: the file is truncated or has changed, a group table does not add up,
            a permutation is invalid, or a scale or bias is not finite.
        UnsupportedFormat: the number of rows of an EXL2 group, except the last, is not a
            multiple of 32.
    """
    if spec.format == "dense":
        return read_dense(spec, checkpoint)
    return read_exl2(spec, checkpoint) if spec.format == "exl2" else read_gptq(spec, checkpoint)
