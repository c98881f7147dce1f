"""GPTQ linear layers of 2, 3, 4 or 8 bits, with or without act-order.

Tensors of a layer P with K inputs, N outputs and G groups:

    P.qweight int32 [K * bits / 32, N]   per column one bit stream along K
    P.qzeros  int32 [G, N * bits / 32]   per group one bit stream along N
    P.scales  float16 [G, N]
    P.g_idx   int32 [K]                  group of each input channel; may be absent

    value = scales[g, n] * (code - zero)

`zero` is stored + 1 in the original layout and stored as it is in `gptq_v2`. The original
quantiser chooses zero points of 0 to 2^bits - 1 and subtracts 1 on writing. A stored
2^bits - 1 is read two ways in the field: as 2^bits (AutoGPTQ's qlinear_cuda, exllama, vLLM)
and, wrapped, as 0 (AutoGPTQ's qlinear_cuda_old). Up to 4 bits this module reads 2^bits, as
the formula says. At 8 bits 256 does not fit the resident byte; there it wraps to 0, the only
value that a quantiser can have meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..errors import InvalidCheckpoint, UnsupportedFormat
from .common import (
    WRONG_FILE,
    expect,
    expect_columns,
    fill_tiles,
    plan_bias,
    quantized_specs,
    read_bias,
    read_columns,
    require_finite,
)
from .packed import BLOCK_ROWS, LinearPlan, PackedLinear, QuantizedSizes
from .packed_cuda import StreamLinear, blocks_for

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint
    from ..kernels.interface import Ops
    from .pack_cuda import StreamOps

WIDTHS = (2, 3, 4, 8)


def plan_gptq(
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
    """Plan a GPTQ layer from headers; see `formats.plan_linear`.

    `options` of the plan: `bits`, `group_size` (rows a group), `zero_offset` (1 or 0).
    """
    weight = checkpoint.header(f"{source}.qweight")
    expect(weight, ["int32"], (None, None))
    words, columns = weight.shape
    expect_columns(weight, columns, out_features, rows)
    bits = _bits(checkpoint, source, in_features, words)
    scales = checkpoint.header(f"{source}.scales")
    expect(scales, ["float16"], (None, columns))
    num_groups = scales.shape[0]
    zeros = checkpoint.header(f"{source}.qzeros")
    expect(zeros, ["int32"], (num_groups, -(-columns * bits // 32)))
    group_size = _group_size(checkpoint, source, in_features, num_groups)
    act_order = f"{source}.g_idx" in checkpoint.headers
    if act_order:
        expect(checkpoint.header(f"{source}.g_idx"), ["int32", "int64"], (in_features,))
    sizes = QuantizedSizes(
        out_features, in_features, blocks_for(in_features) * bits, num_groups,
        zeros=True, perm=act_order,
    )  # fmt: skip
    specs = quantized_specs(name, sizes, device)
    specs |= plan_bias(checkpoint, name, source, out_features, rows, bias, device)
    version = checkpoint.quantization.get("checkpoint_format")
    options = {
        "bits": bits,
        "group_size": group_size,
        "zero_offset": 0 if version == "gptq_v2" else 1,
    }
    return LinearPlan(name, "gptq", in_features, out_features, specs, source, rows, options)


def _setting(checkpoint: Checkpoint, key: str) -> int | None:
    """Look a whole number up in the quantization config; absent is None.

    GPTQModel's `dynamic` gives single layers settings of their own; then the headers decide.
    """
    value = checkpoint.quantization.get(key)
    if value is None or checkpoint.quantization.get("dynamic"):
        return None
    if type(value) is not int:
        raise InvalidCheckpoint(
            f"quantization_config: {key}", expected="a whole number", actual=repr(value)[:80]
        )
    return value


def _bits(checkpoint: Checkpoint, source: str, in_features: int, words: int) -> int:
    """Derive the width from the shape, and hold it against the config's."""
    bits = words * 32 // in_features
    if bits not in WIDTHS or words * 32 != in_features * bits:
        raise InvalidCheckpoint(
            f"{source}.qweight: rows for {in_features} input features",
            expected=" or ".join(f"{in_features * b / 32:g} ({b} bits)" for b in WIDTHS),
            actual=words,
            remedy=WRONG_FILE,
        )
    declared = _setting(checkpoint, "bits")
    if declared not in (None, bits):
        raise InvalidCheckpoint(
            f"{source}.qweight: bits",
            expected=f"{declared} as the quantization config says",
            actual=bits,
            remedy=WRONG_FILE,
        )
    return bits


