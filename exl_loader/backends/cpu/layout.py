"""The layout of a quantised linear layer in main memory.

Packed layout (EXL2 and GPTQ alike)
-----------------------------------
Output columns are divided into tiles of 16, and stored rows into blocks of 32. Stored rows are
permuted, so that a group's rows are consecutive. A block of 32 rows x 16 columns of b-bit codes
takes exactly 64*b bytes: b vectors of 64 bytes. One *register* is the 64 bytes
[column 0..15][row 4j..4j+3], one byte a code: the operand of an 8-bit integer dot product. A
block has 8 registers, j = 0..7. Codes are split into bit planes, the high plane first:

    bits 2: plane of 2      bits 4: plane of 4      bits 6: planes of 4 (high), 2 (low)
    bits 3: planes of 2, 1  bits 5: planes of 4, 1  bits 8: plane of 8

so code = (high << width of the low plane) | low. A plane of w bits takes w vectors. Vector
v (0 <= v < w) of a plane holds in each byte the w-bit fields of 8/w registers: register
v*(8/w) + i is at bits [i*w, i*w + w) of the byte at its own position. The planes of a
block are consecutive, the high plane first.

`codes` is uint8 [tiles, tile_bytes]: for each tile the blocks of group 0, group 1, ... in row
order. A group whose number of rows is not a multiple of 32 is filled up with rows of code
2^(bits-1). The activations of these rows are zero, so their codes do not affect a result.
`groups` is int32 [G, 4]: bits, first stored row, rows (without fill), byte offset of the
group's first block within a tile.
`scales` has one of two forms. GPTQ's are float16 [tiles, G, 16]. EXL2's keep the 4 bits of the
file: `scales` is uint8 [tiles, G, 8] of levels, `scale_units` is float16 [G], and

    scale[g, n] = half((level[g, n] + 1)^2 * scale_units[g])

Kernels decode a scale where they use it, because float16 scales would add 0.375 bits to a weight
in groups of 32 rows. `zeros` is uint8 [tiles, G, 8] of 4-bit zero points, or [tiles, G, 16] where
codes have more than 4 bits; None means that every zero point is 2^(bits-1) (EXL2). Of 16 columns
in fields of 4 bits, column c is field c // 2 of the 32-bit word c % 2. `perm` is int32
[in_features]: stored row r holds input channel perm[r]; None is the identity. `bias` is float32
[out_features] or None.

    value(stored row r of group g, column n) = scale[g, n] * (code - zero[g, n])

The EXL2 quantiser measured weights that were rounded to float16, so an EXL2 weight is this value
rounded to float16. `planes.dequantize` rounds it, and then the fixtures' logits agree to the
last bit. Kernels that sum integers and apply the scale afterwards do not round it, which changes
the logits by 5e-4 to 8e-4 (relative L2, fixtures). GPTQ values are not rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...formats.layer import BLOCK_ROWS, QuantizedLayer, QuantizedSizes
from ...utils.integers import ceil_div
from ..layouts import TILE_COLUMNS, uneven_group

if TYPE_CHECKING:
    import torch

    from ..base import Shapes

# A block of b-bit codes takes b times this number of bytes.
BLOCK_BIT_BYTES = BLOCK_ROWS * TILE_COLUMNS // 8
# Bytes of the 4-bit fields of a tile's columns.
HALF_BYTES = TILE_COLUMNS // 2
# Bytes of a tile for each 32-bit word of codes of a column.
WORD_TILE_BYTES = 4 * TILE_COLUMNS


@dataclass
class PackedLinear:
    """A quantised linear layer in main memory, in the layout above.

    `native` is its C struct for the kernels (`backends/cpu/linear.py`).
    """

    in_features: int
    out_features: int
    codes: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor
    scale_units: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    perm: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    native: object = field(default=None, repr=False, compare=False)


def packed_shapes(sizes: QuantizedSizes) -> Shapes:
    """Return the resident tensors of a quantised layer except its bias."""
    tiles = ceil_div(sizes.out_features, TILE_COLUMNS)
    groups = sizes.num_groups
    shapes: Shapes = {"codes": ("uint8", (tiles, WORD_TILE_BYTES * sizes.code_words))}
    if sizes.zero_bits:
        shapes["scales"] = ("float16", (tiles, groups, TILE_COLUMNS))
        shapes["zeros"] = ("uint8", (tiles, groups, TILE_COLUMNS * sizes.zero_bits // 8))
    else:
        shapes["scales"] = ("uint8", (tiles, groups, HALF_BYTES))
        shapes["scale_units"] = ("float16", (groups,))
    shapes["groups"] = ("int32", (sizes.num_groups, 4))
    if sizes.perm:
        shapes["perm"] = ("int32", (sizes.in_features,))
    return shapes


def group_table(groups: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Assign an offset in a tile to every group.

    Args:
        groups: (bits, rows) of each group, without fill.

    Returns:
        (bits, first stored row, rows, byte offset of the first block in a tile) of each group.
    """
    table, first, offset = [], 0, 0
    for bits, rows in groups:
        table.append((bits, first, rows, offset))
        first += rows
        offset += ceil_div(rows, BLOCK_ROWS) * bits * BLOCK_BIT_BYTES
    return table


def check_room(
    layer: QuantizedLayer, table: list[tuple[int, int, int, int]], tile_bytes: int
) -> None:
    """Check that groups, each filled up to whole blocks, fit into the reserved tiles.

    Args:
        layer: for the error.
        table: from `group_table`.
        tile_bytes: reserved bytes of a tile.

    Raises:
        UnsupportedFormat: the groups of a g_idx need more blocks than groups of equal size.
    """
    bits, _, rows, offset = table[-1]
    if offset + ceil_div(rows, BLOCK_ROWS) * bits * BLOCK_BIT_BYTES <= tile_bytes:
        return
    fill = [-rows % BLOCK_ROWS for _, rows in layer.groups]
    group = fill.index(max(fill))
    raise uneven_group(layer, group)


def fill_tiles(values: torch.Tensor, target: torch.Tensor) -> None:
    """Write one value for each group and column into tiles; columns from N on become zero.

    Args:
        values: [G, N], below 16 where the target has 4-bit fields.
        target: [tiles, G, 16], or uint8 [tiles, G, 8] of 4-bit fields.
    """
    import torch

    groups, columns = values.shape
    tiles = target.shape[0]
    full = values.new_zeros((groups, tiles * TILE_COLUMNS))
    full[:, :columns] = values
    if target.shape[2] == HALF_BYTES:
        # Four columns of a byte each. The lowest byte becomes column 0 | column 2 << 4, the next
        # column 1 | column 3 << 4.
        quads = full.view(torch.int32)
        fields = (quads | quads >> 12).view(torch.uint8).view(groups, tiles, 4, 4)[..., :2]
        target.view(tiles, groups, 2, 4).copy_(fields.permute(1, 0, 3, 2))
    else:
        target.copy_(full.view(groups, tiles, TILE_COLUMNS).transpose(0, 1))


def read_tiles(table: torch.Tensor) -> torch.Tensor:
    """Undo `fill_tiles`: [tiles, G, 16 or 8] to [G, tiles * 16]."""
    import torch

    if table.shape[2] == HALF_BYTES:
        words = table.unflatten(2, (2, 4))
        table = torch.stack([words & 15, words >> 4], dim=3).permute(0, 1, 4, 3, 2).flatten(2)
    return table.transpose(0, 1).flatten(1)
