"""How far a load is, for pages: told by the engine in one thread, drawn in others."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from exl_loader.utils.progress import NullProgress, Progress, format_count

from .gauge import task_html


@dataclass
class _Task:
    total: int | None
    unit: str
    done: int = 0


class WatchedProgress:
    """Progress that other threads can look at: the task begun last is the one shown.

    Args:
        also: is told the same, for a log.
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

    def html(self) -> str:
        """Draw the task begun last; a waiting one where none runs."""
        with self._lock:
            if not self._tasks:
                return task_html("Loading", 0, None, "")
            name, task = list(self._tasks.items())[-1]
            count = format_count(task.done, task.total, task.unit)
            return task_html(name[:1].upper() + name[1:], task.done, task.total, count)
