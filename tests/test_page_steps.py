"""What the Model tab answers to clicks: the fields in step, the gauge of what they come to."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from extension import page_steps
from extension.page_steps import PageSteps
from extension.panel import resolve_cache_type, toggles_for

NAMES = ("ctx_size", "cache_type", "cache_8bit", "cache_4bit")
KEEP = object()
TYPES = ("fp16", "q8", "q4", "q6", "q8_q4")


def drawing(shown):
    """A gauge in words: what a load with the page's fields would take."""
    kind = resolve_cache_type(shown["cache_type"], shown["cache_8bit"], shown["cache_4bit"])
    return f"{shown['ctx_size']} tokens, {kind}"


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(page_steps, "time", SimpleNamespace(monotonic=lambda: now.s))
    return now


@pytest.fixture
def steps(clock):
    return PageSteps(NAMES, drawing, KEEP)


@pytest.mark.parametrize("name", ["cache_8bit", "cache_4bit"])
@pytest.mark.parametrize("before", TYPES)
def test_a_click_is_answered_with_the_gauge_of_what_it_comes_to(steps, name, before):
    fields = toggles_for(before)._asdict() | {"ctx_size": 512}
    fields[name] = not fields[name]
    found = [fields[field] for field in NAMES]
    cache_8bit, cache_4bit, cache_type, gauge = steps.toggled(name)(*found)
    assert toggles_for(cache_type) == (cache_8bit, cache_4bit, cache_type)
    assert gauge == f"512 tokens, {cache_type}" and cache_type != before
    # The page tells of the click itself as well, before it has the answer, and after it.
    assert steps.redraw(*found) is KEEP
    assert steps.redraw(512, cache_type, cache_8bit, cache_4bit) == gauge


def test_an_echo_is_left_out_once_and_for_a_moment(steps, clock):
    found = (512, "q8", True, True)
    steps.toggled("cache_4bit")(*found)
    assert steps.redraw(*found) is KEEP and steps.redraw(*found) == "512 tokens, q8"
    steps.toggled("cache_4bit")(*found)
    clock.s += 2
    assert steps.redraw(*found) == "512 tokens, q8", "nothing of a click is left out much later"
    steps.toggled("cache_4bit")(*found)
    assert steps.redraw(768, "q8", True, True) == "768 tokens, q8", "something else has changed"
    assert steps.redraw(*found) == "512 tokens, q8"


@pytest.mark.parametrize(("before", "after"), [*itertools.permutations(TYPES, 2)])
def test_toggles_follow_another_type_with_its_gauge(steps, before, after):
    toggles = toggles_for(before)
    found = (512, after, toggles.cache_8bit, toggles.cache_4bit)
    expected = toggles_for(after)
    answer = steps.typed(*found)
    if toggles[:2] == expected[:2]:
        assert answer == [KEEP] * 3 and steps.redraw(*found) == f"512 tokens, {after}"
    else:
        assert answer == [*expected[:2], f"512 tokens, {after}"] and steps.redraw(*found) is KEEP


def test_a_button_of_the_gauge_sets_all_that_it_says(steps):
    now = (512, "q8", True, False)
    assert steps.picked("1024 fp16 1", *now) == [1024, False, False, "fp16", "1024 tokens, fp16"]
    assert steps.picked("1024 q4 2", *now) == [1024, False, True, "q4", "1024 tokens, q4"]
    for nothing in (None, "", "2000000000000 q4 3", "1024 q9 4"):
        assert steps.picked(nothing, *now) == [KEEP] * 5


def test_an_empty_type_is_the_default(steps):
    assert steps.toggled("cache_4bit")(512, None, False, True)[2:] == ["q4", "512 tokens, q4"]
    assert steps.typed(512, None, True, False) == [False, False, "512 tokens, fp16"]
