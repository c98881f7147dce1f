"""Decides what runs in the next step: admits jobs, evaluates prompts in chunks, decodes.

Not thread-safe: only a `model_thread.ModelThread` calls it.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from ..cache.layout import PAGE_LEN
from ..cache.paging import PagedCache
from ..utils.errors import (
    CacheFull,
    InsufficientMemory,
    MachineLost,
    drop_locals,
    is_out_of_memory,
)
from .drafts import Drafts
from .evaluations import Evaluation, ExclusiveUse, TextEvaluation
from .exchange import Exchange
from .forward_model import ForwardModel, LogitsRow
from .job_pages import (
    acquire_pages,
    grow_pages,
    num_growing,
    reach_error,
    reaches,
    return_pages,
)
from .jobs import CANCELLED, FAILED, Job
from .passes import Pass, decoding_pass, prompt_pass
from .sampling import guide

if TYPE_CHECKING:
    from .draft_model import DraftModel

# A job whose caller does not take its tokens is computed at most this many tokens ahead, unless
# another job waits for its pages.
MAX_AHEAD = 16


class Scheduler:
    """The requests of one model, and the passes that serve them.

    A step runs only while a caller waits for its result, so nothing is computed for an iterator
    that nobody reads.

    A job is admitted with pages for its prompt if some more are left for texts that grow, and
    takes further pages as its own text grows. If none is free, the youngest job gives its pages
    back and waits until it can be admitted again. So the oldest job always reaches its end. An
    evaluation is admitted with all of its pages and keeps them until its end. Requests are
    admitted in the order of their arrival, so that none waits for ever: every waiting request is
    younger than all active jobs. A long one at the head may wait for several to end, and those
    behind it wait with it.

    Args:
        model: runs forward passes.
        cache: lends pages.
        draft_model: None for none.

    Attributes:
        waiting: requests that have no pages, in order of arrival.
        active: jobs that have pages.
        evaluations: evaluations that have pages, in the order of their turns.
        exclusive: uses of the model during which no other request runs.
    """

    def __init__(
        self, model: ForwardModel, cache: PagedCache, draft_model: DraftModel | None
    ) -> None:
        self.model = model
        self.cache = cache
        self.drafts = Drafts(min(model.logits_rows, model.chunk_size), draft_model)
        self.waiting: deque[Job | TextEvaluation] = deque()
        self.active: list[Job] = []
        self.evaluations: list[TextEvaluation] = []
        self.exclusive: list[ExclusiveUse[Any]] = []
        self._turn = 0
        self._arrivals = itertools.count()

    def accept(self, request: Exchange[Any]) -> None:
        """Accept a request; if it was accepted before, wake its callers if it is ready.

        A caller sends its request whenever it begins to wait.
        """
        if not request.accepted:
            request.accepted = True
            if isinstance(request, ExclusiveUse):
                self.exclusive.append(request)
            else:
                assert isinstance(request, Job | TextEvaluation)
                self._enqueue(request)
        if request.is_ready:
            request.wake_waiters()

    def step(self) -> bool:
        """Run the next pass of each kind.

        An error that belongs to no single request ends all of them.

        Returns:
            False if nothing was run, because no caller waits for anything that can be computed.
        """
        try:
            return self._step()
        except BaseException as error:
            drop_locals(error)
            failure = error
        # All callers raise what concerns the model, and raising changes an error.
        self.fail_all(
            lambda: copy.copy(failure) if isinstance(failure, MachineLost) else failure)
        return True

    def cancel_all(self) -> None:
        """End all jobs before the next step."""
        for request in (*self.waiting, *self.active):
            if isinstance(request, Job):
                request.cancelled = True

    def fail_all(self, make_error: Callable[[], BaseException]) -> None:
        """End all requests, each with its own error.

        Raises:
            BaseException: the last error of those that ended requests have; all have ended.
        """
        failure: BaseException | None = None
        for request in self._requests:
            try:
                self._end(request, FAILED, make_error())
            except MachineLost:
                # Its pages cannot be kept for other texts, and no other text will run.
                pass
            except BaseException as error:
                failure = error
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Drop model and cache, because an error that a caller keeps refers to the scheduler."""
        del self.model, self.cache, self.drafts

    def _step(self) -> bool:
        self._finish_cancelled()
        if self.exclusive:
            if self._land():
                return True
            return self.exclusive[0].is_awaited and self._advance(self.exclusive[0])
        if not any(request.is_awaited for request in self._requests):
            return self._land()
        return self._run_passes()

    def _run_passes(self) -> bool:
        """Run the next pass of each kind; return False if there is none."""
        # Decoding runs first. The last chunk of a prompt gives the job's first token, and its
        # caller should not have to wait for another pass.
        decoded = self.decode()
        return self._run_long_pass() or decoded

    def _land(self) -> bool:
        """Wait for the oldest pass in flight; on one machine there is none.

        Returns:
            False if there is none.
        """
        return False

    def _finish_cancelled(self) -> None:
        """End the requests that were cancelled or whose owner was destroyed."""
        for request in self._requests:
            if request.is_abandoned:
                self._end(request, CANCELLED)

    @property
    def _requests(self) -> list[Job | Evaluation[Any]]:
        """All requests that have not ended."""
        return [*self.exclusive, *self.evaluations, *self.active, *self.waiting]

    def _enqueue(self, request: Job | TextEvaluation) -> None:
        """Let a request wait for its pages; refuse one that could never have them."""
        request.arrival = next(self._arrivals)
        self.waiting.append(request)
        lengths = reaches(request) if isinstance(request, Job) else [len(request.ids)]
        too_long = reach_error(lengths, self.cache)
        if too_long is not None:
            self._end(request, FAILED, too_long)

    def _run_long_pass(self) -> bool:
        """Run one chunk of a prompt, of an evaluation or of the draft model's reading, in turns.

        Only one, so that decoding jobs never wait for two chunks.

        Returns:
            False if there is none of them.
        """
        kinds = (self.prefill, self._run_evaluation, self._read_for_drafts)
        for _ in kinds:
            run = kinds[self._turn]
            self._turn = (self._turn + 1) % len(kinds)
            if run():
                return True
        return False

    def _run_evaluation(self) -> bool:
        awaited = (evaluation for evaluation in self.evaluations if evaluation.is_awaited)
        evaluation = next(awaited, None)
        if evaluation is None:
            return False
        self.evaluations.remove(evaluation)
        self.evaluations.append(evaluation)
        return self._advance(evaluation)

    def _read_for_drafts(self) -> bool:
        """Run one chunk of the draft model over a text that it has to read before it guesses."""
        draft_model = self.drafts.draft_model
        job = draft_model.next_to_read if draft_model is not None else None
        if draft_model is None or job is None:
            return False
        try:
            draft_model.read(job)
        except BaseException as error:
            self._fail(job, error)
        return True

    def _advance(self, evaluation: Evaluation[Any]) -> bool:
        """Run one step of an evaluation; an error ends only this evaluation."""
        try:
            if isinstance(evaluation, ExclusiveUse):
                evaluation.start(self.model, self.cache)
            evaluation.advance()
        except MachineLost:
            raise
        except BaseException as error:
            drop_locals(error)
            self._finish_evaluation(evaluation, _typed(error))
        if evaluation.finished:
            self._remove(evaluation)
        if evaluation.is_ready:
            evaluation.wake_waiters()
        return True

    def _remove(self, request: Job | Evaluation[Any]) -> None:
        """Remove a request from where it is kept."""
        for kept in (self.exclusive, self.evaluations, self.active, self.waiting):
            if request in kept:
                kept.remove(request)  # type: ignore[arg-type]

    def _finish_evaluation(
        self, evaluation: Evaluation[Any], error: BaseException | None = None
    ) -> None:
        self._remove(evaluation)
        try:
            evaluation.finish(error)
        finally:
            evaluation.wake_waiters()

    def decode(self) -> bool:
        """Admit jobs, then run one pass over all decoding jobs.

        Returns:
            False if there are none.
        """
        self._admit()
        decoding = [job for job in self.active if job.prefilled and self._wants_token(job)]
        decoding = self._with_room(decoding)
        if decoding:
            self._run(decoding)
        return bool(decoding)

    def prefill(self) -> bool:
        """Run one chunk of one prompt.

        Prompts take turns, so that a short prompt does not wait for a long one.

        Returns:
            False if there is none.
        """
        job = self._next_prompt()
        if job is None:
            return False
        # A text that went back over the end of a page lacks this page.
        if not self._grow(job):
            return job not in self.active
        try:
            self._skip_stored(job)
        except MachineLost:
            raise
        except BaseException as error:
            self._fail(job, error)
            return True
        if not job.prefilled:
            self._run_chunk(job)
        if job in self.active:
            self.active.remove(job)
            self.active.append(job)
        return True

    def _next_prompt(self) -> Job | None:
        """Return the job of which `prefill` should run a chunk."""
        return next((job for job in self.active if not job.prefilled), None)

    def _run_chunk(self, job: Job) -> None:
        self._run([job])

    @property
    def _is_busy(self) -> bool:
        """True while a job or an evaluation holds pages that waiting jobs may get later."""
        return bool(self.active or self.evaluations)

    def _skip_stored(self, job: Job) -> None:
        """Skip tokens of a prompt that other requests have stored since its pages were acquired."""
        for sequence, ids in job.texts:
            self.cache.advance(sequence, ids)
        job.count_prompt(reused=True)

    def _wants_token(self, job: Job) -> bool:
        return len(job.output) < MAX_AHEAD or bool(self.waiting)

    def _admit(self) -> None:
        """Acquire pages for waiting requests, in order of arrival, as long as there are any."""
        while self.waiting:
            request = self.waiting[0]
            running = sum(other.num_sequences for other in self.active)
            wanted = request.num_sequences if isinstance(request, Job) else 0
            if running + wanted > self.model.max_batch_size:
                return
            # Half of the texts that grow can take a page before a job has to give pages back.
            # Without that, jobs lose their pages eight times as often; with a page for each text
            # fewer texts run. Counted with 128 requests over a cache of 16 pages: 98, 12 and 3
            # preemptions, 24 %, 3.5 % and 0.9 % of tokens evaluated again.
            headroom = (sum(map(num_growing, self.active)) + 1) // 2
            try:
                if isinstance(request, Job):
                    self._start_job(request, headroom)
                else:
                    request.start(self.model, self.cache, headroom)
                    self.waiting.popleft()
                    self.evaluations.append(request)
            except CacheFull as error:
                # Wait until a running request releases pages.
                if self._is_busy:
                    return
                self._end(request, FAILED, error)
            except MachineLost:
                raise
            except BaseException as error:
                drop_locals(error)
                self._end(request, FAILED, _typed(error))

    def _start_job(self, job: Job, headroom: int) -> None:
        """Give a waiting job its pages.

        Raises:
            CacheFull: see `acquire_pages`.
        """
        sequences = acquire_pages(job, self.model, self.cache, headroom)
        self.waiting.popleft()
        self.active.append(job)
        job.begin(sequences)

    def _with_room(self, decoding: list[Job]) -> list[Job]:
        """Take the pages that decoding jobs need for their next tokens, the oldest job first.

        Returns:
            The jobs that have room; the others gave their pages back, or wait for pages.
        """
        ready: set[Job] = set()
        for job in sorted(decoding, key=arrival):
            if job in self.active and self._grow(job):
                ready.add(job)
        return [job for job in decoding if job in ready and job in self.active]

    def _grow(self, job: Job) -> bool:
        """Take the pages that a job needs, if necessary from the youngest jobs.

        Passes in flight land before that, because their jobs may end.

        Returns:
            False if there are none: the job is itself the youngest, and gave its pages back or
            waits for those of an evaluation; or it has ended.
        """
        while job in self.active:
            try:
                grow_pages(job, self.cache)
                return True
            except CacheFull as error:
                if self._land():
                    continue
                youngest = max(self.active, key=arrival)
                if len(self.active) > 1:
                    self._preempt(youngest)
                elif not self.evaluations:
                    self._fail(job, error)
                if youngest is job:
                    return False
        return False

    def _preempt(self, job: Job) -> None:
        """Take a job's pages; it goes on when it is admitted again."""
        self.active.remove(job)
        # It is older than all jobs that wait.
        self.waiting.appendleft(job)
        job.stats.preemptions += 1
        return_pages(job, self.cache)
        self.drafts.release(job)

    def _plan(self, jobs: list[Job], num_parts: int = 1) -> Pass:
        """Return the next pass: the next chunk of one prompt, or one over decoding jobs.

        Args:
            num_parts: number of passes among which decoding jobs are divided.
        """
        if jobs[0].prefilled:
            return decoding_pass(jobs, self.drafts.next(jobs, num_parts))
        return prompt_pass(jobs[0], self.model)

    def _run(self, jobs: list[Job]) -> None:
        """Run the next pass of jobs, while none is in flight."""
        try:
            planned = self._plan(jobs)
            if planned.chunk_of is None:
                with self.drafts.passes.measure(planned.num_rows):
                    rows = self.model.forward_rows(planned.entries, planned.logits)
            else:
                rows = self.model.forward_rows(planned.entries, planned.logits)
                self._commit_chunk(planned)
            self._take_rows(planned, rows)
        except MachineLost:
            raise
        except BaseException as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            # One of the jobs may be the reason. No sequence has advanced, so each job runs again
            # in its own pass.
            for job in jobs:
                self._run([job])

    def _commit_chunk(self, chunk: Pass) -> None:
        """Let others find what a chunk stores. In flight, their passes are behind it."""
        (job,), ((sequence, _),) = chunk.jobs, chunk.entries
        assert chunk.chunk_of is not None
        job.count_prompt(reused=False)
        self.cache.commit(sequence, chunk.chunk_of)

    def _take_rows(self, planned: Pass, rows: list[LogitsRow], gone: Collection[Job] = ()) -> None:
        """Draw the tokens of a pass, then wake the callers that need not wait any more.

        The rows of a draft have the same logits that separate passes would give. So tokens are
        drawn from them in order until one differs from the draft.

        Args:
            gone: jobs whose rows are not needed any more.
        """
        if planned.logits == "none":
            return
        first = 0
        for job, draft in zip(planned.jobs, planned.drafts, strict=True):
            count = (len(draft) + 1) * job.num_sequences
            found = rows[first : first + count]
            first += count
            if job in gone:
                continue
            for sequence, _ in job.texts:
                sequence.past_len -= len(draft)
            job.stats.drafted_tokens += len(draft)
            self._take(job, found, draft)
        for job in planned.jobs:
            if job.is_ready:
                job.wake_waiters()

    def _take(self, job: Job, rows: list[LogitsRow], draft: list[int]) -> None:
        """Draw tokens from the rows of a job as long as they agree with its draft.

        Args:
            rows: 1 + len(draft) rows; with guidance followed by as many of the negative text.
        """
        try:
            reason = self._draw(job, _guided(job, rows, 0))
            for index, expected in enumerate(draft, 1):
                if reason is not None or job.went_back or job.history[-1] != expected:
                    break
                for sequence, _ in job.texts:
                    sequence.past_len += 1
                job.stats.accepted_tokens += 1
                reason = self._draw(job, _guided(job, rows, index))
        except BaseException as error:
            self._fail(job, error)
            return
        if reason is not None:
            self._finish(job, reason)
            return
        for sequence, ids in job.texts:
            if sequence.past_len >= len(sequence.keys) * PAGE_LEN:
                self.cache.commit(sequence, ids)

    def _end(
        self, request: Job | Evaluation[Any], reason: str, error: BaseException | None = None
    ) -> None:
        """End a request of either kind; `reason` is a job's."""
        if isinstance(request, Job):
            self._finish(request, reason, error)
        else:
            self._finish_evaluation(request, error)

    def _draw(self, job: Job, row: LogitsRow) -> str | None:
        """Draw a job's next token; drop what the caches hold of tokens that were taken back."""
        try:
            return job.take_logits(row)
        finally:
            if job.went_back:
                # The logits after the last token have to be computed.
                for sequence, ids in job.texts:
                    self.cache.cut(sequence, len(ids) - 1)
                self.drafts.cut(job)

    def _fail(self, job: Job, error: BaseException) -> None:
        """End a job with the error of its pass."""
        drop_locals(error)
        self._finish(job, FAILED, _typed(error))

    def _finish(self, job: Job, reason: str, error: BaseException | None = None) -> None:
        """End a job: release its pages, then wake its callers."""
        self._remove(job)
        try:
            return_pages(job, self.cache)
        finally:
            try:
                self.drafts.release(job)
            finally:
                job.finish(reason, error)
                job.wake_waiters()


def arrival(request: Job | TextEvaluation) -> int:
    return request.arrival


def _typed(error: BaseException) -> BaseException:
    """Replace an out-of-memory error by a typed one.

    The model's buffers exist since the load, but samplers and Python allocate as they run.
    """
    if not is_out_of_memory(error):
        return error
    return InsufficientMemory(
        "main memory for a step", expected="a few MiB besides the model",
        actual="the system refused it",
        remedy="Close programs that use much memory, and try again",
    )


def _guided(job: Job, rows: list[LogitsRow], index: int) -> LogitsRow:
    """Return the row to draw from: a row of the prompt, or with guidance a combined one."""
    if job.negative is None:
        return rows[index]
    negative = rows[len(rows) // 2 + index]
    return LogitsRow(guide(rows[index].values, negative.values, job.settings.guidance_scale))
