"""A load in a thread, its progress in the bars that TabbyAPI draws, and its reservation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import exl_loader
from exl_loader import ExlLoaderError, Reservation
from exl_loader.memory.reservation.text import refusal
from exl_loader.utils.progress import LOADING, LOADING_DRAFT

from .contract import say
from .options import Choice

if TYPE_CHECKING:
    from exl_loader import LoadedModel

# TabbyAPI draws a bar for each model. A bar advances by one for every step, and after its last step
# TabbyAPI begins the next one.
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
    model_dir: Path, options: dict[str, Any], threads: Executor
) -> AsyncGenerator[int | LoadedModel, None]:
    """Load a model in a thread.

    If the iterator is closed early, the load is given up and its memory freed.

    Args:
        model_dir: the model's folder.
        options: keywords of `exl_loader.load`.
        threads: has a thread for it.

    Yields:
        0 to STEPS for the draft model if there is one, 0 to STEPS - 1 for the model, each once,
        then the loaded model in place of the last step.

    Raises:
        ExlLoaderError: what is wrong; nothing stays allocated.
    """
    bars = (LOADING_DRAFT, LOADING) if options.get("model_draft") else (LOADING,)
    reports: asyncio.Queue[_Reached | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    progress = _BarProgress(loop, reports, bars)
    work = threads.submit(exl_loader.load, model_dir, progress=progress, **options)
    done = asyncio.wrap_future(work)
    done.add_done_callback(lambda _: reports.put_nowait(None))
    shown = _Reached(0, 0)
    is_taken = False
    try:
        yield shown.step
        while (reached := await reports.get()) is not None:
            while shown < reached:
                shown = shown.next()
                yield shown.step
        loaded = await done
        while shown < (len(bars) - 1, STEPS - 1):
            shown = shown.next()
            yield shown.step
        is_taken = True
        yield loaded
    finally:
        progress.is_abandoned = True
        await asyncio.wait([done])
        if not is_taken and done.exception() is None:
            await loop.run_in_executor(threads, done.result().unload)


class _Reached(NamedTuple):
    """How far a load is: the bar that advances, and its steps."""

    bar: int
    step: int

    def next(self) -> _Reached:
        return _Reached(self.bar, self.step + 1) if self.step < STEPS else _Reached(self.bar + 1, 0)


class _BarProgress:
    """Reports the bytes of weights that were read, as steps of a bar for each model.

    Args:
        loop, reports: the queue that gets how far the load is, and its loop.
        bars: the task of each bar, in the order in which the load starts them.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, reports: asyncio.Queue[_Reached | None],
        bars: Sequence[str],
    ) -> None:
        self.is_abandoned = False
        self._loop = loop
        self._reports = reports
        self._bars = bars
        self._reached = _Reached(0, 0)
        self._done = 0
        self._total = 1

    def start(self, task: str, total: int | None, unit: str) -> None:
        self._check()
        if task in self._bars:
            self._done, self._total = 0, total or 1
            self._report(_Reached(self._bars.index(task), 0))
        else:
            say(f"{task} ...")

    def advance(self, task: str, n: int = 1) -> None:
        self._check()
        if task in self._bars:
            self._done += n
            # A bar's last step belongs to the start of the next bar or to the end of the load,
            # because keys are sampled after the weights were read.
            step = min(STEPS - 1, STEPS * self._done // self._total)
            self._report(_Reached(self._bars.index(task), step))

    def finish(self, task: str) -> None:
        pass

    def _report(self, reached: _Reached) -> None:
        if reached > self._reached:
            self._reached = reached
            self._loop.call_soon_threadsafe(self._reports.put_nowait, reached)

    def _check(self) -> None:
        if self.is_abandoned:
            raise _Abandoned("the load", actual="it was given up")


def describe(model_dir: Path, loaded: LoadedModel) -> list[str]:
    """Return a line for each device: the reserved bytes and their parts."""
    lines = []
    for device in loaded.reservation.devices:
        if not device.total_bytes:
            continue  # main memory for the connection to other machines alone
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
