"""The packed layout of `cpu/layout.py` in numpy: pack codes, unpack codes, decode weights.

Tests compare the compiled kernels with it. The four codes that a register holds of one column
are handled as one 32-bit word, for all columns at once. So bit planes are split by shifts and
masks, and a tile is 16 words of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...formats.layer import BLOCK_ROWS, scale_values, unpack_stream
from ...utils.integers import ceil_div
from ..cpu.layout import BLOCK_BIT_BYTES, read_tiles
from ..layouts import BIT_PLANES, TILE_COLUMNS

if TYPE_CHECKING:
    import torch

    from ..cpu.layout import PackedLinear

Array = np.ndarray[Any, Any]

REGISTERS = 8
REGISTER_ROWS = 4
# Words of one pass. Its temporary arrays fit into the L2 cache.
CHUNK_WORDS = 1 << 15


def split_planes(codes: Array, bits: int) -> Array:
    """Split codes into the bit planes of `cpu/layout.py`.

    Args:
        codes: uint8 [blocks * 32, C].

    Returns:
        uint32 [blocks, bits, C]: `bits` vectors a block. A word holds the four bytes of one
        column of a vector.
    """
    quads = codes.reshape(-1, REGISTERS, REGISTER_ROWS, codes.shape[1]).astype(np.uint32)
    registers: Array = quads[:, :, 0]
    for row in range(1, REGISTER_ROWS):
        registers = registers | quads[:, :, row] << (8 * row)
    planes, shift = [], bits
    for width in BIT_PLANES[bits]:
        shift -= width
        fields = (registers >> shift) & ((1 << width) - 1) * 0x01010101
        fields = fields.reshape(len(fields), width, 8 // width, -1)
        plane = fields[:, :, 0]
        for i in range(1, 8 // width):
            plane = plane | fields[:, :, i] << (i * width)
        planes.append(plane)
    return np.concatenate(planes, axis=1)


def join_planes(vectors: Array, bits: int) -> Array:
    """Undo `split_planes`: uint32 [blocks, bits, C] to uint8 [blocks * 32, C]."""
    blocks, _, columns = vectors.shape
    registers = np.zeros((blocks, REGISTERS, columns), np.uint32)
    first, shift = 0, bits
    for width in BIT_PLANES[bits]:
        shift -= width
        plane = vectors[:, first : first + width]
        first += width
        fields = np.stack([plane >> (i * width) for i in range(8 // width)], axis=2)
        fields &= ((1 << width) - 1) * 0x01010101
        registers |= fields.reshape(blocks, REGISTERS, columns) << shift
    rows = [(registers >> (8 * row)).astype(np.uint8) for row in range(REGISTER_ROWS)]
    return np.stack(rows, axis=2).reshape(-1, columns)


def _store(codes: Array, bits: int, offset: int, tiles: Array) -> None:
    """Write stored rows into every tile at `offset`, and fill up rows and columns.

    Args:
        codes: uint8 [rows, N].
        offset: bytes from the start of a tile.
        tiles: uint8 [tiles, tile_bytes], written in place.
    """
    columns = min(codes.shape[1], len(tiles) * TILE_COLUMNS)
    blocks = ceil_div(len(codes), BLOCK_ROWS)
    full = np.zeros((blocks * BLOCK_ROWS, len(tiles) * TILE_COLUMNS), np.uint8)
    full[: len(codes), :columns] = codes[:, :columns]
    full[len(codes) :] = 1 << (bits - 1)
    vectors = split_planes(full, bits).reshape(blocks, bits, len(tiles), TILE_COLUMNS)
    packed = vectors.transpose(2, 0, 1, 3).reshape(len(tiles), -1).view(np.uint8)
    tiles[:, offset : offset + packed.shape[1]] = packed


def _chunks(rows: int, columns: int) -> Iterable[tuple[int, int]]:
    """Cut rows into ranges (first, end) of whole blocks with about CHUNK_WORDS words each."""
    step = max(1, CHUNK_WORDS // max(1, columns * REGISTERS)) * BLOCK_ROWS
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def pack_words(
    words: torch.Tensor, first: int, groups: torch.Tensor, codes: torch.Tensor
) -> None:
    """Define `MainMemoryOps.pack_words`.

    Columns beyond N, and with `first` 0 bytes beyond the last block, become zero.

    Args:
        words: int32 [R, N], word rows of the file from `first` on; whole blocks.
        first: the first of these word rows.
        groups: int32 [G, 4], see `cpu/layout.py`.
        codes: uint8 [tiles, tile_bytes], of which these blocks are written.
    """
    part, tiles = words.numpy().view(np.uint32), codes.numpy()
    used_bytes = 0
    for bits, _, rows, offset in groups.tolist():
        used_bytes = offset + ceil_div(rows, BLOCK_ROWS) * bits * BLOCK_BIT_BYTES
        # The file and a tile have the same order of groups. 64 bytes of a tile are one word of
        # each column in the file.
        base = offset // BLOCK_BIT_BYTES
        begin_row = ceil_div(max(0, first - base), bits) * BLOCK_ROWS
        end_row = min(rows, ceil_div(max(0, first + len(part) - base), bits) * BLOCK_ROWS)
        for chunk, end in _chunks(max(0, end_row - begin_row), part.shape[1]):
            word = base + (begin_row + chunk) // BLOCK_ROWS * bits
            length = ceil_div((end - chunk) * bits, 32)
            stream = unpack_stream(part[word - first : word - first + length], bits, end - chunk)
            _store(stream, bits, word * BLOCK_BIT_BYTES, tiles)
    if first == 0:
        tiles[:, used_bytes:] = 0


def pack_gptq(
    qweight: torch.Tensor,
    bits: int,
    perm: torch.Tensor | None,
    groups: torch.Tensor,
    codes: torch.Tensor,
) -> None:
    """Define `MainMemoryOps.pack_gptq`.

    Args:
        qweight: int32 [K * bits / 32, N], as in the file.
        bits: bits of a code.
        perm: int32 [K], stored row r holds input channel perm[r]; None is the identity.
        groups: int32 [G, 4], see `cpu/layout.py`.
        codes: uint8 [tiles, tile_bytes], written in full. Columns beyond N and bytes beyond
            the last block become zero.
    """
    words, tiles = qweight.numpy().view(np.uint32), codes.numpy()
    tiles[:] = 0
    channels = unpack_stream(words, bits, len(words) * 32 // bits)
    if perm is not None:
        channels = channels[perm.numpy()]
    for _, start, rows, offset in groups.tolist():
        for first, end in _chunks(rows, words.shape[1]):
            start_byte = offset + first // BLOCK_ROWS * bits * BLOCK_BIT_BYTES
            _store(channels[start + first : start + end], bits, start_byte, tiles)


def unpack_codes(linear: PackedLinear) -> Array:
    """Read all codes of a packed layer.

    Returns:
        uint8 [in_features, tiles * 16], rows in stored order, padding columns included.
    """
    tiles = linear.codes.numpy()
    rows_of_groups = []
    for bits, _, rows, offset in linear.groups.tolist():
        blocks = ceil_div(rows, BLOCK_ROWS)
        packed = tiles[:, offset : offset + blocks * bits * BLOCK_BIT_BYTES]
        vectors = np.ascontiguousarray(packed).view(np.uint32)
        vectors = vectors.reshape(len(tiles), blocks, bits, TILE_COLUMNS).transpose(1, 2, 0, 3)
        codes = join_planes(vectors.reshape(blocks, bits, -1), bits)
        rows_of_groups.append(codes[:rows])
    return np.concatenate(rows_of_groups)


def unpack_scales(linear: PackedLinear) -> Array:
    """Decode all scales of a packed layer: float32 [G, tiles * 16]."""
    scales = read_tiles(linear.scales)
    if linear.scale_units is not None:
        scales = scale_values(scales, linear.scale_units[:, None])
    values: Array = scales.float().numpy()
    return values


def unpack_zeros(linear: PackedLinear) -> Array | None:
    """Read all zero points of a packed layer, int16 [G, tiles * 16]; None if it has none."""
    if linear.zeros is None:
        return None
    zeros: Array = read_tiles(linear.zeros).short().numpy()
    return zeros


def dequantize(linear: PackedLinear) -> torch.Tensor:
    """Decode a packed layer. Products are exact in float32: code - zero has 9 bits, a scale 11.

    Returns:
        float32 [in_features, out_features], rows in the order of the input channels. EXL2
        values are rounded to float16; see `cpu/layout.py`.
    """
    import torch

    codes, scales, zeros = unpack_codes(linear), unpack_scales(linear), unpack_zeros(linear)
    weight = np.empty((linear.in_features, linear.out_features), np.float32)
    channels = None if linear.perm is None else linear.perm.numpy()
    for group, (bits, first, rows, _) in enumerate(linear.groups.tolist()):
        zero: Any = 1 << (bits - 1) if zeros is None else zeros[group, : linear.out_features]
        stored = codes[first : first + rows, : linear.out_features].astype(np.int16)
        target = slice(first, first + rows) if channels is None else channels[first : first + rows]
        values = (stored - zero) * scales[group, : linear.out_features]
        weight[target] = values.astype(np.float16) if linear.zeros is None else values
    return torch.from_numpy(weight)
