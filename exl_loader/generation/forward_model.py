"""What generation needs of a model: the protocol `ForwardModel` and the rows it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..cache.paging import PagedSequence

if TYPE_CHECKING:
    import torch

LogitsMode = Literal["last", "all", "none"]


@dataclass(frozen=True, eq=False)
class TopLogits:
    """The largest logits of a row, computed on a device, and the sum over the others.

    Args:
        ids: int64 [n], 0 < n < vocab_size; every other id has a logit of logits[-1] or less.
        logits: float32 [n], finite and falling; equal ones by rising id.
        vocab_size: number of ids that were considered: 0 to vocab_size - 1.
        weight_sum: sum of exp(logit - logits[0]) over the other ids, computed in float32.
    """

    ids: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    vocab_size: int
    weight_sum: float


class LogitsRow:
    """The logits after one token, as samplers see them.

    Args:
        values: float32 [vocab_size], finite; or a function that copies them from a device,
            which is called at most once.
        top_logits: the largest of them, if the device has computed them. They mostly suffice,
            and then the row is not copied.
    """

    def __init__(
        self,
        values: npt.NDArray[np.float32] | Callable[[], npt.NDArray[np.float32]],
        top_logits: TopLogits | None = None,
    ) -> None:
        self.top_logits = top_logits
        self._values = values

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """The logits on the CPU, float32 [vocab_size]."""
        if callable(self._values):
            self._values = self._values()
        return self._values

    def argmax(self, vocab_size: int) -> int:
        """Return the id below `vocab_size` with the largest logit, of equal ones the lowest."""
        if self.top_logits is not None:
            ids = self.top_logits.ids
            ids = ids[ids < vocab_size]
            if len(ids):
                return int(ids[0])
        return int(self.values[:vocab_size].argmax())


class ForwardModel(Protocol):
    """The forward pass; `model.forward.Model` implements it.

    Attributes:
        chunk_size: most ids in one pass.
        max_batch_size: most sequences in one pass.
        logits_rows: most rows of logits in one pass.
        decode_rows: most ids of a sequence in one pass that have the same bits as in passes of
            one id each, at most `chunk_size`.
    """

    chunk_size: int
    max_batch_size: int
    logits_rows: int
    decode_rows: int

    def forward(
        self,
        entries: Sequence[tuple[PagedSequence, list[int]]],
        logits: LogitsMode = "last",
    ) -> torch.Tensor:
        """Run new ids of sequences; return logits on the CPU, float32 [rows, vocab_size]."""

    def forward_rows(
        self,
        entries: Sequence[tuple[PagedSequence, list[int]]],
        logits: LogitsMode = "last",
    ) -> list[LogitsRow]:
        """Run new ids of sequences; return the rows, which are valid until the next call."""

    def rope_class(self, rope_len: int) -> int:
        """Return a number that is equal for lengths with the same RoPE frequencies."""
