"""Learned positions: a second embedding, which is added to that of the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...utils.table import TensorSpec
from .embedding import load_table

if TYPE_CHECKING:
    import torch

    from ...backends.base import Ops
    from .part import Loading, StepViews


@dataclass(eq=False)
class LearnedPositions:
    """x += table[positions].

    Args:
        spec: [positions, hidden_size] in the checkpoint's dtype; its name is that of the tensor
            in the checkpoint.
        offset: rows of that tensor in front of position 0.
    """

    spec: TensorSpec
    offset: int = 0
    table: torch.Tensor = field(init=False, repr=False)

    def specs(self) -> Iterator[TensorSpec]:
        """Describe the table as it will be on the device."""
        yield self.spec

    def load(self, loading: Loading) -> None:
        """Read the table.

        Raises:
            InvalidCheckpoint: a value is not finite, or the file shrank.
        """
        self.table = load_table(loading, self.spec, self.offset)

    def run(self, ops: Ops, views: StepViews) -> None:
        """Add the positions of a step's rows to `views.x`; `views.h` is overwritten."""
        ops.embed(views.batch.positions, self.table, 1.0, views.h)
        ops.add(views.x, views.h)
