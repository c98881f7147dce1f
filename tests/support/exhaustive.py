"""Cases that every run samples and `pytest --exhaustive` takes one by one.

Each compiles kernels anew; all of them together take longer than all other tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

# Set where all cases run, for tests that run tests.
ENV = "EXL_TESTS_EXHAUSTIVE"


def some_of(cases: Sequence[Any], every: int) -> list[Any]:
    """Mark all cases but each `every`-th one as exhaustive; a tuple is one argument."""
    return [
        case if place % every == 0 else pytest.param(case, marks=pytest.mark.exhaustive)
        for place, case in enumerate(cases)
    ]
