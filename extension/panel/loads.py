"""What pages show of a load: how far it is, and what the engine warned of meanwhile."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from exl_loader.utils.output import warn_once
from exl_loader.utils.progress import NullProgress, Progress, format_count, format_remaining

from .gauge import task_html

WATCH_INTERVAL_S = 0.2

# A task that runs for less than this has no rate to tell its end from.
RATE_AFTER_S = 3.0

logger = logging.getLogger("exl_loader")


@dataclass
class _Task:
    total: int | None
    unit: str
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def count(self) -> str:
        """Write how much is done, and after some seconds how long the rest will take."""
        parts = [format_count(self.done, self.total, self.unit)]
        seconds = time.monotonic() - self.began
        if seconds > RATE_AFTER_S and self.total is not None and 0 < self.done < self.total:
            parts.append(format_remaining(seconds * (self.total - self.done) / self.done))
        return " · ".join(filter(None, parts))


class WatchedProgress:
    """Progress that other threads can look at; the task started last is the one shown.

    Args:
        also: another progress that gets the same calls, such as that of a log.
    """

    def __init__(self, also: Progress | None = None) -> None:
        self._also = also or NullProgress()
        self._lock = threading.Lock()
        self._tasks: dict[str, _Task] = {}

    def start(self, task: str, total: int | None, unit: str) -> None:
        with self._lock:
            self._tasks.pop(task, None)
            self._tasks[task] = _Task(total, unit)
        self._also.start(task, total, unit)

    def advance(self, task: str, n: int = 1) -> None:
        with self._lock:
            if task in self._tasks:
                self._tasks[task].done += n
        self._also.advance(task, n)

    def finish(self, task: str) -> None:
        with self._lock:
            self._tasks.pop(task, None)
        self._also.finish(task)

    def html(self, idle: str = "Loading") -> str:
        """Draw the task started last, or a bar without a length while no task runs.

        Args:
            idle: the name of that bar.
        """
        with self._lock:
            if not self._tasks:
                return task_html(idle, 0, None, "")
            name, task = list(self._tasks.items())[-1]
            return task_html(name[:1].upper() + name[1:], task.done, task.total, task.count())


def follow(running: Callable[[], WatchedProgress | None]) -> Iterator[str]:
    """Yield what a page shows of a load, each time it changes.

    Args:
        running: returns the load's progress while it runs, None once it has ended.
    """
    shown = ""
    while (progress := running()) is not None:
        now = progress.html()
        if now != shown:
            shown = now
            yield shown
        time.sleep(WATCH_INTERVAL_S)


class _Collector(logging.Handler):
    """Keeps the warnings that one thread logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._thread = threading.get_ident()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread and record.getMessage() not in self.found:
            self.found.append(record.getMessage())


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the engine's warnings in this thread; the list grows while the block runs."""
    collector = _Collector()
    # A plan of the same folder may have given the same warning already; the load gives it again.
    warn_once.cache_clear()
    logger.addHandler(collector)
    try:
        yield collector.found
    finally:
        logger.removeHandler(collector)
