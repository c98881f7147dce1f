"""The order of the parts in a decoder layer."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .parts.attention import Attention
from .parts.linear import Linear
from .parts.norm import Norm
from .parts.part import Block, LayerState, Loading, StepViews, merged

if TYPE_CHECKING:
    from ..backends.base import Ops, Shapes
    from ..utils.table import TensorSpec


@dataclass(eq=False)
class Layer:
    """x += norm(attention(norm(x))), then x += norm(mlp(norm(x))).

    Args:
        device: where the layer runs.
        attn_input_norm, mlp_input_norm: in front of the blocks.
        attn_output_norm, mlp_output_norm: on what the blocks add; None where there is none.
    """

    device: str
    attn_input_norm: Norm
    attention: Attention
    attn_output_norm: Norm | None
    mlp_input_norm: Norm
    mlp: Block
    mlp_output_norm: Norm | None

    def parts(self) -> Iterator[Norm | Block]:
        """Every part, in the order of the forward pass."""
        yield from (self.attn_input_norm, self.attention)
        if self.attn_output_norm is not None:
            yield self.attn_output_norm
        yield from (self.mlp_input_norm, self.mlp)
        if self.mlp_output_norm is not None:
            yield self.mlp_output_norm

    @cached_property
    def weights(self) -> list[Norm | Linear]:
        """Every norm and linear layer."""
        found: list[Norm | Linear] = []
        for part in self.parts():
            found += [part] if isinstance(part, Norm) else part.weights()
        return found

    @cached_property
    def linears(self) -> list[Linear]:
        """Every linear layer."""
        return [part for part in self.weights if isinstance(part, Linear)]

    @cached_property
    def norms(self) -> list[Norm]:
        """Every norm."""
        return [part for part in self.weights if isinstance(part, Norm)]

    def input_groups(self) -> list[list[Linear]]:
        """See `Block.input_groups`."""
        return [*self.attention.input_groups(), *self.mlp.input_groups()]

    def specs(self) -> Iterator[TensorSpec]:
        """Describe the weights as they will be on the device: norms, then linear layers."""
        for norm in self.norms:
            yield from norm.specs()
        for linear in self.linears:
            yield from linear.specs()

    def workspace(self, rows: int) -> Shapes:
        """Return the tensors of steps of up to `rows` rows, which layers share."""
        hidden = ("float32", (rows, *self.attn_input_norm.spec.shape))
        attention, mlp = self.attention, self.mlp
        return merged(
            ({"x": hidden, "h": hidden}, attention.workspace(rows), mlp.workspace(rows),
             attention.rope.workspace(rows), mlp.routing_workspace(rows))
        )

    @cached_property
    def workspace_key(self) -> Hashable:
        """Equal for layers that need the same workspace: they have the same tensors of a row."""
        return tuple(self.workspace(1).items()), tuple(self.layer_workspace().items())

    @cached_property
    def widths(self) -> frozenset[tuple[int, int]]:
        """(stored rows, output features) of every linear layer, which decide the scratch."""
        return frozenset(
            (linear.stored_rows, linear.out_features) for linear in self.linears
        )

    def layer_workspace(self) -> Shapes:
        """Return the tensors that the layer has for itself."""
        return {**self.attention.layer_workspace(), **self.mlp.layer_workspace()}

    def load(self, loading: Loading) -> None:
        """Read the weights."""
        for part in self.parts():
            part.load(loading)

    def run(self, ops: Ops, views: StepViews, state: LayerState) -> None:
        """Run the layer on `views.x`, in place.

        Args:
            ops: those of the device, or a `Recorder`. It collects the calls, which are replayed
                step by step, so that decoding looks everything up once.
            views: everything but `x` and the table of angles is overwritten.
        """
        for input_norm, block, output_norm in (
            (self.attn_input_norm, self.attention, self.attn_output_norm),
            (self.mlp_input_norm, self.mlp, self.mlp_output_norm),
        ):
            input_norm.run(ops, views.x, views.h)
            if output_norm is None:
                block.run(ops, views, state, views.h, views.x, add=True)
            else:
                block.run(ops, views, state, views.h, views.h, add=False)
                output_norm.run(ops, views.h, views.h)
                ops.add(views.x, views.h)
