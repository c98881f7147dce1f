"""Linear layers as they are stored: planned from headers, then read and checked.

Importing this package imports neither PyTorch nor numpy; functions that touch values do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.errors import InvalidCheckpoint
from .dense import plan_dense, read_dense
from .exl2 import plan_exl2, read_exl2
from .gptq import plan_gptq, read_gptq
from .layer import DenseLayer, LinearSpec, QuantizedLayer

if TYPE_CHECKING:
        from ..checkpoint import Checkpoint

__all__ = [
    "LINEAR_TENSORS",
    "DenseLayer",
    "LinearSpec",
    "QuantizedLayer",
    "has_linear",
    "plan_linear",
    "read_linear",
]

# A checkpoint mixes them: EXL2 and GPTQ leave routers dense, GPTQ the head as well.
PLANNERS = {"q_weight": plan_exl2, "qweight": plan_gptq, "weight": plan_dense}
# Last part of the name of every tensor that belongs to a linear layer.
LINEAR_TENSORS = frozenset(
    {"weight", "bias", "qweight", "qzeros", "scales", "g_idx",
     "q_weight", "q_groups", "q_scale", "q_scale_max", "q_invperm", "q_perm", "q_group_map"}
)


def has_linear(checkpoint: Checkpoint, source: str) -> bool:
    """Tell whether the checkpoint has a linear layer of this name, in any format."""
    return any(f"{source}.{tensor}" in checkpoint.headers for tensor in PLANNERS)


def plan_linear(
    checkpoint: Checkpoint,
    name: str,
    in_features: int,
    out_features: int,
    *,
    source: str | None = None,
    rows: tuple[int, int] | None = None,
    bias: bool | None = None,
) -> LinearSpec:
    """Plan a linear layer from headers alone; the tensors that exist tell its format.

    Args:
        name: the layer's own name. source: prefix of its tensors, `name` where not given.
        in_features: K. out_features: N, without padding columns.
        rows: (first, end) output rows of a fused source tensor.
        bias: True requires a bias, False leaves a stored one out, None takes what is there.

    Returns:
        a plan whose specs are named `{name}.{role}`, segment `weights`. Its bytes are what
        `DeviceOps.pack` fills, whatever the values turn out to be.

    Raises:
        InvalidCheckpoint: a tensor is missing, or its shape contradicts the others or the
            model's dimensions.
        UnsupportedFormat: a dtype or group size that this engine does not have.
    """
    source = name if source is None else source
    for tensor, planner in PLANNERS.items():
        if f"{source}.{tensor}" in checkpoint.headers:
            return planner(
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
        expected=" or ".join(f"{source}.{tensor}" for tensor in PLANNERS),
        remedy="Check that all weight files are there and belong to this config.json",
    )


def read_linear(spec: LinearSpec, checkpoint: Checkpoint) -> QuantizedLayer | DenseLayer:
    """Read a planned layer and check its values.

    Raises:
        InvalidCheckpoint: the file ends early or changed; a group table does not add up, a
            permutation is none, a scale, bias or unquantised weight is not finite.
        UnsupportedFormat: a group before the last whose rows are no multiple of 32.
    """
    if spec.format == "dense":
        return read_dense(spec, checkpoint)
    return read_exl2(spec, checkpoint) if spec.format == "exl2" else read_gptq(spec, checkpoint)