def _group_size(checkpoint: Checkpoint, source: str, in_features: int, num_groups: int) -> int:
    """Take the config's group size, or derive it, and hold it against the number of groups."""
    declared = _setting(checkpoint, "group_size")
    if declared is not None and (declared == 0 or declared < -1):
        raise InvalidCheckpoint(
            "quantization_config: group_size", expected="-1 or at least 1", actual=declared
        )
    size = -(-in_features // max(1, num_groups)) if declared is None else declared
    size = in_features if size == -1 or size > in_features else size
    if -(-in_features // size) != num_groups:
        raise InvalidCheckpoint(
            f"{source}.scales: groups of {size} for {in_features} input features",
            expected=-(-in_features // size),
            actual=num_groups,
            remedy=WRONG_FILE,
        )
    if num_groups > 1 and size % BLOCK_ROWS:
        raise UnsupportedFormat(
            f"{source}: group size", expected=f"a multiple of {BLOCK_ROWS}", actual=size
        )
    return size


def read_group_index(plan: LinearPlan, checkpoint: Checkpoint) -> torch.Tensor:
    """Give the group of each input channel.

    Returns:
        int64 [in_features].

    Raises:
        InvalidCheckpoint: a group that is not there.
    """
    import torch

    group_size, num_groups = plan.options["group_size"], plan.specs["groups"].shape[0]
    trivial = torch.arange(plan.in_features) // group_size
    if "perm" not in plan.specs:
        return trivial
    name = f"{plan.source}.g_idx"
    index = checkpoint.read(name).long()
    if not bool(index.any()):
        # All zero is what some writers leave there without act-order, whatever the groups.
        return trivial
    if not bool(((index >= 0) & (index < num_groups)).all()):
        raise InvalidCheckpoint(
            name,
            expected=f"groups 0 to {num_groups - 1}",
            actual=f"{int(index.min())} to {int(index.max())}",
            remedy="Download the file again",
        )
    return index


def _group_rows(plan: LinearPlan, index: torch.Tensor) -> list[int]:
    """Count the rows of each group; every one but the last must fill whole blocks."""
    import torch

    rows = torch.bincount(index, minlength=plan.specs["groups"].shape[0]).tolist()
    for group, count in enumerate(rows):
        if count == 0:
            raise InvalidCheckpoint(
                f"{plan.source}.g_idx",
                expected="channels in every group",
                actual=f"none in group {group}",
                remedy="Download the file again",
            )
        if count % BLOCK_ROWS and group + 1 < len(rows):
            raise UnsupportedFormat(
                f"{plan.source}.g_idx: channels of group {group}",
                expected=f"a multiple of {BLOCK_ROWS}",
                actual=count,
            )
    return rows


def read_zeros(plan: LinearPlan, checkpoint: Checkpoint) -> torch.Tensor:
    """Read a layer's zero points: uint8 [G, out_features], the offset already added."""
    import numpy as np
    import torch

    from .planes import unpack_stream

    words = checkpoint.read(f"{plan.source}.qzeros").numpy().view(np.uint32)
    columns = checkpoint.header(f"{plan.source}.scales").shape[1]
    stored = unpack_stream(words.T, plan.options["bits"], columns).T
    stored = stored + np.uint8(plan.options["zero_offset"])  # 8 bits: 255 + 1 wraps to 0
    return read_columns(plan, torch.from_numpy(np.ascontiguousarray(stored)))


def read_scales(plan: LinearPlan, checkpoint: Checkpoint) -> torch.Tensor:
    """Read a layer's scales: float16 [G, out_features].

    Raises:
        InvalidCheckpoint: a scale is not finite.
    """
    name = f"{plan.source}.scales"
    scales = checkpoint.read(name)
    require_finite(name, scales)
    return read_columns(plan, scales)


def pack_gptq_linear(
    plan: LinearPlan, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], ops: Ops
) -> PackedLinear | StreamLinear:
    """Read a GPTQ layer into its resident tensors; see `formats.pack_linear`."""
    import torch

    from .pack_cuda import pack_gptq_streams
    from .planes import group_table

    bits = plan.options["bits"]
    index = read_group_index(plan, checkpoint)
    rows = _group_rows(plan, index)
    perm = None
    if "perm" in tensors:
        order = torch.argsort(index, stable=True).int()
        tensors["perm"].copy_(order)
        if not torch.equal(order, torch.arange(plan.in_features, dtype=torch.int32)):
            perm = tensors["perm"]
    scales, zeros = read_scales(plan, checkpoint), read_zeros(plan, checkpoint)
    if "bias" in tensors:
        read_bias(plan, checkpoint, tensors["bias"])
    weight = checkpoint.read(f"{plan.source}.qweight")
    if "windows" in tensors:
        groups, words = [(bits, count) for count in rows], read_columns(plan, weight)
        return pack_gptq_streams(
            plan, groups, words, scales, zeros, perm, tensors, cast("StreamOps", ops)
        )
    if plan.rows is not None:
        weight = read_columns(plan, weight).contiguous()
    tensors["groups"].copy_(torch.from_numpy(group_table([bits] * len(rows), rows)))
    fill_tiles(scales, tensors["scales"])
    fill_tiles(zeros, tensors["zeros"])
    ops.pack_gptq(weight, bits, perm, tensors["groups"], tensors["codes"])
    return PackedLinear(
        plan.in_features,
        plan.out_features,
        tensors["codes"],
        tensors["scales"],
        tensors["groups"],
        zeros=tensors["zeros"],
        perm=perm,
        bias=tensors.get("bias"),
    )


def gptq_weight(plan: LinearPlan, checkpoint: Checkpoint) -> torch.Tensor:
    """Decode a GPTQ layer; see `formats.reference_weight`."""
    import numpy as np
    import torch

    from .planes import unpack_stream

    words = checkpoint.read(f"{plan.source}.qweight").numpy().view(np.uint32)
    codes = torch.from_numpy(unpack_stream(words, plan.options["bits"], plan.in_features))
    index = read_group_index(plan, checkpoint)
    _group_rows(plan, index)
    zeros = read_zeros(plan, checkpoint).float()[index]
    scales = read_scales(plan, checkpoint).float()[index]
    return (read_columns(plan, codes).float() - zeros) * scales
