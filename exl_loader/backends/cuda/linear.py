"""Products with quantised layers on a card: the calls, the structs and the scratch memory.

A call with few rows is decoded: passes of up to 8 rows, each of which reads all weights. A call
with more rows goes through tensor cores. A row's result is the same bits either way, so the
boundary between the two is chosen for speed alone.

Scratch memory holds the quantised activations of a pass (csrc/cuda/linear_layout.cuh): per row
64 bytes for each block of 32 stored rows, and 32 bytes of scale and sums for each row block of
128 stored rows. `linear_scratch_bytes` needs no PyTorch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...utils.integers import ceil_div, round_up
from ..kernel_structs import GATES
from ..layouts import DenseLinear
from .launcher import COUNTER_BYTES, WARP, Grid, address, pointer
from .layout import (
    MAX_ROW_SPLITS,
    StreamLinear,
    blocks_for,
    row_blocks_for,
    row_splits_for,
    tiles_for,
)
from .linear_dense import DenseLinearOps, dense_scratch_bytes
from .rows import NORM_HEAD_SIZE

if TYPE_CHECKING:
    import torch

    from ..base import Linear

# Layers of one launch (kMaxLayers of csrc/cuda/linear_decode.cu).
MAX_LAYERS = 3
# Rows of one set of launches: enough for tensor cores, and few enough to bound scratch memory.
PASS_ROWS = 1024
# csrc/cuda/linear_layout.cuh: kBlockCodeBytes, and the size of ActivationScale.
BLOCK_CODE_BYTES = 64
ACTIVATION_SCALE_BYTES = 32
_ALIGNMENT = 256

# csrc/cuda/linear_quantize.cu: a warp a row block.
QUANTIZE_THREADS = 128
_QUANTIZE_ROW_BLOCKS = QUANTIZE_THREADS // WARP

# csrc/cuda/linear_stream.cuh: each warp has a ring of chunks of weights on their way. Cards with
# more shared memory have room for deep rings without fewer warps; the others have enough reads
# under way with shallow ones.
_CHUNK_BYTES = 1024
RING_BYTES = 4 * _CHUNK_BYTES
_DEEP_RING_BYTES = 8 * _CHUNK_BYTES
_DEEP_SHARED_BYTES = 160 << 10
LEAST_DECODE_WARPS = 8
# Rows of a pass of linear_decode_{4,8}_kernel.
_DECODE_PASSES = (4, 8)
# RowSource.kind of csrc/cuda/linear_decode.cu: how a block makes a single row itself.
_PLAIN_ROW, _NORM_ROW, _GATED_ROW = 0, 1, 2
_NORM_PART_BYTES = 64
# Up to here another pass costs less than prefill leaves unused; beyond, prefill has blocks for
# every multiprocessor.
_MOST_DECODE_ROWS = 32

# csrc/cuda/linear_prefill.cu.
_PREFILL_THREADS = 256
_PREFILL_TILES = 4
_PREFILL_ROWS = (64, 32)
_PREFILL_ROW_BYTES = 4 * BLOCK_CODE_BYTES + ACTIVATION_SCALE_BYTES

_I32, _I64, _F32, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def linear_scratch_bytes(rows: int, in_features: int) -> int:
    """Return what `linear` needs for up to `rows` rows, or pairs, counters included."""
    dense = COUNTER_BYTES + dense_scratch_bytes(rows, in_features)
    return max(quantized_scratch_bytes(rows, in_features), dense)


def quantized_scratch_bytes(rows: int, in_features: int) -> int:
    """Return what `linear` needs for a quantised layer, counters included."""
    held = min(rows, PASS_ROWS)
    return COUNTER_BYTES + code_bytes(held, in_features) + scale_bytes(held, in_features)


def code_bytes(rows: int, in_features: int) -> int:
    """Return the bytes of the integers of `rows` rows, aligned."""
    return round_up(rows * blocks_for(in_features) * BLOCK_CODE_BYTES, _ALIGNMENT)


def scale_bytes(rows: int, in_features: int) -> int:
    """Return the bytes of the scales and sums of `rows` rows, aligned."""
    return round_up(rows * row_blocks_for(in_features) * ACTIVATION_SCALE_BYTES, _ALIGNMENT)


class PositionStruct(ctypes.Structure):
    """StreamPosition of csrc/cuda/linear_layout.cuh."""

    _fields_ = [("offset", _I32), ("group", _I32), ("state", _I32), ("header", _I32)]


class LayerStruct(ctypes.Structure):
    """StreamLayer of csrc/cuda/linear_layout.cuh."""

    _fields_ = [
        ("codes", _P),
        ("groups", _P),
        ("row_blocks", _P),
        ("perm", _P),
        ("bias", _P),
        ("scale_units", _P),
        ("tile_bytes", _I64),
        ("in_features", _I32),
        ("out_features", _I32),
        ("num_groups", _I32),
        ("zero_bits", _I32),
        ("row_splits", _I32),
        ("row_block_bytes", _I32),
        ("starts", PositionStruct * (MAX_ROW_SPLITS + 1)),
    ]


class RowsStruct(ctypes.Structure):
    """QuantizedRows of csrc/cuda/linear_layout.cuh."""

    _fields_ = [("codes", _P), ("activation_scales", _P), ("rows", _I32)]


class RowSourceStruct(ctypes.Structure):
    """RowSource of csrc/cuda/linear_decode.cu."""

    _fields_ = [("x", _P), ("other", _P), ("normed", _P), ("eps", _F32), ("kind", _I32)]


class DecodeStruct(ctypes.Structure):
    """DecodeCall of csrc/cuda/linear_decode.cu."""

    _fields_ = [
        ("layers", LayerStruct * MAX_LAYERS),
        ("outs", _P * MAX_LAYERS),
        ("out_strides", _I64 * MAX_LAYERS),
        ("first_block", _I32 * (MAX_LAYERS + 1)),
        ("passes", _I32),
        ("add", _I32),
        ("ring_chunks", _I32),
        ("x", RowsStruct),
        ("row", RowSourceStruct),
        # The compiler rounds a struct that holds positions up to a multiple of 16 bytes.
        ("unused", _I64),
    ]


_ONE_ROW = RowsStruct(None, None, 1)


def layer_struct(w: StreamLinear) -> LayerStruct:
    """Describe a layer to kernels; the description is made once and kept in `w.struct`."""
    if w.struct is not None:
        return w.struct
    row_blocks = row_blocks_for(w.in_features)
    row_splits = row_splits_for(w.in_features, w.out_features)
    assert w.codes.shape[0] == tiles_for(w.out_features)
    assert len(w.positions) == row_blocks + 1 == w.row_blocks.shape[0]
    assert w.perm is None or w.perm.shape == (w.in_features,)
    assert (w.scale_units is None) == (w.zero_bits > 0)
    offsets = [position[0] for position in w.positions]
    row_block_bytes = max(end - first for first, end in zip(offsets, offsets[1:], strict=False))
    starts = (
        PositionStruct(*w.positions[row_blocks * split // row_splits])
        for split in range(row_splits + 1)
    )
    w.struct = LayerStruct(
        address(w.codes), address(w.groups), address(w.row_blocks), address(w.perm),
        address(w.bias), address(w.scale_units), w.codes.shape[1], w.in_features, w.out_features,
        w.groups.shape[0], w.zero_bits, row_splits, row_block_bytes,
        (PositionStruct * (MAX_ROW_SPLITS + 1))(*starts),
    )  # fmt: skip
    return w.struct


class LinearOps(DenseLinearOps):
    """Products with the layers of a model."""

    def linear(self, x: torch.Tensor, w: Linear, out: torch.Tensor, scratch: torch.Tensor,
               add: bool = False) -> None:
        """See `base.Ops.linear`."""
        if isinstance(w, DenseLinear):
            self._dense_linear(x, w, out, scratch[COUNTER_BYTES:], add)
        else:
            assert isinstance(w, StreamLinear)
            self.linears(x, [w], [out], scratch, add)

    def linears(self, x: torch.Tensor, layers: Sequence[StreamLinear],
                outs: Sequence[torch.Tensor], scratch: torch.Tensor, add: bool = False) -> None:
        """Multiply one input by up to MAX_LAYERS layers that have the same permutation.

        The input is quantised once, and a call with few rows takes one launch for all layers.

        Args:
            x: float32 [T, in_features].
            layers: the layers.
            outs: of each layer, float32 [T, >= out_features].
            scratch: see `base.Ops`.
            add: add to `outs`.
        """
        for first in range(0, x.shape[0], PASS_ROWS):
            rows = slice(first, first + PASS_ROWS)
            self._linears_pass(x[rows], layers, [out[rows] for out in outs], scratch, add)

    def normed_linears(self, x: torch.Tensor, weight: torch.Tensor, eps: float,
                       normed: torch.Tensor, layers: Sequence[StreamLinear],
                       outs: Sequence[torch.Tensor], add: bool = False) -> bool:
        """Run `rms_norm` of a single row and the products of its result in one launch.

        Args:
            x: float32 [1, in_features].
            weight: float32 [in_features], of the norm.
            eps: of the norm.
            normed: float32 [1, in_features], for the norm's result; another tensor than `x`.
            layers, outs, add: as those of `linears`.

        Returns:
            False if it cannot be one launch. Nothing was launched then.
        """
        is_narrow = x.shape[1] <= NORM_HEAD_SIZE  # their norm sums in another order
        is_same = normed.data_ptr() == x.data_ptr()
        if is_narrow or is_same or not self._makes_row(x, layers):
            return False
        row = RowSourceStruct(address(x), address(weight), address(normed), eps, _NORM_ROW)
        self._linear_decode(_checked_structs(x, layers, outs), outs, _ONE_ROW, add, row)
        return True

    def gated_linear(self, gate: torch.Tensor, up: torch.Tensor, activation: str,
                     w: StreamLinear, out: torch.Tensor, add: bool = False) -> bool:
        """Multiply activation(gate) * up of a single row by a layer in one launch.

        `gate` is not written.

        Args:
            gate, up: float32 [1, in_features].
            activation: as that of `base.Ops.gate`.
            w, out, add: as those of `linear`.

        Returns:
            False if it cannot be one launch. Nothing was launched then.
        """
        if gate.shape != up.shape or not self._makes_row(gate, [w]):
            return False
        kind = _GATED_ROW + GATES[activation]
        row = RowSourceStruct(address(gate), address(up), None, 0.0, kind)
        self._linear_decode(_checked_structs(gate, [w], [out]), [out], _ONE_ROW, add, row)
        return True

    def _linears_pass(self, x: torch.Tensor, layers: Sequence[StreamLinear],
                      outs: Sequence[torch.Tensor], scratch: torch.Tensor, add: bool) -> None:
        """Multiply up to PASS_ROWS rows."""
        rows, features = x.shape
        structs = _checked_structs(x, layers, outs)
        if self._makes_row(x, layers):
            row = RowSourceStruct(address(x), None, None, 0.0, _PLAIN_ROW)
            self._linear_decode(structs, outs, _ONE_ROW, add, row)
            return
        activations = cut_scratch(scratch, rows, features)
        self._launch(
            "quantize_rows_kernel", quantize_grid(features, rows), QUANTIZE_THREADS, 0,
            pointer(x), pointer(layers[0].perm), _I32(features), _P(activations.codes),
            _P(activations.activation_scales),
        )
        if rows <= _MOST_DECODE_ROWS:
            self._linear_decode(structs, outs, activations, add)
            return
        for struct, out in zip(structs, outs, strict=True):
            self._linear_prefill(struct, out, activations, add)

    def _ring_bytes(self) -> int:
        is_deep = self.launcher.shared_limit_bytes >= _DEEP_SHARED_BYTES
        return _DEEP_RING_BYTES if is_deep else RING_BYTES

    def _makes_row(self, x: torch.Tensor, layers: Sequence[StreamLinear]) -> bool:
        """Return whether x is a single row that fits in shared memory with a block's rings."""
        warps = _decode_warps([layer_struct(w) for w in layers])
        return x.shape[0] == 1 and self._row_fits(warps, x.shape[1])

    def _row_fits(self, warps: int, in_features: int) -> bool:
        needed = warps * self._ring_bytes() + _row_bytes(in_features)
        return needed <= self.launcher.shared_limit_bytes

    def _row_warps(self, layers: Sequence[LayerStruct]) -> int:
        """Return the warps of a block that makes a row.

        Every block makes the whole row, so large blocks do it less often. They are taken where
        there are two for each multiprocessor.
        """
        blocks = sum(
            ceil_div(tiles_for(w.out_features) * w.row_splits, MAX_ROW_SPLITS) for w in layers
        )
        is_enough = blocks >= 2 * self.launcher.multiprocessors
        fits = self._row_fits(MAX_ROW_SPLITS, layers[0].in_features)
        return MAX_ROW_SPLITS if is_enough and fits else _decode_warps(layers)

    def _linear_decode(self, layers: Sequence[LayerStruct], outs: Sequence[torch.Tensor],
                       x: RowsStruct, add: bool, row: RowSourceStruct | None = None) -> None:
        """Multiply few rows.

        Args:
            x: the quantised rows; with `row` their number only.
            row: a single row, which every block makes itself; None where `x` has the rows.
        """
        pass_rows = next((n for n in _DECODE_PASSES if n >= x.rows), _DECODE_PASSES[-1])
        passes = ceil_div(x.rows, pass_rows)
        warps, ring_bytes = _decode_warps(layers), self._ring_bytes()
        row_bytes = 0
        if row is not None:
            pass_rows = 1
            warps = self._row_warps(layers)
            row_bytes = _row_bytes(layers[0].in_features)
        first_block = [0]
        for layer in layers:
            block_tiles = warps // layer.row_splits
            blocks = ceil_div(tiles_for(layer.out_features), block_tiles)
            first_block.append(first_block[-1] + blocks)
        call = DecodeStruct(
            (LayerStruct * MAX_LAYERS)(*layers),
            (_P * MAX_LAYERS)(*(out.data_ptr() for out in outs)),
            (_I64 * MAX_LAYERS)(*(out.stride(0) for out in outs)),
            (_I32 * (MAX_LAYERS + 1))(*first_block),
            passes, add, ring_bytes // _CHUNK_BYTES, x, row or RowSourceStruct(),
        )  # fmt: skip
        self._launch(
            f"linear_decode_{pass_rows}_kernel", (first_block[-1] * passes, 1, 1),
            warps * WARP, warps * ring_bytes + row_bytes, call,
        )

    def _linear_prefill(self, layer: LayerStruct, out: torch.Tensor, x: RowsStruct,
                        add: bool) -> None:
        """Multiply many rows by one layer, with the most rows a block that fill the card."""
        columns = ceil_div(tiles_for(layer.out_features), _PREFILL_TILES)
        for block_rows in _PREFILL_ROWS:
            shared_bytes = 2 * (
                block_rows * _PREFILL_ROW_BYTES + _PREFILL_TILES * layer.row_block_bytes
            )
            blocks = ceil_div(x.rows, block_rows)
            fills = blocks * columns >= self.launcher.multiprocessors
            if fills and shared_bytes <= self.launcher.shared_limit_bytes:
                break
        self._launch(
            f"linear_prefill_{block_rows}_kernel", (blocks, columns, 1), _PREFILL_THREADS,
            shared_bytes, layer, x, _P(out.data_ptr()), _I64(out.stride(0)), _I32(add),
        )


