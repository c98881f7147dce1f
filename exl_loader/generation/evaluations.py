"""Uses of the model and its cache other than generation: evaluations of texts, measurements.

An evaluation is an iterator that the model's thread advances one chunk at a time. Therefore the
model's thread returns its pages, whatever happens to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..cache.paging import PagedCache, PagedSequence
from .exchange import Exchange
from .forward_model import ForwardModel, LogitsMode

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Evaluation(Exchange[T]):
    """A request other than a job; `start` of a subclass sets its steps.

    The values that the steps yield are the output. None is not output; it only ends a step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps: Iterator[T | None] | None = None
        self._finished = False

    @property
    def finished(self) -> bool:
        return self._finished

    def advance(self) -> None:
        """Run one step.

        Raises:
            BaseException: the step's error; the caller then calls `finish` with it.
        """
        assert self._steps is not None, "not started"
        try:
            value = next(self._steps)
        except StopIteration:
            self.finish()
            return
        if value is not None:
            self.output.append(value)

    def finish(self, error: BaseException | None = None) -> None:
        """End the evaluation; a generator's `finally` blocks run here if it had not ended."""
        close = getattr(self._steps, "close", None)
        try:
            if close is not None:
                close()
        finally:
            # The iterator's local variables refer to the model.
            self._steps = None
            self.error = self.error or error
            self._finished = True


class ExclusiveUse(Evaluation[T]):
    """A use of model and cache during which no other request runs.

    Args:
        steps: called with model and cache; returns the iterator.
    """

    def __init__(
        self, steps: Callable[[ForwardModel, PagedCache], Iterator[T | None]]
    ) -> None:
        super().__init__()
        self._make_steps = steps

    def start(self, model: ForwardModel, cache: PagedCache) -> None:
        """Make the steps; does nothing if they were made."""
        if self._steps is None:
            self._steps = self._make_steps(model, cache)


class TextEvaluation(Evaluation[None]):
    """An evaluation of a text in chunks, between the passes of other requests.

    Args:
        ids: the text.
        rope_len: the length that the text may reach, at least len(ids).
        last: compute only the logits after the last token, and reuse what the cache holds of
            the text. If False, compute the logits after every token and reuse nothing.
        receive: called with the index of the first row's token and the logits, float32
            [rows, vocab_size], which it must not keep.

    Attributes:
        sequence: its pages; None while it waits for pages, and after the end.
        arrival: requests are numbered in the order in which they arrived.
    """

    def __init__(
        self, ids: Sequence[int], rope_len: int, last: bool,
        receive: Callable[[int, torch.Tensor], None],
    ) -> None:
        super().__init__()
        self.ids = ids
        self.sequence: PagedSequence | None = None
        self.arrival = 0
        self._rope_len = rope_len
        self._last = last
        self._receive = receive
        self._cache: PagedCache | None = None
        self._begun = False

    def start(self, model: ForwardModel, cache: PagedCache, headroom: int = 0) -> None:
        """Take the pages of the whole text.

        Args:
            headroom: number of pages that have to stay free.

        Raises:
            CacheFull: too few pages are free, or no open page; call again when there are more.
        """
        ids = self.ids if self._last else ()
        self.sequence = cache.acquire(
            len(self.ids), ids, model.rope_class(self._rope_len), rope_len=self._rope_len,
            headroom=headroom,
        )
        self._cache = cache
        self._steps = self._chunks(model, cache, self.sequence)

    def advance(self) -> None:
        """Run one step; see `Evaluation.advance`."""
        self._begun = True
        super().advance()

    def give_back(self) -> bool:
        """Give the pages back before the first step, to start again later.

        Returns:
            False if it has run a step; then it keeps its pages.
        """
        if not self._begun:
            self._release()
            self._steps = None
        return not self._begun

    def finish(self, error: BaseException | None = None) -> None:
        """End the evaluation and give its pages back."""
        try:
            super().finish(error)
        finally:
            self._release()

    def _release(self) -> None:
        if self._cache is not None and self.sequence is not None:
            self._cache.release(self.sequence)
        self._cache = self.sequence = None

    def _chunks(
        self, model: ForwardModel, cache: PagedCache, sequence: PagedSequence
    ) -> Iterator[None]:
        """Evaluate the text, one chunk a step."""
        ids = np.asarray(self.ids, np.int64)
        rows = model.chunk_size if self._last else min(model.logits_rows, model.chunk_size)
        while sequence.past_len < len(ids):
            first = sequence.past_len
            end = min(first + rows, len(ids), sequence.end_of_pass(first))
            wanted: LogitsMode = "all" if not self._last else "last" if end == len(ids) else "none"
            found = model.forward([(sequence, ids[first:end].tolist())], wanted)
            cache.commit(sequence, ids)
            if wanted != "none":
                self._receive(end - len(found), found)
            if end < len(ids):
                yield
