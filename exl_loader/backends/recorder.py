"""A recorder of operations, and the calls that it collects.

Decoding runs the same operations in every step. So they are recorded once for each shape of a
step, prepared by `DeviceOps.prepare`, and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..cache.layout import CacheLayer
    from .base import AttentionShape, Batch, Call, DeviceOps, ExpertTable, Linear, Ops, Routing


@dataclass(frozen=True, eq=False)
class Embed:
    """A call of `embed`."""

    ids: torch.Tensor
    table: torch.Tensor | Linear
    factor: float
    out: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.embed(self.ids, self.table, self.factor, self.out)


@dataclass(frozen=True, eq=False)
class RmsNorm:
    """A call of `rms_norm`."""

    x: torch.Tensor
    weight: torch.Tensor
    eps: float
    out: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.rms_norm(self.x, self.weight, self.eps, self.out)


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """A call of `layer_norm`."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    out: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.layer_norm(self.x, self.weight, self.bias, self.eps, self.out)


@dataclass(frozen=True, eq=False)
class Product:
    """A call of `linear`."""

    x: torch.Tensor
    w: Linear
    out: torch.Tensor
    scratch: torch.Tensor
    add: bool

    def run(self, ops: Ops) -> None:
        ops.linear(self.x, self.w, self.out, self.scratch, self.add)


@dataclass(frozen=True, eq=False)
class RopeTable:
    """A call of `rope_table`."""

    positions: torch.Tensor
    inv_freq: torch.Tensor
    factor: float
    out: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.rope_table(self.positions, self.inv_freq, self.factor, self.out)


@dataclass(frozen=True, eq=False)
class Rope:
    """A call of `rope`."""

    x: torch.Tensor
    table: torch.Tensor
    interleaved: bool
    mean: torch.Tensor | None

    def run(self, ops: Ops) -> None:
        ops.rope(self.x, self.table, self.interleaved, self.mean)


@dataclass(frozen=True, eq=False)
class WriteCache:
    """A call of `write_cache`."""

    k: torch.Tensor
    v: torch.Tensor
    layer: CacheLayer
    batch: Batch
    scratch: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.write_cache(self.k, self.v, self.layer, self.batch, self.scratch)


@dataclass(frozen=True, eq=False)
class Attention:
    """A call of `attention`."""

    q: torch.Tensor
    layer: CacheLayer
    batch: Batch
    shape: AttentionShape
    out: torch.Tensor
    scratch: torch.Tensor
    sinks: torch.Tensor | None

    def run(self, ops: Ops) -> None:
        ops.attention(self.q, self.layer, self.batch, self.shape, self.out, self.scratch,
                      self.sinks)


@dataclass(frozen=True, eq=False)
class Gate:
    """A call of `gate`."""

    gate: torch.Tensor
    up: torch.Tensor
    activation: str
    out: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.gate(self.gate, self.up, self.activation, self.out)


@dataclass(frozen=True, eq=False)
class Activate:
    """A call of `activate`."""

    x: torch.Tensor
    activation: str
    out: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.activate(self.x, self.activation, self.out)


@dataclass(frozen=True, eq=False)
class Add:
    """A call of `add`."""

    x: torch.Tensor
    y: torch.Tensor
    factor: float

    def run(self, ops: Ops) -> None:
        ops.add(self.x, self.y, self.factor)


@dataclass(frozen=True, eq=False)
class AddGatedRows:
    """A call of `add_gated_rows`."""

    x: torch.Tensor
    y: torch.Tensor
    logits: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.add_gated_rows(self.x, self.y, self.logits)


@dataclass(frozen=True, eq=False)
class Clamp:
    """A call of `clamp`."""

    x: torch.Tensor
    limit: float

    def run(self, ops: Ops) -> None:
        ops.clamp(self.x, self.limit)


@dataclass(frozen=True, eq=False)
class Softcap:
    """A call of `softcap`."""

    x: torch.Tensor
    cap: float

    def run(self, ops: Ops) -> None:
        ops.softcap(self.x, self.cap)


@dataclass(frozen=True, eq=False)
class MoeRoute:
    """A call of `moe_route`."""

    router_logits: torch.Tensor
    routing: Routing
    weights: torch.Tensor
    experts: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.moe_route(self.router_logits, self.routing, self.weights, self.experts)


@dataclass(frozen=True, eq=False)
class LinearPairs:
    """A call of `linear_pairs`."""

    x: torch.Tensor
    table: ExpertTable
    experts: torch.Tensor
    out: torch.Tensor
    scratch: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.linear_pairs(self.x, self.table, self.experts, self.out, self.scratch)


@dataclass(frozen=True, eq=False)
class MoeSum:
    """A call of `moe_sum`."""

    x: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor
    out: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.moe_sum(self.x, self.weights, self.experts, self.out)


