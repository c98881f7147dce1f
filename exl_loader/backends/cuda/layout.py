"""What a quantised linear layer is on a CUDA device: its layout, its plan, its tensors.

Layout (EXL2 and GPTQ alike)
----------------------------
Output columns are cut into tiles of 32, stored rows (already permuted) into blocks of 32.
A tile is one *stream* of bytes that a warp reads from its beginning to its end: for each
group a header, then the group's blocks in row order. So scales arrive with the codes that
they belong to, and what is asked of memory ahead of time does not depend on the width of
groups. `codes` is uint8 [tiles, tile_bytes]; bytes behind the last block are zero.

Header: float16 [32], the group's scales, column c at element 4 * (c % 8) + c // 8; where the
layer has zero points, uint8 [32] in the same order behind them. (That order gives a lane its
four columns at once.)

Block: 128 * bits bytes. A *register* is 4 rows of one column, a byte a code, low byte first;
register j (0..7) of lane L is column 16 * (j // 4) + 8 * (j % 2) + L // 4, rows
8 * (L % 4) + 4 * (j // 2 % 2) .. + 3: registers 0..3 are a lane's A fragment of
mma.m16n8k32 for the first 16 columns, 4..7 for the others, with the rows of a block in the
order in which a lane's eight bytes of activations come. Codes are split into bit planes as in
`packed.BIT_PLANES`, the high plane first. A plane of w bits has w words a lane: register j
stands in word j % w at bits [w * (j // w), w * (j // w) + w) of each byte. A lane's words of
a plane follow each other, lanes one behind the other; of the plane of 8 bits first words 0..3
of all lanes, then words 4..7, so that a warp reads whole runs of 512 bytes.

Only the last group may have rows that are no multiple of 32; its last block is filled up with
2^(bits-1), and the activations there are zero. Columns that the layer lacks have codes and
scales of zero.

`groups` is int32 [G, 4]: bits, first stored row, rows (without fill), byte offset of the
group's header. `perm` and `bias` are those of `packed.py`.

    value(stored row r of group g, column n) = scales[g, n] * (code - zero[g, n])

zero is 2^(bits-1) where there are no zero points. `streams.py` is the layout in numpy.

Windows and splits
------------------
Kernels scale activations per *window* of 128 stored rows (4 blocks), whatever the groups, so
that layers of one permutation share quantised activations. The sum over a layer's windows is
cut into `splits_for(...)` parts at window boundaries, which warps take side by side.
`windows` is int32 [windows + 1, 4], how to begin reading there: byte offset within a tile;
the group that is under way, or the next one where none is; bits | blocks left << 8 of the
group under way (0: a header comes first); byte offset of that group's header. The last row
gives the stream's end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...formats.packed import BLOCK_ROWS, QuantizedSizes

if TYPE_CHECKING:
    import torch

TILE_COLUMNS = 32
WINDOW_BLOCKS = 4
WINDOW_ROWS = WINDOW_BLOCKS * BLOCK_ROWS
# Bytes of a block of b-bit codes are b times this.
BLOCK_BIT_BYTES = BLOCK_ROWS * TILE_COLUMNS // 8
SCALE_BYTES = 2 * TILE_COLUMNS
ZERO_BYTES = TILE_COLUMNS

MAX_SPLITS = 16
# Warps that a layer should give: 16 for each of the 132 multiprocessors of an H200, which is
# about what it takes to have enough reads under way (docs/cuda_linear.md).
_WARPS_WANTED = 2048


def is_cuda(device: str) -> bool:
    """Tell whether a device's layers have the layout of this module."""
    return device.split(":")[0] == "cuda"


def header_bytes(zeros: bool) -> int:
    """Bytes of a group's header."""
    return SCALE_BYTES + (ZERO_BYTES if zeros else 0)


def tiles_for(out_features: int) -> int:
    """Tiles that hold `out_features` columns."""
    return -(-out_features // TILE_COLUMNS)


def blocks_for(in_features: int) -> int:
    """Blocks of stored rows."""
    return -(-in_features // BLOCK_ROWS)


def windows_for(in_features: int) -> int:
    """Windows of stored rows, the last one perhaps short."""
    return -(-in_features // WINDOW_ROWS)


def splits_for(in_features: int, out_features: int) -> int:
    """Parts that a layer's sum is cut into; of shapes alone, since results depend on it."""
    splits, tiles = 1, tiles_for(out_features)
    most = min(MAX_SPLITS, windows_for(in_features))
    while 2 * splits <= most and tiles * splits < _WARPS_WANTED:
        splits *= 2
    return splits


def stream_shapes(sizes: QuantizedSizes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return role -> (dtype, shape) of what is particular to this layout."""
    codes = sizes.code_words * 4 * TILE_COLUMNS
    tile_bytes = codes + sizes.num_groups * header_bytes(sizes.zeros)
    return {
        "codes": ("uint8", (tiles_for(sizes.out_features), tile_bytes)),
        "groups": ("int32", (sizes.num_groups, 4)),
        "windows": ("int32", (windows_for(sizes.in_features) + 1, 4)),
    }


def group_table(groups: list[tuple[int, int]], zeros: bool) -> list[tuple[int, int, int, int]]:
    """Lay groups out in a stream.

    Args:
        groups: (bits, rows) of each, rows of all but the last multiples of 32.

    Returns:
        the rows of `groups`: bits, first stored row, rows, byte offset of the header.
    """
    table, first, offset = [], 0, 0
    for bits, rows in groups:
        assert first % BLOCK_ROWS == 0, groups
        table.append((bits, first, rows, offset))
        first += rows
        offset += header_bytes(zeros) + blocks_for(rows) * bits * BLOCK_BIT_BYTES
    return table


def window_table(
    table: list[tuple[int, int, int, int]], zeros: bool
) -> list[tuple[int, int, int, int]]:
    """Find where each window of a stream begins: the rows of `windows`."""
    windows: list[tuple[int, int, int, int]] = []
    place = 0
    for group, (bits, first, rows, header) in enumerate(table):
        blocks, first_block = blocks_for(rows), first // BLOCK_ROWS
        place = header + header_bytes(zeros)
        for block in range(-first_block % WINDOW_BLOCKS, blocks, WINDOW_BLOCKS):
            if block == 0:
                windows.append((header, group, 0, header))
            else:
                offset = place + block * bits * BLOCK_BIT_BYTES
                windows.append((offset, group, bits | (blocks - block) << 8, header))
        place += blocks * bits * BLOCK_BIT_BYTES
    return [*windows, (place, len(table), 0, place)]


@dataclass
class StreamLinear:
    """A quantised linear layer on a CUDA device, in the layout above.

    `host_windows` are the values of `windows` on the host, from which kernels are launched;
    `native` is the operations' own description of the layer.
    """

    in_features: int
    out_features: int
    codes: torch.Tensor
    groups: torch.Tensor
    windows: torch.Tensor
    host_windows: list[tuple[int, int, int, int]]
    zeros: bool = False
    perm: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    native: Any = field(default=None, repr=False, compare=False)
