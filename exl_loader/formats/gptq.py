"""GPTQ linear layers of 2, 3, 4 or 8 bits, with or without act-order.

Tensors of a layer P with K inputs, N outputs and G groups:

    P.qweight int32 [K * bits / 32, N]   one bit stream a column, along K
    P.qzeros  int32 [G, N * bits / 32]   one bit stream a group, along N
    P.scales  float16 [G, N]             or bfloat16, float32
    P.g_idx   int32 [K]                  group of each input channel; may be absent

    value = scales[g, n] * (code - zero)

`gptq_zeros.py` describes how zero points are stored. auto-round can pack 4-bit codes along N
instead (`awq_packing.py`). The bits and the group size are derived from the shapes. The
quantization config only decides between several possible group sizes.

On a device a group takes whole blocks of 32 stored rows. If the group size is not a multiple of
32, the CPU layout fills up every group to whole blocks. The CUDA layout can only fill up the last
group, so a CUDA device keeps such a layer as float16 weights.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..utils.errors import InvalidCheckpoint, UnsupportedFormat
from ..utils.integers import ceil_div
from ..utils.output import warn_once
from . import awq_packing
from .common import (
    FLOAT_DTYPES,
    WRONG_FILE,
    expect,
    expect_columns,
    has_bias,
    read_bias,
    read_columns,
    read_word_rows,
    require_finite,
)
from .layer import (
    BLOCK_ROWS,
    LinearSpec,
    QuantizedLayer,
    QuantizedSizes,
    RowRanges,
    zero_bits_for,
)

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint

WIDTHS = (2, 3, 4, 8)
USUAL_GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024)


def gptq_spec(
    checkpoint: Checkpoint,
    name: str,
    in_features: int,
    out_features: int,
    *,
    source: str,
    rows: RowRanges | None,
    bias: bool | None,
) -> LinearSpec:
    """Describe a GPTQ layer from headers; see `formats.linear_spec`.

    The spec's `options` are `bits`, `group_size` (rows a group), `num_groups`, and `layout` and
    `sym` for `gptq_zeros.read_zero_points`.
    """
    scales = checkpoint.header(f"{source}.scales")
    expect(scales, FLOAT_DTYPES, (None, None))
    num_groups, columns = scales.shape
    bits = _bits(checkpoint, source, in_features, columns)
    weight = checkpoint.header(f"{source}.qweight")
    expect_columns(weight, columns, out_features, rows)
    zeros = checkpoint.header(f"{source}.qzeros")
    expect(zeros, ["int32"], (num_groups, ceil_div(columns * bits, 32)))
    group_size = _group_size(checkpoint, source, in_features, num_groups)
    act_order = f"{source}.g_idx" in checkpoint.headers
    if act_order:
        expect(checkpoint.header(f"{source}.g_idx"), ["int32", "int64"], (in_features,))
    elif checkpoint.quantization.desc_act and num_groups > 1:
        raise InvalidCheckpoint(
            f"{source}.g_idx: not in the checkpoint",
            expected="the group of each input channel, because desc_act is true",
            remedy=WRONG_FILE,
        )
    last_rows = in_features - (num_groups - 1) * group_size
    blocks = (num_groups - 1) * ceil_div(group_size, BLOCK_ROWS) + ceil_div(last_rows, BLOCK_ROWS)
    options = {
        "bits": bits,
        "group_size": group_size,
        "num_groups": num_groups,
        "layout": checkpoint.quantization.layout,
        "sym": checkpoint.quantization.sym,
    }
    sizes = QuantizedSizes(
        out_features, in_features, blocks * bits, num_groups, zero_bits=zero_bits_for(bits),
        perm=act_order,
        blocks=blocks, whole_blocks=num_groups == 1 or group_size % BLOCK_ROWS == 0,
    )
    biased = has_bias(checkpoint, source, out_features, rows, bias)
    return LinearSpec(name, "gptq", in_features, out_features, sizes, biased, source, rows,
                      options)


def _bits(checkpoint: Checkpoint, source: str, in_features: int, columns: int) -> int:
    """Derive the bits of a code from the shape. Warn if the config has another number."""
    weight = checkpoint.header(f"{source}.qweight")
    expect(weight, ["int32"], (None, None))
    words = weight.shape[0]
    if checkpoint.quantization.packs_columns:
        # `codes_along_rows` packs 8 rows in a word, so their number must be a multiple of 8.
        wanted = columns // awq_packing.COLUMNS
        expect(weight, ["int32"], (in_features // 8 * 8, wanted))
        return awq_packing.BITS
    if words == in_features and weight.shape[1] < columns:
        raise UnsupportedFormat(
            f"{source}.qweight: packed along the output columns, as AWQ does",
            expected="codes packed along the input channels, as GPTQ does",
            remedy="Use a GPTQ or EXL2 version of the model",
        )
    expect(weight, ["int32"], (None, columns))
    bits = words * 32 // in_features
    if bits not in WIDTHS or words * 32 != in_features * bits:
        raise InvalidCheckpoint(
            f"{source}.qweight: rows for {in_features} input features",
            expected=" or ".join(f"{in_features * b / 32:g} ({b} bits)" for b in WIDTHS),
            actual=words,
            remedy=WRONG_FILE,
        )
    quantization = checkpoint.quantization
    if quantization.bits not in (None, bits) and not quantization.per_layer:
        warn_once(
            f"{quantization.where} says {quantization.bits} bits, but the shape of some layers "
            f"is that of {bits} bits; the shape is right"
        )
    return bits


def _group_size(checkpoint: Checkpoint, source: str, in_features: int, num_groups: int) -> int:
    """Return the config's group size if it gives the number of groups; otherwise derive it.

    Raises:
        InvalidCheckpoint: no group size, or more than one, gives the number of groups.
    """
    quantization = checkpoint.quantization
    declared = quantization.group_size
    if declared is not None and (declared == 0 or declared < -1):
        raise InvalidCheckpoint(
            "quantization_config: group_size", expected="-1 or at least 1", actual=declared
        )
    if declared is not None:
        size = in_features if declared == -1 else min(declared, in_features)
        if ceil_div(in_features, size) == num_groups:
            return size
    derived = _derived_group_size(in_features, num_groups)
    if derived is None:
        raise InvalidCheckpoint(
            f"{source}.scales: groups of {in_features} input features",
            expected="a number that one group size gives"
            if declared is None else f"as many as group_size {declared} gives",
            actual=num_groups,
            remedy=WRONG_FILE,
        )
    if declared is not None and not quantization.per_layer:
        warn_once(
            f"{quantization.where} says group_size {declared}, but the shape of some layers is "
            f"that of {derived}; the shape is right"
        )
    return derived


def _derived_group_size(in_features: int, num_groups: int) -> int | None:
    """Derive the group size from the number of groups; None if no size or several sizes fit.

    A usual size with a shorter last group is preferred to an unusual size that divides
    in_features, because quantisers use few sizes.
    """
    if num_groups < 1:
        return None
    even, rest = divmod(in_features, num_groups)
    usual = [size for size in USUAL_GROUP_SIZES if ceil_div(in_features, size) == num_groups]
    if rest == 0 and (even in usual or num_groups == 1):
        return even
    if len(usual) == 1:
        return usual[0]
    return even if rest == 0 and not usual and even else None


def read_group_index(spec: LinearSpec, checkpoint: Checkpoint) -> torch.Tensor:
    """Return the group of each input channel, int64 [in_features].

    Raises:
        InvalidCheckpoint: a group number is outside 0 to num_groups - 1.
    """
    import torch

    num_groups = spec.options["num_groups"]
    trivial = torch.arange(spec.in_features) // spec.options["group_size"]
    name = f"{spec.source}.g_idx"
    if name not in checkpoint.headers:
        return trivial
    index = checkpoint.read(name).long()
    if not bool(index.any()) and not (num_groups > 1 and checkpoint.quantization.desc_act):
        # Without act-order, some writers store zeros only, also for several groups.
        return trivial
    if not bool(((index >= 0) & (index < num_groups)).all()):
        raise InvalidCheckpoint(
            name,
            expected=f"groups 0 to {num_groups - 1}",
            actual=f"{int(index.min())} to {int(index.max())}",
            remedy="Download the file again",
        )
    return index


def _group_rows(spec: LinearSpec, index: torch.Tensor) -> list[int]:
    """Return the number of rows of each group.

    Raises:
        InvalidCheckpoint: a group has no channels.
    """
    import torch

    rows: list[int] = torch.bincount(index, minlength=spec.options["num_groups"]).tolist()
    if 0 in rows:
        raise InvalidCheckpoint(
            f"{spec.source}.g_idx",
            expected="channels in every group",
            actual=f"none in group {rows.index(0)}",
            remedy="Download the file again",
        )
    return rows


def read_codes(
    spec: LinearSpec, checkpoint: Checkpoint, first: int, end: int
) -> torch.Tensor:
    """Read rows of a layer's codes, int32 [K * bits / 32, N], packed along the input channels."""
    import numpy as np
    import torch

    name = f"{spec.source}.qweight"
    if not checkpoint.quantization.packs_columns:
        return read_word_rows(spec, checkpoint, name, first, end)
    rows = awq_packing.WORD_ROWS
    words = checkpoint.read_rows(name, first * rows, end * rows).numpy().view(np.uint32)
    packed = torch.from_numpy(awq_packing.codes_along_rows(words).view(np.int32))
    return packed if spec.rows is None else read_columns(spec, packed)


