"""The order of the parts in a decoder layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .parts.attention import Attention
from .parts.experts import Experts
from .parts.linear import Linear
from .parts.norm import Norm
from .parts.part import Block, LayerState, Loading, StepViews, merged
from .parts.vector import Vector

if TYPE_CHECKING:
    from ..backends.base import Ops, Shapes
    from ..utils.table import TensorSpec


@dataclass(eq=False)
class DecoderLayer(ABC):
    """Attention and MLP, in the order of a subclass.

    Args:
        device: where the layer runs.
        attention, mlp: its blocks.
        attn_input_norm: in front of attention; None where there is none.
    """

    device: str
    attention: Attention
    mlp: Block
    attn_input_norm: Norm | None

    @abstractmethod
    def parts(self) -> Iterator[Norm | Block]:
        """Every part, in the order of the forward pass."""

    @abstractmethod
    def run(self, ops: Ops, views: StepViews, state: LayerState) -> None:
        """Run the layer on `views.x`, in place.

        Args:
            ops: those of the device, or a `Recorder`. It collects the calls, which are replayed
                step by step, so that decoding looks everything up once.
            views: everything but `x` and the tables of angles is overwritten.
        """

    @cached_property
    def weights(self) -> list[Norm | Linear | Vector]:
        """Every norm, linear layer and vector."""
        found: list[Norm | Linear | Vector] = []
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

    @cached_property
    def vectors(self) -> list[Vector]:
        """Every vector."""
        return [part for part in self.weights if isinstance(part, Vector)]

    @property
    def hidden_size(self) -> int:
        """H, elements of a row of the hidden state."""
        return self.attention.o.out_features

    def input_groups(self) -> list[list[Linear]]:
        """See `Block.input_groups`."""
        return [*self.attention.input_groups(), *self.mlp.input_groups()]

    def specs(self) -> Iterator[TensorSpec]:
        """Describe the weights as they will be on the device: norms, linear layers, vectors."""
        parts: list[Norm | Linear | Vector] = [*self.norms, *self.linears, *self.vectors]
        for part in parts:
            yield from part.specs()

    def read_bytes(self) -> int:
        """Return the bytes of the weights that a row runs through."""
        return sum(spec.nbytes for spec in self.specs()) - self.mlp.unread_bytes()

    def workspace(self, rows: int) -> Shapes:
        """Return the tensors of a whole step of up to `rows` rows, which layers share."""
        hidden, rope = ("float32", (rows, self.hidden_size)), self.attention.rope
        return {"x": hidden, "h": hidden, **({} if rope is None else rope.workspace(rows))}

    def phases(self, rows: int) -> dict[str, Shapes]:
        """Return block -> its tensors, which nothing else uses. The blocks share memory."""
        mlp = merged((self.mlp.workspace(rows), self.mlp.routing_workspace(rows)))
        return {"attention": self.attention.workspace(rows), "mlp": mlp}

    @cached_property
    def workspace_key(self) -> Hashable:
        """Equal for layers that need the same workspace: they have the same tensors of a row."""
        by_phase = ((phase, *shapes.items()) for phase, shapes in self.phases(1).items())
        return (
            tuple(self.workspace(1).items()), tuple(by_phase),
            tuple(self.layer_workspace().items()),
        )

    @cached_property
    def widths(self) -> frozenset[tuple[int, bool]]:
        """(stored rows, `is_dense`) of every linear layer, which decide the scratch."""
        return frozenset((linear.stored_rows, linear.is_dense) for linear in self.linears)

    def layer_workspace(self) -> Shapes:
        """Return the tensors that the layer has for itself."""
        return {**self.attention.layer_workspace(), **self.mlp.layer_workspace()}

    def load(self, loading: Loading) -> None:
        """Read the weights."""
        for part in self.parts():
            part.load(loading)


@dataclass(eq=False)
class Layer(DecoderLayer):
    """x += norm(attention(norm(x))) * residual, then x += norm(mlp(norm(x))) * residual.

    Args:
        mlp_input_norm: in front of the MLP; None where there is none, as in `attn_input_norm`.
        attn_output_norm, mlp_output_norm: on what the blocks add; None where there is none.
        residual: factor on what the blocks add.
    """

    attn_output_norm: Norm | None
    mlp_input_norm: Norm | None
    mlp_output_norm: Norm | None
    residual: float = 1.0

    def parts(self) -> Iterator[Norm | Block]:
        for part in (self.attn_input_norm, self.attention, self.attn_output_norm,
                     self.mlp_input_norm, self.mlp, self.mlp_output_norm):
            if part is not None:
                yield part

    def run(self, ops: Ops, views: StepViews, state: LayerState) -> None:
        self._run_block(
            ops, views, state, self.attn_input_norm, self.attention, self.attn_output_norm
        )
        self._run_block(ops, views, state, self.mlp_input_norm, self.mlp, self.mlp_output_norm)

    def _run_block(self, ops: Ops, views: StepViews, state: LayerState, input_norm: Norm | None,
                   block: Block, output_norm: Norm | None) -> None:
        x = views.x
        if input_norm is not None:
            input_norm.run(ops, views.x, views.h)
            x = views.h
        # A mixture has the factor in the weights of its experts.
        residual = 1.0 if isinstance(block, Experts) else self.residual
        if output_norm is None and residual == 1 and input_norm is not None:
            block.run(ops, views, state, x, views.x, add=True)
            return
        block.run(ops, views, state, x, views.h, add=False)
        if output_norm is not None:
            output_norm.run(ops, views.h, views.h)
        ops.add(views.x, views.h, residual)


@dataclass(eq=False)
class ParallelLayer(DecoderLayer):
    """x += attention(norm(x)) + mlp(norm(x)), with one norm or two.

    Args:
        attn_input_norm: in front of attention, and of the MLP if that has none of its own.
        mlp_input_norm: the MLP's own; None where it shares attention's.
    """

    mlp_input_norm: Norm | None

    def parts(self) -> Iterator[Norm | Block]:
        for part in (self.attn_input_norm, self.mlp_input_norm, self.attention, self.mlp):
            if part is not None:
                yield part

    def workspace(self, rows: int) -> Shapes:
        if self.mlp_input_norm is None:
            return super().workspace(rows)
        return super().workspace(rows) | {"mlp_h": ("float32", (rows, self.hidden_size))}

    def run(self, ops: Ops, views: StepViews, state: LayerState) -> None:
        assert self.attn_input_norm is not None
        self.attn_input_norm.run(ops, views.x, views.h)
        mlp_h = views.h
        if self.mlp_input_norm is not None:
            # Before attention adds to x.
            mlp_h = views.view("mlp_h", *views.x.shape)
            self.mlp_input_norm.run(ops, views.x, mlp_h)
        self.attention.run(ops, views, state, views.h, views.x, add=True)
        self.mlp.run(ops, views, state, mlp_h, views.x, add=True)
