"""What runs in the next step: admits jobs, prefills in chunks, decodes all of them together.

Not thread-safe: a `model_thread.ModelThread` alone calls it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..cache.layout import PAGE_LEN, pages_for
from ..cache.paging import PagedCache, PagedSequence
from ..utils.errors import CacheFull, InsufficientMemory, is_out_of_memory
from ..utils.tracebacks import drop_locals
from .exchange import Exchange
from .forward_model import ForwardModel, LogitsRow
from .jobs import CANCELLED, FAILED, Job
from .sampling import guide
from .work import Work

if TYPE_CHECKING:
    from .draft_model import DraftModel

Ids = Sequence[int] | npt.NDArray[np.int64]

# A job whose consumer does not take its tokens is not computed further than this, unless
# another one waits for its pages.
MAX_AHEAD = 16


class Scheduler:
    """The requests of one model, and the passes that bring them on.

    A step runs only where a caller waits for its result, so that nothing is computed for an
    iterator that nobody reads.

    Args:
        model: runs forward passes.
        cache: lends pages.
        drafter: a smaller model that guesses ahead; None for none.

    Attributes:
        waiting, active: the jobs without pages, and those with.
        work: requests other than jobs, in the order of their turns.
    """

    def __init__(
        self, model: ForwardModel, cache: PagedCache, drafter: DraftModel | None = None
    ) -> None:
        self.model = model
        self.cache = cache
        self.drafter = drafter
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []
        self.work: list[Work[Any]] = []
        self._prompts_turn = False

    def accept(self, request: Exchange[Any]) -> None:
        """Take a request on; one that is known already is looked at again.

        A caller sends its request whenever it begins to wait.
        """
        if not request.accepted:
            request.accepted = True
            if isinstance(request, Job):
                self.waiting.append(request)
            else:
                assert isinstance(request, Work)
                self.work.append(request)
        if request.is_ready:
            request.wake_waiters()

    def step(self) -> bool:
        """Run the next pass of every kind that is due.

        An error that belongs to no single request fails all of them.

        Returns:
            False where there was nothing to run: no caller waits for what can be computed.
        """
        try:
            return self._step()
        except BaseException as error:
            drop_locals(error)
            failure = error
        self.fail_all(lambda: failure)
        return True

    def cancel_all(self) -> None:
        """End all jobs before the next step."""
        for job in (*self.waiting, *self.active):
            job.cancelled = True

    def fail_all(self, make_error: Callable[[], BaseException]) -> None:
        """End all requests with an error each."""
        for work in list(self.work):
            self._finish_work(work, make_error())
        for job in [*self.active, *self.waiting]:
            self._finish(job, FAILED, make_error())

    def close(self) -> None:
        """Let go of model and cache. An error that somebody keeps leads here by its frames."""
        del self.model, self.cache, self.drafter

    def _step(self) -> bool:
        self._finish_given_up()
        alone = next((work for work in self.work if work.alone), None)
        if alone is not None:
            return alone.is_awaited and self._advance(alone)
        if not any(job.is_awaited for job in (*self.active, *self.waiting)) and not any(
            work.is_awaited for work in self.work
        ):
            return False
        for work in list(self.work):
            if not work.begun:
                self._advance(work)
        # Decoding first, because a prompt's last chunk brings the job's first token, which
        # its consumer should not have to wait a further pass for.
        decoded = self.decode()
        return self._run_long_pass() or decoded

    def _finish_given_up(self) -> None:
        """End the requests that were cancelled or whose owner no longer exists."""
        for work in list(self.work):
            if work.is_given_up:
                self._finish_work(work)
        for job in [*self.active, *self.waiting]:
            if job.is_given_up:
                self._finish(job, CANCELLED)

    def _run_long_pass(self) -> bool:
        """Run one chunk of a prompt or of work, in turns, so that no stream waits for two.

        Returns:
            False where there is neither.
        """
        self._prompts_turn = not self._prompts_turn
        if self._prompts_turn:
            return self.prefill() or self._run_work()
        return self._run_work() or self.prefill()

    def _run_work(self) -> bool:
        work = next((work for work in self.work if work.is_awaited), None)
        if work is None:
            return False
        self.work.remove(work)
        self.work.append(work)
        return self._advance(work)

    def _advance(self, work: Work[Any]) -> bool:
        """Run one step of some work; an error ends it and nothing else."""
        try:
            work.advance(self.model, self.cache)
        except BaseException as error:
            drop_locals(error)
            self._finish_work(work, no_memory_for_a_step() if is_out_of_memory(error) else error)
        if work.finished and work in self.work:
            self.work.remove(work)
        if work.is_ready:
            work.wake_waiters()
        return True

    def _finish_work(self, work: Work[Any], error: BaseException | None = None) -> None:
        self.work.remove(work)
        try:
            work.finish(error)
        finally:
            work.wake_waiters()

    def decode(self) -> bool:
        """Admit jobs, then run one pass over all that are decoding.

        Returns:
            False where none is decoding.
        """
        self._admit()
        decoding = [job for job in self.active if job.prefilled and self._wants_token(job)]
        if decoding:
            self._run(decoding)
        return bool(decoding)

    def prefill(self) -> bool:
        """Run one chunk of one prompt; prompts take turns, so that a short one need not wait.

        Returns:
            False where there is none.
        """
        job = next((job for job in self.active if not job.prefilled), None)
        if job is None:
            return False
        try:
            self._skip_stored(job)
        except BaseException as error:
            self._fail(job, error)
            return True
        if not job.prefilled:
            self._run([job])
        if job in self.active:
            self.active.remove(job)
            self.active.append(job)
        return True

    @property
    def is_busy(self) -> bool:
        """True while a job or work holds pages that waiting jobs may get later."""
        return bool(self.active or self.work)

    def _skip_stored(self, job: Job) -> None:
        """Skip what others have stored of a prompt since its pages were taken."""
        assert job.sequence is not None
        past_len = job.sequence.past_len
        for sequence, ids in job.texts:
            self.cache.advance(sequence, ids)
        job.skip(job.sequence.past_len - past_len)

    def _wants_token(self, job: Job) -> bool:
        return len(job.output) < MAX_AHEAD or bool(self.waiting)

    def _admit(self) -> None:
        """Give waiting jobs their pages, in order, as long as there are any."""
        while self.waiting:
            job = self.waiting[0]
            running = sum(other.num_sequences for other in self.active)
            if running + job.num_sequences > self.model.max_batch_size:
                return
            try:
                sequences = self._acquire(job)
            except CacheFull as error:
                # Who holds the pages gives them back; a job that needs more than all is lost.
                if self._num_pages(job) <= self.cache.num_pages and self.is_busy:
                    return
                self._finish(job, FAILED, error)
                continue
            except BaseException as error:
                self._fail(job, error)
                continue
            self.waiting.popleft()
            self.active.append(job)
            try:
                job.begin(sequences)
            except BaseException as error:
                self._fail(job, error)

    def _num_pages(self, job: Job) -> int:
        """Pages for all of a job's texts, were nothing shared."""
        negative_pages = pages_for(job.negative.max_tokens) if job.negative is not None else 0
        return pages_for(job.max_tokens) + negative_pages

    def _acquire(self, job: Job) -> list[PagedSequence]:
        """Take the pages of all texts of a job, or of none."""
        wanted = [(job.max_tokens, job.prompt_ids)]
        if job.negative is not None:
            wanted.append((job.negative.max_tokens, job.negative.ids))
        taken: list[PagedSequence] = []
        try:
            for max_tokens, ids in wanted:
                rope_class = self.model.rope_class(max_tokens)
                taken.append(self.cache.acquire(max_tokens, ids, rope_class))
        except BaseException:
            for sequence in taken:
                self.cache.release(sequence)
            raise
        return taken

    def _run(self, jobs: list[Job]) -> None:
        """One forward pass, of one prompt's next chunk or over decoding jobs."""
        try:
            if jobs[0].prefilled:
                self._decode_pass(jobs)
            else:
                self._prompt_pass(jobs[0])
        except BaseException as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            # One of them may be the reason; nothing has advanced, so each can be run again.
            for job in jobs:
                self._run([job])
            return
        for job in jobs:
            if job.is_ready:
                job.wake_waiters()

    def _prompt_pass(self, job: Job) -> None:
        """The next chunk of the prompt, then of the negative prompt."""
        for sequence, text in job.texts:
            pending = _missing(sequence, text)
            if job.negative is not None:
                pending = pending[:-1]
            if pending:
                break
        assert pending, "a prompt without missing tokens is prefilled"
        ids = pending[: self._chunk_end(sequence.past_len, len(pending)) - sequence.past_len]
        last = len(ids) == len(pending) and job.negative is None
        rows = self.model.forward_rows([(sequence, ids)], "last" if last else "none")
        if sequence is job.sequence:
            job.progress.advance("prompt", len(ids))
        self.cache.commit(sequence, text)
        if last:
            self._take(job, rows, [])

    def _chunk_end(self, past_len: int, count: int) -> int:
        """Where the next chunk of `count` missing tokens ends.

        With a page where it can, because only full pages are shared without a copy.
        """
        if count <= self.model.chunk_size:
            return past_len + count
        end = past_len + self.model.chunk_size
        page_end = end // PAGE_LEN * PAGE_LEN
        return page_end if page_end > past_len else end

    def _decode_pass(self, jobs: list[Job]) -> None:
        """One token of each job, and those that are expected behind it.

        Rows of expected tokens give the very logits that passes of their own would give, so
        tokens are drawn from them one after the other until one is not what was expected.
        """
        drafts = self._expected(jobs)
        entries = [
            (sequence, [*_missing(sequence, ids), *draft])
            for job, draft in zip(jobs, drafts, strict=True)
            for sequence, ids in job.texts
        ]
        logits = self.model.forward_rows(entries, "all" if any(drafts) else "last")
        first = 0
        for job, draft in zip(jobs, drafts, strict=True):
            count = len(draft) + 1
            rows = logits[first : first + count * job.num_sequences]
            first += len(rows)
            for sequence, _ in job.texts:
                sequence.past_len -= len(draft)
            self._take(job, rows, draft)

    def _expected(self, jobs: list[Job]) -> list[list[int]]:
        """Guess how each text goes on: by its own past, else by the draft model."""
        rows_left = min(self.model.logits_rows, self.model.chunk_size)
        rows_left -= sum(job.num_sequences for job in jobs)
        drafts, wanted = [], {}
        for job in jobs:
            limit = rows_left // job.num_sequences
            draft = job.draft(limit)
            count = len(draft)
            if not draft and self.drafter is not None:
                count = wanted[job] = job.room_ahead(min(self.drafter.draft_max, limit))
            rows_left -= count * job.num_sequences
            drafts.append(draft)
        if self.drafter is None:
            return drafts
        guesses = self.drafter.guess(wanted)
        return [draft or guesses.get(job, []) for job, draft in zip(jobs, drafts, strict=True)]

    def _take(self, job: Job, rows: list[LogitsRow], draft: list[int]) -> None:
        """Draw from the rows of a job as far as its draft holds good.

        Args:
            rows: float32 [vocab_size], 1 + len(draft) of them; with guidance as many of the
                negative text behind them.
        """
        try:
            reason = job.take_logits(_guided(job, rows, 0))
            for index, expected in enumerate(draft, 1):
                if reason is not None or job.history[-1] != expected:
                    break
                for sequence, _ in job.texts:
                    sequence.past_len += 1
                job.stats.accepted_tokens += 1
                reason = job.take_logits(_guided(job, rows, index))
        except BaseException as error:
            self._fail(job, error)
            return
        if reason is not None:
            self._finish(job, reason)
            return
        for sequence, ids in job.texts:
            if sequence.past_len >= len(sequence.keys) * PAGE_LEN:
                self.cache.commit(sequence, ids)

    def _fail(self, job: Job, error: BaseException) -> None:
        """End a job with what went wrong in its pass."""
        drop_locals(error)
        if is_out_of_memory(error):
            error = no_memory_for_a_step()
        self._finish(job, FAILED, error)

    def _finish(self, job: Job, reason: str, error: BaseException | None = None) -> None:
        """End a job: give its pages back, then tell whoever waits for it."""
        if job in self.active:
            self.active.remove(job)
        if job in self.waiting:
            self.waiting.remove(job)
        try:
            for sequence, ids in job.texts:
                try:
                    self.cache.commit(sequence, ids)
                finally:
                    self.cache.release(sequence)
            if self.drafter is not None:
                self.drafter.release(job)
        finally:
            job.let_go()
            job.finish(reason, error)
            job.wake_waiters()


def no_memory_for_a_step() -> InsufficientMemory:
    """Buffers are there since the load; samplers and Python itself ask for more as they run."""
    return InsufficientMemory(
        "main memory for a step beside the model", expected="some MiB",
        actual="the system refused it",
        remedy="Close what took the memory meanwhile, and ask again",
    )


def _guided(job: Job, rows: list[LogitsRow], index: int) -> LogitsRow:
    """Return the row to draw from: a row of the prompt, or with guidance a combined one."""
    if job.negative is None:
        return rows[index]
    negative = rows[len(rows) // 2 + index]
    return LogitsRow(guide(rows[index].values, negative.values, job.settings.guidance_scale))


def _missing(sequence: PagedSequence, ids: Ids) -> list[int]:
    """Ids of a text that the cache does not hold yet."""
    return [int(i) for i in ids[sequence.past_len :]]
