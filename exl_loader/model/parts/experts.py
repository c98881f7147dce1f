"""A mixture of experts: a router, and the MLPs among which it chooses for each row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from .linear import Linear
from .mlp import Mlp
from .part import Block, LayerState, StepViews, merged
from .vector import Vector

if TYPE_CHECKING:
    import torch

    from ...backends.base import DeviceOps, ExpertTable, Ops, Routing, Shapes

# Pairs of a row and an expert that a device runs one by one, reading an expert's weights for
# each: two rows that chose the same expert could share them.
MAX_PAIRS = 16


@dataclass(frozen=True)
class ExpertTables:
    """The experts of a layer as one table for each projection.

    The device's operations know the contents of a table (`DeviceOps.expert_table`).
    """

    gate: ExpertTable
    up: ExpertTable
    down: ExpertTable


@dataclass(eq=False)
class Experts(Block):
    """The sum of the top_k experts that the router chooses for a row, weighted by the router.

    Args:
        routing: how the router chooses.
        shared: an expert that every row runs through as well; None where there is none.
        shared_gate: the sigmoid of its one output weighs the shared expert; None for 1.
        correction: added to the scores of experts where they are chosen; None without one.
    """

    router: Linear
    experts: tuple[Mlp, ...]
    routing: Routing
    shared: Mlp | None = None
    shared_gate: Linear | None = None
    correction: Vector | None = None

    @property
    def top_k(self) -> int:
        """Experts of a row."""
        return self.routing.top_k

    def weights(self) -> Iterator[Linear | Vector]:
        yield self.router
        for expert in self.experts:
            yield from expert.weights()
        if self.shared is not None:
            yield from self.shared.weights()
        if self.shared_gate is not None:
            yield self.shared_gate
        if self.correction is not None:
            yield self.correction

    def unread_bytes(self) -> int:
        linears = (linear for expert in self.experts for linear in expert.weights())
        nbytes = sum(spec.nbytes for linear in linears for spec in linear.specs())
        return nbytes * (len(self.experts) - self.top_k) // len(self.experts)

    def input_groups(self) -> list[list[Linear]]:
        """The experts' linear layers; router and gate stay float16."""
        experts = self.experts if self.shared is None else (*self.experts, self.shared)
        return [group for expert in experts for group in expert.input_groups()]

    def workspace(self, rows: int) -> Shapes:
        experts = [self.experts[0]] if self.shared is None else [self.experts[0], self.shared]
        return merged(expert.workspace(rows) for expert in experts)

    def routing_workspace(self, rows: int) -> Shapes:
        """Return logits and choice of the router, and the rows of one expert at a time."""
        pairs = rows * self.top_k
        shared: Shapes = {}
        if self.shared_gate is not None:
            shared["shared_logits"] = "float32", (rows, 1)
        return {
            "router_logits": ("float32", (rows, len(self.experts))),
            "route_weights": ("float32", (rows, self.top_k)),
            "route_experts": ("int32", (rows, self.top_k)),
            "expert_rows": ("int32", (pairs,)),
            "expert_weights": ("float32", (pairs,)),
            "expert_x": ("float32", (rows, self.experts[0].down.out_features)),
            **shared,
        }

    def tables(self, ops: DeviceOps, room: torch.Tensor) -> ExpertTables | None:
        """Describe the loaded experts to a device that chooses among them without the CPU.

        Args:
            ops: the device's operations.
            room: uint8 [3, n] of the workspace, for the descriptions.

        Returns:
            None where its operations cannot run these experts that way.
        """
        columns = (
            [expert.gate for expert in self.experts],
            [expert.up for expert in self.experts],
            [expert.down for expert in self.experts],
        )
        gate, up, down = (
            ops.expert_table([linear.weights for linear in column], table)
            for column, table in zip(columns, room, strict=True)
        )
        if gate is None or up is None or down is None:
            return None
        return ExpertTables(gate, up, down)

    def run(self, ops: Ops, views: StepViews, state: LayerState, x: torch.Tensor,
            out: torch.Tensor, add: bool) -> None:
        # Overwriting `out` would need a sum of its own; no mixture here has an output norm.
        assert add
        logits = views.view("router_logits", views.rows, len(self.experts))
        weights = views.view("route_weights", views.rows, self.top_k)
        chosen = views.view("route_experts", views.rows, self.top_k)
        if self.shared is not None:
            self._run_shared(ops, views, state, self.shared, x, out)
        self.router.run(ops, x, logits, views.scratch)
        routing = self.routing
        if self.correction is not None:
            routing = replace(routing, correction=self.correction.values)
        ops.moe_route(logits, routing, weights, chosen)
        pairs = views.rows * self.top_k
        few = pairs <= min(MAX_PAIRS, views.max_rows) and not self._has_adapted_experts
        if state.expert_tables is not None and few:
            self._run_pairs(ops, views, state.expert_tables, x, out)
        else:
            ops.call(partial(self._run_experts, views=views, x=x, out=out))

    @property
    def _has_adapted_experts(self) -> bool:
        """True while an adapter is on an expert; tables describe the experts without it."""
        return any(linear.low_ranks for expert in self.experts for linear in expert.weights())

    def _run_shared(self, ops: Ops, views: StepViews, state: LayerState, shared: Mlp,
                    x: torch.Tensor, out: torch.Tensor) -> None:
        """Add the shared expert's result."""
        if self.shared_gate is None:
            shared.run(ops, views, state, x, out, add=True)
            return
        gate, result = views.view("shared_logits", views.rows, 1), views.view("expert_x", *x.shape)
        self.shared_gate.run(ops, x, gate, views.scratch)
        shared.run(ops, views, state, x, result, add=False)
        ops.add_gated_rows(out, result, views.view("shared_logits", views.rows))

    def _run_pairs(self, ops: Ops, views: StepViews, tables: ExpertTables, x: torch.Tensor,
                   out: torch.Tensor) -> None:
        """Run the chosen experts of few rows, each pair of a row and an expert separately.

        The bits are those of `_run_experts`, and the CPU need not know which experts were chosen.
        """
        first, pairs = self.experts[0], views.rows * self.top_k
        chosen = views.view("route_experts", views.rows, self.top_k)
        weights = views.view("route_weights", views.rows, self.top_k)
        gate = views.view("gate", pairs, first.gate.out_features)
        up = views.view("up", pairs, first.up.out_features)
        down = views.view("expert_x", pairs, first.down.out_features)
        ops.linear_pairs(x, tables.gate, chosen, gate, views.scratch)
        ops.linear_pairs(x, tables.up, chosen, up, views.scratch)
        ops.gate(gate, up, first.activation, gate)
        ops.linear_pairs(gate, tables.down, chosen, down, views.scratch)
        ops.moe_sum(down, weights, chosen, out)

    def _run_experts(
        self, ops: DeviceOps, views: StepViews, x: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Run each chosen expert on its rows and add the weighted results to `out`.

        Experts run in their order, so that the sum of a row does not depend on its neighbours.
        Which rows an expert has is a value of the step, so this is not recorded but called.
        """
        import numpy as np

        pairs, hidden = views.rows * self.top_k, x.shape[1]
        cpu = ops.cpu_access
        rows, factors = views.view("expert_rows", pairs), views.view("expert_weights", pairs)
        chosen = views.view("route_experts", views.rows, self.top_k)
        experts = cpu.read(chosen).reshape(-1).astype(np.int64)
        order = np.argsort(experts, kind="stable")
        weights = cpu.read(views.view("route_weights", views.rows, self.top_k)).reshape(-1)
        sorted_weights = weights[order]
        cpu.write(rows, order // self.top_k)
        cpu.write(factors, sorted_weights)
        ends = np.cumsum(np.bincount(experts, minlength=len(self.experts))).tolist()
        first = 0
        for expert, end in zip(self.experts, ends, strict=True):
            if end == first:
                continue
            own_x = views.view("expert_x", end - first, hidden)
            ops.gather_rows(x, rows[first:end], own_x)
            gated = expert.run_gate(ops, views, own_x)
            expert.down.run(ops, gated, own_x, views.scratch)
            ops.scatter_add_rows(own_x, rows[first:end], factors[first:end], out)
            first = end
