"""Unquantised linear layers as launches of compiled kernels."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from .linear_structs import address
from .ops_rows import Launch, nothing

if TYPE_CHECKING:
    import torch

    from ...formats.packed import DenseLinear
    from .launcher import Launcher

# csrc/cuda/linear_dense.cu.
_DENSE_THREADS = 256
_DENSE_PARTS = 32
_DENSE_PASSES = (1, 4, 8)
_DENSE_MOST_DECODE_ROWS = 32
_DENSE_TILE_COLUMNS = 16
_DENSE_PREFILL_TILES = 4
_DENSE_PREFILL_ROWS = 64
_DENSE_PREFILL_BYTES = 16 * (64 + 64 + 4) * 4

_I32, _I64, _P = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class DenseOps:
    """Matrix products with `DenseLinear`.

    Args:
        launcher: runs kernels.
    """

    launcher: Launcher

    def prepare_dense_linear(self, x: torch.Tensor, w: DenseLinear, out: torch.Tensor,
                             add: bool) -> Launch:
        """Prepare out = x @ W + bias, or out += ... where `add`; `interface.Ops.linear`."""
        rows, features = x.shape
        tiles = -(-w.out_features // _DENSE_TILE_COLUMNS)
        assert x.is_contiguous() and features == w.in_features and out.stride(1) == 1
        assert out.shape[0] == rows and out.shape[1] >= w.out_features
        assert w.weight.shape == (tiles, features, _DENSE_TILE_COLUMNS)
        if rows == 0:
            return nothing
        dtype = str(w.weight.dtype).removeprefix("torch.")
        if rows <= _DENSE_MOST_DECODE_ROWS:
            pass_rows = next((n for n in _DENSE_PASSES if n >= rows), _DENSE_PASSES[-1])
            name, grid = f"dense_decode_{pass_rows}", (tiles, -(-rows // pass_rows), 1)
            shared_bytes = _DENSE_PARTS * pass_rows * _DENSE_TILE_COLUMNS * 4
        else:
            name, shared_bytes = "dense_prefill", _DENSE_PREFILL_BYTES
            grid = (-(-rows // _DENSE_PREFILL_ROWS), -(-tiles // _DENSE_PREFILL_TILES), 1)
        return self.launcher.prepare(
            f"{name}_{dtype}_kernel", grid, _DENSE_THREADS, shared_bytes,
            _P(x.data_ptr()), _I32(rows), _I32(features), _I32(w.out_features),
            _P(address(w.weight)), _P(address(w.bias)), _P(out.data_ptr()),
            _I64(out.stride(0)), _I32(add),
        )
