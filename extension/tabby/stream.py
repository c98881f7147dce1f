"""The tokens of a generation as they arrive, whether or not TabbyAPI asks for them meanwhile.

The engine runs steps of a text while somebody waits for its next token. TabbyAPI is often busy with
something else, so a task of the event loop waits, and keeps what arrives.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

# While no token arrives, the caller looks this often whether the client is still there.
POLL_S = 0.25

_END = object()


class TokenStream:
    """The token ids of one generation, for one coroutine.

    Args:
        generation: an `AsyncIdGeneration` that has not begun.
    """

    def __init__(self, generation: Any) -> None:
        self.generation = generation
        self.was_cancelled = False
        self._reason: Exception | None = None
        self._ended = False
        self._items: deque[object] = deque()
        self._arrived = asyncio.Event()
        self._task = asyncio.ensure_future(self._read())
        # A task that is cancelled at once never begins, so its end is noted from outside.
        self._task.add_done_callback(self._note_end)

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
            timer = asyncio.get_running_loop().call_later(POLL_S, self._arrived.set)
            try:
                await self._arrived.wait()
            finally:
                timer.cancel()
            if not self._items:
                await look()
        ids: list[int] = []
        while self._items and isinstance(item := self._items[0], int):
            ids.append(item)
            self._items.popleft()
        if not ids and self._items:
            self._ended = True
            end = self._items.popleft()
            error = self._reason or (end if isinstance(end, Exception) else None)
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
        self._task.cancel()

    async def close(self) -> None:
        """End the generation, and wait until it has released its pages."""
        self._ended = True
        self._task.cancel()
        # `wait` raises nothing of the task.
        await asyncio.wait([self._task])

    async def _read(self) -> None:
        async with self.generation as generation:
            async for token_id in generation:
                self._arrive(token_id)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        self._arrive(error or _END)

    def _arrive(self, item: object) -> None:
        self._items.append(item)
        self._arrived.set()