def _checked_structs(x: torch.Tensor, layers: Sequence[StreamLinear],
                     outs: Sequence[torch.Tensor]) -> list[LayerStruct]:
    """Describe the layers of a launch, whose shapes must agree."""
    rows, features = x.shape
    assert x.is_contiguous() and 0 < len(layers) == len(outs) <= MAX_LAYERS
    for w, out in zip(layers, outs, strict=True):
        assert w.in_features == features and w.perm is layers[0].perm
        assert out.shape[0] == rows and out.shape[1] >= w.out_features and out.stride(1) == 1
    return [layer_struct(w) for w in layers]


def _decode_warps(layers: Sequence[LayerStruct]) -> int:
    """Return the warps of a block that decodes: one a row split, of several tiles if few."""
    return max(LEAST_DECODE_WARPS, *(layer.row_splits for layer in layers))


def _row_bytes(in_features: int) -> int:
    """Return the shared memory of one quantised row: norm parts, scales and integers."""
    scales = row_blocks_for(in_features) * ACTIVATION_SCALE_BYTES
    return _NORM_PART_BYTES + scales + blocks_for(in_features) * BLOCK_CODE_BYTES


def quantize_grid(in_features: int, rows: int) -> Grid:
    """Return the grid of the kernels that quantise rows."""
    return ceil_div(row_blocks_for(in_features), _QUANTIZE_ROW_BLOCKS), rows, 1


def cut_scratch(scratch: torch.Tensor, rows: int, in_features: int) -> RowsStruct:
    """Cut memory for `rows` quantised rows out of scratch."""
    codes = code_bytes(rows, in_features)
    assert COUNTER_BYTES + codes + scale_bytes(rows, in_features) <= scratch.nbytes
    start = scratch.data_ptr() + COUNTER_BYTES
    return RowsStruct(start, start + codes, rows)
