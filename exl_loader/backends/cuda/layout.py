"""A quantised linear layer on a CUDA device: its layout, its tensors, its sizes. No PyTorch.

Layout (the same for EXL2 and GPTQ)
-----------------------------------
Output columns are cut into tiles of 32, stored rows (already permuted) into blocks of 32.
A tile is one *stream* of bytes that a warp reads from start to end: for each group a header,
then the group's blocks in row order. Scales so arrive together with their codes, and how far
ahead memory is read does not depend on the size of groups. `codes` is uint8
[tiles, tile_bytes]; bytes after the last block are zero.

Header: the group's scales and zero points, column c at element 4 * (c % 8) + c // 8, so that a lane
has its four columns at once. EXL2's are 16 bytes of 4-bit levels, the low half of a byte first, and

    scale[g, n] = half((level[g, n] + 1)^2 * scale_units[g])

where `scale_units` is float16 [G]. GPTQ's are float16 [32] scales, then zero points of `zero_bits`
each: 4, or 8 where codes have more than 4 bits.

Block: 128 * bits bytes. A *register* is 4 rows of one column, a byte a code, low byte first;
register j (0..7) of lane L is column 16 * (j // 4) + 8 * (j % 2) + L // 4, rows
8 * (L % 4) + 4 * (j // 2 % 2) .. + 3: registers 0..3 are a lane's A fragment of
mma.m16n8k32 for the first 16 columns, 4..7 for the others, with the rows of a block in the
order in which a lane's eight bytes of activations come. Codes are split into bit planes as in
`layouts.BIT_PLANES`, the high plane first. A plane of w bits has w words a lane:
register j is in word j % w at bits [w * (j // w), w * (j // w) + w) of each byte. A lane's words
of a plane are consecutive, and so are lanes; of the plane of 8 bits first words 0..3 of all
lanes, then words 4..7, so that a warp reads whole runs of 512 bytes.

Only the last group may have a number of rows that is no multiple of 32. Its last block is
filled up with codes of 2^(bits-1), and the activations of those rows are zero. Columns that the
layer lacks have codes, levels and scales of zero.

`groups` is int32 [G, 4]: bits, first stored row, rows (without fill), byte offset of the
group's header. `perm` and `bias` are those of `cpu/layout.py`.

    value(stored row r of group g, column n) = scale[g, n] * (code - zero[g, n])

zero is 2^(bits-1) where there are no zero points. `pack.pack_streams` is the layout in numpy.

Row blocks and row splits
-------------------------
Kernels scale activations per *row block* of 128 stored rows (4 blocks), whatever the groups, so
that layers with one permutation share quantised activations. The sum over a layer's row blocks
is cut into `row_splits_for(...)` parts at boundaries of row blocks; a warp takes each part.
`row_blocks` is int32 [row blocks + 1, 4], the position of a reader that starts there: byte
offset within a tile; the group that has begun, or the next one where none has; bits | remaining
blocks << 8 of the group that has begun (0: a header comes first); byte offset of that group's
header. The last row is the end of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...formats.layer import BLOCK_ROWS, QuantizedSizes
from ...utils.integers import ceil_div, round_up

if TYPE_CHECKING:
    import torch

    from .linear import LayerStruct

Position = tuple[int, int, int, int]
"""A row of `groups` or of `row_blocks`."""

TILE_COLUMNS = 32
# Blocks of a row block, and its rows.
ROW_BLOCK_BLOCKS = 4
ROW_BLOCK_ROWS = ROW_BLOCK_BLOCKS * BLOCK_ROWS
# A block of b-bit codes has b times this number of bytes.
BLOCK_BIT_BYTES = BLOCK_ROWS * TILE_COLUMNS // 8
LEVEL_BYTES = TILE_COLUMNS // 2
SCALE_BYTES = 2 * TILE_COLUMNS

MAX_ROW_SPLITS = 16
# Warps that a layer should give: 16 for each of the 132 multiprocessors of an H200, about what
# it takes to have enough reads under way (docs/cuda_linear.md).
_WARPS_WANTED = 2048
_UPLOAD_ALIGNMENT = 256


@dataclass
class StreamLinear:
    """A quantised linear layer on a CUDA device, in the layout above.

    Args:
        in_features: stored rows.
        out_features: columns.
        codes: uint8 [tiles, tile_bytes], on the device like all tensors here.
        groups: int32 [G, 4].
        row_blocks: int32 [row blocks + 1, 4].
        positions: the values of `row_blocks`, on the CPU, which launches kernels with them.
        scale_units: float16 [G]; None where headers have float16 scales and zero points.
        zero_bits: bits of a zero point, 4 or 8; 0 where headers have levels.
        perm: int32 [in_features], or None.
        bias: float32 [out_features], or None.
        struct: the layer as kernels take it, made at the first launch.
    """

    in_features: int
    out_features: int
    codes: torch.Tensor
    groups: torch.Tensor
    row_blocks: torch.Tensor
    positions: list[Position]
    scale_units: torch.Tensor | None = None
    zero_bits: int = 0
    perm: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    struct: LayerStruct | None = field(default=None, repr=False, compare=False)


def header_bytes(zero_bits: int) -> int:
    """Return the bytes of a group's header; `zero_bits` as in `StreamLinear`."""
    return SCALE_BYTES + zero_bits * TILE_COLUMNS // 8 if zero_bits else LEVEL_BYTES


