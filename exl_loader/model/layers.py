"""One decoder layer of the forward pass, written once for every architecture.

The functions here say which operations run on which views. They may be given an `Ops` and
then run at once, or a `Recorder` and then become a list of calls that is replayed step by
step: decoding pays for looking things up only once. Shapes: T rows of the step, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends.base import AttentionShape, Batch
from ..backends.host import host_of
from .blueprint import Blueprint, ExpertsPlan, LayerPlan, MlpPlan, NormPlan

if TYPE_CHECKING:
    import torch

    from ..backends.base import Linear, Ops
    from ..cache.layout import CacheLayer
    from ..checkpoint.config import ModelConfig
    from .weights import Weights
    from .workspace import RowViews

Call = Callable[[], Any]


class Recorder:
    """Stands in for an `Ops` and collects the calls instead of running them.

    An implementation may offer `bind(operation, *args) -> callable without arguments`, which
    prepares a call once for all its replays, or `bind_all([(operation, args), ...]) -> list of
    callables`, which may run neighbours as one.

    `reads_values` says whether a collected function looks at values of the step, so that what
    runs is not the same every time.
    """

    def __init__(self, ops: Ops):
        self._ops = ops
        self._bind = getattr(ops, "bind", None)
        self._bind_all = getattr(ops, "bind_all", None)
        self._calls: list[Call] = []
        self._pending: list[tuple[str, tuple[Any, ...]]] = []
        self.reads_values = False

    def __getattr__(self, operation: str) -> Callable[..., None]:
        def record(*args: Any) -> None:
            if self._bind_all is not None:
                self._pending.append((operation, args))
            elif self._bind is not None:
                self._calls.append(self._bind(operation, *args))
            else:
                self._calls.append(partial(getattr(self._ops, operation), *args))

        return record

    @property
    def calls(self) -> list[Call]:
        """What was collected, ready to run."""
        if self._bind_all is not None and self._pending:
            self._calls += self._bind_all(self._pending)
            self._pending = []
        return self._calls

    def call(self, function: Callable[..., None], *args: Any) -> None:
        """Collect a call of a function whose operations depend on values of the step."""
        self.reads_values = True
        self.calls.append(partial(function, self._ops, *args))


@dataclass(frozen=True)
class Mlp:
    """A gated MLP, or one expert."""

    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Experts:
    """A mixture of experts."""

    router: Linear
    experts: tuple[Mlp, ...]
    top_k: int
    on_device: ExpertTables | None = None


@dataclass(frozen=True)
class ExpertTables:
    """A layer's experts as one table for each projection, for operations that choose.

    What stands in them is the operations' own (`CudaOps.expert_layers`).
    """

    gate: Any
    up: Any
    down: Any


@dataclass(frozen=True)
class DecoderLayer:
    """One layer's weights on their device. Norms that the architecture lacks are None."""

    attn_input_norm: torch.Tensor
    attn_output_norm: torch.Tensor | None
    mlp_input_norm: torch.Tensor
    mlp_output_norm: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp: Mlp | Experts
    cache: CacheLayer
    shape: AttentionShape
    eps: float
    activation: str


def build_layer(
    blueprint: Blueprint, index: int, weights: Weights, cache: CacheLayer,
    ops: Any = None, expert_tables: torch.Tensor | None = None,
) -> DecoderLayer:
    """Join a layer's plan with its weights and its part of the cache.

    Args:
        ops, expert_tables: where the device chooses experts itself, its operations, and uint8
            [3, n] of the workspace for what they have to know.
    """
    config, plan = blueprint.config, blueprint.layers[index]

    def norm(norm_plan: NormPlan | None) -> Any:
        return None if norm_plan is None else weights.norms[norm_plan.spec.name]

    return DecoderLayer(
        attn_input_norm=norm(plan.attn_input_norm),
        attn_output_norm=norm(plan.attn_output_norm),
        mlp_input_norm=norm(plan.mlp_input_norm),
        mlp_output_norm=norm(plan.mlp_output_norm),
        q_norm=norm(plan.q_norm),
        k_norm=norm(plan.k_norm),
        q=weights.linears[plan.q.name],
        k=weights.linears[plan.k.name],
        v=weights.linears[plan.v.name],
        o=weights.linears[plan.o.name],
        mlp=_build_mlp(plan, weights, config.num_experts_per_tok, ops, expert_tables),
        cache=cache,
        shape=attention_shape(config, index),
        eps=config.rms_norm_eps,
        activation=config.hidden_act,
    )


def attention_shape(config: ModelConfig, index: int) -> AttentionShape:
    """Return what a layer's attention is."""
    return AttentionShape(
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping,
        window=config.layer_windows[index],
    )


def _build_mlp(plan: LayerPlan, weights: Weights, top_k: int, ops: Any,
               tables: torch.Tensor | None) -> Mlp | Experts:
    def block(mlp: MlpPlan) -> Mlp:
        return Mlp(*(weights.linears[p.name] for p in (mlp.gate, mlp.up, mlp.down)))

    if isinstance(plan.mlp, ExpertsPlan):
        router = weights.linears[plan.mlp.router.name]
        experts = tuple(map(block, plan.mlp.experts))
        return Experts(router, experts, top_k, _expert_tables(ops, experts, tables))
    return block(plan.mlp)


def _expert_tables(
    ops: Any, experts: tuple[Mlp, ...], tables: torch.Tensor | None
) -> ExpertTables | None:
    if tables is None:
        return None
    columns = ([getattr(mlp, name) for mlp in experts] for name in ("gate", "up", "down"))
    made = [ops.expert_layers(c, table) for c, table in zip(columns, tables, strict=True)]
    return None if None in made else ExpertTables(*made)


