"""EXL2 linear layers: each group of rows has 2 to 8 bits, and rows are permuted.

Tensors of a layer P with K inputs, N outputs padded to a multiple of 32, and G groups.
Source: files of the reference quantiser. The tests check every line against the fixtures'
reference logits:

    P.q_weight    int32 [R, N]    one bit stream a column; every group starts at a whole word
    P.q_groups    int16 [2G]      (bits, first row of the group in q_weight)
    P.q_scale     int32 [G, N/8]  4 bits a column, qs - 1
    P.q_scale_max float16 [G]
    P.q_invperm   int32 [K]       input channel -> stored row (16 bits in some files)

    value = (code - 2^(bits-1)) * s,  s = half(qs^2) * half(q_scale_max / 256)

Both products are rounded to half. On a device a scale keeps its 4 bits, its *level* qs - 1, and
half(q_scale_max / 256) is the group's *unit* (`layer.scale_values`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..utils.errors import InvalidCheckpoint, UnsupportedFormat
from ..utils.integers import ceil_div
from .common import (
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
    scale_values,
)

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint

# The last group may have n rows that are no multiple of 32. It takes ceil(n * bits / 32) words a
# column in the file, and on a device `bits` words for each block of 32 rows. A partial block of
# 8 bits and 1 to 4 rows grows most, from 1 word to 8. The bits of the group are values, so a
# spec reserves the largest growth.
TAIL_WORDS = 7
# Allowed bits of a code.
WIDTHS = (2, 3, 4, 5, 6, 8)
COLUMN_PADDING = 32


def exl2_spec(
    checkpoint: Checkpoint,
    name: str,
    in_features: int,
    out_features: int,
    *,
    source: str,
    rows: RowRanges | None,
    bias: bool | None,
) -> LinearSpec:
    """Describe an EXL2 layer from headers; see `formats.linear_spec`."""
    weight = checkpoint.header(f"{source}.q_weight")
    expect(weight, ["int32"], (None, None))
    words, columns = weight.shape
    expect_columns(weight, columns, out_features, rows, COLUMN_PADDING)
    scale = checkpoint.header(f"{source}.q_scale")
    expect(scale, ["int32"], (None, columns // 8))
    num_groups = scale.shape[0]
    expect(checkpoint.header(f"{source}.q_scale_max"), ["float16"], (num_groups,))
    expect(checkpoint.header(f"{source}.q_groups"), ["int16", "uint16"], (2 * num_groups,))
    invperm = checkpoint.header(f"{source}.q_invperm")
    expect(invperm, ["int32", "int16", "uint16"], (in_features,))
    _check_sizes(name, in_features, columns, words, num_groups)
    code_words = words + (TAIL_WORDS if in_features % BLOCK_ROWS else 0)
    sizes = QuantizedSizes(
        out_features, in_features, code_words, num_groups, zero_bits=0, perm=True
    )
    biased = has_bias(checkpoint, source, out_features, rows, bias)
    return LinearSpec(name, "exl2", in_features, out_features, sizes, biased, source, rows)


def _check_sizes(name: str, in_features: int, columns: int, words: int, num_groups: int) -> None:
    """Check the sizes in the headers: at least one valid group table must exist for them."""
    least = ceil_div(in_features * min(WIDTHS), 32)
    most = ceil_div(in_features * max(WIDTHS), 32)
    most_groups = ceil_div(in_features, BLOCK_ROWS)
    for what, expected, actual, good in (
        ("q_weight rows", f"{least} to {most}", words, least <= words <= most),
        ("groups", f"1 to {most_groups}", num_groups, 1 <= num_groups <= most_groups),
        ("q_weight columns", "a multiple of 8", columns, columns % 8 == 0),
    ):
        if not good:
            raise InvalidCheckpoint(
                f"{name}: {what} for {in_features} input features",
                expected=expected,
                actual=actual,
                remedy=WRONG_FILE,
            )


def _bad_groups(spec: LinearSpec, expected: str, actual: object) -> InvalidCheckpoint:
    return InvalidCheckpoint(
        f"{spec.source}.q_groups", expected=expected, actual=actual, remedy="Download it again"
    )


def read_groups(spec: LinearSpec, checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """Read and check a layer's group table.

    Returns:
        (bits, rows) of each group, in stored order.

    Raises:
        InvalidCheckpoint: a number of bits is not in `WIDTHS`, the starts do not increase, or
            the groups do not add up to the layer's rows and words.
        UnsupportedFormat: the number of rows of a group, except the last, is not a multiple
            of 32.
    """
    stored = checkpoint.read(f"{spec.source}.q_groups").tolist()
    table = [value & 0xFFFF for value in stored]
    widths, starts = table[0::2], table[1::2]
    words = checkpoint.header(f"{spec.source}.q_weight").shape[0]
    if starts[0] != 0:
        raise _bad_groups(spec, "the first group at row 0", starts[0])
    groups, left = [], spec.in_features
    for index, (bits, start) in enumerate(zip(widths, starts, strict=True)):
        if bits not in WIDTHS:
            raise _bad_groups(spec, f"bits in {list(WIDTHS)}", f"{bits} in group {index}")
        last = index + 1 == len(starts)
        taken = (words if last else starts[index + 1]) - start
        if taken <= 0:
            raise _bad_groups(spec, f"rising starts below {words}", f"{starts[: index + 2]}"[:80])
        rows = left if last else taken * 32 // bits
        if not last and taken % bits:
            raise _odd_group(spec, index, bits, taken)
        left -= rows
        if rows <= 0 or left < 0 or ceil_div(rows * bits, 32) != taken:
            actual = f"group {index} of {bits} bits with {taken} words for {rows + left} rows"
            raise _bad_groups(spec, f"groups that add up to {spec.in_features} rows", actual)
        groups.append((bits, rows))
    return groups


def _odd_group(spec: LinearSpec, index: int, bits: int, taken: int) -> Exception:
    """Return the error for a group, except the last, that is not made of whole blocks.

    The file is invalid if the group is not made of whole rows. Otherwise the group is valid, and
    the engine does not support it.
    """
    if taken * 32 % bits:
        return _bad_groups(
            spec, "whole rows in every group", f"{taken} words of {bits} bits in group {index}"
        )
    return UnsupportedFormat(
        f"{spec.source}.q_groups: rows of group {index}",
        expected=f"a multiple of {BLOCK_ROWS}",
        actual=taken * 32 // bits,
    )


def read_scales(
    spec: LinearSpec, checkpoint: Checkpoint, groups: list[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a layer's scales.

    Args:
        groups: from `read_groups`.

    Returns:
        levels, uint8 [G, out_features] from 0 to 15; units, float16 [G].

    Raises:
        InvalidCheckpoint: a value of q_scale_max is not finite, or so large that weights are not
            finite in float16.
    """
    import torch

    name = f"{spec.source}.q_scale_max"
    scale_max = checkpoint.read(name)
    name = checkpoint.header(name).name
    require_finite(name, scale_max)
    # A byte has the levels of two columns, the first in its low bits.
    pairs = checkpoint.read(f"{spec.source}.q_scale").view(torch.uint8)
    stored = torch.empty(*pairs.shape, 2, dtype=torch.uint8)
    torch.bitwise_and(pairs, 15, out=stored[..., 0])
    torch.bitwise_right_shift(pairs, 4, out=stored[..., 1])
    levels = read_columns(spec, stored.flatten(1))
    units = scale_units(scale_max)
    scales = scale_values(levels.amax(1), units).abs().float()
    largest = torch.tensor([1 << (bits - 1) for bits, _ in groups])
    require_finite(name, (scales * largest).half())
    return levels, units


