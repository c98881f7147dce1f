"""Runs jobs on a model: admits, prefills in chunks, decodes all of them together.

There is no thread of its own. Whoever waits for a token may lead: one thread at a time runs
a step for every job, the others wait until their own job has something. So requests from
several threads share forward passes, and one request alone costs no hand-over.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

from .cache import PAGE_LEN, pages_for
from .errors import CacheFull, ModelUnloaded
from .jobs import CANCELLED, FAILED, Job
from .paging import PagedCache
from .paging import Sequence as CacheSequence

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

# A job whose consumer does not take its tokens is not computed further than this, unless
# another one waits for its pages.
MAX_AHEAD = 16


class ForwardModel(Protocol):
    """What the generator needs of `model.Model`."""

    chunk_size: int
    max_batch_size: int
    logits_rows: int

    def forward(
        self,
        entries: Sequence[tuple[CacheSequence, list[int]]],
        logits: Literal["last", "all", "none"] = "last",
    ) -> torch.Tensor: ...

    def rope_class(self, rope_len: int) -> int: ...


class Generator:
    """The jobs of one model. Every method may be called from any thread.

    Args:
        model: runs forward passes.
        cache: lends pages.
    """

    def __init__(self, model: ForwardModel, cache: PagedCache) -> None:
        self._model: ForwardModel | None = model
        self._cache: PagedCache | None = cache
        self._changed = threading.Condition()
        # Guarded by `_changed`. While `_leading`, only the leader touches jobs and cache.
        self._leading = False
        self._closing = False
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []

    def submit(self, job: Job) -> None:
        """Queue a job; it runs while somebody waits for a token.

        Raises:
            ModelUnloaded: after `close`.
        """
        with self._changed:
            self._check_open()
            self._waiting.append(job)

    def wait(self, job: Job) -> None:
        """Return when the job has output or has finished; lead where nobody does.

        Raises:
            BaseException: what interrupts this very thread, e.g. KeyboardInterrupt. Errors
                of jobs are left in `job.error`.
        """
        while True:
            # The whole of it in one `try`: an interrupt between taking the lead and using it
            # would leave the other threads without a leader for ever.
            lead = False
            try:
                with self._changed:
                    while not job.output and not job.finished and self._leading:
                        self._changed.wait()
                    if job.output or job.finished:
                        return
                    lead = self._leading = True
                self._step()
            finally:
                if lead:
                    self._end_lead()

    def cancel(self, job: Job, wait: bool = True) -> None:
        """End a job and give its pages back.

        Args:
            job: any job, finished ones included.
            wait: be sure that the pages are back on return, which may take one step. Where
                False, it never blocks (for finalisers, which run wherever they please), and
                the pages may stay with the job until the next step.
        """
        job.cancelled = True
        if wait:
            with self.exclusive():
                self._reap()
        elif self._changed.acquire(blocking=False):
            try:
                if not self._leading:
                    self._reap()
            finally:
                self._changed.release()

    def cancel_all(self) -> None:
        """Ask every job to end. Does not wait; a running step is completed first."""
        with self._changed:
            for job in (*self._waiting, *self._active):
                job.cancelled = True

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the model and the cache for something other than a step."""
        lead = False
        try:
            with self._changed:
                while self._leading:
                    self._changed.wait()
                lead = self._leading = True
            yield
        finally:
            if lead:
                self._end_lead()

    def run_alone(
        self, num_tokens: int, use: Callable[[ForwardModel, CacheSequence], None]
    ) -> None:
        """Call `use(model, sequence)` between steps, with a sequence of its own.

        Raises:
            CacheFull: running jobs leave too few pages.
            ModelUnloaded: after `close`.
        """
        with self.exclusive():
            model, cache = self._check_open()
            self._reap()
            sequence = cache.acquire(num_tokens)
            try:
                use(model, sequence)
            finally:
                cache.release(sequence)

    def next_logits(self, ids: Sequence[int], rope_len: int) -> torch.Tensor:
        """Evaluate what the cache does not hold of a text, between steps.

        Args:
            ids: the text.
            rope_len: the length it is meant to reach, at least len(ids).

        Returns:
            logits behind its last token, float32 [vocab_size], memory of the caller's own.

        Raises:
            CacheFull: running jobs leave too few pages for rope_len tokens.
            ModelUnloaded: after `close`.
        """
        with self.exclusive():
            model, cache = self._check_open()
            self._reap()
            sequence = cache.acquire(rope_len, ids, model.rope_class(rope_len))
            try:
                while len(ids) - sequence.past_len > model.chunk_size:
                    chunk = ids[sequence.past_len : sequence.past_len + model.chunk_size]
                    model.forward([(sequence, list(chunk))], "none")
                logits = model.forward([(sequence, list(ids[sequence.past_len :]))], "last")[0]
                cache.commit(sequence, ids)
                return logits.clone()
            finally:
                cache.release(sequence)

    def close(self) -> None:
        """End all jobs and drop the model and the cache. Twice does no harm."""
        self._closing = True
        with self.exclusive():
            self._reap()
            self._model = self._cache = None

    def _check_open(self) -> tuple[ForwardModel, PagedCache]:
        if self._model is None or self._cache is None:
            raise ModelUnloaded("the model", actual="unloaded", remedy="Load it again")
        return self._model, self._cache

    def _end_lead(self) -> None:
        with self._changed:
            self._leading = False
            self._changed.notify_all()

    def _step(self) -> None:
        """One token of every decoding job, then one chunk of one prompt.

        In this order, because a prompt's last chunk brings the job's first token, which its
        consumer should not have to wait a further pass for.
        """
        self._reap()
        self._admit()
        decoding = [job for job in self._active if job.decoding and self._wants_token(job)]
        if decoding:
            self._run(decoding)
        prefilling = [job for job in self._active if not job.decoding]
        if prefilling:
            self._prefill(prefilling[0])

    def _wants_token(self, job: Job) -> bool:
        return len(job.output) < MAX_AHEAD or bool(self._waiting)

    def _reap(self) -> None:
        for job in [*self._active, *self._waiting]:
            if self._closing:
                error = ModelUnloaded("the model", actual="unloaded while it generated",
                                      remedy="Load it again")
                self._finish(job, FAILED, error)
            elif job.cancelled:
                self._finish(job, CANCELLED)

    def _admit(self) -> None:
        """Give waiting jobs their pages, in order, as long as there are any."""
        model, cache = self._check_open()
        while self._waiting and len(self._active) < model.max_batch_size:
            job = self._waiting[0]
            rope_class = model.rope_class(job.max_tokens)
            try:
                sequence = cache.acquire(job.max_tokens, job.prompt_ids, rope_class)
            except CacheFull as error:
                if not self._active or pages_for(job.max_tokens) > cache.num_pages:
                    self._finish(job, FAILED, error)
                    continue
                return
            self._waiting.popleft()
            self._active.append(job)
            job.begin(sequence)

    def _prefill(self, job: Job) -> None:
        """One chunk of one prompt; prompts take turns, so that a short one need not wait."""
        _, cache = self._check_open()
        assert job.sequence is not None
        past_len = job.sequence.past_len
        cache.advance(job.sequence, job.prompt_ids)
        job.skip(job.sequence.past_len - past_len)
        self._run([job])
        if job in self._active:
            self._active.remove(job)
            self._active.append(job)

    def _next_ids(self, job: Job, sequence: CacheSequence) -> list[int]:
        """The next token, or a prompt's next chunk.

        A chunk ends with a page where it can, because only full pages can be shared.
        """
        model, _ = self._check_open()
        ids, past_len = job.pending_ids, sequence.past_len
        end = past_len + model.chunk_size
        if len(ids) > model.chunk_size and end // PAGE_LEN * PAGE_LEN > past_len:
            end = end // PAGE_LEN * PAGE_LEN
        return ids[: end - past_len]

    def _run(self, jobs: list[Job]) -> None:
        """One forward pass: the next chunk or token of each job."""
        model, cache = self._check_open()
        try:
            entries = []
            for job in jobs:
                assert job.sequence is not None
                entries.append((job.sequence, self._next_ids(job, job.sequence)))
            complete = len(entries[0][1]) == len(jobs[0].pending_ids)
            logits = model.forward(entries, "last" if complete else "none")
        except Exception as error:
            if len(jobs) == 1:
                self._finish(jobs[0], FAILED, error)
                return
            # One of them may be the reason; nothing has advanced, so each can be run again.
            for job in jobs:
                self._run([job])
            return
        except BaseException:
            # An interrupt is meant for this thread, and leaves these jobs half done.
            for job in jobs:
                self._finish(job, CANCELLED)
            raise
        for job, (sequence, ids) in zip(jobs, entries, strict=True):
            if not job.decoding:
                job.progress.advance("prompt", len(ids))
            if not job.decoding or sequence.past_len % PAGE_LEN == 0:
                cache.commit(sequence, job.history)
        if complete:
            for job, row in zip(jobs, logits.numpy(), strict=True):
                self._take_logits(job, row)

    def _take_logits(self, job: Job, row: npt.ArrayLike) -> None:
        try:
            reason = job.take_logits(row)
        except Exception as error:
            self._finish(job, FAILED, error)
        except BaseException:
            self._finish(job, CANCELLED)
            raise
        else:
            if reason is not None:
                self._finish(job, reason)

    def _finish(self, job: Job, reason: str, error: BaseException | None = None) -> None:
        if job in self._active:
            self._active.remove(job)
        if job in self._waiting:
            self._waiting.remove(job)
        sequence, job.sequence = job.sequence, None
        if sequence is not None and self._cache is not None:
            self._cache.commit(sequence, job.history)
            self._cache.release(sequence)
        job.finish(reason, error)
