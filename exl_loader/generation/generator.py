"""The requests of one model from any thread, and the iterators that callers get."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from ..cache.paging import PagedCache
from ..utils.errors import drop_locals
from .evaluations import Evaluation, ExclusiveUse, TextEvaluation
from .exchange import Exchange
from .flight_scheduler import FlightScheduler
from .forward_model import ForwardModel
from .jobs import GenerationStats, Job
from .logprobs import TokenLogprobs
from .loop_waiter import let_others_run
from .model_thread import ModelThread
from .scheduler import Scheduler

if TYPE_CHECKING:
    import torch

    from .draft_model import DraftModel

T = TypeVar("T")


class _Owner:
    """Referred to only by a caller's frame, so it is destroyed with the frame."""


class Generator(ModelThread):
    """The requests of one model. Every method may be called from any thread.

    The model's own thread runs all steps. Therefore requests from several threads share forward
    passes, and an interrupt in a caller's thread cannot split a step.

    Args:
        model: runs forward passes.
        cache: lends pages.
        draft_model: None for none.
        release: frees the model's memory; called after all requests have ended.
    """

    def __init__(
        self, model: ForwardModel, cache: PagedCache, draft_model: DraftModel | None,
        release: Callable[[], None],
    ) -> None:
        kind = FlightScheduler if model.most_in_flight > 1 else Scheduler
        super().__init__(kind(model, cache, draft_model), release)

    def wait(self, request: Exchange[Any]) -> None:
        """Return when the request has output or has finished; see `ModelThread.wait`.

        An error of the request is not raised; it is in `request.error`.
        """
        try:
            super().wait(request)
        except BaseException as error:
            drop_locals(error)
            raise

    async def wait_async(self, request: Exchange[Any]) -> None:
        """Do what `wait` does, in an event loop."""
        try:
            await super().wait_async(request)
        except BaseException as error:
            drop_locals(error)
            raise

    def run_alone(
        self, steps: Callable[[ForwardModel, PagedCache], Iterator[T | None]]
    ) -> Iterator[T]:
        """Use model and cache directly; other requests wait.

        Args:
            steps: called in the model's thread with model and cache. The model's thread advances
                the iterator that it returns, one step whenever the caller waits for a value.
                If the caller is interrupted or stops reading, a generator's `finally` blocks run
                in the model's thread as well.

        Yields:
            The values that `steps` yields, except None.

        Raises:
            What `steps` raises, or as `ModelThread.wait`.
        """
        return self._results(ExclusiveUse(steps))

    def evaluate(
        self, ids: Sequence[int], rope_len: int, logits: Literal["last", "all"],
        receive: Callable[[int, torch.Tensor], None],
    ) -> None:
        """Evaluate a text in chunks; running jobs continue between them.

        It waits for its pages in turn with jobs, in the order of arrival.

        Args:
            ids: the text.
            rope_len: the length that the text may reach, at least len(ids).
            logits: `last` computes the logits after the last token and reuses what the cache
                holds of the text; `all` computes those after every token and reuses nothing.
            receive: called in the model's thread with the index of the first row's token and
                the logits, float32 [rows, vocab_size], which it must not keep.

        Raises:
            CacheFull: the text needs more pages than the cache has.
            InsufficientMemory: the system refused memory that a pass or `receive` needed.
            ModelUnloaded: after `close`.
        """
        for _ in self._results(TextEvaluation(ids, rope_len, logits == "last", receive)):
            pass

    def _results(self, evaluation: Evaluation[T]) -> Iterator[T]:
        """Yield the output of an evaluation; dropping the iterator ends it."""
        owner = _Owner()
        self.own(evaluation, owner)
        try:
            while True:
                self.wait(evaluation)
                if evaluation.output:
                    yield evaluation.output.popleft()
                elif evaluation.error is not None:
                    raise evaluation.error
                else:
                    return
        except BaseException as error:
            drop_locals(error)
            raise
        finally:
            if not evaluation.finished:
                self.cancel(evaluation)


