"""Uses of the model and its cache other than generation: evaluations of texts, measurements.

An evaluation is an iterator that the model's thread advances one chunk at a time. Therefore the
model's thread returns its pages, whatever happens to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from ..cache.paging import PagedCache
from .exchange import Exchange
from .forward_model import ForwardModel, LogitsMode

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Evaluation(Exchange[T]):
    """A request that uses model and cache directly.

    Args:
        steps: called with model and cache; returns the iterator. The values that it yields are
            the output. None is not output; it only ends a step.
        alone: no other request runs until this one has ended.
    """

    def __init__(
        self, steps: Callable[[ForwardModel, PagedCache], Iterator[T | None]], alone: bool = False
    ) -> None:
        super().__init__()
        self.alone = alone
        self._make_steps = steps
        self._steps: Iterator[T | None] | None = None
        self._finished = False

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def started(self) -> bool:
        """True once `advance` was called."""
        return self._steps is not None

    def advance(self, model: ForwardModel, cache: PagedCache) -> None:
        """Run one step.

        Raises:
            BaseException: the step's error; the caller then calls `finish` with it.
        """
        if self._steps is None:
            self._steps = self._make_steps(model, cache)
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


def evaluate_text(
    model: ForwardModel, cache: PagedCache, ids: Sequence[int], rope_len: int, last: bool,
    receive: Callable[[int, torch.Tensor], None],
) -> Iterator[None]:
    """Evaluate a text, one chunk per step; the first step acquires its pages.

    Args:
        model, cache: what to evaluate with.
        ids: the text.
        rope_len: the length that the text may reach, at least len(ids).
        last: compute only the logits after the last token, and reuse what the cache holds of
            the text. If False, compute the logits after every token and reuse nothing.
        receive: called with the index of the first row's token and the logits, float32
            [rows, vocab_size], which it must not keep.

    Raises:
        CacheFull: running requests leave too few pages for the text.
    """
    rope_class = model.rope_class(rope_len)
    sequence = cache.acquire(len(ids), ids if last else (), rope_class, rope_len=rope_len)
    rows = model.chunk_size if last else min(model.logits_rows, model.chunk_size)
    try:
        while sequence.past_len < len(ids):
            yield
            first = sequence.past_len
            end = min(first + rows, len(ids), sequence.end_of_pass(first))
            wanted: LogitsMode = "all" if not last else "last" if end == len(ids) else "none"
            found = model.forward([(sequence, list(ids[first:end]))], wanted)
            cache.commit(sequence, ids)
            if wanted != "none":
                receive(end - len(found), found)
    finally:
        cache.release(sequence)
