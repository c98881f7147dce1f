"""What tests of builds share, of libraries and of cubins."""

from __future__ import annotations

from pathlib import Path


class Recorder:
    """Progress that writes down what it was told."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def start(self, task, total, unit):
        self.calls.append(("start", task, total, unit))

    def advance(self, task, n=1):
        self.calls.append(("advance", task, n))

    def finish(self, task):
        self.calls.append(("finish", task))


def find_partials(cache: Path) -> list[str]:
    """Names of the unfinished builds in a folder of builds."""
    return [path.name for path in cache.iterdir() if "partial" in path.name]