def decoder_layer(ops: Any, layer: DecoderLayer, s: RowViews, batch: Batch) -> None:
    """Run one layer: s.x [T, H] in, s.x out.

    Args:
        ops: an `Ops` or a `Recorder`.
        s: views of the step's rows; everything but `x` and `rope_table` is scratch.
        batch: the step's sequences.
    """
    _attention(ops, layer, s, batch)
    if isinstance(layer.mlp, Experts):
        # An output norm would need a sum of its own; no mixture that we run has one.
        assert layer.mlp_output_norm is None
        ops.rms_norm(s.x, layer.mlp_input_norm, layer.eps, s.h)
        _route(ops, layer.mlp, s)
        if layer.mlp.on_device is not None and s.pair_x is not None:
            _run_pairs(ops, layer.mlp.on_device, layer.activation, s)
        else:
            ops.call(_run_experts, layer.mlp, layer.activation, s)
        return
    ops.rms_norm(s.x, layer.mlp_input_norm, layer.eps, s.h)
    _gated(ops, layer.mlp, layer.activation, s.h, s.gate, s.up, s.scratch)
    _project_back(ops, layer.mlp.down, s.gate, layer.mlp_output_norm, layer.eps, s)


def _attention(ops: Any, layer: DecoderLayer, s: RowViews, batch: Batch) -> None:
    ops.rms_norm(s.x, layer.attn_input_norm, layer.eps, s.h)
    ops.linear(s.h, layer.q, s.q, s.scratch)
    ops.linear(s.h, layer.k, s.k, s.scratch)
    ops.linear(s.h, layer.v, s.v, s.scratch)
    if layer.q_norm is not None:
        ops.rms_norm(s.q_rows, layer.q_norm, layer.eps, s.q_rows)
    if layer.k_norm is not None:
        ops.rms_norm(s.k_rows, layer.k_norm, layer.eps, s.k_rows)
    ops.rope(s.q_heads, s.rope_table)
    ops.rope(s.k_heads, s.rope_table)
    ops.write_cache(s.k_heads, s.v_heads, layer.cache, batch, s.scratch)
    ops.attention(s.q_heads, layer.cache, batch, layer.shape, s.attn_heads, s.scratch)
    _project_back(ops, layer.o, s.attn, layer.attn_output_norm, layer.eps, s)


def _project_back(ops: Any, w: Linear, inner: torch.Tensor, norm: torch.Tensor | None,
                  eps: float, s: RowViews) -> None:
    """Add what a block made to the residual stream, through its output norm if it has one."""
    if norm is None:
        ops.linear(inner, w, s.x, s.scratch, True)
        return
    ops.linear(inner, w, s.h, s.scratch)
    ops.rms_norm(s.h, norm, eps, s.h)
    ops.add(s.x, s.h)


def _gated(ops: Any, mlp: Mlp, activation: str, x: torch.Tensor, gate: torch.Tensor,
           up: torch.Tensor, scratch: torch.Tensor) -> None:
    """gate = activation(x @ Wgate) * (x @ Wup)."""
    ops.linear(x, mlp.gate, gate, scratch)
    ops.linear(x, mlp.up, up, scratch)
    ops.gate(gate, up, activation, gate)


def _route(ops: Any, moe: Experts, s: RowViews) -> None:
    ops.linear(s.h, moe.router, s.router_logits, s.scratch)
    ops.moe_route(s.router_logits, moe.top_k, True, s.route_weights, s.route_experts)


def _run_pairs(ops: Any, moe: ExpertTables, activation: str, s: RowViews) -> None:
    """Run the chosen experts of few rows, each pair of row and expert by itself.

    The same bits as `_run_experts`, and the host need not know which experts these are.
    """
    ops.linear_pairs(s.h, moe.gate, s.route_experts, s.pair_gate, s.scratch)
    ops.linear_pairs(s.h, moe.up, s.route_experts, s.pair_up, s.scratch)
    ops.gate(s.pair_gate, s.pair_up, activation, s.pair_gate)
    ops.linear_pairs(s.pair_gate, moe.down, s.route_experts, s.pair_x, s.scratch)
    ops.moe_sum(s.pair_x, s.route_weights, s.route_experts, s.x)


def _run_experts(ops: Any, moe: Experts, activation: str, s: RowViews) -> None:
    """Run each chosen expert on its rows and add the weighted results to s.x.

    Experts run in their order, so that the sum of a row does not depend on its neighbours.
    """
    host = host_of(ops)
    experts = host.read(s.route_experts).reshape(-1).copy()
    order = np.argsort(experts, kind="stable")
    weights = host.read(s.route_weights).reshape(-1)[order]
    host.write(s.expert_rows, order // moe.top_k)
    host.write(s.expert_weights, weights)
    ends = np.cumsum(np.bincount(experts, minlength=len(moe.experts))).tolist()
    first = 0
    for mlp, end in zip(moe.experts, ends, strict=True):
        if end == first:
            continue
        count = end - first
        rows, factors = s.expert_rows[first:end], s.expert_weights[first:end]
        x, gate, up = s.expert_x[:count], s.gate[:count], s.up[:count]
        ops.gather_rows(s.h, rows, x)
        _gated(ops, mlp, activation, x, gate, up, s.scratch)
        ops.linear(gate, mlp.down, x, s.scratch)
        ops.scatter_add_rows(x, rows, factors, s.x)
        first = end