def tiles_for(out_features: int) -> int:
    """Return the tiles that hold `out_features` columns."""
    return ceil_div(out_features, TILE_COLUMNS)


def blocks_for(in_features: int) -> int:
    """Return the blocks that hold `in_features` stored rows."""
    return ceil_div(in_features, BLOCK_ROWS)


def row_blocks_for(in_features: int) -> int:
    """Return the row blocks that hold `in_features` stored rows; the last may be shorter."""
    return ceil_div(in_features, ROW_BLOCK_ROWS)


def row_splits_for(in_features: int, out_features: int) -> int:
    """Return the parts that a layer's sum is cut into: shapes alone decide, as results do."""
    row_splits, tiles = 1, tiles_for(out_features)
    most = min(MAX_ROW_SPLITS, row_blocks_for(in_features))
    while 2 * row_splits <= most and tiles * row_splits < _WARPS_WANTED:
        row_splits *= 2
    return row_splits


def stream_shapes(sizes: QuantizedSizes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return role -> (dtype, shape) of the tensors that only this layout has."""
    codes = sizes.code_words * 4 * TILE_COLUMNS
    tile_bytes = codes + sizes.num_groups * header_bytes(sizes.zero_bits)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "codes": ("uint8", (tiles_for(sizes.out_features), tile_bytes)),
        "groups": ("int32", (sizes.num_groups, 4)),
        "row_blocks": ("int32", (row_blocks_for(sizes.in_features) + 1, 4)),
    }
    if not sizes.zero_bits:
        shapes["scale_units"] = ("float16", (sizes.num_groups,))
    if sizes.perm:
        shapes["perm"] = ("int32", (sizes.in_features,))
    return shapes


def group_table(groups: list[tuple[int, int]], zero_bits: int) -> list[Position]:
    """Return the rows of `groups`: bits, first stored row, rows, byte offset of the header.

    Args:
        groups: (bits, rows) of each; the rows of all but the last are multiples of 32.
        zero_bits: as in `StreamLinear`.
    """
    table, first, offset = [], 0, 0
    for bits, rows in groups:
        assert first % BLOCK_ROWS == 0, groups
        table.append((bits, first, rows, offset))
        first += rows
        offset += header_bytes(zero_bits) + blocks_for(rows) * bits * BLOCK_BIT_BYTES
    return table


def row_block_table(table: list[Position], zero_bits: int) -> list[Position]:
    """Return the rows of `row_blocks`: where each row block of a stream begins.

    Args:
        table: from `group_table`.
        zero_bits: as in `StreamLinear`.
    """
    positions: list[Position] = []
    offset = 0
    for group, (bits, first, rows, header) in enumerate(table):
        blocks, first_block = blocks_for(rows), first // BLOCK_ROWS
        offset = header + header_bytes(zero_bits)
        for block in range(-first_block % ROW_BLOCK_BLOCKS, blocks, ROW_BLOCK_BLOCKS):
            if block == 0:
                positions.append((header, group, 0, header))
            else:
                start = offset + block * bits * BLOCK_BIT_BYTES
                positions.append((start, group, bits | (blocks - block) << 8, header))
        offset += blocks * bits * BLOCK_BIT_BYTES
    return [*positions, (offset, len(table), 0, offset)]


def upload_bytes(words: int, num_groups: int, columns: int) -> int:
    """Return the upload buffer that packing `columns` columns of a layer needs.

    Args:
        words: 32-bit words of codes a column.
        num_groups: of the layer.
        columns: packed at a time.
    """
    # Of GPTQ, a float16 scale and a zero point; of EXL2, a level.
    tables = num_groups * columns * (2 + 1)
    codes = round_up(words * columns * 4, _UPLOAD_ALIGNMENT)
    return codes + round_up(tables, _UPLOAD_ALIGNMENT)


def least_upload_bytes(in_features: int) -> int:
    """Return the upload buffer that one tile of any layer of `in_features` inputs needs."""
    blocks = blocks_for(in_features)
    return upload_bytes(blocks * BLOCK_ROWS * 8 // 32, blocks, TILE_COLUMNS)
