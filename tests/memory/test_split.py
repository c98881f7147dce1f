"""Splitting layers over devices by bytes, and the search for the most that fits."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from exl_loader.memory.reservation.split import Work, even_split, largest_fitting, split
from exl_loader.utils.integers import ceil_div


class Costs:
    """The bytes of a range of layers, as a model's are made.

    Layers add up, the embedding is with the first and the head with the last, and the
    workspace is as large as the largest layer needs.
    """

    def __init__(self, layers, workspaces, embedding, head):
        self.layers, self.workspaces = layers, workspaces
        self.embedding, self.head = embedding, head

    def __call__(self, first, end):
        assert 0 <= first < end <= len(self.layers), "an empty range has no cost"
        return (
            sum(self.layers[first:end]) + max(self.workspaces[first:end])
            + (self.embedding if first == 0 else 0)
            + (self.head if end == len(self.layers) else 0)
        )


@st.composite
def problems(draw):
    """Draw the costs of a model on 1 to 4 devices, and what each device lends."""
    num_layers, num_devices = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    sizes = st.lists(st.integers(0, 100), min_size=num_layers, max_size=num_layers)
    ends = st.integers(0, 200)
    costs = [
        Costs(draw(sizes), draw(sizes), draw(ends), draw(ends)) for _ in range(num_devices)
    ]
    budgets = draw(
        st.lists(st.integers(0, 800), min_size=num_devices, max_size=num_devices)
    )
    return costs, budgets, num_layers


def fits(ranges, costs, budgets) -> bool:
    return all(
        not layers or cost(layers.start, layers.stop) <= budget
        for layers, cost, budget in zip(ranges, costs, budgets, strict=True)
    )


def contiguous_splits(num_layers, num_devices):
    cuts = range(num_layers + 1)
    for inner in itertools.combinations_with_replacement(cuts, num_devices - 1):
        edges = [0, *inner, num_layers]
        yield [range(first, end) for first, end in itertools.pairwise(edges)]


@given(problems())
def test_every_layer_is_assigned_once_in_order(problem):
    costs, budgets, num_layers = problem
    ranges = split(costs, budgets, range(num_layers))
    assert len(ranges) == len(budgets)
    assert [layer for layers in ranges for layer in layers] == list(range(num_layers))


@given(problems())
def test_a_split_fits_where_any_split_does(problem):
    costs, budgets, num_layers = problem
    every = contiguous_splits(num_layers, len(budgets))
    possible = any(fits(ranges, costs, budgets) for ranges in every)
    assert fits(split(costs, budgets, range(num_layers)), costs, budgets) == possible


@given(problems())
def test_each_device_before_the_last_holds_what_fits_and_no_layer_more_would(problem):
    costs, budgets, num_layers = problem
    *before, _ = zip(split(costs, budgets, range(num_layers)), costs, budgets, strict=True)
    for layers, cost, budget in before:
        assert not layers or cost(layers.start, layers.stop) <= budget
        if layers.stop < num_layers:
            assert cost(layers.start, layers.stop + 1) > budget


def test_the_last_device_takes_the_remaining_layers_even_if_they_do_not_fit():
    cost = Costs([10] * 4, [0] * 4, 0, 0)
    assert split([cost] * 3, [20, 5, 5], range(4)) == [range(2), range(2, 2), range(2, 4)]


@given(
    st.integers(0, 1 << 45), st.lists(st.integers(0, 1 << 40), min_size=1, max_size=60)
)
def test_search_finds_the_last_count_that_fits(free, steps):
    needs = list(itertools.accumulate(steps))
    calls = []

    def headroom(count: int) -> int:
        calls.append(count)
        return free - needs[count - 1]

    expected = sum(need <= free for need in needs)
    assert largest_fitting(headroom, len(needs)) == expected
    assert len(calls) <= 3 * len(needs).bit_length() + 2


def test_search_on_a_straight_line_needs_few_calls():
    calls = []
    assert largest_fitting(lambda n: calls.append(n) or 10**15 - 7_000_003 * n, 1 << 40) == (
        10**15 // 7_000_003
    )
    assert len(calls) <= 6


def test_search_past_a_jump_needs_few_calls():
    """What fits counts for two devices here, and what does not fit for the one that is full."""
    calls = []

    def headroom(count: int) -> int:
        calls.append(count)
        left = 10**11 - 70_003 * count
        return left + 10**10 if left >= 0 else left

    assert largest_fitting(headroom, 3 * 10**6) == 10**11 // 70_003
    assert len(calls) <= 8


def test_search_among_no_counts_and_with_none_or_all_fitting():
    assert largest_fitting(lambda count: -1, 9) == 0
    assert largest_fitting(lambda count: 1, 0) == 0
    assert largest_fitting(lambda count: 1, 9) == 9


def most_layers(cost, budget, first, num_layers) -> int:
    """Return the end of the layers from `first` on that fit."""
    return max(
        [first, *(end for end in range(first + 1, num_layers + 1) if cost(first, end) <= budget)]
    )


def rank(ranges, work, speeds):
    """Return what the best of all splits has least of: the slowest machine's time first."""
    ends = [work.ends] + [0] * (len(ranges) - 1)
    times = [
        ceil_div(end + work.layers[part.stop] - work.layers[part.start], speed)
        for part, end, speed in zip(ranges, ends, speeds, strict=True)
    ]
    return [(max(times[i:]), len(part)) for i, part in enumerate(ranges)]


@given(
    problems(),
    st.lists(st.integers(0, 100), min_size=8, max_size=8), st.integers(0, 300),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
)
def test_an_even_split_is_the_quickest_of_those_that_fit(problem, reads, head, speeds):
    costs, budgets, num_layers = problem
    speeds = speeds[: len(costs)]
    work = Work(tuple(itertools.accumulate(reads[:num_layers], initial=0)), head)
    fitting = [
        ranges for ranges in contiguous_splits(num_layers, len(costs))
        if ranges[0] and fits(ranges, costs, budgets)
    ]
    ends = [
        [most_layers(cost, budget, first, num_layers) for first in range(num_layers)]
        for cost, budget in zip(costs, budgets, strict=True)
    ]
    found = even_split(work, speeds, ends)
    if not fitting:
        assert found is None
        return
    assert found is not None and fits(found, costs, budgets) and found[0]
    assert rank(found, work, speeds) == min(rank(ranges, work, speeds) for ranges in fitting)


def test_the_head_counts_as_layers_of_the_first_machine():
    work = Work(tuple(range(0, 230, 10)), 21)
    assert even_split(work, [1, 1]) == [range(10), range(10, 22)]
    assert even_split(work, [3, 1]) == [range(16), range(16, 22)]
    assert even_split(Work(work.layers, 1000), [1, 1, 1]) == [range(1), range(1, 11), range(11, 22)]
