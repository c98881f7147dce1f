"""Unquantised linear layers as launches of compiled kernels."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from .linear_structs import address
from .ops_rows import Launch, in_order, nothing
from .scratch_linear import (
    DENSE_DECODE_ROWS,
    DENSE_PASS_ROWS,
    dense_input_bytes,
    dense_parts,
    dense_scale_bytes,
)

if TYPE_CHECKING:
    import torch

    from ...formats.packed import DenseLinear
    from .launcher import Launcher

_WARP = 32
_TILE_COLUMNS = 16
# csrc/cuda/linear_dense_decode.cu. A warp has a ring and a part's sums.
_DECODE_ROWS = 8
_DECODE_WARP_BYTES = 6144 + _DECODE_ROWS * _TILE_COLUMNS * 4
_DECODE_WARPS = (4, 8)
_MOST_DECODE_WARPS = 16
# csrc/cuda/linear_dense_prefill.cu.
_PREPARE_THREADS = 256
_PREPARE_PARTS = _PREPARE_THREADS // _WARP
_PREFILL_THREADS = 128
_PREFILL_ROWS = 64
_PREFILL_TILES = 8
_PREFILL_BYTES = 48 << 10

_I32, _I64, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class DenseOps:
    """Matrix products with `DenseLinear`.

    Args:
        launcher: runs kernels.
    """

    launcher: Launcher

    def prepare_dense_linear(self, x: torch.Tensor, w: DenseLinear, out: torch.Tensor,
                             scratch: torch.Tensor, add: bool) -> Launch:
        """Prepare out = x @ W + bias, or out += ... where `add`; `interface.Ops.linear`."""
        rows, features = x.shape
        assert x.is_contiguous() and features == w.in_features and out.stride(1) == 1
        assert out.shape[0] == rows and out.shape[1] >= w.out_features
        assert w.weight.shape == (_tiles(w), features, _TILE_COLUMNS)
        if rows == 0:
            return nothing
        if rows <= DENSE_DECODE_ROWS:
            return self._decode_dense(x, w, out, add)
        launches = []
        for first in range(0, rows, DENSE_PASS_ROWS):
            held = slice(first, first + DENSE_PASS_ROWS)
            launches += self._prefill_dense(x[held], w, out[held], scratch, add)
        return in_order(launches)

    def _decode_dense(self, x: torch.Tensor, w: DenseLinear, out: torch.Tensor,
                      add: bool) -> Launch:
        rows, features = x.shape
        passes = -(-rows // _DECODE_ROWS)
        blocks = _tiles(w) * passes
        warps = self._dense_warps(dense_parts(features), blocks)
        return self.launcher.prepare(
            f"dense_decode_{_dtype(w)}_kernel", (blocks, 1, 1), warps * _WARP,
            warps * _DECODE_WARP_BYTES, _P(x.data_ptr()), _I32(rows), _I32(features),
            _I32(w.out_features), _I32(passes), _P(address(w.weight)), _P(address(w.bias)),
            _P(out.data_ptr()), _I64(out.stride(0)), _I32(add),
        )

    def _dense_warps(self, parts: int, blocks: int) -> int:
        """Warps of a block that decodes; what a block computes does not depend on them.

        Two blocks of 8 fit a multiprocessor. Fewer blocks than that take more warps each.
        """
        fits = _MOST_DECODE_WARPS * _DECODE_WARP_BYTES <= self.launcher.shared_limit_bytes
        if fits and parts > _DECODE_WARPS[-1] and blocks < 2 * self.launcher.multiprocessors:
            return _MOST_DECODE_WARPS
        return next((warps for warps in _DECODE_WARPS if warps >= parts), _DECODE_WARPS[-1])

    def _prefill_dense(self, x: torch.Tensor, w: DenseLinear, out: torch.Tensor,
                       scratch: torch.Tensor, add: bool) -> list[Launch]:
        """Prepare the launches of up to DENSE_PASS_ROWS rows."""
        from .scratch import COUNTER_BYTES

        rows, features = x.shape
        parts, dtype = dense_parts(features), _dtype(w)
        place = COUNTER_BYTES + dense_input_bytes(rows, features)
        assert place + dense_scale_bytes(rows, features) <= scratch.nbytes
        inputs, scales = _P(scratch.data_ptr() + COUNTER_BYTES), _P(scratch.data_ptr() + place)
        prepare = self.launcher.prepare(
            f"dense_prepare_{dtype}_kernel", (-(-parts // _PREPARE_PARTS), rows, 1),
            _PREPARE_THREADS, 0, _P(x.data_ptr()), _I32(features), inputs, scales,
        )
        grid = (-(-rows // _PREFILL_ROWS), -(-_tiles(w) // _PREFILL_TILES), 1)
        multiply = self.launcher.prepare(
            f"dense_prefill_{dtype}_kernel", grid, _PREFILL_THREADS, _PREFILL_BYTES, inputs, scales,
            _I32(rows), _I32(features), _I32(w.out_features), _P(address(w.weight)),
            _P(address(w.bias)), _P(out.data_ptr()), _I64(out.stride(0)), _I32(add),
        )
        return [prepare, multiply]


def _tiles(w: DenseLinear) -> int:
    return -(-w.out_features // _TILE_COLUMNS)


def _dtype(w: DenseLinear) -> str:
    return str(w.weight.dtype).removeprefix("torch.")
