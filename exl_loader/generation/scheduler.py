"""What runs in the next step: admits jobs, prefills in chunks, decodes all of them together.

Not thread-safe; `generator.Generator` sees to it that one thread at a time is in here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..cache import PAGE_LEN, pages_for
from ..errors import CacheFull, InsufficientMemory
from ..memory import is_out_of_memory
from ..paging import PagedCache
from ..paging import Sequence as CacheSequence
from ..sampling import guide
from ..tracebacks import drop_locals
from .forward_model import ForwardModel
from .jobs import CANCELLED, FAILED, Job

if TYPE_CHECKING:
    from .draft_model import DraftModel

Ids = Sequence[int] | npt.NDArray[np.int64]

# A job whose consumer does not take its tokens is not computed further than this, unless
# another one waits for its pages.
MAX_AHEAD = 16


class Scheduler:
    """The jobs of one model, and the passes that bring them on.

    Args:
        model: runs forward passes.
        cache: lends pages.
        drafter: a smaller model that guesses ahead; None for none.

    Attributes:
        waiting, active: the jobs without pages, and those with.
        guests: what evaluations beside the jobs hold of the cache.
    """

    def __init__(
        self, model: ForwardModel, cache: PagedCache, drafter: DraftModel | None = None
    ) -> None:
        self.model = model
        self.cache = cache
        self.drafter = drafter
        self.guests: list[CacheSequence] = []
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []

    def decode(self) -> None:
        """Admit jobs, then run one pass over all that are decoding."""
        self._admit()
        decoding = [job for job in self.active if job.prefilled and self._wants_token(job)]
        if decoding:
            self._run(decoding)

    def prefill(self) -> bool:
        """Run one chunk of one prompt; prompts take turns, so that a short one need not wait.

        Returns:
            False where there is none.
        """
        job = next((job for job in self.active if not job.prefilled), None)
        if job is None:
            return False
        assert job.sequence is not None
        past_len = job.sequence.past_len
        for sequence, ids in job.texts:
            self.cache.advance(sequence, ids)
        job.skip(job.sequence.past_len - past_len)
        if not job.prefilled:
            self._run([job])
        if job in self.active:
            self.active.remove(job)
            self.active.append(job)
        return True

    def reap(self, error: Exception | None = None) -> None:
        """End the jobs that were cancelled, or with an error all of them."""
        for job in [*self.active, *self.waiting]:
            if error is not None:
                self._finish(job, FAILED, error)
            elif job.cancelled:
                self._finish(job, CANCELLED)

    @property
    def is_busy(self) -> bool:
        """Whether somebody holds pages, so that those who wait may hope."""
        return bool(self.active or self.guests)

    def close(self) -> None:
        """Let go of model and cache. An error that somebody keeps leads here by its frames."""
        del self.model, self.cache, self.drafter

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
            self.waiting.popleft()
            self.active.append(job)
            job.begin(sequences)

    def _num_pages(self, job: Job) -> int:
        """Pages for all of a job's texts, were nothing shared."""
        negative_pages = pages_for(job.negative.max_tokens) if job.negative is not None else 0
        return pages_for(job.max_tokens) + negative_pages

    def _acquire(self, job: Job) -> list[CacheSequence]:
        """Take the pages of all texts of a job, or of none."""
        wanted = [(job.max_tokens, job.prompt_ids)]
        if job.negative is not None:
            wanted.append((job.negative.max_tokens, job.negative.ids))
        taken: list[CacheSequence] = []
        try:
            for max_tokens, ids in wanted:
                rope_class = self.model.rope_class(max_tokens)
                taken.append(self.cache.acquire(max_tokens, ids, rope_class))
        except CacheFull:
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
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
                return
            # One of them may be the reason; nothing has advanced, so each can be run again.
            for job in jobs:
                self._run([job])
        except BaseException:
            # An interrupt is meant for this thread, and leaves these jobs half done.
            for job in jobs:
                self._finish(job, CANCELLED)
            raise

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

    def _take(self, job: Job, rows: list[npt.ArrayLike], draft: list[int]) -> None:
        """Draw from the rows of a job as far as its draft holds good.

        Args:
            rows: float32 [vocab_size], 1 + len(draft) of them; with guidance as many of the
                negative text behind them.
        """
        try:
            reason = job.take_logits(_guided(job, rows, 0))
            for place, expected in enumerate(draft, 1):
                if reason is not None or job.history[-1] != expected:
                    break
                for sequence, _ in job.texts:
                    sequence.past_len += 1
                job.stats.accepted_tokens += 1
                reason = job.take_logits(_guided(job, rows, place))
        except Exception as error:
            self._fail(job, error)
            return
        if reason is not None:
            self._finish(job, reason)
            return
        for sequence, ids in job.texts:
            if sequence.past_len >= len(sequence.keys) * PAGE_LEN:
                self.cache.commit(sequence, ids)

    def _fail(self, job: Job, error: Exception) -> None:
        """End a job with what went wrong in its pass."""
        drop_locals(error)
        if is_out_of_memory(error):
            error = no_memory_for_a_step()
        self._finish(job, FAILED, error)

    def _finish(self, job: Job, reason: str, error: BaseException | None = None) -> None:
        if job in self.active:
            self.active.remove(job)
        if job in self.waiting:
            self.waiting.remove(job)
        for sequence, ids in job.texts:
            self.cache.commit(sequence, ids)
            self.cache.release(sequence)
        if self.drafter is not None:
            self.drafter.release(job)
        job.let_go()
        job.finish(reason, error)


def no_memory_for_a_step() -> InsufficientMemory:
    """Buffers are there since the load; samplers and Python itself ask for more as they run."""
    return InsufficientMemory(
        "main memory for a step beside the model", expected="some MiB",
        actual="the system refused it",
        remedy="Close what took the memory meanwhile, and ask again",
    )


def _guided(job: Job, rows: list[npt.ArrayLike], place: int) -> npt.ArrayLike:
    """The logits to draw from at a place, float32 [vocab_size]."""
    if job.negative is None:
        return rows[place]
    positive, negative = np.asarray(rows[place]), np.asarray(rows[len(rows) // 2 + place])
    return guide(positive, negative, job.settings.guidance_scale)


def _missing(sequence: CacheSequence, ids: Ids) -> list[int]:
    """Ids of a text that the cache does not hold yet."""
    return [int(i) for i in ids[sequence.past_len :]]
