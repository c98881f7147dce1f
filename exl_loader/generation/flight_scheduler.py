"""Runs the passes of a model over several machines: several are in flight at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..cache.paging import PagedCache
from ..utils.errors import MachineLost, drop_locals
from .flights import Flights, OpenPass
from .forward_model import ForwardModel
from .jobs import Job
from .scheduler import Scheduler, arrival

if TYPE_CHECKING:
    from .draft_model import DraftModel


class FlightScheduler(Scheduler):
    """A scheduler whose step starts a pass, or waits for the oldest one and draws its tokens.

    Evaluations and exclusive uses run when no pass is in flight. So do jobs whose pass has failed,
    each in its own pass. Pages are not taken from a job whose pass is in flight.

    Args:
        model: over several machines.
        cache, draft_model: as of `Scheduler`.

    Attributes:
        flights: the passes in flight.
    """

    def __init__(
        self, model: ForwardModel, cache: PagedCache, draft_model: DraftModel | None
    ) -> None:
        super().__init__(model, cache, draft_model)
        self.flights = Flights(model)

    def fail_all(self, make_error: Callable[[], BaseException]) -> None:
        """End all requests, each with its own error, then wait for the passes in flight."""
        try:
            super().fail_all(make_error)
        finally:
            try:
                if self._discard_flights():
                    self.cache.forget()
            except MachineLost:
                pass

    def close(self) -> None:
        """Drop model and cache; see `Scheduler.close`."""
        super().close()
        del self.flights

    def _step(self) -> bool:
        try:
            return super()._step()
        except MachineLost:
            self.flights.clear()
            raise

    def _run_passes(self) -> bool:
        """Start a pass, or else wait for the oldest one; return False if there is none."""
        num_landed = self.flights.num_landed
        done = self._start_decoding() or self._start_long() or self._land()
        # Passes also land where pages are wanted, or the machines for an evaluation.
        return done or self.flights.num_landed > num_landed

    def _run_evaluation(self) -> bool:
        if any(evaluation.is_awaited for evaluation in self.evaluations):
            self._land_all()
        return self._counted(super()._run_evaluation())

    def _read_for_drafts(self) -> bool:
        return self._counted(super()._read_for_drafts())

    def _counted(self, has_run: bool) -> bool:
        """Count a long pass that ran without a flight."""
        if has_run:
            self.flights.count_long()
        return has_run

    def _next_prompt(self) -> Job | None:
        if not self.flights.has_room_for_chunk:
            return None
        # The last chunk of these is in flight.
        drawing = self.flights.drawing
        return next((job for job in self.active if not job.prefilled and job not in drawing), None)

    def _run_chunk(self, job: Job) -> None:
        self._start([job])

    def _start_decoding(self) -> bool:
        """Admit jobs, then start one pass over some of the decoding jobs.

        Returns:
            False if there are none, or if enough of their passes are in flight.
        """
        self._admit()
        ready = self._ready
        while ready and self.flights.has_room_for_decoding:
            jobs, num_parts = self.flights.next_jobs(ready), self.flights.num_parts(ready)
            with_room = self._with_room(jobs)
            if with_room:
                self._start(with_room, num_parts)
                return True
            # They wait for the pages of an evaluation, which runs in the meantime.
            self.flights.pass_over(jobs)
            ready = [job for job in self._ready if job not in jobs]
        return False

    def _start_long(self) -> bool:
        return self.flights.may_run_long(self._ready) and self._run_long_pass()

    @property
    def _ready(self) -> list[Job]:
        """The decoding jobs whose next pass may be started. In flight none is prefilled."""
        return [job for job in self.active if job.prefilled and self._wants_token(job)]

    def _start(self, jobs: list[Job], num_parts: int = 1) -> None:
        """Start the next pass of jobs; see `_run` and `_plan`."""
        try:
            planned = self._plan(jobs, num_parts)
            self.flights.start(planned, num_parts)
            if planned.chunk_of is not None:
                self._commit_chunk(planned)
        except MachineLost:
            raise
        except BaseException as error:
            self._fail_or_retry(jobs, error)

    def _fail_or_retry(self, jobs: list[Job], error: BaseException) -> None:
        """End the job whose pass has failed; of several, run each again in its own pass."""
        if len(jobs) == 1:
            self._fail(jobs[0], error)
            return
        self._land_all()
        for job in jobs:
            if job in self.active and job.prefilled:
                self._run([job])

    def _land(self) -> bool:
        """Wait for the oldest pass in flight, and draw its tokens.

        Returns:
            False if there is none.
        """
        if not self.flights:
            return False
        landed = self.flights.pop()
        try:
            rows = landed.flight.rows()
        except MachineLost:
            raise
        except BaseException as error:
            drop_locals(error)
            self._recover(landed, error)
            return True
        seconds = self.flights.seconds(landed)
        planned = landed.planned
        if planned.chunk_of is None and seconds is not None:
            self.drafts.add_seconds(planned.num_rows, seconds, landed.num_parts)
        self._take_rows(planned, rows, [job for job in planned.jobs if not landed.is_of(job)])
        return True

    def _land_all(self) -> None:
        while self._land():
            pass

    def _recover(self, failed: OpenPass, error: BaseException) -> None:
        """Go on after an error of a pass that was in flight."""
        jobs = [job for job in failed.planned.jobs if failed.is_of(job)]
        if failed.planned.chunk_of is None and len(jobs) == len(failed.planned.jobs):
            # Nothing of the pass was committed, so only its own jobs are concerned.
            failed.take_back()
            self._fail_or_retry(jobs, error)
            return
        # Others may have found in the cache what the pass should have stored, so all start again.
        # Nothing was drawn of what they computed with it, because their passes are behind it.
        self._discard_flights()
        if failed.planned.chunk_of is not None:
            for job in jobs:
                self._fail(job, error)
        for job in sorted(self.active, key=arrival, reverse=True):
            self._preempt(job)
        for evaluation in list(self.evaluations):
            if evaluation.give_back():
                self.evaluations.remove(evaluation)
                self.waiting.append(evaluation)
        self.waiting = deque(sorted(self.waiting, key=arrival))
        self.cache.forget()

    def _discard_flights(self) -> bool:
        """Wait for all passes in flight, and draw nothing.

        Returns:
            True if one of them has failed.
        """
        failed = False
        while self.flights:
            try:
                self.flights.pop().flight.rows()
            except MachineLost:
                self.flights.clear()
                raise
            except BaseException as error:
                drop_locals(error)
                failed = True
        return failed