class RunningJob(Generic[T]):
    """What a caller sees of a generation, whichever way it waits for the pieces.

    `stop` may be called from any thread; only one thread or task at a time may iterate.
    """

    def __init__(self, generator: Generator, job: Job) -> None:
        self._generator = generator
        self._job = job
        self._started = False
        self._ended = False
        generator.own(job, self)

    @property
    def stats(self) -> GenerationStats:
        """Tokens and seconds so far."""
        return self._job.stats

    @property
    def finish_reason(self) -> str | None:
        """None while it runs, then `eos`, `stop` (a stop string or id), `loop`
        (loop_detect_window), `length` (max_new_tokens), `context` (ctx_size is full),
        `cancelled` or `failed`."""
        return self._job.finish_reason

    @property
    def seed(self) -> int:
        """The seed in use; with it, the same prompt and settings give the same text."""
        return self._job.sampler.seed

    @property
    def prompt_ids(self) -> list[int]:
        """Ids of the prompt, without a last one that `token_healing` draws anew."""
        return list(self._job.prompt_ids)

    @property
    def token_ids(self) -> list[int]:
        """Ids generated so far, without an end token and without those that may be taken back
        because a banned string may begin with them."""
        first = len(self._job.prompt_ids)
        return self._job.history[first : first + self._job.num_final].tolist()

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """One entry per id of `token_ids`, if the settings ask for `logprobs`."""
        return self._job.logprobs[: self._job.num_final]

    def stop(self) -> None:
        """End the generation after the running step. Does not wait."""
        self._job.cancelled = True

    def _take(self) -> T | None:
        """Take the result of one step after the wait for it; None if there is nothing to show."""
        job = self._job
        if job.output:
            return self._piece(*job.output.popleft())
        self._ended = True
        if job.error is not None:
            raise job.error
        return self._last_piece()

    @abstractmethod
    def _piece(self, token_id: int, text: str) -> T | None:
        """Return what to show for a token; None for nothing."""

    def _last_piece(self) -> T | None:
        return None


class Generation(RunningJob[T], Iterator[T]):
    """A running generation. It starts with the first `next()`.

    Its pages are released when it is closed, when its `with` block ends, or when it is dropped.
    """

    def __iter__(self) -> Generation[T]:
        return self

    def __next__(self) -> T:
        """Return the next piece.

        Raises:
            StopIteration: the generation has ended; `finish_reason` has the reason.
            ModelUnloaded: the model was unloaded, or (ModelForked) this process was forked from
                the one that loaded it.
            ExlLoaderError: the error of a step.
        """
        while not self._ended:
            self._started = True
            self._generator.wait(self._job)
            piece = self._take()
            if piece is not None:
                return piece
        raise StopIteration

    def __enter__(self) -> Generation[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the generation and release its pages; it yields nothing afterwards."""
        self._ended = True
        if self._started:
            self._generator.finish(self._job)


class AsyncGeneration(RunningJob[T], AsyncIterator[T]):
    """A running generation in an event loop. It starts with the first piece that is awaited.

    No thread waits for it. Its pages are released when it is closed, when its `async with` block
    ends, when a task that waits for a piece is cancelled, or when it is dropped.
    """

    def __aiter__(self) -> AsyncGeneration[T]:
        return self

    async def __anext__(self) -> T:
        """Return the next piece.

        Raises:
            StopAsyncIteration: the generation has ended; `finish_reason` has the reason.
            CancelledError: the task was cancelled, which ends the generation.
            ModelUnloaded, ExlLoaderError: as `Generation.__next__`.
        """
        while not self._ended:
            self._started = True
            if self._job.is_ready:
                # Otherwise a long text that is already there would hold up other tasks.
                await let_others_run()
            await self._generator.wait_async(self._job)
            piece = self._take()
            if piece is not None:
                return piece
        raise StopAsyncIteration

    async def __aenter__(self) -> AsyncGeneration[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the generation and release its pages; it yields nothing afterwards."""
        self._ended = True
        if self._started:
            await self._generator.finish_async(self._job)


class _AsIds(RunningJob[int]):
    def _piece(self, token_id: int, text: str) -> int | None:
        return token_id


class _AsText(RunningJob[str]):
    def _piece(self, token_id: int, text: str) -> str | None:
        return text or None

    def _last_piece(self) -> str | None:
        return self._job.last_text or None


class IdGeneration(_AsIds, Generation[int]):
    """Yields token ids one by one, without the end token."""


class TextGeneration(_AsText, Generation[str]):
    """Yields pieces of text: whole characters, never part of a stop string, never empty."""


class AsyncIdGeneration(_AsIds, AsyncGeneration[int]):
    """Yields what `IdGeneration` does."""


class AsyncTextGeneration(_AsText, AsyncGeneration[str]):
    """Yields what `TextGeneration` does."""
