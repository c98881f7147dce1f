"""A load in a thread, its progress in the steps that TabbyAPI counts, and its reservation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import exl_loader
from exl_loader import ExlLoaderError, Reservation
from exl_loader.memory.reservation.text import refusal

from .contract import say
from .options import Choice

if TYPE_CHECKING:
    from exl_loader import LoadedModel

# TabbyAPI shows a bar that advances by one for every step.
STEPS = 100


class _Abandoned(ExlLoaderError):
    """Nobody waits for the load any more."""


def plan(model_dir: Path, choice: Choice) -> Reservation:
    """Plan a load.

    Raises:
        InsufficientMemory: the model does not fit; the message has the numbers.
        ExlLoaderError: the folder or an option is wrong.
    """
    found = exl_loader.plan(model_dir, **choice.for_plan())
    if not found.fits:
        raise refusal(found)
    return found


async def load(
    model_dir: Path, options: dict[str, Any], threads: Executor, weights_bytes: int
) -> AsyncGenerator[int | LoadedModel, None]:
    """Load a model in a thread.

    If the iterator is closed early, the load is given up and its memory freed.

    Args:
        model_dir: the model's folder.
        options: keywords of `exl_loader.load`.
        threads: has a thread for it.
        weights_bytes: the planned bytes of all weights.

    Yields:
        1 to STEPS, each once, then the loaded model.

    Raises:
        ExlLoaderError: what is wrong; nothing stays allocated.
    """
    steps: asyncio.Queue[int | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    progress = _StepProgress(loop, steps, weights_bytes)
    work = threads.submit(exl_loader.load, model_dir, progress=progress, **options)
    done = asyncio.wrap_future(work)
    done.add_done_callback(lambda _: steps.put_nowait(None))
    shown = 0
    is_taken = False
    try:
        while (step := await steps.get()) is not None:
            while shown < step:
                shown += 1
                yield shown
        loaded = await done
        while shown < STEPS:
            shown += 1
            yield shown
        is_taken = True
        yield loaded
    finally:
        progress.is_abandoned = True
        await asyncio.wait([done])
        if not is_taken and done.exception() is None:
            await loop.run_in_executor(threads, done.result().unload)


class _StepProgress:
    """Counts the bytes of weights that were read, as steps of one bar.

    Args:
        loop, steps: the queue that gets the number of steps, and its loop.
        weights_bytes: the bytes of all weights.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, steps: asyncio.Queue[int | None], weights_bytes: int
    ) -> None:
        self.is_abandoned = False
        self._loop = loop
        self._steps = steps
        self._weights_bytes = max(1, weights_bytes)
        self._done = 0
        self._shown = 0
        self._counted: set[str] = set()

    def start(self, task: str, total: int | None, unit: str) -> None:
        self._check()
        if task.startswith("loading"):
            self._counted.add(task)
        else:
            say(f"{task} ...")

    def advance(self, task: str, n: int = 1) -> None:
        self._check()
        if task not in self._counted:
            return
        self._done += n
        # The last step belongs to the end of the load.
        step = min(STEPS - 1, STEPS * self._done // self._weights_bytes)
        if step > self._shown:
            self._shown = step
            self._loop.call_soon_threadsafe(self._steps.put_nowait, step)

    def finish(self, task: str) -> None:
        pass

    def _check(self) -> None:
        if self.is_abandoned:
            raise _Abandoned("the load", actual="it was given up")


def describe(model_dir: Path, loaded: LoadedModel) -> list[str]:
    """Return a line for each device: the reserved bytes and their parts."""
    lines = []
    for device in loaded.reservation.devices:
        parts = {
            "weights": device.weights_bytes + device.embedding_bytes,
            "cache": device.cache_bytes,
            "workspace": device.workspace_bytes,
            "LoRAs": device.lora_bytes,
        }
        named = ", ".join(f"{name} {nbytes:,}" for name, nbytes in parts.items() if nbytes)
        lines.append(
            f"{model_dir.name} on {device.memory_name}: {device.total_bytes:,} bytes reserved "
            f"({named})"
        )
    return lines


def measured(loaded: LoadedModel) -> str:
    """Return a line with the reserved and the allocated bytes, which are equal."""
    reservation = loaded.reservation
    return (
        f"{reservation.total_bytes:,} bytes reserved, {loaded.allocated_bytes():,} allocated; "
        f"{reservation.ctx_size:,} tokens of context in a cache of {reservation.cache_size:,} "
        f"({reservation.cache_type}), up to "
        f"{reservation.max_batch_size} at once"
    )