@dataclass(frozen=True, eq=False)
class GatherRows:
    """A call of `gather_rows`."""

    x: torch.Tensor
    rows: torch.Tensor
    out: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.gather_rows(self.x, self.rows, self.out)


@dataclass(frozen=True, eq=False)
class ScatterAddRows:
    """A call of `scatter_add_rows`."""

    x: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.scatter_add_rows(self.x, self.rows, self.weights, self.out)


@dataclass(frozen=True, eq=False)
class TopLogits:
    """A call of `top_logits`."""

    logits: torch.Tensor
    vocab_size: int
    out: torch.Tensor
    scratch: torch.Tensor

    def run(self, ops: Ops) -> None:
        ops.top_logits(self.logits, self.vocab_size, self.out, self.scratch)


@dataclass(frozen=True, eq=False)
class Function:
    """A call of a function whose operations depend on values of the step; see `Ops.call`."""

    function: Callable[[DeviceOps], None]

    def run(self, ops: Ops) -> None:
        ops.call(self.function)


class Recorder:
    """An `Ops` that collects calls instead of running them.

    Attributes:
        calls: the calls in order.
        reads_values: whether a call depends on values of the step, so that operations differ
            between steps.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.reads_values = False

    def embed(self, ids: torch.Tensor, table: torch.Tensor | Linear, factor: float,
              out: torch.Tensor) -> None:
        self.calls.append(Embed(ids, table, factor, out))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float,
                 out: torch.Tensor) -> None:
        self.calls.append(RmsNorm(x, weight, eps, out))

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                   eps: float, out: torch.Tensor) -> None:
        self.calls.append(LayerNorm(x, weight, bias, eps, out))

    def linear(self, x: torch.Tensor, w: Linear, out: torch.Tensor, scratch: torch.Tensor,
               add: bool = False) -> None:
        self.calls.append(Product(x, w, out, scratch, add))

    def rope_table(self, positions: torch.Tensor, inv_freq: torch.Tensor, factor: float,
                   out: torch.Tensor) -> None:
        self.calls.append(RopeTable(positions, inv_freq, factor, out))

    def rope(self, x: torch.Tensor, table: torch.Tensor, interleaved: bool = False,
             mean: torch.Tensor | None = None) -> None:
        self.calls.append(Rope(x, table, interleaved, mean))

    def write_cache(self, k: torch.Tensor, v: torch.Tensor, layer: CacheLayer, batch: Batch,
                    scratch: torch.Tensor) -> None:
        self.calls.append(WriteCache(k, v, layer, batch, scratch))

    def attention(self, q: torch.Tensor, layer: CacheLayer, batch: Batch, shape: AttentionShape,
                  out: torch.Tensor, scratch: torch.Tensor,
                  sinks: torch.Tensor | None = None) -> None:
        self.calls.append(Attention(q, layer, batch, shape, out, scratch, sinks))

    def gate(self, gate: torch.Tensor, up: torch.Tensor, activation: str,
             out: torch.Tensor) -> None:
        self.calls.append(Gate(gate, up, activation, out))

    def activate(self, x: torch.Tensor, activation: str, out: torch.Tensor) -> None:
        self.calls.append(Activate(x, activation, out))

    def add(self, x: torch.Tensor, y: torch.Tensor, factor: float = 1.0) -> None:
        self.calls.append(Add(x, y, factor))

    def add_gated_rows(self, x: torch.Tensor, y: torch.Tensor, logits: torch.Tensor) -> None:
        self.calls.append(AddGatedRows(x, y, logits))

    def clamp(self, x: torch.Tensor, limit: float) -> None:
        self.calls.append(Clamp(x, limit))

    def softcap(self, x: torch.Tensor, cap: float) -> None:
        self.calls.append(Softcap(x, cap))

    def moe_route(self, router_logits: torch.Tensor, routing: Routing, weights: torch.Tensor,
                  experts: torch.Tensor) -> None:
        self.calls.append(MoeRoute(router_logits, routing, weights, experts))

    def linear_pairs(self, x: torch.Tensor, table: ExpertTable, experts: torch.Tensor,
                     out: torch.Tensor, scratch: torch.Tensor) -> None:
        self.calls.append(LinearPairs(x, table, experts, out, scratch))

    def moe_sum(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor,
                out: torch.Tensor) -> None:
        self.calls.append(MoeSum(x, weights, experts, out))

    def gather_rows(self, x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
        self.calls.append(GatherRows(x, rows, out))

    def scatter_add_rows(self, x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor,
                         out: torch.Tensor) -> None:
        self.calls.append(ScatterAddRows(x, rows, weights, out))

    def top_logits(self, logits: torch.Tensor, vocab_size: int, out: torch.Tensor,
                   scratch: torch.Tensor) -> None:
        self.calls.append(TopLogits(logits, vocab_size, out, scratch))

    def call(self, function: Callable[[DeviceOps], None]) -> None:
        self.reads_values = True
        self.calls.append(Function(function))
