"""The search for the most that fits: exact, and in few looks."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from exl_loader.memory.reservation.search import largest_fitting


@given(
    st.integers(0, 1 << 45), st.lists(st.integers(0, 1 << 40), min_size=1, max_size=60), st.data()
)
def test_search_finds_the_last_that_fits(free, steps, data):
    needs = list(itertools.accumulate(steps))
    calls = []

    def spare(count: int) -> int:
        calls.append(count)
        return free - needs[count - 1]

    expected = sum(need <= free for need in needs)
    assert largest_fitting(spare, len(needs)) == expected
    assert len(calls) <= 3 * len(needs).bit_length() + 2


def test_search_on_a_straight_line_needs_few_looks():
    calls = []
    assert largest_fitting(lambda n: calls.append(n) or 10**15 - 7_000_003 * n, 1 << 40) == (
        10**15 // 7_000_003
    )
    assert len(calls) <= 6


def test_no_count_at_all():
    assert largest_fitting(lambda count: -1, 9) == 0
    assert largest_fitting(lambda count: 1, 0) == 0
    assert largest_fitting(lambda count: 1, 9) == 9
