"""Lets any thread run jobs on a model.

There is no thread of its own. Whoever waits for a token may lead: one thread at a time runs
a step for every job, the others wait until their own job has something. So requests from
several threads share forward passes, and one request alone costs no hand-over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from ..errors import ModelUnloaded
from ..memory import is_out_of_memory
from ..paging import PagedCache
from ..paging import Sequence as CacheSequence
from ..tracebacks import drop_locals
from .forward_model import ForwardModel
from .jobs import Job
from .scheduler import Scheduler, no_memory_for_a_step

if TYPE_CHECKING:
    import torch

    from .draft_model import DraftModel


class Generator:
    """The jobs of one model. Every method may be called from any thread.

    Args:
        model: runs forward passes.
        cache: lends pages.
        drafter: a smaller model that guesses ahead; None for none.
    """

    def __init__(
        self, model: ForwardModel, cache: PagedCache, drafter: DraftModel | None = None
    ) -> None:
        self._scheduler: Scheduler | None = Scheduler(model, cache, drafter)
        self._changed = threading.Condition()
        # Guarded by `_changed`. While `_leading`, only the leader is in the scheduler.
        self._leading = False
        self._closing = False

    def submit(self, job: Job) -> None:
        """Queue a job; it runs while somebody waits for a token.

        Raises:
            ModelUnloaded: after `close`.
        """
        with self._changed:
            self._check_open().waiting.append(job)

    def wait(self, job: Job) -> None:
        """Return when the job has output or has finished; lead where nobody does.

        Raises:
            BaseException: what interrupts this very thread, e.g. KeyboardInterrupt. Errors
                of jobs are left in `job.error`.
        """
        while True:
            # The whole of it in one `try`: an interrupt between taking the lead and using it
            # would leave the other threads without a leader for ever.
            lead = stuck = False
            try:
                with self._changed:
                    while not (job.output or job.finished) and self._leading:
                        self._changed.wait()
                    if job.output or job.finished:
                        return
                    lead = self._leading = True
                self._reap()
                scheduler = self._check_open()
                # Decoding first, because a prompt's last chunk brings the job's first token,
                # which its consumer should not have to wait a further pass for.
                scheduler.decode()
                scheduler.prefill()
                # An evaluation that holds the pages leads again before it ends.
                stuck = bool(scheduler.guests) and not (
                    scheduler.active or job.output or job.finished)
            except BaseException as error:
                drop_locals(error)
                raise
            finally:
                if lead:
                    self._end_lead(stuck)

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
            if self._scheduler is not None:
                for job in (*self._scheduler.waiting, *self._scheduler.active):
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

    @contextmanager
    def held(self) -> Iterator[tuple[ForwardModel, PagedCache]]:
        """Lend the model and the cache themselves; running jobs wait for the block's end.

        Raises:
            ModelUnloaded: after `close`.
        """
        with self.exclusive():
            scheduler = self._check_open()
            scheduler.reap()
            yield scheduler.model, scheduler.cache

    def evaluate(
        self, ids: Sequence[int], rope_len: int, logits: Literal["last", "all"],
        use: Callable[[int, torch.Tensor], None],
    ) -> None:
        """Evaluate a text in chunks, between which running jobs go on.

        Args:
            ids: the text.
            rope_len: the length it is meant to reach, at least len(ids).
            logits: `last` for those behind the last token, and what the cache holds of the
                text is reused; `all` for those behind every token, and nothing is.
            use: called with the place of the first row's token and the logits, float32
                [rows, vocab_size], which it must not keep.

        Raises:
            CacheFull: running jobs leave too few pages for rope_len tokens.
            InsufficientMemory: the system refused memory that a pass or `use` wanted.
            ModelUnloaded: after `close`.
        """
        try:
            self._evaluate(ids, rope_len, logits == "last", use)
        except BaseException as error:
            drop_locals(error)
            if is_out_of_memory(error):
                raise no_memory_for_a_step() from error
            raise

    def _evaluate(
        self, ids: Sequence[int], rope_len: int, last: bool,
        use: Callable[[int, torch.Tensor], None],
    ) -> None:
        cache, sequence = None, None
        try:
            with self.exclusive():
                scheduler = self._check_open()
                scheduler.reap()
                cache, rope_class = scheduler.cache, scheduler.model.rope_class(rope_len)
                sequence = cache.acquire(rope_len, ids if last else (), rope_class)
                scheduler.guests.append(sequence)
            own_turn = True
            while sequence.past_len < len(ids):
                with self.exclusive():
                    scheduler = self._check_open()
                    scheduler.decode()
                    # Takes turns with prompts, so that no stream waits for two chunks.
                    if own_turn or not scheduler.prefill():
                        self._evaluate_chunk(scheduler, sequence, ids, last, use)
                    own_turn = not own_turn
        finally:
            if cache is not None and sequence is not None:
                with self.exclusive():
                    if sequence in scheduler.guests:
                        scheduler.guests.remove(sequence)
                    cache.commit(sequence, ids)
                    cache.release(sequence)

    def close(self) -> None:
        """End all jobs and drop the model and the cache. Twice does no harm."""
        self._closing = True
        with self.exclusive():
            self._reap()
            if self._scheduler is not None:
                self._scheduler.close()
            self._scheduler = None

    def _check_open(self) -> Scheduler:
        if self._scheduler is None:
            raise ModelUnloaded("the model", actual="unloaded", remedy="Load it again")
        return self._scheduler

    def _end_lead(self, stuck: bool = False) -> None:
        """Let others lead; where `stuck`, until somebody did, because only they can help."""
        with self._changed:
            self._leading = False
            self._changed.notify_all()
            if stuck:
                self._changed.wait()

    def _reap(self) -> None:
        if self._scheduler is None:
            return
        error = None
        if self._closing:
            error = ModelUnloaded("the model", actual="unloaded while it generated",
                                  remedy="Load it again")
        self._scheduler.reap(error)

    @staticmethod
    def _evaluate_chunk(
        scheduler: Scheduler, sequence: CacheSequence, ids: Sequence[int], last: bool,
        use: Callable[[int, torch.Tensor], None],
    ) -> None:
        model, first = scheduler.model, sequence.past_len
        rows = model.chunk_size if last else min(model.logits_rows, model.chunk_size)
        chunk = list(ids[first : first + rows])
        if not last:
            use(first, model.forward([(sequence, chunk)], "all"))
        elif first + len(chunk) < len(ids):
            model.forward([(sequence, chunk)], "none")
        else:
            use(len(ids) - 1, model.forward([(sequence, chunk)], "last"))
