"""Iterators over what a job produces, as hosts see them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Generic, TypeVar

from .generator import Generator
from .jobs import GenerationStats, Job
from .logprobs import TokenLogprobs

T = TypeVar("T")


class Generation(Iterator[T], Generic[T]):
    """A running generation. It begins with the first `next()`.

    Closing it, leaving its `with` block, or dropping it gives its pages back. `stop` may be
    called from any thread; iteration is for one thread at a time.
    """

    def __init__(self, generator: Generator, job: Job) -> None:
        self._generator = generator
        self._job = job
        self._began = False
        self._ended = False
        generator.own(job, self)

    def __iter__(self) -> Generation[T]:
        return self

    def __next__(self) -> T:
        """Return the next piece.

        Raises:
            StopIteration: the generation has ended; `finish_reason` says why.
            ModelUnloaded: the model was unloaded before or meanwhile, or (ModelForked) it
                belongs to the process that this one was forked from.
            ExlLoaderError: what went wrong in the model.
        """
        while not self._ended:
            piece = self._next_piece()
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

    @property
    def stats(self) -> GenerationStats:
        """Tokens and seconds so far."""
        return self._job.stats

    @property
    def finish_reason(self) -> str | None:
        """None while it runs, then `eos`, `stop` (a stop string or id), `length`
        (max_new_tokens), `context` (ctx_size is full), `cancelled` or `failed`."""
        return self._job.finish_reason

    @property
    def seed(self) -> int:
        """The seed in use: with it, the same prompt and settings give the same text."""
        return self._job.sampler.seed

    @property
    def prompt_ids(self) -> list[int]:
        """Ids of the prompt."""
        return list(self._job.prompt_ids)

    @property
    def token_ids(self) -> list[int]:
        """Ids generated so far, without an end token."""
        return self._job.history[len(self._job.prompt_ids) :].tolist()

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """One for each of `token_ids`, where the settings ask for `logprobs`."""
        return list(self._job.logprobs)

    def stop(self) -> None:
        """End the generation after the step that is running. Does not wait."""
        self._job.cancelled = True

    def close(self) -> None:
        """End the generation and give its pages back; nothing more comes from it."""
        self._ended = True
        if self._began:
            self._generator.finish(self._job)

    def _next_piece(self) -> T | None:
        """Wait for one step's result; None where it brought nothing to show."""
        job = self._job
        self._began = True
        self._generator.wait(job)
        if job.output:
            return self._piece(*job.output.popleft())
        self._ended = True
        if job.error is not None:
            raise job.error
        return self._tail()

    @abstractmethod
    def _piece(self, token_id: int, text: str) -> T | None:
        """What a token brings to show; None for nothing."""

    def _tail(self) -> T | None:
        return None


class IdGeneration(Generation[int]):
    """Token ids, one by one, without the end token."""

    def _piece(self, token_id: int, text: str) -> int | None:
        return token_id


class TextGeneration(Generation[str]):
    """Pieces of text: whole characters, never a part of a stop string, never empty."""

    def _piece(self, token_id: int, text: str) -> str | None:
        return text or None

    def _tail(self) -> str | None:
        return self._job.tail or None