def read_zeros(spec: LinearSpec, checkpoint: Checkpoint) -> torch.Tensor:
    """Read a layer's zero points, uint8 [G, out_features]: `zero` in the formula above."""
    import numpy as np
    import torch

    from .gptq_zeros import read_zero_points

    words = checkpoint.read(f"{spec.source}.qzeros").numpy().view(np.uint32)
    if checkpoint.quantization.packs_columns:
        words = awq_packing.zeros_in_order(words)
    columns = checkpoint.header(f"{spec.source}.scales").shape[1]
    options = spec.options
    zeros, contradiction = read_zero_points(
        words, options["bits"], columns, options["layout"], options["sym"]
    )
    if contradiction:
        warn_once(f"{checkpoint.model_dir}: {contradiction}; the values were followed")
    return read_columns(spec, torch.from_numpy(zeros))


def read_scales(spec: LinearSpec, checkpoint: Checkpoint) -> torch.Tensor:
    """Read a layer's scales, float16 [G, out_features].

    Raises:
        InvalidCheckpoint: a scale is not finite in its file, or not finite in float16.
    """
    import torch

    name = f"{spec.source}.scales"
    stored = checkpoint.read(name)
    name = checkpoint.header(name).name
    require_finite(name, stored)
    scales = stored.to(torch.float16)
    if scales is not stored:
        require_finite(f"{name} as float16", scales)
        _warn_of_small_scales(checkpoint, stored, scales)
    return read_columns(spec, scales)


