"""The MLP of a layer: gated, or plain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .linear import Linear, run_linears
from .part import Block, LayerState, Loading, StepViews

if TYPE_CHECKING:
    import torch

    from ...backends.base import Ops, Shapes


@dataclass(eq=False)
class Mlp(Block):
    """down(activation(gate(x)) * up(x)): the MLP of a layer, or one expert of several.

    Args:
        activation: as `Ops.gate` takes it.
    """

    gate: Linear
    up: Linear
    down: Linear
    activation: str

    def weights(self) -> Iterator[Linear]:
        yield from (self.gate, self.up, self.down)

    def input_groups(self) -> list[list[Linear]]:
        return [[self.gate, self.up], [self.down]]

    def workspace(self, rows: int) -> Shapes:
        shape = ("float32", (rows, self.gate.out_features))
        return {"gate": shape, "up": shape}

    def load(self, loading: Loading) -> None:
        """Read the weights."""
        super().load(loading)
        same_input = [self.gate, self.up]
        ops = loading.ops[self.gate.device]
        ops.share_permutations([linear.weights for linear in same_input])

    def run(self, ops: Ops, views: StepViews, state: LayerState, x: torch.Tensor,
            out: torch.Tensor, add: bool) -> None:
        gated = self.run_gate(ops, views, x)
        down = self.down.add if add else self.down.run
        down(ops, gated, out, views.scratch)

    def run_gate(self, ops: Ops, views: StepViews, x: torch.Tensor) -> torch.Tensor:
        """Return activation(gate(x)) * up(x), float32 [rows of x, intermediate_size]."""
        shape = x.shape[0], self.gate.out_features
        gate, up = views.view("gate", *shape), views.view("up", *shape)
        run_linears(ops, x, (self.gate, self.up), (gate, up), views.scratch)
        ops.gate(gate, up, self.activation, gate)
        return gate


@dataclass(eq=False)
class PlainMlp(Block):
    """down(activation(up(x))).

    Args:
        activation: as `Ops.activate` takes it.
    """

    up: Linear
    down: Linear
    activation: str

    def weights(self) -> Iterator[Linear]:
        yield from (self.up, self.down)

    def input_groups(self) -> list[list[Linear]]:
        return [[self.up], [self.down]]

    def workspace(self, rows: int) -> Shapes:
        return {"up": ("float32", (rows, self.up.out_features))}

    def run(self, ops: Ops, views: StepViews, state: LayerState, x: torch.Tensor,
            out: torch.Tensor, add: bool) -> None:
        up = views.view("up", x.shape[0], self.up.out_features)
        self.up.run(ops, x, up, views.scratch)
        ops.activate(up, self.activation, up)
        down = self.down.add if add else self.down.run
        down(ops, up, out, views.scratch)
