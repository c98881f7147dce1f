"""Rotary position embedding: the angles of a step's rows, which attention layers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ...backends.base import Ops, Shapes
    from ...checkpoint.rope import RopeConfig
    from .part import StepViews


@dataclass(frozen=True, eq=False)
class Rope:
    """The table of angles of one RoPE.

    Args:
        config: its scheme.
        interleaved: see `Ops.rope`.
        index: its place in `ModelConfig.ropes`.
    """

    config: RopeConfig
    interleaved: bool = False
    index: int = 0

    @property
    def pairs(self) -> int:
        """Pairs of elements of a head that are turned together."""
        return self.config.rotary_dim // 2

    @property
    def frequencies_name(self) -> str:
        """The tensor of the frequencies, which the CPU writes."""
        return f"inv_freq_{self.index}" if self.index else "inv_freq"

    @property
    def table_name(self) -> str:
        """The tensor of the table."""
        return f"rope_table_{self.index}" if self.index else "rope_table"

    def inputs(self, max_batch_size: int) -> Shapes:
        """Return the frequencies of each sequence, which the CPU writes."""
        return {self.frequencies_name: ("float32", (max_batch_size, self.pairs))}

    def workspace(self, rows: int) -> Shapes:
        """Return the table of steps of up to `rows` rows."""
        return {self.table_name: ("float32", (rows, 2, self.pairs))}

    def table(self, views: StepViews) -> torch.Tensor:
        """Return cosines and sines of the step's rows, float32 [T, 2, pairs]."""
        return views.view(self.table_name, views.rows, 2, self.pairs)

    def run(self, ops: Ops, views: StepViews, frequencies: torch.Tensor, factor: float) -> None:
        """Compute the table of a step whose sequences all have the same frequencies."""
        ops.rope_table(views.batch.positions, frequencies, factor, self.table(views))

    def turn(self, ops: Ops, views: StepViews, x: torch.Tensor,
             mean: torch.Tensor | None = None) -> None:
        """Turn heads, float32 [T, heads, head_dim], in place, less `mean` as `Ops.rope` says."""
        ops.rope(x, self.table(views), self.interleaved, mean)
