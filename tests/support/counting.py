"""Count what code does, because its time depends on the processor and on the machine's load.

A limit on a time fails on another machine. A limit on the number of calls, of sorted elements
or of bytes read holds everywhere, and it catches the same mistakes: a sort of the whole
vocabulary, a loop over bytes in Python, a file that is read twice.
"""

from __future__ import annotations

import sys
import unittest.mock
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

SORTS = frozenset({"argpartition", "argsort", "partition", "sort"})


class Counts(NamedTuple):
    """What a piece of work did in this thread.

    Attributes:
        calls: functions that Python called, those of C included.
        sorted_elements: elements of all arrays that NumPy sorted or partitioned.
    """

    calls: int
    sorted_elements: int


def count(work: Callable[[], object]) -> Counts:
    """Run the work once, in this thread.

    Args:
        work: what is counted; it must not set a profiler of its own.

    Returns:
        its counts. They are the same in every run on one version of Python and NumPy.
    """
    calls = sorted_elements = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal calls, sorted_elements
        if event not in ("call", "c_call"):
            return
        calls += 1
        if event == "c_call" and getattr(argument, "__name__", "") in SORTS:
            array = getattr(argument, "__self__", None)
            sorted_elements += array.size if isinstance(array, np.ndarray) else 0

    lexsort = np.lexsort

    def counted_lexsort(keys, *args, **kwargs):
        nonlocal sorted_elements
        sorted_elements += np.size(keys[-1])
        return lexsort(keys, *args, **kwargs)

    # A profiler sees methods of arrays with their array, but lexsort is a function.
    with unittest.mock.patch.object(np, "lexsort", counted_lexsort):
        sys.setprofile(note)
        try:
            work()
        finally:
            sys.setprofile(None)
    return Counts(calls, sorted_elements)
