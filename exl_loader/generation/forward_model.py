"""What the scheduler and a draft need of a model, so that neither has to know the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from ..cache.paging import PagedSequence

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch


class ForwardModel(Protocol):
    """What generation needs of `model.Model`."""

    chunk_size: int
    max_batch_size: int
    logits_rows: int

    def forward(
        self,
        entries: Sequence[tuple[PagedSequence, list[int]]],
        logits: Literal["last", "all", "none"] = "last",
    ) -> torch.Tensor: ...

    def forward_rows(
        self,
        entries: Sequence[tuple[PagedSequence, list[int]]],
        logits: Literal["last", "all", "none"] = "last",
    ) -> list[npt.ArrayLike]: ...

    def rope_class(self, rope_len: int) -> int: ...
