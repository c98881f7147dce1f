"""Products with unquantised layers on a card: the calls and the scratch memory.

A call with few rows is decoded: each pass of 8 rows reads all weights. The inputs of more rows
are prepared in scratch memory first (csrc/cuda/linear_dense.cuh): per row 16 bytes for each 4
inputs, in slices of 32 inputs, and a float32 scale for each part of 256 inputs.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from ...utils.integers import ceil_div, round_up
from .launcher import WARP, KernelOps, pointer

if TYPE_CHECKING:
    import torch

    from ..layouts import DenseLinear

# Columns of a tile of `DenseLinear.weight` (kTileColumns).
TILE_COLUMNS = 16
# Rows that share one set of launches where inputs are prepared, and the most rows that are
# decoded, which need no scratch memory.
PASS_ROWS = 256
DECODE_ROWS = 32
# csrc/cuda/linear_dense.cuh: kSliceK, kPartK, kFragmentRows.
_SLICE_FEATURES = 32
_PART_FEATURES = 256
_FRAGMENT_ROWS = 8
_ALIGNMENT = 256
# csrc/cuda/linear_dense_decode.cu: a warp has a ring of weights (kRingBytes) and a part's sums.
_RING_BYTES = 6144
_DECODE_WARP_BYTES = _RING_BYTES + _FRAGMENT_ROWS * TILE_COLUMNS * 4
_DECODE_WARPS = (4, 8)
_MOST_DECODE_WARPS = 16
# csrc/cuda/linear_dense_prefill.cu: a warp prepares a part of a row.
_PREPARE_THREADS = 256
_PREPARE_PARTS = _PREPARE_THREADS // WARP
_PREFILL_THREADS = 128
_PREFILL_ROWS = 64
_PREFILL_TILES = 8
_PREFILL_BYTES = 48 << 10

_I32, _I64, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


def dense_scratch_bytes(rows: int, in_features: int) -> int:
    """Return what a product of up to `rows` rows needs besides counters."""
    if rows <= DECODE_ROWS:
        return 0
    held = min(rows, PASS_ROWS)
    return _input_bytes(held, in_features) + _scale_bytes(held, in_features)


def _parts(in_features: int) -> int:
    """Return the parts that a sum is cut into."""
    return ceil_div(in_features, _PART_FEATURES)


def _input_bytes(rows: int, in_features: int) -> int:
    """Return the bytes of prepared inputs, aligned."""
    return round_up(rows * round_up(in_features, _SLICE_FEATURES) * 4, _ALIGNMENT)


def _scale_bytes(rows: int, in_features: int) -> int:
    """Return the bytes of the scales of prepared inputs, aligned."""
    return round_up(rows * _parts(in_features) * 4, _ALIGNMENT)


class DenseLinearOps(KernelOps):
    """Products with `DenseLinear`."""

    def _dense_linear(self, x: torch.Tensor, w: DenseLinear, out: torch.Tensor,
                      scratch: torch.Tensor, add: bool) -> None:
        """Run `base.Ops.linear` with an unquantised layer.

        Args:
            scratch: uint8 [n], without counters.
        """
        rows, features = x.shape
        assert x.is_contiguous() and features == w.in_features and out.stride(1) == 1
        assert out.shape[0] == rows and out.shape[1] >= w.out_features
        assert w.weight.shape == (_tiles(w), features, TILE_COLUMNS)
        if rows == 0:
            return
        if rows <= DECODE_ROWS:
            self._dense_decode(x, w, out, add)
            return
        for first in range(0, rows, PASS_ROWS):
            held = slice(first, first + PASS_ROWS)
            self._dense_prefill(x[held], w, out[held], scratch, add)

    def _dense_decode(self, x: torch.Tensor, w: DenseLinear, out: torch.Tensor,
                      add: bool) -> None:
        rows, features = x.shape
        passes = ceil_div(rows, _FRAGMENT_ROWS)
        blocks = _tiles(w) * passes
        warps = self._dense_warps(_parts(features), blocks)
        self._launch(
            f"dense_decode_{_dtype(w)}_kernel", (blocks, 1, 1), warps * WARP,
            warps * _DECODE_WARP_BYTES, pointer(x), _I32(rows), _I32(features),
            _I32(w.out_features), _I32(passes), pointer(w.weight), pointer(w.bias),
            _P(out.data_ptr()), _I64(out.stride(0)), _I32(add),
        )

    def _dense_warps(self, parts: int, blocks: int) -> int:
        """Return the warps of a block that decodes; its results do not depend on them.

        Two blocks of 8 warps fit a multiprocessor. Where there are fewer blocks than that, each
        takes more warps.
        """
        fits = _MOST_DECODE_WARPS * _DECODE_WARP_BYTES <= self.launcher.shared_limit_bytes
        if fits and parts > _DECODE_WARPS[-1] and blocks < 2 * self.launcher.multiprocessors:
            return _MOST_DECODE_WARPS
        return next((warps for warps in _DECODE_WARPS if warps >= parts), _DECODE_WARPS[-1])

    def _dense_prefill(self, x: torch.Tensor, w: DenseLinear, out: torch.Tensor,
                       scratch: torch.Tensor, add: bool) -> None:
        """Multiply up to PASS_ROWS rows."""
        rows, features = x.shape
        dtype, offset = _dtype(w), _input_bytes(rows, features)
        assert offset + _scale_bytes(rows, features) <= scratch.nbytes
        inputs, scales = pointer(scratch), pointer(scratch[offset:])
        self._launch(
            f"dense_prepare_{dtype}_kernel", (ceil_div(_parts(features), _PREPARE_PARTS), rows, 1),
            _PREPARE_THREADS, 0, pointer(x), _I32(features), inputs, scales,
        )
        grid = (ceil_div(rows, _PREFILL_ROWS), ceil_div(_tiles(w), _PREFILL_TILES), 1)
        self._launch(
            f"dense_prefill_{dtype}_kernel", grid, _PREFILL_THREADS, _PREFILL_BYTES, inputs, scales,
            _I32(rows), _I32(features), _I32(w.out_features), pointer(w.weight),
            pointer(w.bias), _P(out.data_ptr()), _I64(out.stride(0)), _I32(add),
        )


def _tiles(w: DenseLinear) -> int:
    return ceil_div(w.out_features, TILE_COLUMNS)


def _dtype(w: DenseLinear) -> str:
    return str(w.weight.dtype).removeprefix("torch.")
