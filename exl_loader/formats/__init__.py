"""Linear layers as they are stored: planned from headers, then read into resident tensors.

Importing this package imports neither PyTorch nor numpy; functions that touch values do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..utils.errors import InvalidCheckpoint
from ..utils.table import MAIN_MEMORY
from .dense import dense_weight, pack_dense_linear, plan_dense
from .exl2 import exl2_weight, pack_exl2_linear, plan_exl2
from .gptq import gptq_weight, pack_gptq_linear, plan_gptq
from .packed import DenseLinear, LinearPlan, PackedLinear

if TYPE_CHECKING:
    import torch

    from ..backends.base import Ops
    from ..backends.cuda.layout import StreamLinear
    from ..checkpoint import Checkpoint

__all__ = [
    "LINEAR_TENSORS",
    "DenseLinear",
    "LinearPlan",
    "PackedLinear",
    "has_linear",
    "pack_linear",
    "plan_linear",
    "reference_weight",
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
    device: str = MAIN_MEMORY,
    source: str | None = None,
    rows: tuple[int, int] | None = None,
    bias: bool | None = None,
) -> LinearPlan:
    """Plan a linear layer from headers alone; the tensors that exist tell its format.

    Args:
        name: the layer's own name. source: prefix of its tensors, `name` where not given.
        in_features: K. out_features: N, without padding columns.
        rows: (first, end) output rows of a fused source tensor.
        bias: True requires a bias, False leaves a stored one out, None takes what is there.

    Returns:
        a plan whose specs are named `{name}.{role}`, segment `weights`. Its bytes are what
        `pack_linear` fills, whatever the values turn out to be.

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
                device=device,
                source=source,
                rows=rows,
                bias=bias,
            )
    raise InvalidCheckpoint(
        f"{source}: no weight in the checkpoint",
        expected=" or ".join(f"{source}.{tensor}" for tensor in PLANNERS),
        remedy="Check that all weight files are there and belong to this config.json",
    )


def pack_linear(
    plan: LinearPlan, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], ops: Ops
) -> PackedLinear | StreamLinear | DenseLinear:
    """Read a planned layer into its resident tensors, and validate the values.

    Args:
        tensors: role -> tensor of the plan's dtype and shape, written in full.
        ops: repacks the codes; of a plan for a CUDA device, on that device.

    Raises:
        InvalidCheckpoint: the file ends early or changed; a group table does not add up, a
            permutation is none, a scale, bias or unquantised weight is not finite.
        UnsupportedFormat: a group before the last whose rows are no multiple of 32.
    """
    assert tensors.keys() == plan.specs.keys(), (plan.name, tensors.keys(), plan.specs.keys())
    if plan.format == "dense":
        return pack_dense_linear(plan, checkpoint, tensors)
    pack = pack_exl2_linear if plan.format == "exl2" else pack_gptq_linear
    return pack(plan, checkpoint, tensors, ops)


def reference_weight(plan: LinearPlan, checkpoint: Checkpoint) -> torch.Tensor:
    """Decode a planned layer straight from the checkpoint, without the packed layout.

    Returns:
        float32 [in_features, out_features], input channels in their original order.

    Raises:
        InvalidCheckpoint, UnsupportedFormat: as `pack_linear` does.
    """
    decode = {"exl2": exl2_weight, "gptq": gptq_weight, "dense": dense_weight}[plan.format]
    return decode(plan, checkpoint)
