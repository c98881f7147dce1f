"""Packing quantised layers into the streams of `layout.py`: on a card, and in numpy.

On a card, `PackOps` uploads as many tiles at a time as the upload buffer holds and launches the
kernels of csrc/cuda/pack.cu. The functions in numpy are the definition that these kernels are
compared with.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...formats.common import require_finite
from ...formats.layer import BLOCK_ROWS, DenseLayer, QuantizedLayer, scale_values, zero_bits_for
from ...utils.integers import ceil_div, round_up
from ...utils.output import warn_once
from ..layouts import BIT_PLANES, DenseLinear, fill_dense, pack_dense, place_bias, uneven_group
from .launcher import WARP, KernelOps, pointer
from .layout import (
    BLOCK_BIT_BYTES,
    SCALE_BYTES,
    TILE_COLUMNS,
    StreamLinear,
    blocks_for,
    group_table,
    header_bytes,
    row_block_table,
    upload_bytes,
)

if TYPE_CHECKING:
    import torch

    from ..base import Linear

Array = np.ndarray[Any, Any]

LANES = 32
REGISTERS = 8

# csrc/cuda/pack.cu: warps of a block, each of which packs a tile, and the words of a warp's block
# of codes in shared memory (32 rows of kColumnStride).
_PACK_WARPS = 4
_PACK_SHARED_BYTES = _PACK_WARPS * 32 * 9 * 4

_I32, _I64, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


@dataclass(frozen=True)
class _Upload:
    """Columns of a layer in the upload buffer.

    Args:
        columns: how many.
        word_rows: 32-bit words of codes a column.
        words: address of int32 [word_rows, columns].
        tables: addresses of uint8 [G, columns] levels (EXL2), or of float16 [G, columns] scales
            and of uint8 [G, columns] zero points (GPTQ).
        target: address of the first tile that these columns fill.
    """

    columns: int
    word_rows: int
    words: ctypes.c_void_p
    tables: tuple[ctypes.c_void_p, ...]
    target: ctypes.c_void_p


class PackOps(KernelOps):
    """Packing of layers while a model is loaded.

    Attributes:
        upload_buffer: uint8 [n] of the device, at least
            `layout.least_upload_bytes`; None unless a model is being loaded.
    """

    needs_upload_buffer = True
    # There is one upload buffer.
    load_threads = 1
    upload_buffer: torch.Tensor | None = None

    def pack(self, layer: QuantizedLayer | DenseLayer, views: dict[str, torch.Tensor]) -> Linear:
        import torch

        if isinstance(layer, DenseLayer):
            return pack_dense(layer, views)
        if "weight" in views:
            return _pack_as_dense(layer, views)
        # Only the last group of a stream may end within a block.
        for group, (_, rows) in enumerate(layer.groups[:-1]):
            if rows % BLOCK_ROWS:
                raise uneven_group(layer, group)
        table = group_table(layer.groups, layer.zero_bits)
        positions = row_block_table(table, layer.zero_bits)
        views["groups"].copy_(torch.tensor(table, dtype=torch.int32))
        views["row_blocks"].copy_(torch.tensor(positions, dtype=torch.int32))
        perm = None
        if layer.perm is not None:
            views["perm"].copy_(layer.perm)
            perm = views["perm"] if layer.permutes else None
        words, units = layer.words[:, : layer.out_features], None
        if layer.scale_units is not None:
            units = views["scale_units"].copy_(layer.scale_units)
        if layer.zeros is None:
            self.pack_exl2_streams(words, layer.scales, views["groups"], views["codes"])
        else:
            self.pack_gptq_streams(words, layer.scales, layer.zeros, perm, views["groups"],
                                   views["codes"])
        return StreamLinear(
            layer.in_features, layer.out_features, views["codes"], views["groups"],
            views["row_blocks"], positions, scale_units=units, zero_bits=layer.zero_bits,
            perm=perm, bias=place_bias(layer.bias, views),
        )

    def pack_exl2_streams(self, q_weight: torch.Tensor, levels: torch.Tensor,
                          groups: torch.Tensor, codes: torch.Tensor) -> None:
        """Repack EXL2's codes and levels into streams.

        Args:
            q_weight: int32 [R, N] on the CPU, the layer's columns only, as on disk.
            levels: uint8 [G, N] on the CPU.
            groups: int32 [G, 4] on the device.
            codes: uint8 [tiles, tile_bytes] on the device, all of which is written.
        """
        codes.zero_()
        for upload in self._uploads(q_weight, levels, None, codes):
            self._launch_pack("pack_exl2_kernel", upload, upload.tables, groups, codes)

    def pack_gptq_streams(self, qweight: torch.Tensor, scales: torch.Tensor,
                          zeros: torch.Tensor, perm: torch.Tensor | None,
                          groups: torch.Tensor, codes: torch.Tensor) -> None:
        """Repack GPTQ's codes, scales and zero points into streams.

        Args:
            qweight: int32 [K * bits / 32, N] on the CPU, the layer's columns only.
            scales: float16 [G, N] on the CPU.
            zeros: uint8 [G, N] on the CPU.
            perm: int32 [K] on the device, or None.
            groups, codes: as those of `pack_exl2_streams`.
        """
        codes.zero_()
        zero_bits = zero_bits_of(groups)
        for upload in self._uploads(qweight, scales, zeros, codes):
            tables = (*upload.tables, _I32(zero_bits), pointer(perm))
            self._launch_pack("pack_gptq_kernel", upload, tables, groups, codes)

    def _launch_pack(self, kernel: str, upload: _Upload, tables: tuple[Any, ...],
                     groups: torch.Tensor, codes: torch.Tensor) -> None:
        _, first, rows, _ = groups[-1].tolist()
        grid = (
            blocks_for(first + rows), ceil_div(upload.columns, _PACK_WARPS * TILE_COLUMNS), 1
        )
        self._launch(
            kernel, grid, _PACK_WARPS * WARP, _PACK_SHARED_BYTES, upload.words,
            _I64(upload.word_rows), _I32(upload.columns), *tables, pointer(groups),
            _I32(groups.shape[0]), upload.target, _I64(codes.shape[1]),
        )

    def _uploads(self, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
                 codes: torch.Tensor) -> Iterator[_Upload]:
        """Upload a layer's tensors, as many tiles at a time as the upload buffer holds."""
        buffer, num_groups = self.upload_buffer, len(scales)
        word_rows, out_features = words.shape
        assert buffer is not None, "packing needs an upload buffer"
        step = TILE_COLUMNS
        assert upload_bytes(word_rows, num_groups, step) <= buffer.nbytes, buffer.nbytes
        while (step < out_features
               and upload_bytes(word_rows, num_groups, 2 * step) <= buffer.nbytes):
            step *= 2
        tensors = [words, scales] if zeros is None else [words, scales, zeros]
        for first in range(0, out_features, step):
            end = min(first + step, out_features)
            offset, uploaded = 0, []
            for tensor in tensors:
                part = tensor[:, first:end]
                nbytes = part.numel() * part.element_size()
                view = buffer[offset : offset + nbytes].view(part.dtype).view(part.shape)
                view.copy_(part)
                uploaded.append(pointer(view))
                offset += round_up(nbytes, 4)
            target = _P(codes[first // TILE_COLUMNS].data_ptr())
            yield _Upload(end - first, word_rows, uploaded[0], tuple(uploaded[1:]), target)


def _pack_as_dense(layer: QuantizedLayer, views: dict[str, torch.Tensor]) -> DenseLinear:
    """Decode a layer whose groups do not fit blocks into float16 weights."""
    weight = layer.weight().half().t().contiguous()
    require_finite(f"{layer.source}: weights as float16", weight)
    fill_dense(weight, 0, views["weight"])
    warn_once(
        f"{layer.folder}: groups of {layer.groups[0][1]} rows are kept as float16 weights on a "
        "CUDA device, which takes 16 bits a weight"
    )
    return DenseLinear(
        layer.in_features, layer.out_features, views["weight"], place_bias(layer.bias, views)
    )


def _register_positions() -> tuple[Array, Array]:
    """Return column and first row of each lane's registers, each [32, 8]."""
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


def pack_fields(values: Array, bits: int) -> Array:
    """Pack values of 4 or 8 bits for a header: uint8 [32] to uint8 [4 * bits]."""
    ordered = lane_order(values)
    return ordered[0::2] | ordered[1::2] << 4 if bits == 4 else ordered


def unpack_fields(fields: Array, bits: int) -> Array:
    """Undo `pack_fields`."""
    if bits == 4:
        fields = np.stack([fields & 15, fields >> 4], axis=1).reshape(-1)
    return column_order(fields)


def zero_bits_of(groups: Array | torch.Tensor) -> int:
    """Return the bits of a zero point of a layer that has them; groups: int32 [G, 4]."""
    return max(map(zero_bits_for, groups[:, 0].tolist()))


def pack_block(codes: Array, bits: int) -> Array:
    """Pack one block: uint8 [32 rows, 32 columns] to uint8 [128 * bits]."""
    column, row = _register_positions()
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
    column, row = _register_positions()
    codes = np.empty((BLOCK_ROWS, TILE_COLUMNS), np.uint8)
    for i in range(4):
        codes[row + i, column] = (registers >> (8 * i)) & 0xFF
    return codes


def pack_streams(
    codes: Array, scales: Array, zeros: Array | None, groups: Array, streams: Array
) -> None:
    """Write all of a layer's streams.

    Args:
        codes: uint8 [in_features, N], rows in stored order.
        scales: float16 [G, N]; without zeros, levels, uint8 [G, N].
        zeros: uint8 [G, N], or None.
        groups: int32 [G, 4], see `layout.group_table`.
        streams: uint8 [tiles, tile_bytes].
    """
    streams[:] = 0
    zero_bits = 0 if zeros is None else zero_bits_of(groups)
    for tile, stream in enumerate(streams):
        columns = slice(tile * TILE_COLUMNS, min((tile + 1) * TILE_COLUMNS, codes.shape[1]))
        count = columns.stop - columns.start
        for group, (bits, first, rows, offset) in enumerate(groups.tolist()):
            header = np.zeros(TILE_COLUMNS, scales.dtype)
            header[:count] = scales[group, columns]
            if zeros is None:
                parts = [pack_fields(header, 4)]
            else:
                points = np.zeros(TILE_COLUMNS, np.uint8)
                points[:count] = zeros[group, columns]
                parts = [lane_order(header).view(np.uint8), pack_fields(points, zero_bits)]
            for part in parts:
                stream[offset : offset + len(part)] = part
                offset += len(part)
            full = np.zeros((blocks_for(rows) * BLOCK_ROWS, TILE_COLUMNS), np.uint8)
            full[:rows, :count] = codes[first : first + rows, columns]
            full[rows:] = 1 << (bits - 1)
            for block in full.reshape(-1, BLOCK_ROWS, TILE_COLUMNS):
                stream[offset : offset + bits * BLOCK_BIT_BYTES] = pack_block(block, bits)
                offset += bits * BLOCK_BIT_BYTES


def unpack_streams(linear: StreamLinear) -> tuple[Array, Array, Array | None]:
    """Read a layer on the CPU back.

    Returns:
        codes uint8 [in_features, N], rows in stored order; scales float16 [G, N], decoded; zeros
        uint8 [G, N] or None. N counts the columns of all tiles.
    """
    import torch

    streams, table = linear.codes.numpy(), linear.groups.tolist()
    columns = len(streams) * TILE_COLUMNS
    codes = np.empty((linear.in_features, columns), np.uint8)
    scales = np.empty((len(table), columns), np.float16)
    zeros = np.empty((len(table), columns), np.uint8) if linear.zero_bits else None
    levels = np.empty((len(table), columns), np.uint8)
    for tile, stream in enumerate(streams):
        part = slice(tile * TILE_COLUMNS, (tile + 1) * TILE_COLUMNS)
        for group, (bits, first, rows, offset) in enumerate(table):
            header = np.ascontiguousarray(stream[offset : offset + header_bytes(linear.zero_bits)])
            offset += len(header)
            if zeros is None:
                levels[group, part] = unpack_fields(header, 4)
            else:
                scales[group, part] = column_order(header[:SCALE_BYTES].view(np.float16))
                zeros[group, part] = unpack_fields(header[SCALE_BYTES:], linear.zero_bits)
            for row in range(first, first + rows, BLOCK_ROWS):
                block = unpack_block(stream[offset : offset + bits * BLOCK_BIT_BYTES], bits)
                end = min(row + BLOCK_ROWS, first + rows)
                codes[row:end, part] = block[: end - row]
                offset += bits * BLOCK_BIT_BYTES
    if linear.scale_units is not None:
        scales = scale_values(torch.from_numpy(levels), linear.scale_units[:, None]).numpy()
    return codes, scales, zeros


def dequantize(linear: StreamLinear) -> torch.Tensor:
    """Decode a layer on the CPU.

    Returns:
        float32 [in_features, out_features], input channels in their original order, rounded to
        float16 for EXL2 as in `reference.planes.dequantize`.
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
