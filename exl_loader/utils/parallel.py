"""Run tasks on several threads, where the work releases Python's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

# Runs a task; it may report counts of finished units.
Task = Callable[[Callable[[int], None]], None]


def run_tasks(
    tasks: Sequence[Task], threads: int, advance: Callable[[int], None] | None = None
) -> None:
    """Run tasks, each on one of several threads, in order of their starts.

    After an error no further task starts. No thread is left when the function returns or raises.

    Args:
        tasks: called with a function that takes counts of finished units.
        threads: how many run at once, or fewer where the system starts no more threads. With 1
            the tasks run on the calling thread.
        advance: gets the counts, always on the calling thread, because what shows progress may
            belong to that thread.

    Raises:
        BaseException: the error of the first task, in their order, that failed.
    """
    if advance is None:
        advance = _ignore
    if threads <= 1 or len(tasks) <= 1:
        for task in tasks:
            task(advance)
        return
    _Runner(tasks).run(min(threads, len(tasks)), advance)


def _ignore(count: int) -> None:
    return


class _Runner:
    """One call of `run_tasks`.

    Attributes:
        reports: counts from tasks, and None from each thread that ends.
        errors: index of a task -> its error.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._lock = threading.Lock()
        self._next = 0
        self._stopped = False
        self.reports: SimpleQueue[int | None] = SimpleQueue()
        self.errors: dict[int, BaseException] = {}

    def run(self, count: int, advance: Callable[[int], None]) -> None:
        threads: list[threading.Thread] = []
        try:
            for number in range(count):
                thread = threading.Thread(target=self._work, name=f"exl_loader task {number}")
                try:
                    thread.start()
                except RuntimeError:
                    break  # a limit of the system
                threads.append(thread)
            if not threads:
                self._work()
            running = max(1, len(threads))
            while running:
                report = self.reports.get()
                if report is None:
                    running -= 1
                else:
                    advance(report)
        finally:
            # Also after an interrupt.
            self._stopped = True
            for thread in threads:
                thread.join()
        if self.errors:
            raise self.errors[min(self.errors)]

    def _work(self) -> None:
        while True:
            with self._lock:
                index = self._next
                if self._stopped or index == len(self._tasks):
                    break
                self._next += 1
            try:
                self._tasks[index](self.reports.put)
            except BaseException as error:
                self.errors[index] = error
                self._stopped = True
        self.reports.put(None)
