"""Progress of work that takes longer than a second.

Compiling counts units, loading counts bytes, prefill counts tokens. The code that does the work
calls `start`, `advance` and `finish`; the caller chooses how progress is shown. Progress goes to
stderr, because programs read stdout.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from .byte_counts import MIB
from .errors import InvalidSettings, shown

# The tasks in which a load reads weights; a draft model comes first. A front end tells the two
# models apart by these names.
LOADING = "loading weights"
LOADING_DRAFT = "loading draft weights"

# Plain lines are for logs. A task that ends within the delay writes none; a longer one writes a
# line every interval.
PLAIN_DELAY_S = 1.0
PLAIN_INTERVAL_S = 5.0


class Progress(Protocol):
    """The object that long work reports its progress to.

    The name of a task is the text that a person reads (`compiling kernels`). Starting a task that
    is already running starts it again. `advance` and `finish` of an unknown task do nothing, so
    that showing progress never makes the work fail. Only one thread at a time may call.
    """

    def start(self, task: str, total: int | None, unit: str) -> None:
        """Start a task.

        Args:
            task: its name.
            total: units of the whole task, None where unknown.
            unit: `bytes`, `tokens`, ...; empty for a task without anything to count.
        """

    def advance(self, task: str, n: int = 1) -> None:
        """Count n more units as done. With 0 the work only says that it is still going on."""

    def finish(self, task: str) -> None:
        """End a task, whether it succeeded or failed."""


class NullProgress:
    """Show nothing."""

    def start(self, task: str, total: int | None, unit: str) -> None:
        pass

    def advance(self, task: str, n: int = 1) -> None:
        pass

    def finish(self, task: str) -> None:
        pass


class LockedProgress:
    """Progress that several threads may report to.

    Args:
        progress: gets one call at a time.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()

    def start(self, task: str, total: int | None, unit: str) -> None:
        with self._lock:
            self._progress.start(task, total, unit)

    def advance(self, task: str, n: int = 1) -> None:
        with self._lock:
            self._progress.advance(task, n)

    def finish(self, task: str) -> None:
        with self._lock:
            self._progress.finish(task)


# Between two calls of a heartbeat: short, so that a plain line is at most that much too late.
HEARTBEAT_S = 2.0


