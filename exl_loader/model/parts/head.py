"""The end of a model: final norm, output head and soft cap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .linear import Linear
from .norm import Norm

if TYPE_CHECKING:
    import torch

    from ...backends.base import Ops, Shapes
    from ...utils.table import TensorSpec
    from .part import Loading, StepViews


@dataclass(eq=False)
class Head:
    """Logits of a step's rows, or of the last row of each sequence.

    Args:
        softcap: cap * tanh(logit / cap) is applied where it is not 0.
    """

    norm: Norm
    linear: Linear
    softcap: float

    def specs(self) -> Iterator[TensorSpec]:
        """Describe the weights as they will be on the device."""
        yield from self.norm.specs()
        yield from self.linear.specs()

    def inputs(self, logits_rows: int) -> Shapes:
        """Return the numbers of the rows that get logits, which the CPU writes."""
        return {"head_rows": ("int32", (logits_rows,))}

    def workspace(self, logits_rows: int) -> Shapes:
        """Return the tensors of steps with up to `logits_rows` rows of logits."""
        (hidden_size,) = self.norm.spec.shape
        return {
            "head_x": ("float32", (logits_rows, hidden_size)),
            "logits": ("float32", (logits_rows, self.linear.out_features)),
        }

    def load(self, loading: Loading) -> None:
        """Read the weights."""
        self.norm.load(loading)
        self.linear.load(loading)

    def run(
        self, ops: Ops, views: StepViews, rows: torch.Tensor | None, logits: torch.Tensor
    ) -> None:
        """Compute logits of the hidden state.

        Args:
            rows: int32 [R], rows of the step that get logits; None for all.
            logits: float32 [R, vocab_size].
        """
        x, head_x = views.x, views.view("head_x", logits.shape[0], views.x.shape[1])
        if rows is not None:
            ops.gather_rows(x, rows, head_x)
            x = head_x
        self.norm.run(ops, x, head_x)
        self.linear.run(ops, head_x, logits, views.scratch)
        if self.softcap:
            ops.softcap(logits, self.softcap)
