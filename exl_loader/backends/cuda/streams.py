"""The layout of `packed_cuda.py` in numpy: codes in, streams out, and back to weights.

This is the definition that the packing kernels of csrc/cuda/pack.cu are held against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ...formats.packed import BIT_PLANES, BLOCK_ROWS
from .layout import BLOCK_BIT_BYTES, SCALE_BYTES, TILE_COLUMNS, StreamLinear, blocks_for

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]

LANES = 32
REGISTERS = 8


def _register_places() -> tuple[Array, Array]:
    """Column and first row of every lane's registers, each [32, 8]."""
    lane, register = np.arange(LANES)[:, None], np.arange(REGISTERS)[None]
    column = 16 * (register // 4) + 8 * (register % 2) + lane // 4
    row = 8 * (lane % 4) + 4 * (register // 2 % 2)
    return column, row


def lane_order(columns: Array) -> Array:
    """Put the 32 columns of the last dimension in the order of a header."""
    return columns.reshape(*columns.shape[:-1], 4, 8).swapaxes(-1, -2).reshape(columns.shape)


def column_order(lanes: Array) -> Array:
    """Undo `lane_order`."""
    return lanes.reshape(*lanes.shape[:-1], 8, 4).swapaxes(-1, -2).reshape(lanes.shape)


def pack_block(codes: Array, bits: int) -> Array:
    """Pack one block: uint8 [32 rows, 32 columns] to uint8 [128 * bits]."""
    column, row = _register_places()
    registers = np.zeros((LANES, REGISTERS), np.uint32)
    for i in range(4):
        registers |= codes[row + i, column].astype(np.uint32) << (8 * i)
    planes, shift = [], bits
    for width in BIT_PLANES[bits]:
        shift -= width
        fields = (registers >> shift) & ((1 << width) - 1) * 0x01010101
        words: Array = np.zeros((LANES, width), np.uint32)
        for j in range(REGISTERS):
            words[:, j % width] |= fields[:, j] << (width * (j // width))
        if width == 8:
            words = words.reshape(LANES, 2, 4).swapaxes(0, 1)
        planes.append(np.ascontiguousarray(words).reshape(-1).view(np.uint8))
    return np.concatenate(planes)


def unpack_block(block: Array, bits: int) -> Array:
    """Undo `pack_block`."""
    registers = np.zeros((LANES, REGISTERS), np.uint32)
    first, shift = 0, bits
    for width in BIT_PLANES[bits]:
        shift -= width
        end = first + width * BLOCK_BIT_BYTES
        words = np.ascontiguousarray(block[first:end]).view(np.uint32)
        first = end
        if width == 8:
            words = words.reshape(2, LANES, 4).swapaxes(0, 1)
        words = words.reshape(LANES, width)
        for j in range(REGISTERS):
            field = words[:, j % width] >> (width * (j // width))
            registers[:, j] |= (field & ((1 << width) - 1) * 0x01010101) << shift
    column, row = _register_places()
    codes = np.empty((BLOCK_ROWS, TILE_COLUMNS), np.uint8)
    for i in range(4):
        codes[row + i, column] = (registers >> (8 * i)) & 0xFF
    return codes


def pack_streams(
    codes: Array, scales: Array, zeros: Array | None, groups: Array, streams: Array
) -> None:
    """Write a layer's streams, in full.

    Args:
        codes: uint8 [in_features, N], rows in stored order. scales: float16 [G, N].
        zeros: uint8 [G, N] or None. groups: int32 [G, 4], see `packed_cuda.group_table`.
        streams: uint8 [tiles, tile_bytes].
    """
    streams[:] = 0
    for tile, stream in enumerate(streams):
        columns = slice(tile * TILE_COLUMNS, min((tile + 1) * TILE_COLUMNS, codes.shape[1]))
        count = columns.stop - columns.start
        for group, (bits, first, rows, place) in enumerate(groups.tolist()):
            header = np.zeros(TILE_COLUMNS, np.float16)
            header[:count] = scales[group, columns]
            stream[place : place + SCALE_BYTES] = lane_order(header).view(np.uint8)
            place += SCALE_BYTES
            if zeros is not None:
                points = np.zeros(TILE_COLUMNS, np.uint8)
                points[:count] = zeros[group, columns]
                stream[place : place + TILE_COLUMNS] = lane_order(points)
                place += TILE_COLUMNS
            full = np.zeros((blocks_for(rows) * BLOCK_ROWS, TILE_COLUMNS), np.uint8)
            full[:rows, :count] = codes[first : first + rows, columns]
            full[rows:] = 1 << (bits - 1)
            for block in full.reshape(-1, BLOCK_ROWS, TILE_COLUMNS):
                stream[place : place + bits * BLOCK_BIT_BYTES] = pack_block(block, bits)
                place += bits * BLOCK_BIT_BYTES


def unpack_streams(linear: StreamLinear) -> tuple[Array, Array, Array | None]:
    """Read a layer back.

    Returns:
        codes uint8 [in_features, N], rows in stored order; scales float16 [G, N]; zeros uint8
        [G, N] or None. N counts the columns of all tiles.
    """
    streams, table = linear.codes.numpy(), linear.groups.tolist()
    columns = len(streams) * TILE_COLUMNS
    codes = np.empty((linear.in_features, columns), np.uint8)
    scales = np.empty((len(table), columns), np.float16)
    zeros = np.empty((len(table), columns), np.uint8) if linear.zeros else None
    for tile, stream in enumerate(streams):
        part = slice(tile * TILE_COLUMNS, (tile + 1) * TILE_COLUMNS)
        for group, (bits, first, rows, place) in enumerate(table):
            header = np.ascontiguousarray(stream[place : place + SCALE_BYTES])
            scales[group, part] = column_order(header.view(np.float16))
            place += SCALE_BYTES
            if zeros is not None:
                zeros[group, part] = column_order(stream[place : place + TILE_COLUMNS])
                place += TILE_COLUMNS
            for row in range(first, first + rows, BLOCK_ROWS):
                block = unpack_block(stream[place : place + bits * BLOCK_BIT_BYTES], bits)
                end = min(row + BLOCK_ROWS, first + rows)
                codes[row:end, part] = block[: end - row]
                place += bits * BLOCK_BIT_BYTES
    return codes, scales, zeros


def dequantize(linear: StreamLinear) -> torch.Tensor:
    """Decode a layer.

    Returns:
        float32 [in_features, out_features], input channels in their original order, with
        EXL2's rounding to float16 as in `planes.dequantize`.
    """
    import torch

    codes, scales, zeros = unpack_streams(linear)
    columns = linear.out_features
    channels = np.arange(linear.in_features) if linear.perm is None else linear.perm.numpy()
    weight = np.empty((linear.in_features, columns), np.float32)
    for group, (bits, first, rows, _) in enumerate(linear.groups.tolist()):
        stored = codes[first : first + rows, :columns].astype(np.int16)
        zero: Any = 1 << (bits - 1) if zeros is None else zeros[group, :columns].astype(np.int16)
        values = (stored - zero) * scales[group, :columns].astype(np.float32)
        target = channels[first : first + rows]
        weight[target] = values.astype(np.float16) if zeros is None else values
    return torch.from_numpy(weight)
