"""Shared by tests: makers of models and inputs, a double of the web UI, the emulated card."""

from __future__ import annotations

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
