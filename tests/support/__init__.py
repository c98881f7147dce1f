"""Shared by tests: makers of models and inputs, a double of the web UI, the emulated card."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def in_threads(work: Callable, items: Iterable) -> list:
    """Call a function for each item, all at once in threads; return its results in order.

    An error of a call is raised after all calls have ended.
    """
    items = list(items)
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(work, items))


def run_python(code: str, *arguments: str) -> str:
    """Run Python code in a process of its own, which must exit with 0; return what it prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=REPO, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(condition: Callable[[], object], seconds: float = 300.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)
