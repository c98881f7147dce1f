"""Norms, angles, gates, rows and the choice of experts, as launches of compiled kernels.

Each operation of `interface.Ops` is one `prepare_...`: it looks at shapes and addresses alone
and returns what launches, so that a recorded step pays for it once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...formats.packed import DenseLinear
from ..cpu.library import dtype_code

if TYPE_CHECKING:
    import torch

    from .launcher import Launcher

Launch = Callable[[], None]

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}

# Constants of csrc/cuda/{norm,rope,elementwise,rows,moe}.cu.
_NORM_THREADS = 512
_HEAD_THREADS = 128
_ROPE_THREADS = 128
_ELEMENT_THREADS = 256
_ROW_THREADS = 256
_ROUTE_THREADS = 32
_WARP = 32
# Rows up to this are normalised by a warp each, wider ones by a block.
NORM_HEAD_SIZE = 512

_I32, _I64, _F32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Return a contiguous tensor's address as a kernel takes it; null for None."""
    if tensor is None:
        return ctypes.c_void_p(None)
    assert tensor.is_contiguous(), tensor.shape
    return ctypes.c_void_p(tensor.data_ptr())


def nothing() -> None:
    """The launch of an operation on no rows."""


def in_order(launches: Sequence[Launch]) -> Launch:
    """Make one launch of several, one behind the other."""
    if len(launches) == 1:
        return launches[0]

    def launch() -> None:
        for run in launches:
            run()

    return launch


