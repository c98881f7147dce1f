"""What a quantised linear layer is in main memory: its layout and its tensors.

Packed layout (EXL2 and GPTQ alike)
-----------------------------------
Output columns are cut into tiles of 16, stored rows (already permuted, so that a group's
rows follow each other) into blocks of 32. A block of 32 rows x 16 columns of b-bit codes
takes exactly 64*b bytes: b vectors of 64 bytes. One *register* is the 64 bytes
[column 0..15][row 4j..4j+3], one byte a code: what an 8-bit integer dot product takes. A
block has 8 registers, j = 0..7. Codes are split into bit planes, the high plane first:

    bits 2: plane of 2      bits 4: plane of 4      bits 6: planes of 4 (high), 2 (low)
    bits 3: planes of 2, 1  bits 5: planes of 4, 1  bits 8: plane of 8

so code = (high << width of the low plane) | low. A plane of w bits takes w vectors. Vector
v (0 <= v < w) of a plane holds in each byte the w-bit fields of 8/w registers: register
v*(8/w) + i is at bits [i*w, i*w + w) of the byte at its own position. The planes of a
block follow each other, high first.

`codes` is [tiles, tile_bytes]: per tile the blocks of group 0, group 1, ... in row order. A
group whose rows are no multiple of 32 is filled up with rows of code 2^(bits-1); the
activations there are zero, so their codes do not matter.
`groups` is int32 [G, 4]: bits, first stored row, rows (without fill), byte offset of the
group's first block within a tile.
`scales` is float16 [tiles, G, 16]. `zeros` is uint8 [tiles, G, 16] or None, where every
zero point is 2^(bits-1) (EXL2). `perm` is int32 [in_features]: stored row r takes input
channel perm[r]; None where it is the identity. `bias` is float32 [out_features] or None.

    value(stored row r of group g, column n) = scales[g, n] * (code - zero[g, n])

EXL2 (`zeros` is None) means this value rounded to float16, as the weights its quantiser
measured: `planes.dequantize` decodes so, and then the fixtures' logits agree to the last
bit. Kernels that sum integers and apply the scale afterwards leave that rounding out, which
moves the logits by 5e-4 to 8e-4 (relative L2, fixtures). GPTQ's value is rounded nowhere.
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

# Bytes of a block of b-bit codes are b times this.
BLOCK_BIT_BYTES = BLOCK_ROWS * TILE_COLUMNS // 8
# A tile has so many bytes for each 32-bit word of codes of a column.
WORD_TILE_BYTES = 4 * TILE_COLUMNS


@dataclass
class PackedLinear:
    """A quantised linear layer on its device, in the layout above.

    `native` is the compiled operations' own description of it (`backends/cpu/linear.py`).
    """

    in_features: int
    out_features: int
    codes: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor
    zeros: torch.Tensor | None = None
    perm: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    native: object = field(default=None, repr=False, compare=False)


def packed_shapes(sizes: QuantizedSizes) -> Shapes:
    """Return the resident tensors of a quantised layer but for its bias."""
    tiles = ceil_div(sizes.out_features, TILE_COLUMNS)
    of_groups = (tiles, sizes.num_groups, TILE_COLUMNS)
    shapes: Shapes = {
        "codes": ("uint8", (tiles, WORD_TILE_BYTES * sizes.code_words)),
        "scales": ("float16", of_groups),
    }
    if sizes.zeros:
        shapes["zeros"] = ("uint8", of_groups)
    shapes["groups"] = ("int32", (sizes.num_groups, 4))
    if sizes.perm:
        shapes["perm"] = ("int32", (sizes.in_features,))
    return shapes


def group_table(groups: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Lay groups out in a tile.

    Args:
        groups: (bits, rows) of each, without padding.

    Returns:
        of each group: bits, first stored row, rows, byte offset of the first block in a tile.
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
    """Check that groups, each filled up to whole blocks, fit into what was planned.

    Raises:
        UnsupportedFormat: they need more blocks of rows than groups of equal size.
    """
    bits, _, rows, offset = table[-1]
    if offset + ceil_div(rows, BLOCK_ROWS) * bits * BLOCK_BIT_BYTES <= tile_bytes:
        return
    fill = [-rows % BLOCK_ROWS for _, rows in layer.groups]
    group = fill.index(max(fill))
    raise uneven_group(layer, group)


def fill_tiles(values: torch.Tensor, target: torch.Tensor) -> None:
    """Spread [G, N] over [tiles, G, 16]; columns beyond N become zero."""
    groups, columns = values.shape
    tiles = target.shape[0]
    full = values.new_zeros((groups, tiles * TILE_COLUMNS))
    full[:, :columns] = values
    target.copy_(full.view(groups, tiles, TILE_COLUMNS).transpose(0, 1))
