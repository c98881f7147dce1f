"""Cases of which a run takes a sample, and `pytest --exhaustive` all.

Each compiles kernels; all of them together take longer than all other tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

# Set where all cases run, for tests that run tests.
ENV = "EXL_TESTS_EXHAUSTIVE"


def some_of(cases: Sequence[Any], every: int) -> list[Any]:
    """Mark all cases but each `every`-th one as exhaustive; a tuple is one argument."""
    return [
        case if index % every == 0 else pytest.param(case, marks=pytest.mark.exhaustive)
        for index, case in enumerate(cases)
    ]


def rotated(cases: Iterable[Any], choices: Sequence[Any]) -> list[Any]:
    """Pair each case with every choice; a sample has each case once, with the choices in turn."""
    return [
        pytest.param(case, choice, marks=(
            () if number == index % len(choices) else pytest.mark.exhaustive
        ))
        for index, case in enumerate(cases) for number, choice in enumerate(choices)
    ]