def _blocks(count: int, each: int) -> int:
    return -(-count // each)


class RowOps:
    """The operations that take rows and have no weights but norms.

    Args:
        launcher: runs kernels.
    """

    def __init__(self, launcher: Launcher):
        self.launcher = launcher

    def prepare_embed(self, ids: torch.Tensor, table: torch.Tensor | DenseLinear, factor: float,
                      out: torch.Tensor) -> Launch:
        rows, size = out.shape
        weight, lanes = table, 1
        if isinstance(table, DenseLinear):
            weight, lanes = table.weight, table.weight.shape[2]
            assert table.in_features == size
        else:
            assert table.shape[1] == size
        assert ids.shape[0] == rows and not isinstance(weight, DenseLinear)
        return self._launch_rows("embed_kernel", rows, size,
            pointer(ids), pointer(weight), _I32(dtype_code(weight.dtype)), _I32(lanes),
            _I32(size), _F32(factor), pointer(out),
        )  # fmt: skip

    def prepare_rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float,
                         out: torch.Tensor) -> Launch:
        rows, size = x.shape
        assert out.shape == x.shape and weight.shape[0] == size
        if rows == 0:
            return nothing
        start = pointer(x), pointer(weight), _F32(eps)
        if size <= NORM_HEAD_SIZE:
            grid = (_blocks(rows, _HEAD_THREADS // _WARP), 1, 1)
            return self.launcher.prepare("rms_norm_heads_kernel", grid, _HEAD_THREADS, 0,
                                         *start, _I64(rows), _I32(size), pointer(out))
        shared_bytes = _NORM_THREADS // _WARP * ctypes.sizeof(_F32)
        return self.launcher.prepare("rms_norm_kernel", (rows, 1, 1), _NORM_THREADS,
                                     shared_bytes, *start, _I32(size), pointer(out))

    def prepare_rope_table(self, positions: torch.Tensor, inv_freq: torch.Tensor, factor: float,
                           out: torch.Tensor) -> Launch:
        rows, _, half = out.shape
        assert positions.shape[0] == rows and inv_freq.shape[0] == half
        if rows == 0:
            return nothing
        return self.launcher.prepare(
            "rope_table_kernel", (_blocks(rows * half, _ROPE_THREADS), 1, 1), _ROPE_THREADS, 0,
            pointer(positions), pointer(inv_freq), _F32(factor), _I32(rows), _I32(half),
            pointer(out),
        )

    def prepare_rope(self, x: torch.Tensor, table: torch.Tensor) -> Launch:
        rows, heads, head_dim = x.shape
        half = table.shape[2]
        assert table.shape[0] == rows and 2 * half <= head_dim
        if rows == 0:
            return nothing
        return self.launcher.prepare(
            "rope_kernel", (_blocks(rows * heads, _ROPE_THREADS // _WARP), 1, 1), _ROPE_THREADS,
            0, pointer(x), pointer(table), _I32(rows), _I32(heads), _I32(head_dim), _I32(half),
        )

    def prepare_gate(self, gate: torch.Tensor, up: torch.Tensor, activation: str,
                     out: torch.Tensor) -> Launch:
        assert gate.shape == up.shape == out.shape
        return self._launch_elements("gate_kernel", out.numel(),
            pointer(gate), pointer(up), pointer(out), _I64(out.numel()),
            _I32(ACTIVATIONS[activation]),
        )  # fmt: skip

    def prepare_add(self, x: torch.Tensor, y: torch.Tensor) -> Launch:
        assert x.shape == y.shape
        return self._launch_elements("add_kernel", x.numel(), pointer(x), pointer(y),
                                     _I64(x.numel()))

    def prepare_softcap(self, x: torch.Tensor, cap: float) -> Launch:
        return self._launch_elements("softcap_kernel", x.numel(), pointer(x), _F32(cap),
                                     _I64(x.numel()))

    def prepare_moe_route(self, router_logits: torch.Tensor, top_k: int, normalize: bool,
                          weights: torch.Tensor, experts: torch.Tensor) -> Launch:
        rows, num_experts = router_logits.shape
        assert top_k <= num_experts and weights.shape == (rows, top_k) == experts.shape
        if rows == 0:
            return nothing
        return self.launcher.prepare(
            "moe_route_kernel", (rows, 1, 1), _ROUTE_THREADS, 0,
            pointer(router_logits), _I32(num_experts), _I32(top_k), _I32(normalize),
            pointer(weights), pointer(experts),
        )

    def prepare_moe_sum(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor,
                        out: torch.Tensor) -> Launch:
        """out[t] += sum over k of weights[t, k] * x[t * top_k + k], in rising expert order.

        Args:
            x: float32 [T * top_k, D]. weights: float32 [T, top_k]. experts: int32 [T, top_k].
            out: float32 [T, D].
        """
        rows, top_k = experts.shape
        size = out.shape[1]
        assert weights.shape == experts.shape and x.shape == (rows * top_k, size)
        return self._launch_rows("moe_sum_kernel", rows, size,
            pointer(x), pointer(weights), pointer(experts), _I32(top_k), _I32(size),
            pointer(out),
        )  # fmt: skip

    def prepare_gather_rows(self, x: torch.Tensor, rows: torch.Tensor,
                            out: torch.Tensor) -> Launch:
        count, size = out.shape
        assert rows.shape[0] == count and x.shape[1] == size
        return self._launch_rows("gather_rows_kernel", count, size,
            pointer(x), pointer(rows), _I32(size), pointer(out),
        )  # fmt: skip

    def prepare_scatter_add_rows(self, x: torch.Tensor, rows: torch.Tensor,
                                 weights: torch.Tensor, out: torch.Tensor) -> Launch:
        count, size = x.shape
        assert rows.shape == weights.shape == (count,) and out.shape[1] == size
        return self._launch_rows("scatter_add_rows_kernel", count, size,
            pointer(x), pointer(rows), pointer(weights), _I32(size), pointer(out),
        )  # fmt: skip

    def _launch_rows(self, kernel: str, rows: int, size: int, *args: ctypes._SimpleCData) -> Launch:
        """Prepare a kernel whose blocks are pieces of rows."""
        if rows == 0:
            return nothing
        grid = (rows, _blocks(size, _ROW_THREADS), 1)
        return self.launcher.prepare(kernel, grid, _ROW_THREADS, 0, *args)

    def _launch_elements(self, kernel: str, count: int, *args: ctypes._SimpleCData) -> Launch:
        """Prepare a kernel that has a thread an element."""
        if count == 0:
            return nothing
        grid = (_blocks(count, _ELEMENT_THREADS), 1, 1)
        return self.launcher.prepare(kernel, grid, _ELEMENT_THREADS, 0, *args)
