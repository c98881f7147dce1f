"""Runs the requests of one model, whichever threads they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..cache.paging import PagedCache
from ..utils.tracebacks import drop_locals
from .exchange import Exchange
from .forward_model import ForwardModel
from .model_thread import ModelThread
from .scheduler import Scheduler
from .work import Work, evaluate_text

if TYPE_CHECKING:
    import torch

    from .draft_model import DraftModel

T = TypeVar("T")


def _nothing_to_release() -> None:
    pass


class _Owner:
    """Held by a caller's frame alone: when the frame is gone, so is whoever asked."""


class Generator:
    """The requests of one model. Every method may be called from any thread.

    A thread of the generator's own runs all steps (`ModelThread`), so requests from several
    threads share forward passes, and an interrupt in a caller's thread cannot split a step.

    Args:
        model: runs forward passes.
        cache: lends pages.
        drafter: a smaller model that guesses ahead; None for none.
        release: called when the generator has closed; gives the model's memory back.
    """

    def __init__(
        self, model: ForwardModel, cache: PagedCache, drafter: DraftModel | None = None,
        release: Callable[[], None] = _nothing_to_release,
    ) -> None:
        self._scheduler = Scheduler(model, cache, drafter)
        self._thread = ModelThread(self._scheduler, release)

    def check(self) -> None:
        """Refuse what could not be answered; see `ModelThread.check`."""
        self._thread.check()

    def own(self, request: Exchange[Any], owner: object) -> None:
        """End `request` when `owner` is destroyed. To be called before the first `wait`."""
        self._thread.own(request, owner)

    def wait(self, request: Exchange[Any]) -> None:
        """Return when the request has output or has finished; see `ModelThread.wait`.

        Errors of the request are left in `request.error`.
        """
        try:
            self._thread.wait(request)
        except BaseException as error:
            drop_locals(error)
            raise

    def finish(self, request: Exchange[Any]) -> None:
        """Cancel a request, and return when it has given its pages back."""
        self._thread.finish(request)

    def cancel_all(self) -> None:
        """Ask every job to end. Does not wait; a running step is completed first."""
        self._thread.cancel_all()

    def run_alone(
        self, steps: Callable[[ForwardModel, PagedCache], Iterator[T | None]]
    ) -> Iterator[T]:
        """Work with the model and the cache themselves; other requests wait meanwhile.

        Args:
            steps: called with both in the model's thread, which advances what it returns, one
                step whenever the caller waits for the next. Where the caller is interrupted
                or stops reading, a generator's `finally` blocks run in that thread as well.

        Yields:
            What `steps` yields, None left out.

        Raises:
            What `steps` raises; else as `ModelThread.wait`.
        """
        return self._results(Work(steps, alone=True))

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
            use: called in the model's thread with the index of the first row's token and the
                logits, float32 [rows, vocab_size], which it must not keep.

        Raises:
            CacheFull: running jobs leave too few pages for rope_len tokens.
            InsufficientMemory: the system refused memory that a pass or `use` wanted.
            ModelUnloaded: after `close`.
        """
        steps = partial(
            evaluate_text, ids=ids, rope_len=rope_len, last=logits == "last", use=use
        )
        for _ in self._results(Work(steps)):
            pass

    def close(self) -> None:
        """End all requests, drop the model and the cache, and release the memory.

        Twice does no harm. An interrupt ends the wait, and the closing goes on.
        """
        self._thread.close()

    def _results(self, work: Work[T]) -> Iterator[T]:
        """Yield the output of some work; drop the iterator to end it."""
        owner = _Owner()
        self.own(work, owner)
        try:
            while True:
                self.wait(work)
                if work.output:
                    yield work.output.popleft()
                elif work.error is not None:
                    raise work.error
                else:
                    return
        except BaseException as error:
            drop_locals(error)
            raise
        finally:
            if not work.finished:
                self._thread.cancel(work)
