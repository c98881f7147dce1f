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
    """The table of angles of one RoPE."""

    config: RopeConfig

    @property
    def pairs(self) -> int:
        """Elements i and pairs + i of a head are turned together."""
        return self.config.rotary_dim // 2

    def inputs(self, max_batch_size: int) -> Shapes:
        """Return the frequencies of each sequence, which the CPU writes."""
        return {"inv_freq": ("float32", (max_batch_size, self.pairs))}

    def workspace(self, rows: int) -> Shapes:
        """Return the table of steps of up to `rows` rows."""
        return {"rope_table": ("float32", (rows, 2, self.pairs))}

    def table(self, views: StepViews) -> torch.Tensor:
        """Return cosines and sines of the step's rows, float32 [T, 2, pairs]."""
        return views.view("rope_table", views.rows, 2, self.pairs)

    def run(self, ops: Ops, views: StepViews, frequencies: torch.Tensor) -> None:
        """Compute the table of a step whose sequences all have the same frequencies."""
        batch = views.batch
        ops.rope_table(batch.positions, frequencies, batch.rope_factor, self.table(views))
