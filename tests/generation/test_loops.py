"""Texts that only repeat a pattern end where the request asks for that."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl_loader.generation.loops import STRIDE, is_loop, shortest_period
from support.fake_model import count_up, endless, fake_engine


def period_by_trying(ids):
    return next((p for p in range(1, len(ids)) if ids[p:] == ids[:-p]), len(ids))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=24))
def test_the_shortest_period_is_that_of_trying_all(ids):
    assert shortest_period(ids) == period_by_trying(ids)


def first_found(ids, window):
    """The number of tokens after which a text is found to be a loop."""
    ids = np.array(ids, np.int64)
    return next((n for n in range(1, len(ids) + 1) if is_loop(ids[:n], window)), None)


def test_a_loop_is_found_when_it_fills_the_window_and_nothing_else_is():
    pattern = [1, 2, 3, 4, 5]
    assert first_found(pattern * 40, 20) == 20
    assert first_found(list(range(100)) + pattern * 40, 20) in range(120, 120 + STRIDE)
    assert first_found(range(1000), 20) is None
    # A pattern that is longer than half of the window has not been repeated in it.
    assert first_found(pattern * 40, 9) is None
    assert first_found([1] * 100, 0) is None and first_found([1] * 100, 1) is None


@pytest.mark.parametrize(("window", "count"), [(0, 200), (1, 200), (40, 40)])
def test_a_text_that_repeats_itself_ends_with_a_reason_of_its_own(window, count):
    """The prompt does not count, although it repeats itself as well."""
    engine, _, cache = fake_engine(endless, 300)
    options = {"temperature": 0, "max_new_tokens": 200, "loop_detect_window": window}
    generation = engine.generate_ids([7] * 30, options)
    assert len(list(generation)) == count
    assert generation.finish_reason == ("length" if count == 200 else "loop")
    assert cache.num_free_pages == cache.num_pages


def test_a_text_that_does_not_repeat_itself_goes_on():
    engine, _, _ = fake_engine(count_up, 300)
    generation = engine.generate_ids(
        [3], {"temperature": 0, "max_new_tokens": 200, "loop_detect_window": 20})
    assert len(list(generation)) == 200 and generation.finish_reason == "length"
