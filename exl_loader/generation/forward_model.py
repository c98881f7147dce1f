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


class Flight(Protocol):
    """A pass that was started, and whose hidden states go from machine to machine and back."""

    def rows(self) -> list[LogitsRow]:
        """Wait for the pass, and run the head on this machine where logits are wanted.

        Called once for each flight, in the order in which the flights were started.

        Returns:
            The rows, valid until the next call of `rows` of any flight, or of `forward` or
            `forward_rows`. `start_rows` leaves them valid. An empty list for `none`.

        Raises:
            MachineLost: a machine or the connection is lost, and with it every open flight, whose
                `rows` are not called any more. Every later call of the model raises it as well.
            Any other error of the pass: the flight has ended. It is unknown which of its keys and
                values the cache holds, and with that what passes behind it have read. The flights
                behind it go on, and their `rows` have to be called.
        """


@dataclass(frozen=True)
class LandedFlight:
    """The flight of a pass that had ended before `start_rows` returned.

    Args:
        landed: its rows.
    """

    landed: list[LogitsRow]

    def rows(self) -> list[LogitsRow]:
        """Return the rows."""
        return self.landed


class ForwardModel(Protocol):
    """The forward pass; `model.forward.Model` implements it.

    A model over several machines is a pipeline. Passes are run, and pages are copied, in the
    order of the calls on every machine. So a pass may read what a pass before it writes, although
    that one has not ended yet.

    Attributes:
        chunk_size: most ids in one pass.
        max_batch_size: most sequences in one pass.
        logits_rows: most rows of logits in one pass.
        decode_rows: most ids of a sequence in one pass that have the same bits as in passes of
            one id each, at most `chunk_size`.
        most_in_flight: most flights that may be open at a time: started, and `rows` not called.
            1 on one machine, where `start_rows` has no use. Otherwise twice the number of
            machines keeps all of them busy with decoding and prompts at once.
        decoding_in_flight: number of flights among which decoding texts are divided, at most
            `most_in_flight`. As many as there are machines keep all of them busy; each further
            one makes passes smaller, and pays only where hidden states travel for longer than
            a machine computes.
    """

    chunk_size: int
    max_batch_size: int
    logits_rows: int
    decode_rows: int
    most_in_flight: int
    decoding_in_flight: int

    def forward(
        self,
        entries: Sequence[tuple[PagedSequence, list[int]]],
        logits: LogitsMode = "last",
    ) -> torch.Tensor:
        """Run new ids of sequences; return logits on the CPU, float32 [rows, vocab_size].

        Called only while no flight is open. After an error no sequence has advanced.
        """

    def forward_rows(
        self,
        entries: Sequence[tuple[PagedSequence, list[int]]],
        logits: LogitsMode = "last",
    ) -> list[LogitsRow]:
        """Run new ids of sequences; return the rows, which are valid until the next call.

        Called only while no flight is open. After an error no sequence has advanced.
        """

    def start_rows(
        self,
        entries: Sequence[tuple[PagedSequence, list[int]]],
        logits: LogitsMode = "last",
    ) -> Flight:
        """Start what `forward_rows` does: run this machine's layers, and send the rest on.

        Called only while fewer than `most_in_flight` flights are open. The rows of a sequence
        with an open page lie in one page (`PagedSequence.end_of_pass`).

        Returns:
            The flight. The sequences' `past_len` have advanced, so that their next ids may be
            started behind it, and their pages may be committed or released.

        Raises:
            MachineLost: as `Flight.rows`.
            Any other error: nothing has been started, and no sequence has advanced.
        """

    def rope_class(self, rope_len: int) -> int:
        """Return a number that is equal for lengths with the same RoPE frequencies."""
