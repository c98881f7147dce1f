"""Operations on rows without weight matrices on a card: norms, RoPE, gates, sums, copies."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from ...utils.integers import ceil_div
from ..kernel_structs import ACTIVATIONS, GATES, dtype_code
from ..layouts import DenseLinear
from .launcher import WARP, KernelOps, pointer

if TYPE_CHECKING:
    import torch

    from ..base import Linear

# Threads of the blocks of csrc/cuda/{norm,rope,elementwise,rows,moe}.cu.
_NORM_THREADS = 512
_HEAD_THREADS = 128
_ROPE_THREADS = 128
_ELEMENT_THREADS = 256
_ROW_THREADS = 256
# Sums over a block of layer_norm_kernel, each with a float per warp.
_LAYER_NORM_SUMS = 3
# Rows up to this size are normalised by a warp each, wider ones by a block.
NORM_HEAD_SIZE = 512

_I32, _I64, _F32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class RowOps(KernelOps):
    """Operations of `base.Ops` on rows, whose weights are norms at most."""

    def embed(self, ids: torch.Tensor, table: torch.Tensor | Linear, factor: float,
              out: torch.Tensor) -> None:
        import torch

        rows, size = out.shape
        if isinstance(table, DenseLinear):
            weight, lanes = table.weight, table.weight.shape[2]
            assert table.in_features == size
        else:
            assert isinstance(table, torch.Tensor) and table.shape[1] == size
            weight, lanes = table, 1
        assert ids.shape[0] == rows
        self._launch_rows(
            "embed_kernel", rows, size, pointer(ids), pointer(weight),
            _I32(dtype_code(weight.dtype)), _I32(lanes), _I32(size), _F32(factor), pointer(out),
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float,
                 out: torch.Tensor) -> None:
        rows, size = x.shape
        assert out.shape == x.shape and weight.shape[0] == size
        if rows == 0:
            return
        inputs = pointer(x), pointer(weight), _F32(eps)
        if size <= NORM_HEAD_SIZE:
            grid = (ceil_div(rows, _HEAD_THREADS // WARP), 1, 1)
            self._launch("rms_norm_heads_kernel", grid, _HEAD_THREADS, 0, *inputs, _I64(rows),
                         _I32(size), pointer(out))
            return
        shared_bytes = _NORM_THREADS // WARP * ctypes.sizeof(_F32)
        self._launch("rms_norm_kernel", (rows, 1, 1), _NORM_THREADS, shared_bytes, *inputs,
                     _I32(size), pointer(out))

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                   eps: float, out: torch.Tensor) -> None:
        rows, size = x.shape
        periods = len(weight)
        assert out.shape == x.shape and weight.shape == (periods, size) and rows % periods == 0
        assert bias is None or bias.shape == weight.shape
        if rows == 0:
            return
        inputs = pointer(x), pointer(weight), pointer(bias), _F32(eps)
        if size <= NORM_HEAD_SIZE:
            grid = (ceil_div(rows, _HEAD_THREADS // WARP), 1, 1)
            self._launch("layer_norm_heads_kernel", grid, _HEAD_THREADS, 0, *inputs, _I64(rows),
                         _I32(size), _I32(periods), pointer(out))
            return
        shared_bytes = _LAYER_NORM_SUMS * (_NORM_THREADS // WARP) * ctypes.sizeof(_F32)
        self._launch("layer_norm_kernel", (rows, 1, 1), _NORM_THREADS, shared_bytes, *inputs,
                     _I32(size), _I32(periods), pointer(out))

    def rope_table(self, positions: torch.Tensor, inv_freq: torch.Tensor, factor: float,
                   out: torch.Tensor) -> None:
        rows, _, half = out.shape
        assert positions.shape[0] == rows and inv_freq.shape[0] == half
        if rows == 0:
            return
        self._launch(
            "rope_table_kernel", (ceil_div(rows * half, _ROPE_THREADS), 1, 1), _ROPE_THREADS, 0,
            pointer(positions), pointer(inv_freq), _F32(factor), _I32(rows), _I32(half),
            pointer(out),
        )

    def rope(self, x: torch.Tensor, table: torch.Tensor, interleaved: bool = False,
             mean: torch.Tensor | None = None) -> None:
        rows, heads, head_dim = x.shape
        half = table.shape[2]
        assert table.shape[0] == rows and 2 * half <= head_dim
        assert mean is None or mean.shape == (heads, head_dim)
        if rows == 0:
            return
        grid = (ceil_div(rows * heads, _ROPE_THREADS // WARP), 1, 1)
        self._launch("rope_kernel", grid, _ROPE_THREADS, 0, pointer(x), pointer(table),
                     pointer(mean), _I32(rows), _I32(heads), _I32(head_dim), _I32(half),
                     _I32(interleaved))

    def gate(self, gate: torch.Tensor, up: torch.Tensor, activation: str,
             out: torch.Tensor) -> None:
        assert gate.shape == up.shape == out.shape
        self._launch_elements("gate_kernel", out.numel(), pointer(gate), pointer(up),
                              pointer(out), _I64(out.numel()), _I32(GATES[activation]))

    def activate(self, x: torch.Tensor, activation: str, out: torch.Tensor) -> None:
        assert x.shape == out.shape
        self._launch_elements("activate_kernel", x.numel(), pointer(x), pointer(out),
                              _I64(x.numel()), _I32(ACTIVATIONS[activation]))

    def add(self, x: torch.Tensor, y: torch.Tensor, factor: float = 1.0) -> None:
        assert x.shape == y.shape
        self._launch_elements("add_kernel", x.numel(), pointer(x), pointer(y), _F32(factor),
                              _I64(x.numel()))

    def add_gated_rows(self, x: torch.Tensor, y: torch.Tensor, logits: torch.Tensor) -> None:
        rows, size = x.shape
        assert x.shape == y.shape and logits.shape == (rows,)
        self._launch_rows("add_gated_rows_kernel", rows, size, pointer(x), pointer(y),
                          pointer(logits), _I32(size))

    def clamp(self, x: torch.Tensor, limit: float) -> None:
        self._launch_elements("clamp_kernel", x.numel(), pointer(x), _F32(limit),
                              _I64(x.numel()))

    def softcap(self, x: torch.Tensor, cap: float) -> None:
        self._launch_elements("softcap_kernel", x.numel(), pointer(x), _F32(cap),
                              _I64(x.numel()))

    def gather_rows(self, x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
        count, size = out.shape
        assert rows.shape[0] == count and x.shape[1] == size
        self._launch_rows("gather_rows_kernel", count, size, pointer(x), pointer(rows),
                          _I32(size), pointer(out))

    def scatter_add_rows(self, x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor,
                         out: torch.Tensor) -> None:
        count, size = x.shape
        assert rows.shape == weights.shape == (count,) and out.shape[1] == size
        self._launch_rows("scatter_add_rows_kernel", count, size, pointer(x), pointer(rows),
                          pointer(weights), _I32(size), pointer(out))

    def _launch_rows(self, kernel: str, rows: int, size: int, *args: Any) -> None:
        """Launch a kernel whose blocks take parts of rows."""
        if rows > 0:
            grid = (rows, ceil_div(size, _ROW_THREADS), 1)
            self._launch(kernel, grid, _ROW_THREADS, 0, *args)

    def _launch_elements(self, kernel: str, count: int, *args: Any) -> None:
        """Launch a kernel with a thread for each element."""
        if count > 0:
            grid = (ceil_div(count, _ELEMENT_THREADS), 1, 1)
            self._launch(kernel, grid, _ELEMENT_THREADS, 0, *args)
