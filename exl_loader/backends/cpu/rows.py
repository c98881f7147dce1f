"""Operations on rows without weight matrices on the CPU: norms, RoPE, gates, sums, copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...checkpoint.config import MAX_EXPERTS
from ..kernel_structs import ACTIVATIONS, GATES, dtype_code
from ..layouts import DenseLinear
from .library import FLOAT, INT, INT32, INT64, POINTER, KernelOps, Signature, address
from .linear import linear_struct

if TYPE_CHECKING:
    from ..base import Linear, Routing

SIGNATURES = {
    "embed": Signature(
        (POINTER, INT64, POINTER, INT64, INT64, INT64, FLOAT, POINTER),
        "a token id beyond the vocabulary",
    ),
    "embed_tiled": Signature(
        (POINTER, INT64, POINTER, FLOAT, POINTER), "a token id beyond the vocabulary"
    ),
    "rms_norm": Signature((POINTER, POINTER, FLOAT, INT64, INT64, POINTER)),
    "layer_norm": Signature(
        (POINTER, POINTER, POINTER, FLOAT, INT64, INT64, INT64, POINTER)
    ),
    "rope_table": Signature((POINTER, POINTER, FLOAT, INT64, INT64, POINTER)),
    "rope": Signature((POINTER, POINTER, POINTER, INT64, INT64, INT64, INT64, INT)),
    "gate": Signature((POINTER, POINTER, POINTER, INT64, INT32)),
    "activate": Signature((POINTER, POINTER, INT64, INT32)),
    "add": Signature((POINTER, POINTER, FLOAT, INT64)),
    "add_gated_rows": Signature((POINTER, POINTER, POINTER, INT64, INT64)),
    "clamp": Signature((POINTER, FLOAT, INT64)),
    "softcap": Signature((POINTER, FLOAT, INT64)),
    "moe_route": Signature(
        (POINTER, POINTER, INT64, INT64, INT64, INT, INT, FLOAT, POINTER, POINTER)
    ),
    "gather_rows": Signature((POINTER, INT64, POINTER, INT64, INT64, POINTER), "a row beyond x"),
    "scatter_add_rows": Signature(
        (POINTER, POINTER, POINTER, INT64, INT64, POINTER, INT64), "a row beyond out"
    ),
}


class RowOps(KernelOps):
    """Operations of `base.Ops` on rows that need no weight matrix."""

    def embed(self, ids: torch.Tensor, table: torch.Tensor | Linear, factor: float,
              out: torch.Tensor) -> None:
        assert ids.is_contiguous() and out.is_contiguous()
        if isinstance(table, DenseLinear):
            self._call("embed_tiled", ids.data_ptr(), ids.shape[0],
                       linear_struct(table).address, factor, out.data_ptr())
            return
        assert isinstance(table, torch.Tensor) and table.is_contiguous()
        assert table.shape[1] == out.shape[1]
        self._call("embed", ids.data_ptr(), ids.shape[0], table.data_ptr(),
                   dtype_code(table.dtype), *table.shape, factor, out.data_ptr())

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float,
                 out: torch.Tensor) -> None:
        rows, size = x.shape
        assert x.is_contiguous() and out.is_contiguous() and weight.shape[0] == size
        self._call("rms_norm", x.data_ptr(), weight.data_ptr(), eps, rows, size, out.data_ptr())

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                   eps: float, out: torch.Tensor) -> None:
        rows, size = x.shape
        periods = len(weight)
        assert x.is_contiguous() and out.is_contiguous() and out.shape == x.shape
        assert weight.shape == (periods, size) and rows % periods == 0
        assert bias is None or bias.shape == weight.shape
        self._call("layer_norm", x.data_ptr(), address(weight), address(bias), eps, rows, size,
                   periods, out.data_ptr())

    def rope_table(self, positions: torch.Tensor, inv_freq: torch.Tensor, factor: float,
                   out: torch.Tensor) -> None:
        rows, _, half = out.shape
        assert positions.is_contiguous() and out.is_contiguous() and inv_freq.shape[0] == half
        self._call("rope_table", positions.data_ptr(), inv_freq.data_ptr(), factor, rows, half,
                   out.data_ptr())

    def rope(self, x: torch.Tensor, table: torch.Tensor, interleaved: bool = False,
             mean: torch.Tensor | None = None) -> None:
        rows, heads, head_dim = x.shape
        half = table.shape[2]
        assert x.is_contiguous() and table.is_contiguous() and 2 * half <= head_dim
        assert mean is None or (mean.is_contiguous() and mean.shape == (heads, head_dim))
        self._call("rope", x.data_ptr(), table.data_ptr(), address(mean), rows, heads, head_dim,
                   half, interleaved)

    def gate(self, gate: torch.Tensor, up: torch.Tensor, activation: str,
             out: torch.Tensor) -> None:
        assert gate.is_contiguous() and up.is_contiguous() and out.is_contiguous()
        assert gate.shape == up.shape == out.shape
        self._call("gate", gate.data_ptr(), up.data_ptr(), out.data_ptr(), out.numel(),
                   GATES[activation])

    def activate(self, x: torch.Tensor, activation: str, out: torch.Tensor) -> None:
        assert x.is_contiguous() and out.is_contiguous() and x.shape == out.shape
        self._call("activate", x.data_ptr(), out.data_ptr(), x.numel(), ACTIVATIONS[activation])

    def add(self, x: torch.Tensor, y: torch.Tensor, factor: float = 1.0) -> None:
        assert x.is_contiguous() and y.is_contiguous() and x.shape == y.shape
        self._call("add", x.data_ptr(), y.data_ptr(), factor, x.numel())

    def add_gated_rows(self, x: torch.Tensor, y: torch.Tensor, logits: torch.Tensor) -> None:
        rows, size = x.shape
        assert x.is_contiguous() and y.is_contiguous() and x.shape == y.shape
        assert logits.is_contiguous() and logits.shape == (rows,)
        self._call("add_gated_rows", x.data_ptr(), y.data_ptr(), logits.data_ptr(), rows, size)

    def clamp(self, x: torch.Tensor, limit: float) -> None:
        assert x.is_contiguous()
        self._call("clamp", x.data_ptr(), limit, x.numel())

    def softcap(self, x: torch.Tensor, cap: float) -> None:
        assert x.is_contiguous()
        self._call("softcap", x.data_ptr(), cap, x.numel())

    def moe_route(self, router_logits: torch.Tensor, routing: Routing, weights: torch.Tensor,
                  experts: torch.Tensor) -> None:
        rows, num_experts = router_logits.shape
        top_k, correction = routing.top_k, routing.correction
        assert router_logits.is_contiguous() and top_k <= num_experts <= MAX_EXPERTS
        assert weights.is_contiguous() and weights.shape == (rows, top_k) == experts.shape
        assert experts.is_contiguous()
        assert correction is None or correction.shape == (num_experts,)
        self._call("moe_route", router_logits.data_ptr(), address(correction), rows, num_experts,
                   top_k, routing.score == "sigmoid", routing.normalize, routing.factor,
                   weights.data_ptr(), experts.data_ptr())

    def gather_rows(self, x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
        assert x.is_contiguous() and out.is_contiguous() and rows.is_contiguous()
        self._call("gather_rows", x.data_ptr(), x.shape[0], rows.data_ptr(), rows.shape[0],
                   x.shape[1], out.data_ptr())

    def scatter_add_rows(self, x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor,
                         out: torch.Tensor) -> None:
        assert x.is_contiguous() and out.is_contiguous() and rows.is_contiguous()
        assert weights.is_contiguous() and weights.shape == rows.shape
        self._call("scatter_add_rows", x.data_ptr(), rows.data_ptr(), weights.data_ptr(),
                   rows.shape[0], x.shape[1], out.data_ptr(), out.shape[0])
