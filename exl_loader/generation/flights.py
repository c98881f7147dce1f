"""The passes that are in flight between machines, and which may be started next.

Each machine runs its layers of one pass while the others run theirs of other passes. So all are
busy if there are as many passes as machines. Decoding jobs are divided among that many passes,
and chunks of prompts are started without waiting for those before. A model on one machine has no
pass in flight.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..utils.integers import ceil_div
from .forward_model import Flight, ForwardModel
from .jobs import Job
from .passes import Pass


@dataclass(eq=False)
class OpenPass:
    """A pass that was started and has not landed.

    Args:
        planned: what it runs.
        flight: waits for it.
        firsts: `missing_first` of each of its sequences before it was started.
        started_s: when.
        num_long: number of long passes that were started before it.
        num_parts: number of passes among which the decoding jobs were divided.
    """

    planned: Pass
    flight: Flight
    firsts: list[int | None]
    started_s: float
    num_long: int
    num_parts: int

    def is_of(self, job: Job) -> bool:
        """True unless the job has ended or given its pages back since the start."""
        held = [sequence for sequence, _ in job.texts]
        return any(sequence in held for sequence, _ in self.planned.entries)

    def take_back(self) -> None:
        """Set the sequences back to before the start, because the pass has failed."""
        for (sequence, ids), first in zip(self.planned.entries, self.firsts, strict=True):
            sequence.past_len -= len(ids)
            sequence.missing_first = first


class Flights:
    """The open passes of one model, in the order in which they were started.

    A chunk of a prompt, of an evaluation or of the draft model's reading is a long pass.

    Args:
        model: starts passes, and says how many may be open.

    Attributes:
        num_landed: number of passes that were waited for.
    """

    def __init__(self, model: ForwardModel) -> None:
        assert 1 <= model.decoding_in_flight <= model.most_in_flight
        self._model = model
        self._most, self._parts = model.most_in_flight, model.decoding_in_flight
        self._open: deque[OpenPass] = deque()
        # Passes are numbered in the order of their starts. These are the last long ones, as many
        # as may be started between two passes of a decoding job. With more than two machines one
        # is too few: the last machine would wait for its next chunk until the tokens behind the
        # one before have come back.
        self._number = 0
        self._long: deque[int] = deque(maxlen=max(1, self._parts - 1))
        self._num_long = 0
        self._landed_s = 0.0
        self.num_landed = 0

    def __len__(self) -> int:
        """Return the number of open passes."""
        return len(self._open)

    @property
    def drawing(self) -> set[Job]:
        """The jobs that will draw tokens when their pass lands."""
        return {
            job for opened in self._open if opened.planned.logits != "none"
            for job in opened.planned.jobs if opened.is_of(job)
        }

    @property
    def has_room_for_decoding(self) -> bool:
        """True if another pass over decoding jobs may be started."""
        return len(self._open) < self._most and len(self._decoding) < self._parts

    @property
    def has_room_for_chunk(self) -> bool:
        """True if another chunk of a prompt may be started.

        With one for each machine all are busy, and with one more also while hidden states travel.
        Others would only wait, and the first pass of a short request behind them.
        """
        num_chunks = len(self._open) - len(self._decoding)
        return len(self._open) < self._most and num_chunks <= self._parts

    def may_run_long(self, ready: Sequence[Job]) -> bool:
        """True if no decoding job would wait for too many long passes between two tokens.

        Args:
            ready: decoding jobs that are not in flight.
        """
        if len(self._long) < (self._long.maxlen or 0):
            return True
        jobs = [*self._in_decoding(), *ready]
        return all(job.last_pass > self._long[0] for job in jobs)

    def next_jobs(self, ready: Sequence[Job]) -> list[Job]:
        """Return which decoding jobs are in the next pass, so that all passes have equally many.

        Args:
            ready: decoding jobs that are not in flight. Those that have waited for longest are
                taken first.
        """
        count = sum(job.num_sequences for job in (*self._in_decoding(), *ready))
        most = ceil_div(count, self._parts)
        jobs: list[Job] = []
        for job in sorted(ready, key=lambda job: job.last_pass):
            if sum(other.num_sequences for other in jobs) >= most:
                break
            jobs.append(job)
        return jobs

    def num_parts(self, ready: Sequence[Job]) -> int:
        """Return among how many passes the decoding jobs are divided."""
        return min(self._parts, len(self._in_decoding()) + len(ready))

    def start(self, planned: Pass, num_parts: int) -> None:
        """Start a pass.

        Args:
            num_parts: number of passes among which decoding jobs are divided.

        Raises:
            As `ForwardModel.start_rows`; nothing has changed.
        """
        firsts = [sequence.missing_first for sequence, _ in planned.entries]
        started_s = time.perf_counter()
        flight = self._model.start_rows(planned.entries, planned.logits)
        self._number += 1
        for job in planned.jobs:
            job.last_pass = self._number
        if planned.chunk_of is not None:
            self._long.append(self._number)
            self._num_long += 1
        self._open.append(
            OpenPass(planned, flight, firsts, started_s, self._num_long, num_parts)
        )

    def count_long(self) -> None:
        """Count a long pass that ran without a flight."""
        self._number += 1
        self._long.append(self._number)
        self._num_long += 1

    def pass_over(self, jobs: Sequence[Job]) -> None:
        """Let long passes run before decoding jobs that have no room for their next tokens."""
        self._number += 1
        for job in jobs:
            job.last_pass = self._number

    def pop(self) -> OpenPass:
        """Remove the oldest open pass, to wait for it."""
        self.num_landed += 1
        return self._open.popleft()

    def clear(self) -> None:
        """Remove all open passes, which have ended with the connection to another machine."""
        self._open.clear()

    def seconds(self, landed: OpenPass) -> float | None:
        """Return for how long a pass that has just landed took the machines' time.

        Between two landings the slowest machine has run one pass, so what a pass waited for
        others does not count. A pass that was alone has taken all of its time.

        Returns:
            None if a long pass was started in the meantime, whose time cannot be told apart.
        """
        began = max(landed.started_s, self._landed_s)
        self._landed_s = time.perf_counter()
        return self._landed_s - began if landed.num_long == self._num_long else None

    @property
    def _decoding(self) -> list[OpenPass]:
        return [opened for opened in self._open if opened.planned.chunk_of is None]

    def _in_decoding(self) -> list[Job]:
        """Return the jobs of open passes over decoding jobs."""
        return [
            job for opened in self._decoding for job in opened.planned.jobs if opened.is_of(job)
        ]
