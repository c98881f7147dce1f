"""Brings the tokens of a generation into the event loop.

A generation blocks the thread that waits for its next token. Each one has a thread of this
backend's own, so the event loop's default threads, with which TabbyAPI reads files, are never used
up by generations.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

# While no token arrives, the caller looks this often whether the client is still there.
POLL_S = 0.25

_END = object()


class TokenStream:
    """The token ids of one generation, for one coroutine.

    Args:
        generation: an `IdGeneration` that has not begun.
        threads: has a thread for it, or will have one when another generation has ended.
    """

    def __init__(self, generation: Any, threads: Executor) -> None:
        self.generation = generation
        self.was_cancelled = False
        self._reason: Exception | None = None
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._items: deque[object] = deque()
        self._arrived = asyncio.Event()
        self._work = threads.submit(self._read)

    async def next(self, look: Callable[[], Awaitable[None]]) -> list[int]:
        """Wait for tokens; return those that have arrived, none at the end.

        Args:
            look: called while nothing arrives; what it raises ends the wait.

        Raises:
            ExlLoaderError: what ended the generation.
        """
        while not (self._items or self._ended):
            self._arrived.clear()
            # `wait_for` may suppress a cancellation that arrives together with a token.
            timer = self._loop.call_later(POLL_S, self._arrived.set)
            try:
                await self._arrived.wait()
            finally:
                timer.cancel()
            if not self._items:
                await look()
        ids = []
        while self._items and isinstance(self._items[0], int):
            ids.append(self._items.popleft())
        if not ids and self._items:
            self._ended = True
            end = self._items.popleft()
            error = self._reason or (end if isinstance(end, BaseException) else None)
            if error is not None:
                raise error
        return ids

    async def cancel(self, reason: Exception | None = None) -> None:
        """End the generation after the running step.

        Args:
            reason: the error that the caller of `next` gets; None for an end without an error.
        """
        if not self.was_cancelled:
            self.was_cancelled = True
            self._reason = reason
        self.generation.stop()
        if self._work.cancel():
            self._arrive(_END)

    async def close(self) -> None:
        """End the generation, and wait until it has released its pages."""
        self._ended = True
        self.generation.stop()
        if not self._work.cancel():
            # `wait` does not cancel the work when this wait is cancelled.
            await asyncio.wait([asyncio.wrap_future(self._work)])

    def _read(self) -> None:
        """Iterate in a thread of `threads`."""
        end: object = _END
        try:
            with self.generation as generation:
                for token_id in generation:
                    self._post(token_id)
        except BaseException as error:
            end = error
        self._post(end)

    def _post(self, item: object) -> None:
        try:
            self._loop.call_soon_threadsafe(self._arrive, item)
        except RuntimeError:  # the loop has been closed
            self.generation.stop()

    def _arrive(self, item: object) -> None:
        self._items.append(item)
        self._arrived.set()
