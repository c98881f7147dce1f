"""Report where a run's time goes: the running tests meanwhile, the time of each file at its end.

Active with `--durations`, which `install.py --test` passes, so that the log of a killed run shows
what was running. Processor time is that of a test's process and of its finished children; other
load on the machine changes it little.
"""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from pathlib import Path

import pytest

# Seconds between two lines that name the running tests.
PROGRESS_EVERY_S = 30.0
# Files that take fewer seconds are added up in one line.
LEAST_S = 2.0


def processor_seconds() -> float:
    """User and system time of this process and of its finished children."""
    try:
        import resource
    except ImportError:  # Windows has no such module, and counts in larger steps
        return sum(os.times()[:4])
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class PhaseTimes:
    """In a process that runs tests: adds each phase's processor time to its report."""

    def __init__(self) -> None:
        self._last = processor_seconds()

    def pytest_runtest_logstart(self) -> None:
        self._last = processor_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = processor_seconds()
        report.processor_seconds, self._last = now - self._last, now
        return report


class RunTimes:
    """In the process that shows results: adds up files, and regularly names the running tests."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal
        self._began = self._said = time.monotonic()
        self._running: dict[str, float] = {}
        self._done = 0
        self._wall: dict[str, float] = defaultdict(float)
        self._processor: dict[str, float] = defaultdict(float)

    def pytest_sessionstart(self) -> None:
        def interrupt(number: int, frame: object) -> None:
            # `timeout` sends the signal to the process and to its group. The second one would
            # interrupt the summary that the first one causes.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupt)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._running.pop(nodeid, None)
        self._done += 1
        self._say_progress()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        self._wall[file] += report.duration
        self._processor[file] += getattr(report, "processor_seconds", 0.0)

    def _say_progress(self) -> None:
        now = time.monotonic()
        if now - self._said < PROGRESS_EVERY_S:
            return
        self._said = now
        under_way = [
            f"{nodeid} ({now - started:.0f} s)" for nodeid, started in self._running.items()
        ]
        minutes, seconds = divmod(int(now - self._began), 60)
        self._terminal.ensure_newline()
        self._terminal.write_line(
            f"[{minutes}:{seconds:02}] {self._done} done; " + ", ".join(under_way)
        )

    def pytest_terminal_summary(self) -> None:
        self._terminal.section("time of each file, in seconds: by the clock, of processors")
        rest = [0.0, 0.0]
        for file in sorted(self._wall, key=self._wall.__getitem__, reverse=True):
            wall, processor = self._wall[file], self._processor[file]
            if max(wall, processor) < LEAST_S:
                rest[0] += wall
                rest[1] += processor
                continue
            self._terminal.write_line(f"{wall:8.1f} {processor:8.1f}  {Path(file).name}")
        self._terminal.write_line(f"{rest[0]:8.1f} {rest[1]:8.1f}  other files")
        total = sum(self._wall.values()), sum(self._processor.values())
        self._terminal.write_line(f"{total[0]:8.1f} {total[1]:8.1f}  all files")
