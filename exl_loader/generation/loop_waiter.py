"""Waits in an event loop for the model's thread, without a thread that sleeps."""

from __future__ import annotations

import asyncio


class LoopWaiter:
    """Wakes one coroutine from the model's thread; made in the coroutine's event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._woken: asyncio.Future[None] = self._loop.create_future()

    def put(self, item: None) -> None:
        """Wake the coroutine; may be called from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            # The loop was closed, so the coroutine has ended.
            pass

    async def wait(self) -> None:
        """Return when `put` was called.

        Raises:
            CancelledError: the task was cancelled.
        """
        await self._woken

    def _wake(self) -> None:
        if not self._woken.done():
            self._woken.set_result(None)


async def wait_for_ever() -> None:
    """Wait until the task is cancelled."""
    await asyncio.get_running_loop().create_future()


async def let_others_run() -> None:
    """Give other tasks of the event loop a turn."""
    await asyncio.sleep(0)