class Heartbeat(LockedProgress):
    """Reports while a step lasts that the work goes on: a context manager around a progress.

    A single decomposition of a large matrix takes longer than a person should wait for a line. A
    thread therefore advances the running tasks by 0. Calls of both threads take turns.

    Args:
        progress: shows the progress.
        wait: waits a number of seconds and returns True once the work has ended; tests pass their
            own.
    """

    def __init__(
        self, progress: Progress, wait: Callable[[float], bool] | None = None
    ) -> None:
        super().__init__(progress)
        self._ended = threading.Event()
        self._wait = wait or self._ended.wait
        self._running: dict[str, None] = {}
        self._thread = threading.Thread(target=self._beat, name="progress", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._wait(HEARTBEAT_S):
            with self._lock:
                for name in self._running:
                    self._progress.advance(name, 0)

    def start(self, task: str, total: int | None, unit: str) -> None:
        super().start(task, total, unit)
        with self._lock:
            self._running[task] = None

    def finish(self, task: str) -> None:
        with self._lock:
            self._running.pop(task, None)
        super().finish(task)


def checked_progress(progress: Progress | None) -> Progress:
    """Check a caller's progress object; None becomes one that shows nothing.

    Raises:
        InvalidSettings: the object lacks one of the three methods.
    """
    if progress is None:
        return NullProgress()
    if not all(callable(getattr(progress, name, None)) for name in ("start", "advance", "finish")):
        raise InvalidSettings(
            "progress", expected="an object with the methods start, advance and finish, or None",
            actual=shown(progress),
        )
    return progress


@dataclass
class _Task:
    total: int | None
    unit: str
    began: float = 0.0
    next_line: float = 0.0
    done: int = 0


def format_count(done: int, total: int | None, unit: str) -> str:
    """Format `3/8 units`, or `12.0/96.5 MiB` for bytes; empty without a unit."""
    if not unit:
        return ""
    if unit == "bytes":
        written = f"{done / MIB:.1f}" if total is None else f"{done / MIB:.1f}/{total / MIB:.1f}"
        return f"{written} MiB"
    return f"{done} {unit}" if total is None else f"{done}/{total} {unit}"


def _count(state: _Task) -> str:
    return format_count(state.done, state.total, state.unit)


def _elapsed(state: _Task, now: float) -> str:
    """Return how long a task without anything to count has lasted; empty for others."""
    return "" if state.unit else f"{now - state.began:.0f} s so far"


def format_remaining(seconds: float) -> str:
    """Format a time that is left: `40 s left`, `3 min left`, `1.5 h left`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5970 else f"{seconds / 3600:.1f} h left"


def _remaining(state: _Task, now: float) -> str:
    """Return how long a task will last at its rate until now; empty where that is unknown."""
    if state.total is None or not 0 < state.done < state.total:
        return ""
    return ", " + format_remaining((now - state.began) * (state.total - state.done) / state.done)


class PlainProgress:
    """Write few, whole lines, for logs and pipes.

    Args:
        stream: the target; None for what sys.stderr is at each line.
        clock: returns seconds; tests pass their own.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._tasks: dict[str, _Task] = {}

    def start(self, task: str, total: int | None, unit: str) -> None:
        now = self._clock()
        self._tasks[task] = _Task(total, unit, began=now, next_line=now + PLAIN_DELAY_S)

    def advance(self, task: str, n: int = 1) -> None:
        state = self._tasks.get(task)
        if state is None:
            return
        state.done += n
        now = self._clock()
        if now >= state.next_line:
            state.next_line = now + PLAIN_INTERVAL_S
            shown = _count(state) or _elapsed(state, now)
            self._write(f"{task}: {shown}{_remaining(state, now)}")

    def finish(self, task: str) -> None:
        state = self._tasks.pop(task, None)
        if state is None:
            return
        seconds = self._clock() - state.began
        if seconds >= PLAIN_DELAY_S:
            count = _count(state)
            self._write(f"{task}: {count} in {seconds:.1f} s" if count
                        else f"{task}: {seconds:.1f} s")

    def _write(self, line: str) -> None:
        print(line, file=self._stream or sys.stderr, flush=True)


class RichProgress:
    """Draw bars on a terminal, and remove them when no task is left.

    The display exists only while a task runs, so that it does not disturb text that is printed
    between tasks (a prompt, generated text).

    Args:
        stream: the terminal; None for what sys.stderr is when a task starts.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._display: Any = None
        self._tasks: dict[str, tuple[Any, _Task]] = {}

    def start(self, task: str, total: int | None, unit: str) -> None:
        if task in self._tasks:
            self.finish(task)
        if self._display is None:
            self._display = self._make_display()
            self._display.start()
        state = _Task(total, unit)
        bar = self._display.add_task(task, total=total, count=format_count(0, total, unit))
        self._tasks[task] = (bar, state)

    def advance(self, task: str, n: int = 1) -> None:
        if task not in self._tasks:
            return
        bar, state = self._tasks[task]
        state.done += n
        self._display.update(bar, completed=state.done, count=_count(state))

    def finish(self, task: str) -> None:
        if task not in self._tasks:
            return
        bar, _ = self._tasks.pop(task)
        self._display.remove_task(bar)
        if not self._tasks:
            self._display.stop()
            self._display = None

    def _make_display(self) -> Any:
        # Importing rich takes tens of milliseconds, and a load of compiled kernels may need no bar.
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Display

        return Display(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=self._stream or sys.stderr),
            transient=True,
        )


def default_progress(stream: TextIO | None = None) -> Progress:
    """Choose bars for a terminal and plain lines for anything else.

    Args:
        stream: the target; None for stderr.
    """
    target = stream or sys.stderr
    if target is not None and target.isatty():
        return RichProgress(stream)
    return PlainProgress(stream)


@contextmanager
def task(
    progress: Progress, name: str, total: int | None, unit: str
) -> Iterator[Callable[[int], None]]:
    """Run a task as a `with` block that yields `advance(n)`; it is finished after an error too."""
    progress.start(name, total, unit)
    try:
        yield lambda n: progress.advance(name, n)
    finally:
        progress.finish(name)