def scale_units(scale_max: torch.Tensor) -> torch.Tensor:
    """Return the units of groups: q_scale_max / 256, rounded to float16."""
    return scale_max / 256


def effective_scales(qs: torch.Tensor, scale_max: torch.Tensor) -> torch.Tensor:
    """Return the scales that codes are multiplied by: half(qs^2) * half(scale_max / 256).

    Both factors and their product are rounded to float16, because the quantiser chose the
    codes for the rounded value.

    Args:
        qs: integers from 1 to 16.
        scale_max: float16; broadcast against `qs`.

    Returns:
        float16.
    """
    return scale_values(qs - 1, scale_units(scale_max))


def read_perm(spec: LinearSpec, checkpoint: Checkpoint) -> torch.Tensor:
    """Read a layer's permutation.

    Returns:
        int32 [in_features]: stored row r holds input channel perm[r].

    Raises:
        InvalidCheckpoint: the tensor is not a permutation.
    """
    import torch

    name = f"{spec.source}.q_invperm"
    invperm = checkpoint.read(name)
    if invperm.dtype != torch.int32:
        invperm = invperm.view(torch.int16).int() & 0xFFFF
    # Channels that no row names keep -1. With as many rows as channels, that is a permutation
    # exactly where every channel is named.
    perm = torch.full((spec.in_features,), -1, dtype=torch.int32)
    if 0 <= int(invperm.min()) and int(invperm.max()) < spec.in_features:
        perm[invperm.long()] = torch.arange(spec.in_features, dtype=torch.int32)
    if int(perm.min()) < 0:
        raise InvalidCheckpoint(
            name,
            expected=f"a permutation of 0 to {spec.in_features - 1}",
            actual="repeated or foreign numbers",
            remedy="Download the file again",
        )
    return perm


def read_exl2(spec: LinearSpec, checkpoint: Checkpoint) -> QuantizedLayer:
    """Read and check an EXL2 layer; see `formats.read_linear`."""
    groups = read_groups(spec, checkpoint)
    perm = read_perm(spec, checkpoint)
    levels, units = read_scales(spec, checkpoint, groups)
    bias = read_bias(spec, checkpoint)
    name = f"{spec.source}.q_weight"
    return QuantizedLayer(
        folder=str(checkpoint.model_dir),
        source=spec.source,
        in_features=spec.in_features,
        out_features=spec.out_features,
        groups=groups,
        word_rows=checkpoint.header(name).shape[0],
        read_words=partial(read_word_rows, spec, checkpoint, name),
        by_group=True,
        scales=levels,
        scale_units=units,
        zeros=None,
        perm=perm,
        bias=bias,
    )