def _warn_of_small_scales(
    checkpoint: Checkpoint, stored: torch.Tensor, scales: torch.Tensor
) -> None:
    """Warn if rounding to float16 changes a scale by more than rounding to bfloat16 would."""
    error = (scales.float() - stored.float()).abs()
    if bool((error > stored.float().abs() * 2**-9).any()):
        warn_once(
            f"{checkpoint.model_dir}: some scales are too small for float16 and lose precision"
        )


def read_gptq(spec: LinearSpec, checkpoint: Checkpoint) -> QuantizedLayer:
    """Read and check a GPTQ layer; see `formats.read_linear`."""
    import torch

    index = read_group_index(spec, checkpoint)
    rows = _group_rows(spec, index)
    perm = None
    if f"{spec.source}.g_idx" in checkpoint.headers:
        perm = torch.argsort(index, stable=True).int()
    scales, zeros = read_scales(spec, checkpoint), read_zeros(spec, checkpoint)
    bias = read_bias(spec, checkpoint)
    return QuantizedLayer(
        folder=str(checkpoint.model_dir),
        source=spec.source,
        in_features=spec.in_features,
        out_features=spec.out_features,
        groups=[(spec.options["bits"], count) for count in rows],
        word_rows=spec.in_features * spec.options["bits"] // 32,
        read_words=partial(read_codes, spec, checkpoint),
        by_group=False,
        scales=scales,
        scale_units=None,
        zeros=zeros,
        perm=perm,
        bias=bias,
    )
